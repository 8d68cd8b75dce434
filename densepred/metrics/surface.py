"""Distances between the surfaces of what is true and what is predicted.

The surface of an object is the set of its voxels that have a neighbour across a face outside it; beyond the edge of the
image is outside. A surface against voxels that are not known is none. Distances are those between voxel centres, in the
unit of the spacing, each surface voxel counting 1. This is MONAI's definition; DeepMind's surface-distance instead puts
the surface midway between voxels and weighs its pieces by their area, so that its values differ by parts of a voxel.

Where one of the two has no surface there is no distance: the distances are nan, and the surface Dice is 0, or nan if
neither has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

_ROUNDING = 1e-9  # relative: a distance of exactly the tolerance is within it, however the spacing was rounded


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances of every surface voxel to the nearest of the other surface; those of several images add up.

    Args:
        to_truth: (P,) of the prediction's surface; inf where the truth has none.
        to_prediction: (T,) of the truth's surface; inf where the prediction has none.

    Source of the metrics: Taha and Hanbury, BMC Medical Imaging 15:29, 2015; Nikolov et al. 2021 (arXiv:1809.04430).
    """

    to_truth: np.ndarray
    to_prediction: np.ndarray

    def __add__(self, other: SurfaceDistances) -> SurfaceDistances:
        return SurfaceDistances(
            np.concatenate([self.to_truth, other.to_truth]),
            np.concatenate([self.to_prediction, other.to_prediction]),
        )

    @property
    def _apart(self) -> bool:
        """Is a surface without the other?"""
        known = [side.size and np.isfinite(side).all() for side in (self.to_truth, self.to_prediction)]
        return not all(known)

    def hausdorff(self, percentile: float = 100.0) -> float:
        """The larger of the two directed distances: the longest way, or a percentile of the ways (NumPy's, linear)."""
        if self._apart:
            return np.nan
        return float(max(np.percentile(side, percentile) for side in (self.to_truth, self.to_prediction)))

    def average(self) -> float:
        """The mean over the voxels of both surfaces: the average symmetric surface distance (ASSD)."""
        if self._apart:
            return np.nan
        return float((self.to_truth.sum() + self.to_prediction.sum()) / (self.to_truth.size + self.to_prediction.size))

    def within(self, tolerance: float) -> tuple[int, int]:
        """The surface voxels, of both, that lie no further than `tolerance` from the other surface, and all of them."""
        limit = tolerance * (1 + _ROUNDING)
        near = sum(int((side <= limit).sum()) for side in (self.to_truth, self.to_prediction))
        return near, self.to_truth.size + self.to_prediction.size

    def surface_dice(self, tolerance: float) -> float:
        """The share of both surfaces that lies within `tolerance` of the other (normalised surface Dice)."""
        near, whole = self.within(tolerance)
        return near / whole if whole else np.nan


def surface_distances(
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float] | None = None,
    known: np.ndarray | None = None,
) -> SurfaceDistances:
    """The distances between the surfaces of two masks; beyond the box around both no memory is needed.

    Args:
        truth: bool (*spatial).
        prediction: bool of the same shape.
        spacing: size of a voxel along each axis; by default 1.
        known: bool of the same shape, where to look.

    Raises:
        ValueError: the shapes differ, or the spacing has another number of axes.

    Example:
        >>> square = np.zeros((8, 8), bool)
        >>> square[2:5, 2:5] = True
        >>> found = surface_distances(square, np.roll(square, 1, axis=1), spacing=(1, 0.5))
        >>> found.hausdorff(), round(found.average(), 3), found.surface_dice(0.25)
        (0.5, 0.25, 0.5)
    """
    spacing = (1.0,) * truth.ndim if spacing is None else tuple(spacing)
    if truth.shape != prediction.shape or len(spacing) != truth.ndim:
        raise ValueError(
            f"truth, prediction and spacing must fit, got {truth.shape}, {prediction.shape} and {len(spacing)} spacings"
        )
    if known is not None:
        if known.shape != truth.shape:
            raise ValueError(f"known must be {truth.shape} like the truth, got {known.shape}")
        truth, prediction = truth & known, prediction & known
    box = _box(truth | prediction)
    hidden = None if known is None else ~known[box]
    ours, theirs = (_surface(mask[box], hidden) * np.asarray(spacing, float) for mask in (truth, prediction))
    if not len(ours) or not len(theirs):
        return SurfaceDistances(np.full(len(theirs), np.inf), np.full(len(ours), np.inf))
    return SurfaceDistances(_nearest(theirs, ours), _nearest(ours, theirs))


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The box around what is in a mask, and one voxel more."""
    found = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        found.append(slice(max(0, used[0] - 1), used[-1] + 2) if used.size else slice(0, 0))
    return tuple(found)


def _surface(mask: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    """Indices of the surface voxels: bool (*spatial) -> (N, axes)."""
    solid = mask if hidden is None else mask | hidden
    inner = mask.copy()
    for axis in range(mask.ndim):
        there, beside = np.moveaxis(inner, axis, 0), np.moveaxis(solid, axis, 0)
        there[1:] &= beside[:-1]
        there[:-1] &= beside[1:]
        there[:1] = False
        there[-1:] = False
    return np.argwhere(mask & ~inner)


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest of the others."""
    tree = cKDTree(others, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points)[0])
