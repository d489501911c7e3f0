"""Which protocol ranks backbones as which other one does: Spearman's ρ over the backbones that both measured.

A point is a backbone: one file of weights (the mean of its runs), all random initialisations of a network together.
Records meet in a column when protocol, data and recipe are the same, whatever the network: that is what is compared.
The interval is Fisher's z with Bonett and Wright's standard error sqrt((1 + ρ²/2) / (n - 3)) (Psychometrika 65, 2000).
"""

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twist.compare.grouping import device_hours
from twist.compare.statistics import mean
from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_json
from twist.contracts.published import display_name
from twist.contracts.record import RunRecord

LEAST = 5
# Of the interval: 95 %.
_Z = 1.959964


@dataclass(frozen=True)
class Column:
    """One protocol with one recipe: its main metric of each backbone, and what a run costs in device hours (mean)."""

    protocol: str
    metric: str
    recipe: str
    values: dict[str, float]
    hours: float


@dataclass(frozen=True)
class Correlation:
    """Two columns, the cheaper first, over the backbones of both; `low`, `high` bound ρ at 95 %."""

    cheap: Column
    dear: Column
    backbones: tuple[str, ...]
    rho: float
    low: float
    high: float

    @property
    def points(self) -> list[tuple[str, float, float]]:
        return [(name, self.cheap.values[name], self.dear.values[name]) for name in self.backbones]


def backbone_of(record: RunRecord) -> str:
    """A name of the weights: method, network, epochs and the start of a digest that a conversion does not change."""
    weights = record.weights
    network = weights.architecture or record.recipe.get("architecture")
    digest = weights.source_sha256 or weights.sha256
    branch = weights.branch if weights.branch not in (None, "backbone") else None
    epochs = f"{weights.epochs} ep" if weights.epochs else None
    return " · ".join(filter(None, [display_name(record.method), network, epochs, branch, (digest or "")[:8]]))


def columns_of(records: Iterable[RunRecord]) -> list[Column]:
    """One column for each protocol, data and recipe without its network, in order of cost."""
    groups: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        recipe = {key: value for key, value in record.recipe.items() if key != "architecture"}
        groups[record.protocol, sha256_json([recipe, record.data])[:8]].append(record)
    columns = []
    for (protocol, digest), members in groups.items():
        metric = next(iter(members[0].metrics))
        of: dict[str, list[float]] = defaultdict(list)
        for record in members:
            if metric in record.metrics:
                of[backbone_of(record)].append(record.metrics[metric])
        hours = mean([device_hours(record) for record in members])
        columns.append(Column(protocol, metric, digest, {name: mean(values) for name, values in of.items()}, hours))
    return sorted(columns, key=lambda column: (column.hours, column.protocol, column.recipe))


def correlate(records: Sequence[RunRecord]) -> list[Correlation]:
    """Every pair of columns that share at least five backbones.

    Raises:
        UserError: no pair does.
    """
    pairs = [
        (cheap, dear, sorted(cheap.values.keys() & dear.values.keys()))
        for cheap, dear in itertools.combinations(columns_of(records), 2)
    ]
    found = [_correlation(cheap, dear, shared) for cheap, dear, shared in pairs if len(shared) >= LEAST]
    if not found:
        most = max((len(shared) for _, _, shared in pairs), default=0)
        raise UserError(
            f"A correlation needs {LEAST} backbones that two protocols both measured under one recipe each, and these "
            f"records have at most {most}: measure more backbones with the same protocols."
        )
    return found


def _correlation(cheap: Column, dear: Column, shared: list[str]) -> Correlation:
    from scipy.stats import spearmanr  # half a second to import

    with warnings.catch_warnings(action="ignore"):  # scipy's, that one side ranks nothing
        rho = float(spearmanr(*([column.values[name] for name in shared] for column in (cheap, dear))).statistic)
    if math.isnan(rho):
        return Correlation(cheap, dear, tuple(shared), math.nan, -1.0, 1.0)
    if abs(rho) > 1 - 1e-12:  # Fisher's z has no value there
        rho = math.copysign(1.0, rho)
        z = math.atanh(math.copysign(1 - 1e-3, rho))
    else:
        z = math.atanh(rho)
    half = _Z * math.sqrt((1 + rho**2 / 2) / (len(shared) - 3))
    low, high = math.tanh(z - half), math.tanh(z + half)
    return Correlation(cheap, dear, tuple(shared), rho, min(low, rho), max(high, rho))


def render_correlations(found: Sequence[Correlation]) -> str:
    """A table of the pairs, the strongest first, and the cost of each protocol."""
    ranked = sorted(found, key=lambda one: -2.0 if math.isnan(one.rho) else one.rho, reverse=True)
    lines = ["Which protocol ranks backbones as which (Spearman's ρ, 95 % interval; n backbones)"]
    for one in ranked:
        rho = "nothing to rank" if math.isnan(one.rho) else f"{one.rho:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
        names = f"{_named(one.cheap)} → {_named(one.dear)}"
        lines.append(f"  {names:72} {rho}  n = {len(one.backbones)}")
    unique = {(column.protocol, column.recipe): column for one in ranked for column in (one.cheap, one.dear)}
    lines.append("What a run costs (wall hours × devices, mean)")
    for column in sorted(unique.values(), key=lambda column: column.hours):
        lines.append(f"  {_named(column):72} {column.hours:.3g} h")
    lines.append("Backbones of one method are no independent samples: read the interval as the least uncertainty.")
    return "\n".join(lines)


def draw_correlations(found: Sequence[Correlation], path: Path) -> Path:
    """The points of every pair as a PNG at `path`, a panel each."""
    from matplotlib.figure import Figure

    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down), dpi=100, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, one in zip(panels, found):
        for number, (name, x, y) in enumerate(one.points):
            axes.plot([x], [y], "o", color=f"C{number % 10}", label=name)
        axes.set(xlabel=f"{one.cheap.protocol} ({one.cheap.metric})", ylabel=f"{one.dear.protocol} ({one.dear.metric})")
        axes.set_title(f"ρ = {one.rho:.2f} [{one.low:.2f}, {one.high:.2f}], n = {len(one.backbones)}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=5, frameon=False)
    for axes in list(figure.axes)[len(found) :]:
        axes.set_visible(False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def _named(column: Column) -> str:
    return f"{column.protocol} ({column.recipe})"
