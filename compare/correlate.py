"""Which protocol ranks backbones as which other one does: Spearman's ρ over the backbones that both measured.

A point is a backbone: one file of weights (the mean of its runs), all random initialisations of a network together.
Records meet in a column when protocol, data and recipe are the same, whatever the network: that is what is compared.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twist.compare.grouping import architecture_of, device_hours, recipe_without_network
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.metrics import METRICS
from twist.contracts.published import display_name
from twist.contracts.record import RunRecord

if TYPE_CHECKING:
    import pandas

LEAST = 5


class Correlation(NamedTuple):
    """Two columns, `protocol (recipe)`, the cheaper first, over `n` backbones, the index of `points`; `low`, `high`
    bound ρ at 95 %. ρ is NaN where a column ranks nothing."""

    cheap: str
    dear: str
    points: pandas.DataFrame
    n: int
    rho: float
    low: float
    high: float


def correlate(records: Iterable[RunRecord]) -> tuple[list[Correlation], dict[str, float]]:
    """Every pair of columns that share at least five backbones, and the mean device hours of a run of each column.

    Raises:
        UserError: no pair does.
    """
    import pandas

    rows = []
    for record in records:
        recipe = recipe_without_network(record)
        column = f"{record.protocol} ({sha256_json([recipe, record.data])[:8]})"
        # A protocol's main metric is the first of its metrics in the table's order; records are in the alphabet's.
        value = next(record.metrics[name] for name in METRICS if name in record.metrics)
        rows.append((column, _backbone(record), value, device_hours(record)))
    frame = pandas.DataFrame(rows, columns=["column", "backbone", "value", "hours"])
    hours = frame.groupby("column").hours.mean().sort_values(kind="stable")
    values = frame.pivot_table(index="backbone", columns="column", values="value")
    pairs = [values[list(pair)].dropna() for pair in itertools.combinations(hours.index, 2)]
    found = [_correlation(pair) for pair in pairs if len(pair) >= LEAST]
    if not found:
        raise UserError(
            f"A correlation needs {LEAST} backbones that two protocols both measured under one recipe each, and these "
            f"records have at most {max(map(len, pairs), default=0)}: measure more backbones with the same protocols."
        )
    shown = {name for one in found for name in (one.cheap, one.dear)}
    return found, {name: cost for name, cost in hours.items() if name in shown}


def _backbone(record: RunRecord) -> str:
    """A name of the weights: method, network, epochs and the start of a digest that a conversion does not change."""
    weights = record.weights
    digest = (weights.source_sha256 or weights.sha256 or "")[:8]
    branch = None if weights.branch == "backbone" else weights.branch
    epochs = f"{weights.epochs} ep" if weights.epochs else None
    parts = (display_name(record.method), architecture_of(record), epochs, branch, digest)
    return " · ".join(filter(None, parts))


def _correlation(pair: pandas.DataFrame) -> Correlation:
    from scipy.stats import spearmanr  # half a second to import

    with warnings.catch_warnings(action="ignore"):  # scipy's, that one side ranks nothing
        rho = float(spearmanr(pair).statistic)
    # Fisher's z, which has no value at ±1, with the standard error of Bonett and Wright (Psychometrika 65, 2000).
    z = math.atanh(max(-0.999, min(0.999, rho)))
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (len(pair) - 3))
    low, high = math.tanh(z - half), math.tanh(z + half)
    cheap, dear = pair.columns
    return Correlation(cheap, dear, pair, len(pair), rho, min(low, rho), max(high, rho))


def render_correlations(found: Sequence[Correlation], costs: Mapping[str, float]) -> str:
    """A table of the pairs, the strongest first, and the cost of each protocol."""
    lines = ["Which protocol ranks backbones as which (Spearman's ρ, 95 % interval; n backbones)"]
    for one in sorted(found, key=lambda one: -2.0 if math.isnan(one.rho) else one.rho, reverse=True):
        rho = "nothing to rank" if math.isnan(one.rho) else f"{one.rho:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
        lines.append(f"  {f'{one.cheap} → {one.dear}':72} {rho}  n = {one.n}")
    lines.append("What a run costs (wall hours × devices, mean)")
    lines += [f"  {name:72} {cost:.3g} h" for name, cost in costs.items()]
    lines.append("Backbones of one method are no independent samples: read the interval as the least uncertainty.")
    return "\n".join(lines)


def draw_correlations(found: Sequence[Correlation], path: Path) -> None:
    """The points of every pair as a PNG at `path`, a panel each."""
    from matplotlib.figure import Figure

    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down), dpi=100, layout="constrained")
    names = dict.fromkeys(name for one in found for name in one.points.index)
    styles = {name: f"C{number % 10}{'osDv^'[number // 10 % 5]}" for number, name in enumerate(names)}
    for number, one in enumerate(found, start=1):
        axes = figure.add_subplot(down, across, number)
        for name, (x, y) in zip(one.points.index, one.points.to_numpy()):
            axes.plot([x], [y], styles[name], label=name)
        title = f"ρ = {one.rho:.2f} [{one.low:.2f}, {one.high:.2f}], n = {one.n}"
        axes.set(xlabel=one.cheap, ylabel=one.dear, title=title)
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(handles=[*drawn.values()], loc="outside lower center", ncols=across, fontsize=7)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
