"""Resampling whole images and labels; `densepred.cases.regrid` says how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from densepred.cases.regrid import Kernel


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The spatial shape at another spacing, at least one voxel along each axis.

    Example:
        >>> resampled_shape((10, 20), (3.0, 1.0), (1.0, 2.0))
        (30, 10)
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(shape, spacing, target, strict=True))


def resample(array: np.ndarray, shape: Sequence[int], kernels: Sequence[Kernel] | None = None) -> np.ndarray:
    """Resample an image; besides the result a few planes are in memory.

    Args:
        array: `(C, *spatial)`.
        shape: the new spatial shape.
        kernels: the filter of each axis; by default linear, antialiased.

    Returns:
        float32 `(C, *shape)`.

    Raises:
        ValueError: `shape` has not one positive number for each spatial axis.

    Example:
        >>> resample(np.array([[[0.0, 4.0]]]), (1, 4))
        array([[[0., 1., 3., 4.]]], dtype=float32)
    """
    if len(shape) != array.ndim - 1 or min(shape) < 1:
        raise ValueError(f"shape must be {array.ndim - 1} positive numbers, got {tuple(shape)}")
    import torch  # takes a second; checking files needs none of it

    from densepred.cases.regrid import Regrid

    regrid = Regrid(array.shape[1:], shape, kernels=kernels)
    out = np.empty((array.shape[0], *shape), np.float32)
    most = regrid.piece(array.shape[0])
    for start in range(0, array.shape[1], most):
        planes = np.require(array[:, start : start + most], np.float32, ["C", "W"])
        regrid.add(torch.from_numpy(planes))
        if (done := regrid.done) < regrid.ready:
            out[:, done : regrid.ready] = regrid.take(regrid.ready).numpy()
    return out


def resample_labels(array: np.ndarray, shape: Sequence[int], kernels: Sequence[Kernel] | None = None) -> np.ndarray:
    """Resample labels: each class as an image of its own, and the largest share wins.

    One class at a time, so the memory does not grow with their number; -1 is a class like the others. Where shares are
    equal, that of the nearest voxel wins.

    Args:
        array: `(*spatial)` integers.
        shape: the new shape.
        kernels: the filter of each axis; by default linear, antialiased.

    Returns:
        `(*shape)` of the same type.

    Example:
        >>> resample_labels(np.array([[0, 7]]), (1, 4))
        array([[0, 0, 7, 7]])
    """
    if tuple(shape) == array.shape:
        return array.copy()
    from densepred.cases.relabel import Relabel

    relabel = Relabel(array.shape, shape, kernels)
    out = np.empty(tuple(shape), array.dtype)
    for start in range(0, len(array), relabel.piece):
        relabel.add(array[start : start + relabel.piece])
        if (done := relabel.done) < relabel.ready:
            out[done : relabel.ready] = relabel.take(relabel.ready)
    return out
