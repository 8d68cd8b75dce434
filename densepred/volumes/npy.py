"""NumPy's `.npy` files, read from the disk where they are asked for and written plane by plane; never pickled objects.

The format holds an array and nothing else: spacing is 1, without a unit. Two axes are (Y, X), three (Z, Y, X) unless
`axes` says otherwise; several channels are written first, and need `axes="cyx"` or `"czyx"` on reading.

Reference: numpy.lib.format.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from densepred.errors import InputError
from densepred.files import atomic_path
from densepred.volumes.arrays import FileArray, SlabSink, assumed, create, declared, stored_dtype, stranger
from densepred.volumes.volume import Volume

_MAGIC = b"\x93NUMPY"


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a file: its header is read and checked, its values are left for later.

    Args:
        path: a `.npy` file, of either byte order, in C or Fortran order.
        axes: what the axes hold, one of `arrays.AXES`; None for (Y, X) or (Z, Y, X).
        part: None: a file holds one array.

    Raises:
        InputError: no `.npy` file, truncated, objects instead of numbers, or axes that are not plain.

    Example:
        >>> read("stack.npy", axes="yxc").shape  # doctest: +SKIP
        (3, 512, 512)
    """
    path = Path(path)
    if part is not None:
        raise InputError(f"a .npy file holds one array, not a part [{part}]", "leave the brackets out", path)
    stored = NpyArray(path)
    letters = declared(stored.shape, axes, path) if axes else assumed(stored.shape, path)
    array = FileArray(stored, letters, path)
    return Volume(array, (1.0,) * (len(array.shape) - 1), path=path)


class NpyArray:
    """The array of a file, mapped for each read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise stranger(".npy", path)
            file.seek(0)
            self.shape, fortran, self.dtype = _head(file, path)
            self._offset = file.tell()
        self._order = "F" if fortran else "C"
        if self.dtype.hasobject:
            fix = "save it again as an array of numbers"
            raise InputError("holds Python objects, which are never loaded (they can run code)", fix, path)
        count = 1
        for size in self.shape:
            count *= size
        self._needed = self._offset + count * self.dtype.itemsize
        held = path.stat().st_size
        if held > self._needed:
            extra = held - self._needed
            warnings.warn(f"{path}: {extra} bytes behind its array are not read", stacklevel=4)
        self.verify()

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """See `Stored.read`."""
        self.verify()
        mapped = np.memmap(self._path, self.dtype, "r", self._offset, self.shape, self._order)  # type: ignore[call-overload]
        return np.array(mapped[key])

    def verify(self) -> None:
        """Only the size can be verified."""
        held = self._path.stat().st_size
        if held < self._needed:
            what = f"truncated: holds {held} of {self._needed} bytes"
            raise InputError(what, "get the file again from its source", self._path)

    def close(self) -> None:
        """Nothing is held open."""


def _head(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # the header is parsed as Python source, which fails in many ways
        what = f"the header of this .npy file is broken ({str(error).splitlines()[0][:80]})"
        raise InputError(what, "get the file again from its source", path) from error
    what = f"version {version[0]}.{version[1]} of .npy is not supported"
    raise InputError(what, "save it again as a plain array of numbers", path)


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[SlabSink]:
    """Write a file slab by slab; it gets its name only once it is whole and has been read back.

    Args:
        path: a `.npy` file.
        like: gives the grid; its spacing has no place in the file.
        dtype: of the values; `SlabSink.dtype` is what is stored.
        channels: more than one become the first axis.
        labels: the values are classes.

    Raises:
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    shape = (channels, *like.shape[1:])
    axes = "czyx" if len(shape) == 4 else "cyx"
    stored = stored_dtype(np.dtype(dtype), labels)

    def verify(part: Path) -> None:
        writer.compare(lambda: read(part, axes if channels > 1 else axes[1:]))

    with atomic_path(path, verify) as part, create(part) as file:
        writer = Writer(file, shape, stored)
        yield writer
        writer.finish()


class Writer(SlabSink):
    """Puts the planes of every channel where they belong; made by `open_writer`."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        stored = shape if shape[0] > 1 else shape[1:]
        description = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"shape": stored, "fortran_order": False, "descr": description})
        self._file, self._head = file, file.tell()
        self._plane = dtype.itemsize * int(np.prod(shape[2:], dtype=np.int64))

    def _put(self, slab: np.ndarray, start: int) -> None:
        for channel, planes in enumerate(slab):
            self._file.seek(self._head + (channel * self.shape[1] + start) * self._plane)
            self._file.write(np.ascontiguousarray(planes).data)
