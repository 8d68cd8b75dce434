"""What is counted of validation cases for each kind of head, and the scores that follow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    def row(found: metrics.MapErrors) -> Array:
        """The numbers of a case."""
        return np.array([found.count, found.squares, found.absolutes, *found.means, *found.moments], np.float64)

    def scores(self, cases: Array) -> dict[str, float]:
        each = [metrics.MapErrors(int(n), s, a, (t, p), (tt, pp, tp)) for n, s, a, t, p, tt, pp, tp in cases.tolist()]
        every = sum(each, metrics.MapErrors())
        finite = [one.pearson for one in each if math.isfinite(one.pearson)]
        r = float(np.mean(finite)) if finite else math.nan
        values = {"mse": every.mse, "mae": every.mae, "r": r, "explained": every.r2}
        return {f"{score}_{self.name}": float(value) for score, value in values.items()}

    def merit(self, scores: dict[str, float]) -> float:
        return scores[f"explained_{self.name}"]


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
        rankings = [metrics.Ranking.of(scores, truth == k) for k, scores in enumerate(probabilities.T)]
        areas = [one.auc for one in rankings]
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
        every = metrics.MapErrors.of(cases[:, 0], cases[:, 1])
        return Errors(self.name).scores(Errors.row(every)[np.newaxis])

    def merit(self, scores: dict[str, float]) -> float:
        return scores[f"explained_{self.name}"]


def dice_of(sums: Array) -> Array:
    """Dice `(K,)` of true, found and both `(3, K)`; NaN where neither is."""
    size = sums[0] + sums[1]
    return np.divide(2 * sums[2], size, out=np.full(size.shape, np.nan), where=size > 0)


def dice_of_classes(confusion: NDArray[np.int64]) -> Array:
    """Dice `(K - 1,)` of all classes but the background."""
    return np.asarray(metrics.dice(confusion)[1:], np.float64)
