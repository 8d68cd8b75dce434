"""HDF5 by the path of a dataset, `cells.h5[raw]`: chunked, compressed and checksummed on writing.

Spacing is in micrometres where the dataset has the attribute `element_size_um` (z, y, x), as plant-seg and ilastik
write it, else 1 without a unit. What its axes hold is told by `axes`, else by ilastik's `axistags`, else two axes
are (Y, X) and three (Z, Y, X).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from densepred.errors import DensepredError, InputError
from densepred.files import atomic_path
from densepred.volumes.arrays import (
    FileArray,
    SlabSink,
    assumed,
    create,
    declared,
    micrometres,
    stored_dtype,
    stranger,
)
from densepred.volumes.volume import Volume

try:
    import h5py
except ImportError as error:
    raise InputError("HDF5 files need h5py", "pip install h5py") from error

from densepred.volumes.hdf5_chunks import Chunks

SIZE, UNITLESS, LABELS, TAGS = "element_size_um", "element_size", "labels", "axistags"
"""Attributes: voxel size in micrometres, or without a unit; whether values are classes; what the axes hold (vigra)."""
_CACHE = 1 << 26  # bytes of decoded chunks that are kept, so that slabs do not decode a chunk over and over
_BUFFER = 1 << 26  # bytes of planes that gather to whole chunks
_FIX = "get the file again from its source"


@dataclass(frozen=True)
class Hdf5Header:
    """What a volume keeps of its dataset.

    Args:
        dataset: its path in the file.
        unit: "um" where the spacing is in micrometres, else None.
    """

    dataset: str
    unit: str | None = None


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a dataset; its values are left for later.

    Args:
        path: an HDF5 file.
        axes: what the stored axes hold, one of `arrays.AXES`, where the file does not say or is wrong.
        part: the path of the dataset; None if the file holds one image.

    Raises:
        InputError: no HDF5 file, truncated, several images and no `part`, or axes that are not plain.

    Example:
        >>> read("cells.h5", part="raw").spacing  # doctest: +SKIP
        (0.28, 0.13, 0.13)
    """
    path = Path(path)
    stored = Hdf5Array(path, part)
    try:
        if axes is None:
            letters = _stated(stored.data, path) or assumed(stored.shape, path)
        else:
            letters = declared(stored.shape, axes, path)
        array = FileArray(stored, letters, path)
        spacing, unit = _spacing(stored.data, len(array.shape) - 1, path)
        labels = bool(_attribute(stored.data, LABELS, path)) and array.dtype.kind in "iu"
    except InputError:
        stored.close()
        raise
    return Volume(array, spacing, header=Hdf5Header(stored.data.name, unit), path=path, labels=labels)


class Hdf5Array:
    """A dataset of a file that is open for reading.

    Raises:
        InputError: as `read`.
    """

    def __init__(self, path: Path, part: str | None) -> None:
        self._path = path
        try:
            self._file = h5py.File(path, "r", rdcc_nbytes=_CACHE)
        except OSError as error:
            raise _unopened(error, path) from error
        try:
            self.data = _choose(self._file, part, path)
            self._chunks = Chunks(self.data, path)
        except DensepredError:
            self.close()
            raise
        self.shape, self.dtype = self.data.shape, self.data.dtype

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """See `Stored.read`.

        Raises:
            InputError: a chunk is damaged, or packed by a filter that is not there.
        """
        try:
            self._chunks.check(key)
            return np.asarray(self.data[key])
        except OSError as error:
            cause = re.sub(r"^.*?\(|\)$", "", str(error).strip())
            cause = "a chunk is damaged" if cause.startswith("filter returned failure") else cause
            fix = "write it with gzip compression" if "filter" in cause and "plugin" in cause else _FIX
            raise InputError(f"'{self.data.name}' cannot be read ({cause})", fix, self._path) from error

    def verify(self) -> None:
        """HDF5 checks the checksum of a chunk, where it has one, as it is read."""

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _unopened(error: OSError, path: Path) -> Exception:
    cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", str(error))
    if cut:
        return InputError(f"truncated: holds {cut[1]} of {cut[2]} bytes", _FIX, path)
    if "signature not found" in str(error):
        return stranger("HDF5", path)
    if error.errno:
        return error
    cause = re.sub(r"^.*?\(|\)$", "", str(error).strip())
    return InputError(f"the HDF5 file is broken ({cause})", _FIX, path)


