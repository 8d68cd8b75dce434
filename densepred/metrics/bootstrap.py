"""What is more than noise: scores over cases, resampled with whole groups of cases.

Cases of one group (two sides of a subject, say) are drawn together, as they are not independent. Draws are weights: how
often each case is in the sample, so that means and sums of counts are products of matrices.

Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (the percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED, LEVEL = 2000, 0, 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; nan where there is none.

    Args:
        value: of all cases.
        low, high: percentiles 2.5 and 97.5 over the draws; nan where fewer than two groups have a value.
        n: cases that have a value.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f}, n = {self.n})"

    def signed(self) -> str:
        """As a difference."""
        return f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f}, n = {self.n})"

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def resampled(groups: Sequence[str], draws: int = DRAWS, seed: int = SEED) -> Floats:
    """How often each case is in each draw: `(draws, n)`.

    Args:
        groups: that of each case; as many groups are drawn as there are, with replacement.
        draws: samples.
        seed: the same one gives the same draws.

    Example:
        >>> bool((resampled(["a", "a", "b"])[:, 0] == resampled(["a", "a", "b"])[:, 1]).all())
        True
    """
    names, which = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    counts = np.zeros((draws, len(names)))
    np.add.at(counts, (np.arange(draws)[:, None], drawn), 1)
    return counts[:, which]


def means(values: Floats, weights: Floats) -> Floats:
    """The mean over the classes of their means over cases: `(draws,)`; what is nan is left out of both.

    Args:
        values: `(n, classes)`.
        weights: `(draws, n)`.
    """
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        of_class = (weights @ np.where(known, values, 0)) / (weights @ known)
        there = ~np.isnan(of_class)
        return np.asarray(np.where(there, of_class, 0).sum(1) / there.sum(1))


def interval(values: Floats, groups: Sequence[str], weights: Floats | None = None) -> Interval:
    """The mean over classes of the means over cases, with its interval.

    Args:
        values: `(n, classes)`; nan where a case has no score of a class.
        groups: `(n,)`.
        weights: what `resampled` gives for the groups, where it is at hand.
    """
    if not (~np.isnan(values)).any():
        return Interval(np.nan, np.nan, np.nan, 0)
    drawn = means(values, resampled(groups) if weights is None else weights)
    return bounded(means(values, np.ones((1, len(values))))[0], drawn, values, groups)


def gain(before: Floats, after: Floats, groups: Sequence[str]) -> Interval:
    """By how much the mean rises, over the same cases in every draw; arguments as of `interval`.

    The interval takes two groups with a value before and after.
    """
    weights = resampled(groups)
    every = np.ones((1, len(before)))
    drawn = means(after, weights) - means(before, weights)
    value = (means(after, every) - means(before, every))[0]
    return bounded(value, drawn, before + after, groups)


def informative(values: Floats, groups: Sequence[str]) -> int:
    """The number of groups with a value; without groups each case is one.

    Args:
        values: `(n, classes)`; of two arms their sum, which is nan where one is.
        groups: `(n,)`, or empty.
    """
    known = [int(index) for index in np.flatnonzero((~np.isnan(values)).any(1))]
    return len({groups[index] for index in known}) if len(groups) else len(known)


def bounded(value: float, drawn: Floats, values: Floats, groups: Sequence[str]) -> Interval:
    """A number with the percentiles of its draws `(draws,)`; `values` and `groups` as of `informative`."""
    tail = 100 * (1 - LEVEL) / 2
    finite = drawn[~np.isnan(drawn)]
    enough = informative(values, groups) > 1 and finite.size
    low, high = np.percentile(finite, (tail, 100 - tail)) if enough else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), int((~np.isnan(values)).any(1).sum()))
