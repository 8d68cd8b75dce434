"""A part of an image, or its pixels averaged over blocks, as a `Volume` of its own that is read where it is asked for.

Every point keeps its world coordinates: the affine and the cards of a FITS or NIfTI header move with the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from densepred.errors import InputError
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.volume import Key, Volume, check_memory, full_key, span

if TYPE_CHECKING:
    from astropy.io.fits import Header

Box: TypeAlias = "tuple[tuple[int, int], ...]"
"""Start and stop (exclusive), from 0, along each spatial axis, slowest first."""
_BLOCK = 1 << 24  # bytes that are read and averaged at once


def cutout(volume: Volume, box: Sequence[tuple[int, int]]) -> Volume:
    """The voxels within a box, which are read from `volume` when they are asked for.

    Args:
        volume: `(C, *spatial)`; verified and closed with the cut-out.
        box: see `Box`.

    Returns:
        A volume `(C, *sizes of the box)`; a FITS or NIfTI header tells where it lies.

    Raises:
        InputError: the box leaves the image, or its world coordinates need a look-up table of the whole image.
        ValueError: not one pair per spatial axis.

    Example:
        >>> image = Volume(np.arange(20.0).reshape(1, 4, 5), (1.0, 1.0), np.eye(4))
        >>> part = cutout(image, [(1, 3), (2, 5)])
        >>> part.numpy().tolist(), part.affine[:2, 3].tolist()
        ([[[7.0, 8.0, 9.0], [12.0, 13.0, 14.0]]], [2.0, 1.0])
    """
    if len(box) != volume.dims:
        raise ValueError(f"box must have {volume.dims} pairs, got {list(box)}")
    for axis, ((start, stop), size) in enumerate(zip(box, volume.shape[1:], strict=True)):
        if not 0 <= start < stop <= size:
            what = f"the box {start}:{stop} is not within axis {axis} of {size} voxels"
            raise InputError(what, "choose a box within the image", volume.path)
    starts = [start for start, _ in box]
    array = _Window(volume, starts, [stop - start for start, stop in box])
    return _moved(volume, array, starts, [1] * volume.dims, volume.labels)


def binned(volume: Volume, factor: int | Sequence[int]) -> Volume:
    """The means of blocks of voxels, read and averaged when they are asked for.

    A mean is that of the block's valid voxels, those neither NaN nor infinite; NaN where it has none. It is a value per
    original voxel, so a sum over the binned image is smaller by the size of the blocks. Blocks that reach over the far
    edges are left out. Integers of up to 16 bits become float32, larger ones float64.

    Args:
        volume: `(C, *spatial)`; verified and closed with the result.
        factor: voxels along an edge of a block: for the two fastest axes, or one per spatial axis, slowest first.

    Returns:
        A volume `(C, *sizes // factor)`; a FITS or NIfTI header tells where it lies.

    Raises:
        InputError: a label map, blocks larger than the image, or world coordinates that cannot be binned (TPV).
        ValueError: factors below 1, or not one per spatial axis.

    Example:
        >>> image = Volume.from_array(np.array([[1, 3, 9], [5, np.nan, 9]]), (1.0, 1.0))
        >>> binned(image, 2).numpy().tolist()
        [[[3.0]]]
    """
    if volume.labels:
        fix = "bin the image and predict that, or leave `bin` out"
        raise InputError("a label map cannot be binned: classes have no mean", fix, volume.path)
    factors = _factors(volume, factor)
    if set(factors) == {1}:
        return volume
    return _moved(volume, _Means(volume, factors), [0] * volume.dims, factors, False)


def binned_like(volume: Volume, factor: int | Sequence[int]) -> Volume:
    """The grid of `binned` without the values, for a writer's `like`: zeros that take no memory.

    Args:
        volume: `(C, *spatial)`, of intensities or labels; neither verified nor closed with the result.
        factor: as for `binned`.

    Raises:
        InputError: blocks larger than the image, or world coordinates that cannot be binned.
        ValueError: factors below 1, or not one per spatial axis.

    Example:
        >>> labels = Volume.from_array(np.ones((40, 50), np.uint8), (0.5, 0.5), labels=True)
        >>> coarse = binned_like(labels, 4)
        >>> coarse.shape, coarse.spacing
        ((1, 10, 12), (2.0, 2.0))
    """
    factors = _factors(volume, factor)
    shape = (volume.shape[0], *(size // n for size, n in zip(volume.shape[1:], factors, strict=True)))
    zeros = np.broadcast_to(np.zeros((), volume.dtype), shape)
    return _moved(volume, zeros, [0] * volume.dims, factors, volume.labels)


def _factors(volume: Volume, factor: int | Sequence[int]) -> list[int]:
    factors = [*[1] * (volume.dims - 2), factor, factor] if isinstance(factor, int) else list(factor)
    if len(factors) != volume.dims or min(factors) < 1:
        raise ValueError(f"factor must be one integer or {volume.dims}, each at least 1, got {factor}")
    for axis, (n, size) in enumerate(zip(factors, volume.shape[1:], strict=True)):
        if n > size:
            what = f"blocks of {n} voxels are larger than axis {axis} of {size}"
            raise InputError(what, "choose a smaller factor", volume.path)
    return factors


class _Window:
    """A box of a volume's array."""

    def __init__(self, volume: Volume, starts: Sequence[int], sizes: Sequence[int]) -> None:
        self._volume, self._starts = volume, (0, *starts)
        self.shape, self.dtype = (volume.shape[0], *sizes), volume.dtype

    def __getitem__(self, key: Key) -> np.ndarray:
        spans = [span(item, size) for item, size in zip(full_key(key, self.shape), self.shape, strict=True)]
        window = tuple(slice(a + start, b + start) for (a, b, _), start in zip(spans, self._starts, strict=True))
        return self._volume[window][tuple(inner for *_, inner in spans)]

    def verify(self) -> None:
        """See `Volume.verify`."""
        self._volume.verify()

    def close(self) -> None:
        """Let go of the file."""
        self._volume.close()


