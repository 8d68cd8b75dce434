"""What plain array formats share: which stored axis is which, reading in stored order, and taking slabs forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from isal import isal_zlib

from densepred.errors import InputError, ResourceError
from densepred.volumes.volume import Key, Volume, check_memory, full_key, spacing_affine, span

AXES = ("yx", "cyx", "yxc", "zyx", "czyx", "zcyx", "zyxc")
"""How stored axes may be declared, slowest first: c channels, z planes, y rows, x columns."""
_FLOAT32_EXACT = 1 << 24
"""Integers up to here are exact in float32."""
_FEW, _MANY = 4, 16  # an axis of at most 4 beside axes of at least 16 may hold channels
_MICROMETRES = {"um": 1.0, "micron": 1.0, "mm": 1e3, "meter": 1e6}


class Stored(Protocol):
    """An array in a file, in the order of its axes there."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """The values of a box, one slice with start and stop per axis."""

    def verify(self) -> None:
        """Raise InputError where the file is damaged."""

    def close(self) -> None:
        """Let go of the file."""


class FileArray:
    """A stored array as `(C, *spatial)`, read where it is asked for.

    Args:
        stored: the array in its file.
        letters: one of "czyx" per stored axis, or "1" for an axis of size 1 that is dropped.
        path: for messages.

    Raises:
        InputError: the values are no real numbers, or there are none.
    """

    def __init__(self, stored: Stored, letters: str, path: Path) -> None:
        if stored.dtype.kind not in "biuf" or stored.dtype.itemsize > 8:
            fix = "save it with one real number per voxel"
            raise InputError(f"voxels of type {stored.dtype} are not supported", fix, path)
        if min(stored.shape) < 1:
            raise InputError(f"impossible sizes: {stored.shape}", "get the file again from its source", path)
        self._stored, self._letters, self._path = stored, letters, path
        self._order = [letters.index(letter) for letter in "czyx" if letter in letters]
        spatial = [stored.shape[letters.index(letter)] for letter in "zyx" if letter in letters]
        self.shape = (stored.shape[letters.index("c")] if "c" in letters else 1, *spatial)
        self.dtype = np.dtype(np.uint8) if stored.dtype.kind == "b" else stored.dtype.newbyteorder("=")

    def __getitem__(self, key: Key) -> np.ndarray:
        spans = [span(index, size) for index, size in zip(full_key(key, self.shape), self.shape, strict=True)]
        lengths = [stop - start for start, stop, _ in spans]
        size = self.dtype.itemsize
        for length in lengths:
            size *= length
        check_memory(size, self._path)
        if not size:
            return np.empty(lengths, self.dtype)[tuple(inner for *_, inner in spans)]
        named = dict(zip("c" + "zyx"[-len(self.shape) + 1 :], spans, strict=True))
        box = tuple(slice(*named[letter][:2]) if letter != "1" else slice(0, 1) for letter in self._letters)
        values = self._stored.read(box)
        dropped = tuple(axis for axis, letter in enumerate(self._letters) if letter == "1")
        values = values.transpose(*self._order, *dropped).reshape(lengths).astype(self.dtype, copy=False)
        return values[tuple(inner for *_, inner in spans)]

    def verify(self) -> None:
        """See `Volume.verify`."""
        self._stored.verify()

    def close(self) -> None:
        """Let go of the file."""
        self._stored.close()


def declared(shape: tuple[int, ...], axes: str, path: Path) -> str:
    """The letters of `FileArray` for `axes`, one of `AXES`; leading stored axes of size 1 beyond them are dropped.

    Raises:
        InputError: unknown axes, times, or not as many as are stored.

    Example:
        >>> declared((1, 5, 6, 7), "zyx", Path("x.npy"))
        '1zyx'
    """
    if "t" in axes:
        what = f"axes '{axes}' name a time axis, which an image has not"
        raise InputError(what, "save each time as a file of its own", path)
    if axes not in AXES:
        raise InputError(f"axes '{axes}' are not known for this format", f"choose one of {', '.join(AXES)}", path)
    letters = list(axes)
    extra = len(shape) - len(axes)
    for at, size in enumerate(shape):
        if size == 1 and extra > 0:
            letters.insert(at, "1")
            extra -= 1
    if extra:
        what = f"axes '{axes}' were declared and the file has {len(shape)}: {shape}"
        raise InputError(what, "declare the axes that are there", path)
    return "".join(letters)


def assumed(shape: tuple[int, ...], path: Path) -> str:
    """The letters of a shape without any metadata: "yx" or "zyx", where that is plain.

    Raises:
        InputError: an axis may hold channels, or there are too many axes or too few.
    """
    ones = 0
    while len(shape) - ones > 3 and shape[ones] == 1:
        ones += 1
    rest = shape[ones:]
    if len(rest) < 2:
        raise InputError(f"one axis only, so no image: {shape}", "choose another array", path)
    if len(rest) > 3:
        fix = "add `axes: czyx`, `axes: zcyx` or `axes: zyxc`, whichever is right"
        raise InputError(f"{len(shape)} axes {shape}: what lies along them is not declared", fix, path)
    if len(rest) == 3:
        for at, word in ((0, "cyx"), (2, "yxc")):
            others = rest[1:] if at == 0 else rest[:2]
            if rest[at] <= _FEW and rest[at] > 1 and min(others) >= _MANY:
                what = f"3 axes {rest}: the axis of {rest[at]} may hold channels or belong to the space"
                raise InputError(what, f"add `axes: {word}` or `axes: zyx`, whichever is right", path)
    return "1" * ones + "zyx"[-len(rest) :]


def stranger(kind: str, path: Path) -> InputError:
    """The error for a file that is not of the kind its name says."""
    with open(path, "rb") as file:
        head = file.read(200)
    if not head:
        return InputError("the file is empty (0 bytes)", "get the file again from its source", path)
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) >= len(head) - 3 and all(sign.isprintable() or sign.isspace() for sign in text):
        start = text.strip().split("\n")[0][:40]
        return InputError(f"no {kind} file: starts with '{start}'", "get the image itself, not a page of text", path)
    return InputError(f"no {kind} file: starts with the bytes {head[:4].hex(' ')}", "give it its true suffix", path)


def micrometres(like: Volume) -> float | None:
    """How many micrometres the unit of `like.spacing` has, or None where nothing says what the unit is.

    A header tells by its `unit`, a NIfTI header by `xyzt_units` (mm where unset); an affine alone is in mm.
    """
    header: Any = like.header
    if hasattr(header, "get_xyzt_units"):
        return _MICROMETRES.get(header.get_xyzt_units()[0], 1e3)
    if hasattr(header, "unit"):
        return _MICROMETRES.get(header.unit)
    return None if like.affine is None else 1e3


def affine_in_mm(like: Volume) -> np.ndarray:
    """The 4x4 affine of a volume, or that of its spacing, in mm where its unit is known.

    Example:
        >>> affine_in_mm(Volume(np.zeros((1, 2, 2, 2)), (2.0, 1.0, 1.0))).diagonal().tolist()
        [1.0, 1.0, 2.0, 1.0]
    """
    affine = spacing_affine(like.spacing) if like.affine is None else like.affine
    factor = (micrometres(like) or 1e3) / 1e3
    scaled = np.diag([factor, factor, factor, 1.0]) @ affine
    if like.dims == 2:
        scaled[2, 2] = affine[2, 2]  # an image has no thickness
    return np.asarray(scaled)


def stored_dtype(dtype: np.dtype, labels: bool) -> np.dtype:
    """The type that is written for `dtype`: bool as uint8, float16 as float32, 64-bit integers as int32.

    Raises:
        ValueError: labels that are no integers, or a type without numbers.
    """
    if dtype.kind not in "biuf" or (labels and dtype.kind == "f"):
        allowed = "an integer type for labels" if labels else "bool, an integer or a float type"
        raise ValueError(f"dtype must be {allowed}, got {dtype}")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "f":
        return np.dtype(np.float64 if dtype.itemsize >= 8 else np.float32)
    if dtype.itemsize == 8 or (labels and dtype == np.uint32):
        return np.dtype(np.int32)
    return dtype.newbyteorder("=")


def scaled_dtype(stored: np.dtype, scale: float, zero: float) -> np.dtype:
    """The type of `scale * stored + zero`: float32 where its steps are as fine as those stored, else float64.

    Example:
        >>> scaled_dtype(np.dtype("i2"), 0.5, -1024.0), scaled_dtype(np.dtype("i4"), 0.5, 0.0)
        (dtype('float32'), dtype('float64'))
    """
    if stored.kind == "f":
        wide = stored.itemsize == 8 or abs(zero) > _FLOAT32_EXACT
        return np.dtype(np.float64 if wide else np.float32)
    limits = np.iinfo(stored)
    largest = max(abs(scale * limits.min + zero), abs(scale * limits.max + zero))
    wide = largest > _FLOAT32_EXACT * abs(scale) or abs(zero) > _FLOAT32_EXACT
    return np.dtype(np.float64 if wide else np.float32)


def check_slab(slab: np.ndarray, shape: tuple[int, ...], written: int) -> None:
    """Is `slab`, `(C, n, *rest)`, the next planes of a file of `shape` that has `written` of them?

    Raises:
        ValueError: a wrong shape, or planes past the end.
    """
    left = shape[1] - written
    expected = (shape[0], slab.shape[1] if slab.ndim > 1 else -1, *shape[2:])
    if slab.shape != expected or not 0 <= slab.shape[1] <= left:
        allowed = (shape[0], f"up to {left}", *shape[2:])
        raise ValueError(f"slab must have the shape {allowed}, got {slab.shape}")


def as_stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast, refusing to change an integer or a class.

    Raises:
        ValueError: values that the stored type cannot hold.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype.kind in "iu" and not np.can_cast(values.dtype, dtype) and not np.array_equal(cast, values):
        raise ValueError(f"values must fit {dtype}, got {values.min()} to {values.max()} of type {values.dtype}")
    return cast


def create(part: Path) -> IO[bytes]:
    """The unfinished file `part`, opened for writing.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        return open(part, "w+b")
    except PermissionError as error:
        what = f"cannot write to this folder ({error.strerror})"
        raise InputError(what, "choose another folder or change its permissions", part.parent) from error


