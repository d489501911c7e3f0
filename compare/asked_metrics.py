"""`--metric NAME`: a name that is no metric, or one that nothing here has, is an error that says what there is."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from twist.contracts.errors import UsageError
from twist.contracts.metrics import METRICS
from twist.contracts.published import PublishedRow
from twist.contracts.record import RunRecord


def metrics_in(records: Iterable[RunRecord], published: Iterable[PublishedRow]) -> list[str]:
    """The metrics that these have, in the vocabulary's order."""
    there = {name for record in records for name in record.metrics} | {
        name for row in published for name in row.metrics
    }
    return [name for name in METRICS if name in there]


def check_known(asked: Iterable[str], there: Collection[str]) -> None:
    """`UsageError` for a name in `asked` that is no metric; `there` are the metrics that could be asked for."""
    for name in asked:
        if name not in METRICS:
            near = _nearest(name)
            raise UsageError(f'There is no metric "{name}".' + (f' Did you mean "{near}"?' if near else _listed(there)))


def check_present(asked: Iterable[str], there: Collection[str]) -> None:
    """`UsageError` for a name in `asked` that is not in `there`, too."""
    check_known(asked, there)
    for name in asked:
        if name not in there:
            raise UsageError(f'Nothing here has the metric "{name}".{_listed(there)}')


def _listed(there: Collection[str]) -> str:
    return f" What is here has {', '.join(there)}." if there else ""


def _nearest(name: str) -> str | None:
    """The metric that is meant by its name without the unit (`top1`), or by the head of its column (`k-NN top-1`)."""
    spoken = {metric.name.removesuffix(f"_{metric.unit}"): metric.name for metric in METRICS.values()}
    spoken |= {metric.label.casefold(): metric.name for metric in METRICS.values()}
    near = difflib.get_close_matches(name.removesuffix("_percent").casefold(), spoken, n=1)
    return spoken[near[0]] if near else None
