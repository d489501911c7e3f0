"""Welch's t-test of a few runs, corrected for all tests of a table.

Welch, because two methods need not spread alike; Student's pooled variance would assume that they do.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

SIGNIFICANT = 0.05
# Two results a side give a test hardly any degree of freedom.
FEWEST = 3


@dataclass(frozen=True)
class Difference:
    """A mean minus the baseline's mean, and the test's result in words.

    `p_value` is of this test alone, `p_holm` corrected for the others of its table; both are None without a test.
    """

    value: float
    p_value: float | None
    said: str
    p_holm: float | None = None

    @property
    def significant(self) -> bool | None:
        """Whether the corrected p < 0.05; None when there is no test."""
        return None if self.p_holm is None else self.p_holm < SIGNIFICANT


def differences(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Difference]:
    """(values, baseline) of each pair by Welch's two-sided t-test (B. L. Welch, Biometrika 34, 1947), the p-values
    by S. Holm's step-down for all their tests together (Scand. J. Statist. 6, 1979)."""
    tests = [_test(*pair) for pair in pairs]
    p_values = holm([test[0] for test in tests if not isinstance(test, str)])
    how = f"Holm's correction for {len(p_values)} comparisons; " if len(p_values) > 1 else ""
    corrected, made = iter(p_values), []
    for (values, baseline), test in zip(pairs, tests):
        gap = fmean(values) - fmean(baseline)
        if isinstance(test, str):
            made.append(Difference(gap, None, test))
            continue
        (p_value, freedom), p = test, next(corrected)
        verdict = f"{'significant' if p < SIGNIFICANT else 'not significant'}, {p_text(p)}"
        said = f"{verdict} ({how}Welch's t, {freedom:.1f} degrees of freedom)"
        made.append(Difference(gap, p_value, said, p))
    return made


def _test(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float] | str:
    """The p-value and the degrees of freedom, or why there is no test."""
    if (short := min(len(values), len(baseline))) < FEWEST:
        return f"n too small for a test: {short} where {FEWEST} results are needed"
    if len(set(values)) == len(set(baseline)) == 1:
        return "no test: neither side varies from run to run"
    from scipy.stats import ttest_ind  # half a second to import

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # one side may be constant
        test = ttest_ind(values, baseline, equal_var=False)
    return float(test.pvalue), float(test.df)


def holm(p_values: Sequence[float]) -> list[float]:
    """`p_values` corrected for all of them, in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    raised = ((len(order) - rank) * p_values[index] for rank, index in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(raised, max)))
    return [min(1.0, corrected[index]) for index in range(len(p_values))]


def p_text(p_value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"
