"""Mean, standard deviation and Welch's t-test of a few runs.

Welch, because two methods need not spread alike; Student's pooled variance would assume that they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIGNIFICANT = 0.05


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
    """A mean minus the baseline's mean, and what can be said about it. `p_value` is None when there is no test."""

    value: float
    p_value: float | None
    said: str

    @property
    def significant(self) -> bool | None:
        """Whether p < 0.05; None when there is no test."""
        return None if self.p_value is None else self.p_value < SIGNIFICANT


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` against `baseline` by Welch's two-sided t-test (B. L. Welch, Biometrika 34, 1947)."""
    gap = mean(values) - mean(baseline)
    spread, baseline_spread = standard_deviation(values), standard_deviation(baseline)
    if spread is None or baseline_spread is None:
        short = min(len(values), len(baseline))
        return Difference(gap, None, f"n too small for a test: {short} run where two are needed")
    a, b = spread**2 / len(values), baseline_spread**2 / len(baseline)
    if a + b == 0:
        return Difference(gap, None, "no test: neither side varies from run to run")
    # Welch-Satterthwaite degrees of freedom.
    freedom = (a + b) ** 2 / (a**2 / (len(values) - 1) + b**2 / (len(baseline) - 1))
    p_value = _two_sided_p(gap / math.sqrt(a + b), freedom)
    verdict = "significant" if p_value < SIGNIFICANT else "not significant"
    return Difference(gap, p_value, f"{verdict}, {p_text(p_value)} (Welch's t, {freedom:.1f} degrees of freedom)")


def p_text(p_value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"


def _two_sided_p(t: float, freedom: float) -> float:
    # scipy.special alone: scipy.stats takes a second to import, longer than everything else that compare does.
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))
