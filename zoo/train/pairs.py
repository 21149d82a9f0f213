"""Statistics of paired runs: means, Student's paired t test, and what it supports in words.

For n pairs with the differences d the interval is mean(d) ± t(0.975, n - 1) sd(d) / sqrt(n), and p is that of Student's
paired t test, two-sided (scipy's ``ttest_rel``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "interval", "paired_difference", "points", "spread", "verdict"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its 95 % interval, and p of no difference; NaN where there is no spread."""

    pairs: int
    mean: float
    low: float
    high: float
    p: float

    @property
    def decided(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (with n - 1); the latter is NaN for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Mean of ``values - reference``, pair by pair, with the interval and the p value of Student's paired t test.

    Without spread, which is with one pair or with equal differences, interval and p value are NaN.
    """
    from scipy import stats

    differences = [mine - theirs for mine, theirs in zip(values, reference, strict=True)]
    pairs, mean = len(differences), statistics.fmean(differences)
    # Equal differences of accuracies differ by rounding, from which the test would make certainty.
    if pairs < 2 or max(differences) - min(differences) < 1e-12:
        return Difference(pairs, mean, math.nan, math.nan, math.nan)
    result = stats.ttest_rel(values, reference)
    low, high = result.confidence_interval(CONFIDENCE)
    return Difference(pairs, mean, float(low), float(high), float(result.pvalue))


def verdict(name: str, reference: str, difference: Difference, comparisons: int) -> str:
    """What a difference of accuracies supports, in one or two sentences made from its numbers.

    Args:
        name: of the variant.
        reference: what it was compared with.
        difference: of shares.
        comparisons: how many variants were compared with it; the test is judged by 0.05 over this (Bonferroni).
    """
    text = f"{name}: {points(difference.mean)} points against {reference}"
    if math.isnan(difference.p):
        if difference.pairs == 1:
            return f"{text}, from one seed: without a spread this says nothing about chance."
        return f"{text}, the same with each of {difference.pairs} seeds: without a spread there is no test."
    text += f" over {difference.pairs} seeds (95 % interval {interval(difference)}, p = {difference.p:.2g})."
    if not difference.decided:
        return (
            f"{text} The interval contains zero: these runs do not show that {name} helps, nor that it harms; they "
            "speak against effects beyond the interval."
        )
    found = f"{name} was {'more' if difference.mean > 0 else 'less'} accurate"
    if comparisons == 1:
        return f"{text} The interval does not contain zero: {found} here."
    if difference.p < 0.05 / comparisons:
        held = f"also below {0.05 / comparisons:.2g}, which {comparisons} comparisons ask for"
        return f"{text} The interval does not contain zero: {found} here, and p is {held}."
    return (
        f"{text} The interval does not contain zero: {found} here; but p is not below {0.05 / comparisons:.2g}, which "
        f"{comparisons} comparisons ask for, so it may be the luckiest of them."
    )


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.2f}".replace("-", "−")


def interval(difference: Difference) -> str:
    """The interval of a difference of shares, in points."""
    return f"{points(difference.low)} to {points(difference.high)}"
