"""Mean, standard deviation and Welch's t-test of a few runs.

Welch, because two methods need not spread alike; Student's pooled variance would assume that they do.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

SIGNIFICANT = 0.05
# Two results a side give a test hardly any degree of freedom.
FEWEST = 3


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; `math.fsum`, so the order of the records does not show in the last digit."""
    return math.fsum(values) / len(values)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 in the denominator), or None for a single value."""
    if len(values) < 2:
        return None
    if min(values) == max(values):  # exactly: the mean of equal values may differ from them by a rounding
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


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


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` against `baseline` by Welch's two-sided t-test (B. L. Welch, Biometrika 34, 1947), as a lone test."""
    gap = mean(values) - mean(baseline)
    if (short := min(len(values), len(baseline))) < FEWEST:
        return Difference(gap, None, f"n too small for a test: {short} where {FEWEST} results are needed")
    if standard_deviation(values) == standard_deviation(baseline) == 0:
        return Difference(gap, None, "no test: neither side varies from run to run")
    from scipy.stats import ttest_ind  # half a second to import

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # one side may be constant
        test = ttest_ind(values, baseline, equal_var=False)
    p_value = float(test.pvalue)
    return Difference(gap, p_value, _verdict(p_value, f"Welch's t, {test.df:.1f} degrees of freedom"), p_value)


def _verdict(p_value: float, how: str) -> str:
    return f"{'significant' if p_value < SIGNIFICANT else 'not significant'}, {p_text(p_value)} ({how})"


def correct(gaps: Sequence[Difference]) -> list[Difference]:
    """`gaps` with the p-values by S. Holm's step-down for all their tests together (Scand. J. Statist. 6, 1979)."""
    tests = sorted((gap.p_value, index) for index, gap in enumerate(gaps) if gap.p_value is not None)
    corrected, largest = list(gaps), 0.0
    for done, (p_value, index) in enumerate(tests):
        largest = min(1.0, max(largest, (len(tests) - done) * p_value))
        how = gaps[index].said.partition("(")[2].rstrip(")")
        how = f"Holm's correction for {len(tests)} comparisons; {how}" if len(tests) > 1 else how
        corrected[index] = replace(gaps[index], p_holm=largest, said=_verdict(largest, how))
    return corrected


def p_text(p_value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"
