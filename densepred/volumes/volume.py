"""`Volume`: an image with its geometry, read from its file only where it is asked for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np

from densepred.errors import InputError, ResourceError

MAX_LOADED_FRACTION = 0.8
"""Share of the machine's memory that one read may fill."""
GEOMETRY_TOLERANCE = 1e-3
"""Voxels by which the corners of two images of one case may lie apart."""
_SAVE_BYTES = 1 << 24

Index: TypeAlias = "int | slice"
Key: TypeAlias = "Index | EllipsisType | tuple[Index | EllipsisType, ...]"


class ArrayLike(Protocol):
    """What a volume reads from: a numpy array, or a file behind the same three members.

    A lazy array may also have `verify()`, which raises if the file is damaged, and `close()`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class SlabWriter(Protocol):
    """What `open_writer` gives: slabs go in forward, planes in order."""

    dtype: np.dtype
    """The type that is stored."""

    def write(self, slab: np.ndarray) -> None:
        """Append `slab`, `(C, n, *rest)`, the next `n` planes of every channel."""


class Volume:
    """An image `(C, *spatial)` with its geometry; `spatial` is (Z, Y, X) or (Y, X), as stored on disk.

    A volume read from a file holds no voxels: `volume[:, z0:z1]` reads that slab. It is not safe to share between
    threads or across a fork: open the file again there. Damage to a compressed file shows only once its end has been
    read, so data are sound when `numpy()`, a whole pass of `slabs()`, or `verify()` has returned.

    Args:
        array: `(C, *spatial)`, a numpy array or a lazy one (`ArrayLike`).
        spacing: size of a voxel along each spatial axis, in the order of the array and the unit of the file (mm).
        affine: 4x4, from index (x, y, z) to world, nibabel's convention; None where there is none.
        header: the header of the source, in its format's own form.
        path: the file it came from.
        labels: the values are classes, not intensities.
        unit: of the values, as the file names it ("electron/s"); "" if it does not.
        classes: label -> name, where the file tells.

    Raises:
        ValueError: the array, spacing and affine do not belong together.

    Example:
        >>> volume = Volume(np.zeros((1, 4, 5, 6), np.float32), spacing=(2.0, 1.0, 1.0))
        >>> volume[:, 1:3].shape
        (1, 2, 5, 6)
    """

    def __init__(
        self,
        array: ArrayLike,
        spacing: Sequence[float],
        affine: np.ndarray | None = None,
        header: object | None = None,
        path: str | Path | None = None,
        labels: bool = False,
        unit: str = "",
        classes: Mapping[int, str] | None = None,
    ) -> None:
        if len(array.shape) not in (3, 4) or min(array.shape) < 1:
            raise ValueError(f"array must be (C, Y, X) or (C, Z, Y, X) without empty axes, got shape {array.shape}")
        if len(spacing) != len(array.shape) - 1 or not all(0 < size < np.inf for size in spacing):
            raise ValueError(f"spacing must be {len(array.shape) - 1} positive numbers, got {spacing}")
        if affine is not None and np.shape(affine) != (4, 4):
            raise ValueError(f"affine must be 4x4, got shape {np.shape(affine)}")
        self.array = array
        self.spacing: tuple[float, ...] = tuple(float(size) for size in spacing)
        self.affine = None if affine is None else np.array(affine, np.float64)
        self.header = header
        self.path = None if path is None else Path(path)
        self.labels, self.unit, self.classes = labels, unit, dict(classes or {})

    @classmethod
    def from_array(cls, array: np.ndarray, spacing: Sequence[float], labels: bool = False) -> Volume:
        """A volume of an array `(*spatial)` or `(C, *spatial)`; `len(spacing)` says which.

        Raises:
            ValueError: the array has neither as many axes as the spacing nor one more.
        """
        array = np.asarray(array)
        if array.ndim == len(spacing):
            array = array[np.newaxis]
        if array.ndim != len(spacing) + 1:
            raise ValueError(f"array must have {len(spacing)} or {len(spacing) + 1} axes, got shape {array.shape}")
        return cls(array, spacing, labels=labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, *spatial)`."""
        return tuple(int(size) for size in self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type of the values that reading gives."""
        return np.dtype(self.array.dtype)

    @property
    def dims(self) -> int:
        """2 or 3 spatial axes."""
        return len(self.array.shape) - 1

    def __getitem__(self, key: Key) -> np.ndarray:
        return np.asarray(self.array[key])

    def __repr__(self) -> str:
        source = "" if self.path is None else f", path={str(self.path)!r}"
        return f"Volume(shape={self.shape}, dtype={self.dtype}, spacing={self.spacing}{source})"

    def numpy(self) -> np.ndarray:
        """The whole `(C, *spatial)` array, verified.

        Raises:
            InputError: the file is damaged or shorter than it declares.
            ResourceError: it would fill the memory of this machine.
        """
        whole = self[...]
        self.verify()
        return whole

    def slabs(self, thickness: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Read forward: yields `(z0, z1, slab)`, slab `(C, z1 - z0, *rest)`; then verifies the file to its end.

        Raises:
            InputError: the file is damaged. What was yielded before must then be thrown away.
        """
        if thickness < 1:
            raise ValueError(f"thickness must be at least 1, got {thickness}")
        depth = self.shape[1]
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            yield start, stop, self[:, start:stop]
        self.verify()

    def verify(self) -> None:
        """Read a file to its end and check its checksum, where the format has one.

        Raises:
            InputError: the file is damaged.
        """
        if hasattr(self.array, "verify"):
            self.array.verify()

    def like(self, array: np.ndarray, labels: bool | None = None) -> Volume:
        """This geometry and header with other values, `(*spatial)` or `(C, *spatial)`, of which the unit is not known.

        Args:
            array: the values, in memory.
            labels: whether they are classes; by default, whether they are integers.

        Raises:
            ValueError: the spatial shape differs.
        """
        array = np.asarray(array)
        if array.ndim == self.dims:
            array = array[np.newaxis]
        if array.shape[1:] != self.shape[1:]:
            raise ValueError(f"array must have the spatial shape {self.shape[1:]}, got {array.shape}")
        if labels is None:
            labels = array.dtype.kind in "bui"
        return Volume(array, self.spacing, self.affine, self.header, self.path, labels)

    def save(self, path: str | Path) -> None:
        """Write to `path` in the format of its suffix, slab by slab and atomically; integers stay integers.

        Types that few programs read are stored as others that hold the same values: bool as uint8, float16 as
        float32, 64-bit integers and all labels as the first of uint8, int16, int32 that holds them.

        Raises:
            InputError: the suffix is unknown, the values fit no type of the format, or the source is damaged.
        """
        from densepred.volumes import Record, open_writer

        thickness = max(1, _SAVE_BYTES * self.shape[1] // (int(np.prod(self.shape)) * self.dtype.itemsize))
        dtype = self.dtype
        if dtype.kind in "ui" and (self.labels or dtype.itemsize == 8):
            dtype = self._smallest_dtype(thickness)
        told = None
        if self.classes or (self.unit and not self.labels):
            told = Record(names=self.classes, unit=self.unit)
        with open_writer(path, self, dtype, self.shape[0], self.labels, told) as writer:
            for _, _, slab in self.slabs(thickness):
                writer.write(slab)

    def _smallest_dtype(self, thickness: int) -> np.dtype:
        extremes = [(int(slab.max()), int(slab.min())) for _, _, slab in self.slabs(thickness)]
        high, low = max(pair[0] for pair in extremes), min(pair[1] for pair in extremes)
        try:
            return label_dtype(high, low)
        except ValueError as error:
            raise InputError(str(error), "renumber the values from 0", self.path) from error

    def close(self) -> None:
        """Let go of the file."""
        if hasattr(self.array, "close"):
            self.array.close()

    def __enter__(self) -> Volume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def label_dtype(high: int, low: int = 0) -> np.dtype:
    """The first of uint8, int16 and int32 that holds the labels from `low` to `high`.

    Raises:
        ValueError: none does.
    """
    for kind in (np.uint8, np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise ValueError(f"labels must lie within int32, got {low} to {high}")


def corner_offset(first: Volume, second: Volume) -> float:
    """How far apart the corners of two grids lie, in voxels of the first: 0 where the geometries agree.

    Where either has no affine, the spacings alone are compared; where a file says nothing of the size of its voxels, as
    PNG, .npy and plain TIFF, the shapes alone.

    Raises:
        ValueError: the spatial shapes differ.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"the spatial shapes must agree, got {first.shape[1:]} and {second.shape[1:]}")
    if is_sizeless(first) or is_sizeless(second):
        return 0.0
    if first.affine is None or second.affine is None:
        ours, theirs = (spacing_affine(volume.spacing) for volume in (first, second))
    else:
        ours, theirs = first.affine, second.affine
    ends = [(0, size - 1) for size in reversed(first.shape[1:])]
    ends += [(0, 0)] * (3 - len(ends))
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], np.float64)
    apart = corners @ (theirs - ours)[:3].T
    return float(np.linalg.norm(apart @ np.linalg.pinv(ours[:3, :3]).T, axis=1).max())


def is_sizeless(volume: Volume) -> bool:
    """Does its file say nothing of the size of its voxels, as PNG, .npy and plain TIFF?"""
    unit = getattr(volume.header, "unit", None)
    return volume.path is not None and volume.affine is None and unit is None and set(volume.spacing) == {1.0}


def spacing_affine(spacing: Sequence[float]) -> np.ndarray:
    """The diagonal 4x4 affine of a spacing in array order."""
    return np.diag([*reversed(spacing), *[1.0] * (4 - len(spacing))])


def full_key(key: Key, shape: tuple[int, ...]) -> tuple[Index, ...]:
    """`key` with one index or slice per axis.

    Raises:
        IndexError: too many indices, or one outside its axis.
        TypeError: an index that is neither an integer, a slice nor `...`.
    """
    items = list(key) if isinstance(key, tuple) else [key]
    if items.count(...) > 1 or len(items) - items.count(...) > len(shape):
        raise IndexError(f"at most {len(shape)} indices and one '...' are allowed, got {key}")
    at = items.index(...) if ... in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + items.count(...))
    out: list[Index] = []
    for item, size in zip(items, shape, strict=True):
        if isinstance(item, slice):
            out.append(item)
        elif isinstance(item, (int, np.integer)):
            if not -size <= item < size:
                raise IndexError(f"index {item} is outside an axis of {size}")
            out.append(int(item) % size)
        else:
            raise TypeError(f"an index must be an integer, a slice or '...', got {item!r}")
    return tuple(out)


def span(index: Index, size: int) -> tuple[int, int, Index]:
    """The smallest run `start, stop` that covers `index`, and the index that is left within the run."""
    if isinstance(index, int):
        return index, index + 1, 0
    chosen = range(*index.indices(size))
    if not chosen:
        return 0, 0, slice(None)
    return min(chosen), max(chosen) + 1, slice(None, None, chosen.step)


def check_memory(needed: int, path: Path | None) -> None:
    """Refuse to load `needed` bytes where that would fill the machine's memory.

    Raises:
        ResourceError: `needed` is over `MAX_LOADED_FRACTION` of the memory.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > MAX_LOADED_FRACTION * memory:
        what = f"reading it at once takes {needed / 1e9:.1f} GB and this machine has {memory / 1e9:.1f} GB"
        raise ResourceError(what, "read it by slabs, or check that its header is right", path)
