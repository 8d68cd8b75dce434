"""Resampling along each axis in turn, as products with small sparse matrices.

The filter is linear interpolation between half-pixel centres; where an axis shrinks, the triangle is widened by the
factor, so that nothing aliases (the "antialias" of PIL and torch). Beyond the ends the last voxel goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The spatial shape at another spacing, at least one voxel along each axis.

    Example:
        >>> resampled_shape((10, 20), (3.0, 1.0), (1.0, 2.0))
        (30, 10)
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(shape, spacing, target, strict=True))


def axis_matrix(size: int, target: int) -> sparse.csr_matrix:
    """The matrix (target, size), float32, that resamples an axis; its rows sum to 1."""
    scale = size / target
    width = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum(np.floor(centre - width).astype(int), 0)
    taps = first[:, None] + np.arange(int(np.ceil(2 * width)) + 2)  # (target, taps)
    share = np.maximum(1 - np.abs(taps + 0.5 - centre[:, None]) / width, 0) * (taps < size)
    share /= share.sum(1, keepdims=True)
    rows = np.broadcast_to(np.arange(target)[:, None], taps.shape)
    kept = share > 0
    return sparse.csr_matrix((share[kept].astype(np.float32), (rows[kept], taps[kept])), shape=(target, size))


def resample(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resample an image.

    Args:
        array: `(C, *spatial)`.
        shape: the new spatial shape.

    Returns:
        float32 `(C, *shape)`.

    Raises:
        ValueError: `shape` has not one positive number for each spatial axis.
    """
    if len(shape) != array.ndim - 1 or min(shape) < 1:
        raise ValueError(f"shape must be {array.ndim - 1} positive numbers, got {tuple(shape)}")
    out = np.asarray(array, np.float32)
    for axis in sorted(range(len(shape)), key=lambda axis: shape[axis] / array.shape[axis + 1]):  # shrink first
        if out.shape[axis + 1] != shape[axis]:
            out = _along(out, axis + 1, shape[axis])
    return np.ascontiguousarray(out)


def resample_labels(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resample labels: each class linearly as an image of its own, and the largest share wins.

    One class at a time, so the memory does not grow with their number; -1 is a class like the others. Where shares are
    equal the lower value wins.

    Args:
        array: `(*spatial)` integers.
        shape: the new shape.

    Returns:
        `(*shape)` of the same type.
    """
    if tuple(shape) == array.shape:
        return array.copy()
    best = np.zeros(tuple(shape), np.float32)
    out = np.zeros(tuple(shape), array.dtype)
    for value in np.unique(array):
        share = resample((array == value)[np.newaxis], shape)[0]
        better = share > best
        out[better] = value
        np.maximum(best, share, out=best)
    return out


def _along(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, 0)
    flat = np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
    result = axis_matrix(moved.shape[0], size) @ flat
    return np.moveaxis(result.reshape(size, *moved.shape[1:]), 0, axis)
