"""Arrays on disk in compressed chunks with checksums, of which patches are read at random.

An array is a Zarr v3 array of one shard: `zarr.json`, and a file with the chunks one after the other and their places
at its end. So any Zarr library opens it; but what writes and reads it in training is here, because a patch is a hundred
chunks, and zarr-python spends longer on each than its decompression takes (docs/preprocessing.md has the figures).
Values are kept bit for bit.

Reference: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed (version 1.0).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, BinaryIO

import google_crc32c
import numcodecs.blosc
import numpy as np

from densepred.errors import InputError
from densepred.volumes.volume import full_key, span

CHUNK_VOXELS = {2: 128, 3: 32}
"""Spatial axes -> edge of a chunk, measured by scripts/bench_store.py."""
SMALL = 64**3
"""Voxels up to which an image is one chunk."""
_META = "zarr.json"
_CODEC, _LEVEL = "lz4", 5
_ENTRY = np.dtype([("at", "<u8"), ("size", "<u8")])
_NONE = (1 << 64) - 1  # of a chunk that is all zeros, and so not stored
_SUM = struct.Struct("<I")

Key = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]

numcodecs.blosc.use_threads = False  # chunks are worked on in threads of ours; with its own the bytes would vary


def chunk_shape(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    """Of an array `(*leading, *spatial)`: all of the leading axes, an equal edge along the others, or the whole.

    Example:
        >>> chunk_shape((2, 300, 512, 20), 3)
        (2, 32, 32, 20)
    """
    lead = len(shape) - dims
    if math.prod(shape[lead:]) <= SMALL:
        return tuple(shape)
    return (*shape[:lead], *(min(CHUNK_VOXELS[dims], size) for size in shape[lead:]))


class StoredArray:
    """An array on disk that is indexed as one in memory, with ints and slices of step 1. No file stays open.

    Args:
        folder: what `writing` made.
        damaged: called when a chunk is damaged, before the error is raised.
        case: its id, for messages.

    Attributes:
        shape, dtype, chunk: as they are stored.

    Raises:
        InputError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path, damaged: Callable[[], None] | None = None, case: str | None = None) -> None:
        self.folder, self._damaged, self._case = folder, damaged, case
        try:
            meta = json.loads((folder / _META).read_bytes())
            self.shape: tuple[int, ...] = tuple(meta["shape"])
            self.dtype = np.dtype(meta["data_type"])
            self.chunk: tuple[int, ...] = tuple(meta["codecs"][0]["configuration"]["chunk_shape"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise self._fault(f"the metadata are no such array's ({error})") from error
        self.grid = tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))
        self._file = folder.joinpath("c", *("0" for _ in self.shape))
        self._index: np.ndarray | None = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the array in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)

    def __getitem__(self, key: Key) -> np.ndarray:
        spans = [span(index, size) for index, size in zip(full_key(key, self.shape), self.shape, strict=True)]
        out = np.empty([max(stop - start, 0) for start, stop, _ in spans], self.dtype)
        if out.size:
            self.read_into(out, [(start, stop) for start, stop, _ in spans])
        picked: np.ndarray = out[tuple(inner for _, _, inner in spans)]
        return picked

    def read_into(self, out: np.ndarray, spans: Sequence[tuple[int, int]]) -> None:
        """Put the elements within some (start, stop) of each axis into an array of that shape.

        Raises:
            InputError: a chunk is damaged.
        """
        blocks = [range(a // step, (b - 1) // step + 1) for (a, b), step in zip(spans, self.chunk, strict=True)]
        with self._opened() as file:
            for place in itertools.product(*blocks):
                chunk = self._read(file, place)
                source, target = [], []
                for number, step, (start, stop) in zip(place, self.chunk, spans, strict=True):
                    low, high = max(number * step, start), min((number + 1) * step, stop)
                    source.append(slice(low - number * step, high - number * step))
                    target.append(slice(low - start, high - start))
                out[tuple(target)] = 0 if chunk is None else chunk[tuple(source)]

    def block(self, number: int) -> np.ndarray:
        """The chunk of that number, in C order of the grid, cut to the array.

        Raises:
            InputError: it is damaged.
        """
        return self[tuple(slice(a, a + step) for a, step in zip(self.corner(number), self.chunk, strict=True))]

    def corner(self, number: int) -> tuple[int, ...]:
        """The first element of the chunk of that number."""
        place = np.unravel_index(number, self.grid)
        return tuple(int(at) * step for at, step in zip(place, self.chunk, strict=True))

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            handle = os.open(self._file, os.O_RDONLY)
        except OSError as error:
            raise self._fault(f"the chunks cannot be opened ({error.strerror})") from error
        try:
            if self._index is None:
                self._index = self._places(handle)
            yield handle
        finally:
            os.close(handle)

    def _places(self, handle: int) -> np.ndarray:
        count = int(np.prod(self.grid, dtype=np.int64))
        size = count * _ENTRY.itemsize
        start = os.fstat(handle).st_size - size - _SUM.size
        tail = os.pread(handle, size + _SUM.size, start) if start >= 0 else b""
        if len(tail) < size + _SUM.size or google_crc32c.value(tail[:size]) != _SUM.unpack(tail[size:])[0]:
            raise self._fault("the list of its chunks does not have its checksum")
        return np.frombuffer(tail[:size], _ENTRY).reshape(self.grid)

    def _read(self, handle: int, place: tuple[int, ...]) -> np.ndarray | None:
        """A whole chunk; None if it is all zeros."""
        assert self._index is not None
        at, size = self._index[place].tolist()
        if at == _NONE:
            return None
        try:
            data = os.pread(handle, size, at)
        except OSError as error:
            raise self._fault(f"chunk {place} cannot be read ({error.strerror})") from error
        if len(data) != size or google_crc32c.value(data[:-4]) != _SUM.unpack(data[-4:])[0]:
            raise self._fault(f"chunk {place} does not have its checksum")
        values: np.ndarray = np.frombuffer(numcodecs.blosc.decompress(data[:-4]), self.dtype).reshape(self.chunk)
        return values

    def _fault(self, what: str) -> InputError:
        if self._damaged is not None:
            self._damaged()
        fix = f"run again, and this case is prepared anew; if it happens again, check the disk or remove {self.folder}"
        return InputError(f"the cache is damaged: {what}", fix, self.folder, self._case)


class ArrayWriter:
    """Writes an array of which planes come in order; those of one row of chunks are held. Used in a `with` block.

    Args:
        folder: made here, so in a folder that gets its name only when all is written.
        shape: of the whole, `(*leading, *spatial)`.
        dtype: of its values.
        dims: how many axes are spatial; the planes come along the first of these.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     with ArrayWriter(Path(name) / "a", (1, 40, 8), np.dtype(np.float32), 2) as writer:
        ...         for start in range(0, 40, 10):
        ...             writer.add(np.full((1, 10, 8), start, np.float32))
        ...     float(StoredArray(Path(name) / "a")[0, 25, 3])
        20.0
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: np.dtype, dims: int) -> None:
        self.folder, self.shape, self.dtype, self.axis = folder, tuple(shape), np.dtype(dtype), len(shape) - dims
        self.chunk = chunk_shape(self.shape, dims)
        self.grid = tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))
        self._row = np.zeros(
            (*self.shape[: self.axis], self.chunk[self.axis], *self.shape[self.axis + 1 :]), self.dtype
        )
        self.done = 0
        self._places: list[tuple[int, int]] = []
        self._at = 0
        self._out: BinaryIO

    def __enter__(self) -> ArrayWriter:
        part = self.folder.joinpath("c", *("0" for _ in self.shape))
        part.parent.mkdir(parents=True)
        self._out = open(part, "xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._out:
            if kind is not None:
                return
            if self.done != self.shape[self.axis]:
                raise ValueError(f"{self.shape[self.axis]} planes must be written, got {self.done}")
            index = np.array(self._places, "<u8").tobytes()
            self._out.write(index + _SUM.pack(google_crc32c.value(index)))
        part = self.folder / _META
        part.write_text(json.dumps(self._meta(), indent=1))

    def add(self, planes: np.ndarray) -> None:
        """The next planes, `(*leading, n, *rest)`."""
        lead, start = (slice(None),) * self.axis, 0
        count = planes.shape[self.axis]
        while start < count:
            at = self.done % self.chunk[self.axis]
            n = min(count - start, self.chunk[self.axis] - at)
            self._row[(*lead, slice(at, at + n))] = planes[(*lead, slice(start, start + n))]
            self.done, start = self.done + n, start + n
            if self.done % self.chunk[self.axis] == 0 or self.done == self.shape[self.axis]:
                self._flush(at + n)

    def _flush(self, filled: int) -> None:
        """Write the row of chunks whose first planes are filled."""
        self._row[(*(slice(None),) * self.axis, slice(filled, None))] = 0
        behind = list(zip(self.grid, self.chunk, strict=True))[self.axis + 1 :]
        for place in itertools.product(*(range(n) for n, _ in behind)):
            cut = tuple(slice(n * step, (n + 1) * step) for n, (_, step) in zip(place, behind, strict=True))
            values = self._row[(*(slice(None),) * (self.axis + 1), *cut)]
            if values.shape != self.chunk:
                pads = [(0, step - size) for step, size in zip(self.chunk, values.shape, strict=True)]
                values = np.pad(values, pads)
            self._put(np.ascontiguousarray(values))

    def _put(self, values: np.ndarray) -> None:
        if not values.view(f"u{values.itemsize}").any():  # of bits, so that a -0.0 is kept
            self._places.append((_NONE, _NONE))
            return
        data = numcodecs.blosc.compress(values, _CODEC.encode(), _LEVEL, numcodecs.blosc.BITSHUFFLE)
        self._out.write(data + _SUM.pack(google_crc32c.value(data)))
        self._places.append((self._at, len(data) + _SUM.size))
        self._at += len(data) + _SUM.size

    def _meta(self) -> dict[str, Any]:
        """The metadata of a Zarr v3 array."""
        whole = [n * step for n, step in zip(self.grid, self.chunk, strict=True)]
        little: dict[str, Any] = {"name": "bytes"}
        if self.dtype.itemsize > 1:
            little["configuration"] = {"endian": "little"}
        blosc = {"cname": _CODEC, "clevel": _LEVEL, "shuffle": "bitshuffle", "typesize": self.dtype.itemsize}
        inner = [little, {"name": "blosc", "configuration": {**blosc, "blocksize": 0}}, {"name": "crc32c"}]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        shards = {"chunk_shape": self.chunk, "codecs": inner, "index_codecs": index, "index_location": "end"}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": shards}],
            "attributes": {},
        }
