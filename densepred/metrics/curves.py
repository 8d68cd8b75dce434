"""How well scores tell two classes apart, at every threshold: ROC and precision-recall curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """How many voxels of either class have each score; the counts of slabs, cases and sets add up.

    Exact, every score that occurs has its own place. With `bins`, scores in 0..1 are put into so many of equal width,
    and the memory does not depend on the number of voxels: the curves' points at the edges of the bins stay exact, and
    `auc_error` bounds what the area can be off.

    Args:
        scores: (n,) rising: the scores, or the lower edges of the bins.
        positive: (n,) int64, voxels inside.
        negative: (n,) int64, voxels outside.
        bins: how many, or 0 where the scores are exact.

    Source: Fawcett 2006 (doi:10.1016/j.patrec.2005.10.010).

    Example:
        >>> found = Ranking.of(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
        >>> found.auc, found.tpr_at(0.0)
        (0.75, 0.5)
    """

    scores: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    bins: int = 0

    @classmethod
    def of(cls, scores: np.ndarray, truth: np.ndarray, bins: int = 0) -> Ranking:
        """Count.

        Args:
            scores: float of any shape, higher where inside is likelier; NaN counts nowhere.
            truth: integers or bools of the same shape: 1 inside, 0 outside, -1 not known.
            bins: into how many the scores, then within 0..1, are put; by default each has its own.

        Raises:
            ValueError: the shapes differ, the truth has other values, or a score to be put into bins is outside 0..1.
        """
        if scores.shape != truth.shape:
            raise ValueError(f"scores and truth must have one shape, got {scores.shape} and {truth.shape}")
        known = np.isfinite(scores) & (truth != -1)
        values, inside = scores[known], truth[known]
        if inside.size and not np.isin(inside, (0, 1)).all():
            raise ValueError("truth must be 1 inside, 0 outside and -1 where it is not known")
        inside = inside.astype(bool)
        if not bins:
            found, at = np.unique(values, return_inverse=True)
            at = at.reshape(-1)
        else:
            if values.size and not 0 <= values.min() <= values.max() <= 1:
                raise ValueError(f"scores must lie in [0, 1] for bins, got [{values.min():g}, {values.max():g}]")
            found = np.arange(bins) / bins
            at = np.minimum((values.astype(np.float64) * bins).astype(np.int64), bins - 1)
        positive, negative = (np.bincount(at[side], minlength=len(found)) for side in (inside, ~inside))
        return cls(found, positive, negative, bins)

    def __add__(self, other: Ranking) -> Ranking:
        if self.bins != other.bins:
            raise ValueError(f"rankings must have the same bins, got {self.bins} and {other.bins}")
        scores = np.union1d(self.scores, other.scores)
        sides = []
        for name in ("positive", "negative"):
            total = np.zeros(len(scores), np.int64)
            for one in (self, other):
                total[np.searchsorted(scores, one.scores)] += getattr(one, name)
            sides.append(total)
        return Ranking(scores, sides[0], sides[1], self.bins)

    @property
    def roc(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """False positive rate, true positive rate, both rising from 0 to 1, and the least score that is called inside.

        The first point, at which nothing is, has the threshold inf. Rates of a class that does not occur are nan.
        """
        true, false = self._called
        rates = (_share(false, false[-1]), _share(true, true[-1]))
        return *rates, np.concatenate([[np.inf], self.scores[::-1]])

    @property
    def precision_recall(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall (rising) and the least score that is called inside, without the point of no calls."""
        true, false = (side[1:] for side in self._called)
        called = true + false
        some = called > 0
        precision = np.divide(true, called, out=np.full(len(true), np.nan), where=some)
        return precision[some], _share(true, int(self.positive.sum()))[some], self.scores[::-1][some]

    @property
    def auc(self) -> float:
        """The area under the ROC curve: how often an inner voxel has the higher score; equal ones count half."""
        inside, outside = int(self.positive.sum()), int(self.negative.sum())
        if not inside or not outside:
            return math.nan
        below = np.cumsum(self.negative) - self.negative
        return _product(self.positive, 2 * below + self.negative) / (2 * inside * outside)

    @property
    def auc_error(self) -> float:
        """How far `auc` can be from that of the exact scores: half the pairs that share a bin; 0 if exact."""
        inside, outside = int(self.positive.sum()), int(self.negative.sum())
        if not self.bins or not inside or not outside:
            return 0.0
        return _product(self.positive, self.negative) / (2 * inside * outside)

    @property
    def average_precision(self) -> float:
        """The sum of the precisions, each times the recall that it adds; nan if nothing is inside."""
        if not self.positive.sum():
            return math.nan
        precision, recall, _ = self.precision_recall
        return float((np.diff(recall, prepend=0.0) * precision).sum())

    def tpr_at(self, fpr: float) -> float:
        """The largest true positive rate of a threshold whose false positive rate is at most `fpr`."""
        false, true, _ = self.roc
        if np.isnan(false).any() or np.isnan(true).any():
            return math.nan
        return float(true[false <= fpr].max())

    @property
    def _called(self) -> tuple[np.ndarray, np.ndarray]:
        """Right and wrong calls for every threshold, the highest first, after the one at which there are none."""
        right, wrong = (
            np.concatenate([[0], np.cumsum(side[::-1])]).astype(np.int64) for side in (self.positive, self.negative)
        )
        return right, wrong


def _product(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The exact sum of the products of counts, which may be beyond what int64 holds."""
    if int(ours.sum()) * int(theirs.max(initial=0)) < 2**62:
        return int(np.dot(ours, theirs))
    return sum(int(a) * int(b) for a, b in zip(ours, theirs, strict=True) if a)


def _share(part: np.ndarray, whole: int) -> np.ndarray:
    return part / whole if whole else np.full(len(part), np.nan)