def _choose(file: Any, part: str | None, path: Path) -> Any:
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biuf" and len(item.shape or ()) >= 2:
            found[name] = item

    try:
        if part is None:
            file.visititems(note)
            chosen = next(iter(found.values())) if len(found) == 1 else None
        else:
            chosen = file.get(part)
        if chosen is None or not isinstance(chosen, h5py.Dataset):
            if part is not None:
                file.visititems(note)
            raise _which(found, part, path)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"the HDF5 file is broken ({str(error)[:150]})", _FIX, path) from error
    if chosen.is_virtual or chosen.external or chosen.file.filename != file.filename:
        what = f"'{chosen.name}' keeps its values in other files, which may be missing"
        raise InputError(what, "copy it into one file with h5repack", path)
    if len(chosen.shape or ()) < 2:
        raise InputError(f"'{chosen.name}' is no image: its shape is {chosen.shape}", "choose another dataset", path)
    return chosen


def _which(found: dict[str, Any], part: str | None, path: Path) -> InputError:
    if not found:
        return InputError("holds no dataset of at least two axes", "choose another file", path)
    listed = "; ".join(f"[{name}] {item.shape} {item.dtype}" for name, item in list(found.items())[:20])
    listed += "; ..." if len(found) > 20 else ""
    what = f"holds {len(found)} images: {listed}" if part is None else f"has no dataset [{part}], but {listed}"
    return InputError(what, f"say which: '{path.name}[{next(iter(found))}]'", path)


def _stated(data: Any, path: Path) -> str | None:
    """The letters of `FileArray` by the file's own word, or None."""
    try:
        names = [str(axis["key"]) for axis in json.loads(_attribute(data, TAGS, path))["axes"]]
    except (KeyError, TypeError, ValueError):
        return None
    letters = "".join(
        "1" if size == 1 and name in "tc" else name for name, size in zip(names, data.shape, strict=False)
    )
    if len(names) != len(data.shape) or not set(letters) <= set("1tczyx"):
        return None
    if "t" in letters:
        what = f"'{data.name}' holds {data.shape[letters.index('t')]} times"
        raise InputError(what, "save each time as a dataset of its own", path)
    once = all(letters.count(letter) == 1 for letter in "yx") and max(map(letters.count, "zc")) <= 1
    return letters if once else None


def _attribute(data: Any, name: str, path: Path) -> Any:
    """The value of an attribute, or None."""
    try:
        return data.attrs.get(name, None)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"the HDF5 file is broken ({str(error)[:150]})", _FIX, path) from error