class _Means:
    """The means over blocks of a volume's array."""

    def __init__(self, volume: Volume, factors: Sequence[int]) -> None:
        self._volume, self._factors = volume, (1, *factors)
        self.shape = (volume.shape[0], *(size // n for size, n in zip(volume.shape[1:], factors, strict=True)))
        self.dtype = np.result_type(volume.dtype, np.float32)

    def __getitem__(self, key: Key) -> np.ndarray:
        spans = [span(item, size) for item, size in zip(full_key(key, self.shape), self.shape, strict=True)]
        sizes = [stop - start for start, stop, _ in spans]
        check_memory(int(np.prod(sizes, dtype=object)) * self.dtype.itemsize, self._volume.path)
        out = np.empty(sizes, self.dtype)
        whole = [slice(start * n, stop * n) for (start, stop, _), n in zip(spans, self._factors, strict=True)]
        read = out[:, :1].size * int(np.prod(self._factors)) * self._volume.dtype.itemsize
        step, (first, _, _), thick = max(1, _BLOCK // max(1, read)), spans[1], self._factors[1]
        for start in range(0, sizes[1] if out.size else 0, step):
            stop = min(start + step, sizes[1])
            whole[1] = slice((first + start) * thick, (first + stop) * thick)
            out[:, start:stop] = _means(self._volume[tuple(whole)], self._factors)
        return out[tuple(inner for *_, inner in spans)]

    def verify(self) -> None:
        """See `Volume.verify`."""
        self._volume.verify()

    def close(self) -> None:
        """Let go of the file."""
        self._volume.close()


def _means(values: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """The means of blocks of `factors`, summed in float64."""
    count = int(np.prod(factors))
    valid = np.isfinite(values)
    if valid.all():
        return _sums(values, factors, np.float64) / count
    total = _sums(np.where(valid, values, 0), factors, np.float64)
    counts = _sums(valid, factors, np.int64)
    return np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)


def _sums(values: np.ndarray, factors: Sequence[int], dtype: type) -> np.ndarray:
    for axis in reversed(range(values.ndim)):  # the fastest axis first: it leaves the least for the others
        if (n := factors[axis]) > 1:
            lead = (slice(None),) * axis
            total: np.ndarray = values[(*lead, slice(0, None, n))].astype(dtype)
            for offset in range(1, n):
                total += values[(*lead, slice(offset, None, n))]
            values = total
    return values


def _moved(
    volume: Volume, array: _Window | _Means | np.ndarray, starts: Sequence[int], factors: Sequence[int], labels: bool
) -> Volume:
    """`array` on the grid of blocks of `factors` voxels of `volume`, the first of which begins at `starts`."""
    step = np.array([*reversed(factors), *[1] * (3 - volume.dims)], np.float64)
    move = np.diag([*step, 1.0])
    move[:3, 3] = [*reversed(starts), *[0] * (3 - volume.dims)] + (step - 1) / 2
    affine = None if volume.affine is None else volume.affine @ move
    spacing = [size * n for size, n in zip(volume.spacing, factors, strict=True)]
    header: Any = volume.header
    if isinstance(header, FitsHeader):
        header = _fits(volume, header, starts, factors, array.shape[1:])
    elif hasattr(header, "get_xyzt_units"):
        from densepred.volumes import nifti_header

        header, affine = nifti_header.moved(header, move, array.shape[1:], affine)
    return Volume(array, spacing, affine, header, volume.path, labels, volume.unit, volume.classes)


def _fits(
    volume: Volume, source: FitsHeader, starts: Sequence[int], factors: Sequence[int], sizes: Sequence[int]
) -> FitsHeader:
    from densepred.volumes.fits_cut import binned_header, cutout_header

    axes, shape = source.spatial_axes, list(source.shape)
    boxes, steps = [(0, size) for size in shape], [1] * len(shape)
    for axis, start, n, size in zip(axes, starts, factors, sizes, strict=True):
        boxes[axis], steps[axis], shape[axis] = (start, start + n * size), n, size
    header: Header = source.header
    try:
        if set(factors) == {1}:
            header = cutout_header(header, boxes[axes[0] :])
        else:
            header = binned_header(header, steps[min(axis for axis, n in enumerate(steps) if n > 1) :])
    except InputError as error:
        error.file = volume.path
        raise
    return replace(source, header=header, shape=tuple(shape))
