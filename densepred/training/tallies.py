"""What is counted of validation cases for each kind of head, and the scores that follow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from densepred import metrics

Array = NDArray[np.float64]


class Tally(ABC):
    """Numbers of a case, and scores from the numbers of all."""

    width: int
    """How many numbers `case` gives."""

    @abstractmethod
    def scores(self, cases: Array) -> dict[str, float]:
        """The scores of all cases, from `(N, width)` numbers; NaN where nothing is known."""

    @abstractmethod
    def merit(self, scores: dict[str, float]) -> float:
        """One number of them, 1 being perfect."""


class Overlap(Tally):
    """Dice of classes or regions, the mean over the cases that have them in truth or prediction.

    Args:
        names: of the classes but the background, or of the regions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.width = tuple(names), len(names)

    @staticmethod
    def of_regions(truth: NDArray[np.int8], found: NDArray[np.bool_]) -> Array:
        """True, found and both `(3, K)`, of truth `(K, *spatial)` of 1, 0 and -1 for unknown, and what was found."""
        axes = tuple(range(1, truth.ndim))
        true, said = truth == 1, found & (truth >= 0)
        return np.stack([true.sum(axes), said.sum(axes), (true & said).sum(axes)]).astype(np.float64)

    def scores(self, cases: Array) -> dict[str, float]:
        known = np.isfinite(cases)
        mean = np.divide(np.nansum(cases, 0), known.sum(0), out=np.full(self.width, np.nan), where=known.any(0))
        named = {f"dice_{name}": float(value) for name, value in zip(self.names, mean, strict=True)}
        return named | {"dice_mean": float(np.nanmean(mean)) if known.any() else math.nan}

    def merit(self, scores: dict[str, float]) -> float:
        return scores["dice_mean"]


class Errors(Tally):
    """Errors of a map of numbers, over all voxels of all cases; Pearson's r is the mean over the cases.

    Args:
        name: of the target.
    """

    width = 8

    def __init__(self, name: str) -> None:
        self.name = name

    @staticmethod
    def planes(truth: Array, found: Array) -> Array:
        """Sums over some planes, which add up over a case: n, squared and absolute errors, and those for r.

        Args:
            truth: any shape, NaN where not known.
            found: of the same shape.
        """
        known = np.isfinite(truth)
        t, p = truth[known].astype(np.float64), found[known].astype(np.float64)
        squares = [(t * t).sum(), (p * p).sum(), (t * p).sum()]
        return np.array([t.size, ((p - t) ** 2).sum(), np.abs(p - t).sum(), t.sum(), p.sum(), *squares])

    def scores(self, cases: Array) -> dict[str, float]:
        n, squared, absolute = cases[:, :3].sum(0)
        known = cases[cases[:, 0] > 0]
        r = [_pearson(row) for row in known]
        finite = [value for value in r if math.isfinite(value)]
        values = {
            "mse": squared / n if n else math.nan,
            "mae": absolute / n if n else math.nan,
            "r": float(np.mean(finite)) if finite else math.nan,
            "explained": _explained(known),
        }
        return {f"{score}_{self.name}": float(value) for score, value in values.items()}

    def merit(self, scores: dict[str, float]) -> float:
        return scores[f"explained_{self.name}"]


def _pearson(sums: Array) -> float:
    n, _, _, t, p, tt, pp, tp = sums
    spread = (tt - t * t / n) * (pp - p * p / n)
    return float((tp - t * p / n) / math.sqrt(spread)) if spread > 0 else math.nan


def _explained(cases: Array) -> float:
    """One less the squared errors over those of the truth's mean."""
    n, squared, _, t, _, tt, _, _ = cases.sum(0) if len(cases) else np.zeros(8)
    spread = tt - t * t / n if n else 0.0
    return float(1 - squared / spread) if spread > 0 else math.nan


class Choices(Tally):
    """Accuracy, area under the ROC curve and cross-entropy of classes of whole images.

    A case's numbers are the index of the truth, -1 if it is not known, and the probabilities.

    Args:
        name: of the target.
        classes: K.
    """

    def __init__(self, name: str, classes: int) -> None:
        self.name, self.width = name, classes + 1

    def scores(self, cases: Array) -> dict[str, float]:
        known = cases[cases[:, 0] >= 0]
        truth, probabilities = known[:, 0].astype(int), known[:, 1:]
        areas = [auc(probabilities[:, k], truth == k) for k in range(probabilities.shape[1])]
        finite = [area for area in areas if math.isfinite(area)]
        told = probabilities[np.arange(len(truth)), truth]
        values = {
            "accuracy": (probabilities.argmax(1) == truth).mean() if len(truth) else math.nan,
            "auc": np.mean(finite) if finite else math.nan,
            "log_loss": -np.log(np.maximum(told, 1e-12)).mean() if len(truth) else math.nan,
        }
        return {f"{score}_{self.name}": float(value) for score, value in values.items()}

    def merit(self, scores: dict[str, float]) -> float:
        return scores[f"accuracy_{self.name}"]


class Values(Tally):
    """Errors of a number for each image; a case's numbers are the truth, NaN if not known, and the prediction.

    Args:
        name: of the target.
    """

    width = 2

    def __init__(self, name: str) -> None:
        self.name = name

    def scores(self, cases: Array) -> dict[str, float]:
        sums = Errors.planes(cases[:, 0], cases[:, 1])
        found = Errors(self.name).scores(sums[np.newaxis])
        return found

    def merit(self, scores: dict[str, float]) -> float:
        return scores[f"explained_{self.name}"]


def auc(scores: Array, truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the share of pairs whose true one scores higher, ties counting half; NaN of none.

    Args:
        scores: `(n,)`.
        truth: `(n,)`.

    Source: the U statistic of Mann and Whitney 1947 (Hanley and McNeil 1982).

    Example:
        >>> auc(np.array([0.1, 0.4, 0.8]), np.array([False, True, True]))
        1.0
    """
    true, others = int(truth.sum()), int((~truth).sum())
    if not true or not others:
        return math.nan
    ranks = stats.rankdata(scores)
    return float((ranks[truth].sum() - true * (true + 1) / 2) / (true * others))


def dice_of(sums: Array) -> Array:
    """Dice `(K,)` of true, found and both `(3, K)`; NaN where neither is."""
    size = sums[0] + sums[1]
    return np.divide(2 * sums[2], size, out=np.full(size.shape, np.nan), where=size > 0)


def dice_of_classes(confusion: NDArray[np.int64]) -> Array:
    """Dice `(K - 1,)` of all classes but the background."""
    return np.asarray(metrics.dice(confusion)[1:], np.float64)
