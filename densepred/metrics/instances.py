"""How well objects are found and outlined: panoptic quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Panoptic:
    """Objects matched, missed and invented; those of several images add up.

    A true and a predicted object match if their intersection over union is above 1/2, which at most one pair can have.

    Args:
        matched: pairs.
        missed: true objects without a match.
        invented: predicted objects without a match.
        overlap: sum of the intersections over unions of the pairs.

    Source: Kirillov et al. 2019 (arXiv:1801.00868), equations 1 and 2.

    Example:
        >>> (Panoptic(2, 1, 0, 1.5) + Panoptic(1, 0, 1, 0.75)).quality  # 2.25 / (3 + 1/2 + 1/2)
        0.5625
    """

    matched: int = 0
    missed: int = 0
    invented: int = 0
    overlap: float = 0.0

    def __add__(self, other: Panoptic) -> Panoptic:
        return Panoptic(
            self.matched + other.matched,
            self.missed + other.missed,
            self.invented + other.invented,
            self.overlap + other.overlap,
        )

    @property
    def quality(self) -> float:
        """PQ: `segmentation` times `recognition`; nan if there are no objects at all."""
        weight = self.matched + (self.missed + self.invented) / 2
        return self.overlap / weight if weight else math.nan

    @property
    def recognition(self) -> float:
        """RQ: the F1 score of the matches; nan if there are no objects at all."""
        weight = self.matched + (self.missed + self.invented) / 2
        return self.matched / weight if weight else math.nan

    @property
    def segmentation(self) -> float:
        """SQ: the mean intersection over union of the pairs; nan without any."""
        return self.overlap / self.matched if self.matched else math.nan


def panoptic(truth: np.ndarray, prediction: np.ndarray, known: np.ndarray | None = None) -> Panoptic:
    """Match the objects of two instance maps.

    Args:
        truth: integers of any shape, a number for each object, 0 outside.
        prediction: integers of the same shape.
        known: bool of the same shape, where to look. A predicted object of which more than half is not known is left
            out, unless it matches.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> panoptic(np.array([1, 1, 1, 0, 2]), np.array([7, 7, 0, 0, 0]))
        Panoptic(matched=1, missed=1, invented=0, overlap=0.6666666666666666)
    """
    if truth.shape != prediction.shape or (known is not None and known.shape != truth.shape):
        raise ValueError(f"truth, prediction and known must have one shape, got {truth.shape} and {prediction.shape}")
    theirs, predicted = np.unique(prediction, return_inverse=True)
    predicted = predicted.reshape(-1)
    whole = np.bincount(predicted, minlength=len(theirs))
    if known is not None:
        truth, predicted = truth[known], predicted[known.reshape(-1)]
    ours, true = np.unique(truth, return_inverse=True)
    pairs, counts = np.unique(true.reshape(-1) * len(theirs) + predicted, return_counts=True)
    shared = {
        (int(pair // len(theirs)), int(pair % len(theirs))): int(n) for pair, n in zip(pairs, counts, strict=True)
    }
    return _matches(shared, ours, theirs, whole)


def _matches(
    shared: Mapping[tuple[int, int], int], ours: np.ndarray, theirs: np.ndarray, whole: np.ndarray
) -> Panoptic:
    """The counts of known voxels by (true, predicted) object, as places in `ours` and `theirs`; `whole` sizes."""
    true, predicted = np.zeros(len(ours), np.int64), np.zeros(len(theirs), np.int64)
    for (one, other), count in shared.items():
        true[one] += count
        predicted[other] += count
    found: dict[int, int] = {}
    overlap = 0.0
    for (one, other), count in shared.items():
        union = int(true[one] + predicted[other]) - count
        if ours[one] and theirs[other] and 2 * count > union:
            found[other] = one
            overlap += count / union
    invented = [at for at in range(len(theirs)) if theirs[at] and at not in found and 2 * predicted[at] >= whole[at]]
    return Panoptic(len(found), int((ours != 0).sum()) - len(found), len(invented), overlap)


def components(mask: np.ndarray, corners: bool = True) -> np.ndarray:
    """Number the connected parts of a mask from 1.

    Args:
        mask: bool (*spatial).
        corners: voxels that touch at an edge or a corner are connected too.

    Example:
        >>> components(np.array([[True, False], [False, True]])).max()
        np.int32(1)
    """
    structure = ndimage.generate_binary_structure(mask.ndim, mask.ndim if corners else 1)
    numbered, _ = ndimage.label(mask, structure)
    return np.asarray(numbered)