def _spacing(data: Any, dims: int, path: Path) -> tuple[tuple[float, ...], str | None]:
    micrometres, plain = _attribute(data, SIZE, path), _attribute(data, UNITLESS, path)
    stated, name = (plain, UNITLESS) if micrometres is None else (micrometres, SIZE)
    if stated is None:
        return (1.0,) * dims, None
    try:
        sizes = [float(size) for size in np.ravel(stated)]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) not in (dims, 3) or not all(0 < size < np.inf for size in sizes):
        what = f"impossible voxel size of '{data.name}': {name} = {np.ravel(stated).tolist()}"
        raise InputError(what, "write (z, y, x) in micrometres there", path)
    return tuple(sizes[-dims:]), "um" if name == SIZE else None


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[SlabSink]:
    """Write a file of one dataset slab by slab; it gets its name only once it is whole and has been read back.

    Args:
        path: an HDF5 file. The dataset is `label` for classes, `raw` for as many channels as `like` has, else
            `predictions`.
        like: gives the grid and the voxel size.
        dtype: of the values; `SlabSink.dtype` is what is stored.
        channels: more than one become the first axis.
        labels: the values are classes; the dataset says so.

    Raises:
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    name = "label" if labels else "raw" if channels == like.shape[0] else "predictions"
    stored = stored_dtype(np.dtype(dtype), labels)
    with (
        atomic_path(path, lambda part: writer.compare(lambda: read(part))) as part,
        create(part) as file,
        _sheltered(file) as shelter,
        h5py.File(shelter, "w", libver=("v110", "v110")) as target,
    ):
        writer = Writer(target, shelter, name, (channels, *like.shape[1:]), stored)
        factor = micrometres(like)
        if factor or set(like.spacing) != {1.0}:
            writer.data.attrs[SIZE if factor else UNITLESS] = [size * (factor or 1.0) for size in like.spacing]
        if labels:
            writer.data.attrs[LABELS] = True
        yield writer
        writer.finish()


class _Sheltered:
    """A file that keeps the faults of writing from HDF5, which does not survive a full disk.

    The first fault is raised by `check`; what HDF5 writes after it is lost with the file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file
        self._fault: OSError | None = None

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file; what is buffered may be written here."""
        return self._shelter(self._file.seek, offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._shelter(self._file.tell)

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        return self._shelter(self._file.read, size) or b""

    def readinto(self, target: Any) -> int:
        """As of a file."""
        return self._shelter(self._file.readinto, target)

    def write(self, data: Any) -> int:
        """As of a file."""
        return self._shelter(self._file.write, data)

    def truncate(self, size: int | None = None) -> int:
        """As of a file."""
        return self._shelter(self._file.truncate, size)

    def flush(self) -> None:
        """As of a file."""
        self._shelter(self._file.flush)

    def _shelter(self, action: Callable[..., Any], *given: Any) -> Any:
        if self._fault is None:
            try:
                return action(*given)
            except OSError as fault:
                self._fault = fault
        return 0

    def check(self) -> None:
        """Raise the first fault."""
        if self._fault is not None:
            raise self._fault


@contextmanager
def _sheltered(file: IO[bytes]) -> Iterator[_Sheltered]:
    shelter = _Sheltered(file)
    try:
        yield shelter
    finally:
        shelter.check()


class Writer(SlabSink):
    """Gathers planes to whole chunks; made by `open_writer`."""

    def __init__(self, file: Any, shelter: _Sheltered, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        self._shelter = shelter
        plane = shape[0] * int(np.prod(shape[2:], dtype=np.int64)) * dtype.itemsize
        self._depth = max(1, min(shape[1], _BUFFER // plane, 32 if len(shape) == 4 else 256))
        self._held: list[np.ndarray] = []
        self._done = 0
        chunks = (1, self._depth, *(min(size, 128 if len(shape) == 4 else 256) for size in shape[2:]))
        stored, chunks = (shape, chunks) if shape[0] > 1 else (shape[1:], chunks[1:])
        self.data = file.create_dataset(
            name, stored, dtype, chunks=chunks, compression="gzip", compression_opts=4, shuffle=True, fletcher32=True
        )
        keys = ("czyx" if len(shape) == 4 else "cyx")[-len(stored) :]
        tags = [{"key": key, "typeFlags": 1 if key == "c" else 2, "resolution": 0, "description": ""} for key in keys]
        # of fixed length: HDF5 has no checksum for other strings, and may hang where they are damaged
        self.data.attrs[TAGS] = np.bytes_(json.dumps({"axes": tags}))

    def _put(self, slab: np.ndarray, start: int) -> None:
        while slab.shape[1]:
            room = self._depth - sum(part.shape[1] for part in self._held)
            self._held.append(slab[:, :room].copy() if slab.shape[1] < room else slab[:, :room])
            slab = slab[:, room:]
            if sum(part.shape[1] for part in self._held) == self._depth:
                self._flush()

    def _flush(self) -> None:
        if self._held:
            block = np.concatenate(self._held, axis=1)
            planes = slice(self._done, self._done + block.shape[1])
            if self.shape[0] > 1:
                self.data[:, planes] = block
            else:
                self.data[planes] = block[0]
            self._shelter.check()
            self._done = planes.stop
            self._held = []

    def finish(self) -> None:
        """See `SlabSink.finish`."""
        super().finish()
        self._flush()