class SlabSink:
    """Takes slabs forward, checks and casts them, and compares what is read back; a format's writer puts them away.

    Args:
        shape: `(C, *spatial)` of the whole.
        dtype: what is stored.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._written, self._crc = 0, [0] * shape[0]

    def write(self, slab: np.ndarray) -> None:
        """Append the next planes, `(C, n, *rest)`.

        Raises:
            ValueError: a wrong shape, planes past the end, or values that the stored type cannot hold.
        """
        check_slab(slab, self.shape, self._written)
        cast = as_stored(slab, self.dtype)
        self._add(self._crc, cast)
        self._put(cast, self._written)
        self._written += slab.shape[1]

    def finish(self) -> None:
        """All slabs are in.

        Raises:
            ValueError: planes are missing.
        """
        if self._written != self.shape[1]:
            raise ValueError(f"all {self.shape[1]} planes must be written, got {self._written}")

    def compare(self, opened: Callable[[], Volume]) -> None:
        """Read back what was written.

        Args:
            opened: opens it.

        Raises:
            ResourceError: it differs, or cannot be read.
        """
        what, crc = "the file does not read back as it was written", [0] * self.shape[0]
        try:
            with opened() as volume:
                if volume.shape == self.shape and volume.dtype == self.dtype:
                    rows = max(1, (1 << 24) * self.shape[1] // (int(np.prod(self.shape, dtype=np.int64))))
                    for *_, slab in volume.slabs(rows):
                        self._add(crc, slab)
        except InputError as error:
            raise ResourceError(f"{what} ({error.what})", "check the disk", error.file) from error
        if crc != self._crc:
            raise ResourceError(what, "check the disk", volume.path)

    @staticmethod
    def _add(crc: list[int], slab: np.ndarray) -> None:
        for channel, planes in enumerate(slab):
            crc[channel] = isal_zlib.crc32(np.ascontiguousarray(planes).reshape(-1).view(np.uint8).data, crc[channel])

    def _put(self, slab: np.ndarray, start: int) -> None:
        raise NotImplementedError
