"""Where the data of an output HDU go: into their place in the file, or compressed by tiles into a heap.

Tiles are compressed without loss as GZIP_2 (bytes of like weight together, then gzip), which all readers know.
Reference: FITS standard 4.0, section 10 (tile-compressed images).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np
from astropy.io import fits
from isal import igzip

from densepred.volumes.fits_sums import add_sums, padding, sealed, sum_of

TILE_BYTES = 1 << 17
"""A tile holds as many whole rows of an image as fit into this, at least one."""
_LEVEL = 2
_SHORT = 1 << 30
"""Below so many bytes of data the offsets into the heap have 32 bits."""

Sealed: TypeAlias = "tuple[bytes, int, int]"
"""Of an HDU on disk: its header, the length of its data with padding, their sum."""


@dataclass
class Image:
    """One image HDU of an output.

    Args:
        header: whole but for its sums; of a compressed one, the table's with TFORM1, NAXISn and PCOUNT still to come.
        shape: as stored, in numpy's order.
        dtype: the type of the values, in native order.
        channels: which channels of the slabs it takes.
        position: of the channels among the stored axes that are not of length 1; 0: they are the slowest.
    """

    header: fits.Header
    shape: tuple[int, ...]
    dtype: np.dtype
    channels: range
    position: int = 0

    @property
    def streams(self) -> int:
        """How many pieces of the stored array are filled side by side: all channels of it, where they are slowest."""
        return len(self.channels) if self.position == 0 else 1

    @property
    def stream_shape(self) -> tuple[int, ...]:
        """The shape of the part of the array that one stream fills."""
        if self.streams == 1:
            return self.shape
        slowest = next(axis for axis, size in enumerate(self.shape) if size > 1)
        return (*self.shape[:slowest], 1, *self.shape[slowest + 1 :])

    @property
    def nbytes(self) -> int:
        """Of the array, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


class Sink(Protocol):
    """Takes the values of one HDU."""

    image: Image

    def write(self, stream: int, data: np.ndarray) -> None:
        """Append big-endian values to one stream of the image."""

    def finish(self, file: IO[bytes]) -> Sealed:
        """Complete the HDU; a sink without a place of its own appends it to `file`."""


def big_endian(values: np.ndarray) -> np.ndarray:
    """Values as they lie on disk; unsigned ones less BZERO.

    Example:
        >>> big_endian(np.array([0, 32768], np.uint16)).tolist()
        [-32768, 0]
    """
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        high = values.dtype.type(1 << (8 * values.dtype.itemsize - 1))
        values = (values ^ high).view(f"i{values.dtype.itemsize}")
    return np.ascontiguousarray(values, values.dtype.newbyteorder(">"))


class PlainSink:
    """An image at its place in a file that has its full length already.

    Args:
        image: the HDU.
        file: open for writing, positioned anywhere.
        start: where the HDU starts.
    """

    def __init__(self, image: Image, file: IO[bytes], start: int) -> None:
        self.image, self._file, self._start = image, file, start
        self._data = start + len(image.header.tostring())
        self._stream_bytes = image.nbytes // image.streams
        self._offsets = [stream * self._stream_bytes for stream in range(image.streams)]
        self._sum = 0
        self.end = self._data + image.nbytes + padding(image.nbytes)

    def write(self, stream: int, data: np.ndarray) -> None:
        """See `Sink`."""
        offset = self._offsets[stream]
        self._file.seek(self._data + offset)
        self._file.write(data.reshape(-1).view(np.uint8).data)
        self._sum = add_sums(self._sum, sum_of(data, offset))
        self._offsets[stream] += data.nbytes

    def finish(self, file: IO[bytes]) -> Sealed:
        """Write the header; `file` is the one the data are in."""
        block = sealed(self.image.header, self._sum)
        file.seek(self._start)
        file.write(block)
        return block, self.end - self._data, self._sum


class TileSink:
    """An image compressed tile by tile into an unnamed file, which becomes the heap of a table.

    Args:
        image: the HDU.
        folder: where the unnamed file lies.
        stack: closes it.
    """

    def __init__(self, image: Image, folder: Path, stack: ExitStack) -> None:
        self.image = image
        tile = tile_shape(image.stream_shape, image.dtype.itemsize)
        for axis, size in enumerate(reversed(tile), 1):
            image.header[f"ZTILE{axis}"] = size
        self._heap: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self._heap_bytes = self._heap_sum = 0
        counts = [-(-size // part) for size, part in zip(image.shape, tile, strict=True)]
        self._table = np.zeros((math.prod(counts), 2), ">i8" if image.nbytes >= _SHORT else ">i4")
        self._tile_bytes = math.prod(tile) * image.dtype.itemsize
        self._plane_bytes = plane_bytes(image.stream_shape, image.dtype.itemsize)
        per_stream = len(self._table) // image.streams
        self._next = [stream * per_stream for stream in range(image.streams)]
        self._held = [bytearray() for _ in range(image.streams)]
        self._position = [0] * image.streams

    def write(self, stream: int, data: np.ndarray) -> None:
        """See `Sink`."""
        view = data.reshape(-1).view(np.uint8).data
        held = self._held[stream]
        while len(view):
            within = self._position[stream] % self._plane_bytes
            wanted = min(self._tile_bytes, self._plane_bytes - within)
            if not held and len(view) >= wanted:
                self._emit(stream, view[:wanted])
                view = view[wanted:]
                continue
            taken = min(wanted - len(held), len(view))
            held += view[:taken]
            view = view[taken:]
            if len(held) == wanted:
                self._emit(stream, bytes(held))
                held.clear()

    def _emit(self, stream: int, tile: memoryview | bytes) -> None:
        octets = np.frombuffer(tile, np.uint8).reshape(-1, self.image.dtype.itemsize)
        packed = igzip.compress(np.ascontiguousarray(octets.T).data, _LEVEL, mtime=0)
        self._table[self._next[stream]] = len(packed), self._heap_bytes
        self._next[stream] += 1
        self._position[stream] += len(tile)
        self._heap.write(packed)
        self._heap_sum = add_sums(self._heap_sum, sum_of(packed, self._heap_bytes))
        self._heap_bytes += len(packed)

    def finish(self, file: IO[bytes]) -> Sealed:
        """Append header, table and heap to `file`."""
        header = self.image.header
        form = "Q" if self._table.dtype.itemsize == 8 else "P"
        header["TFORM1"] = f"1{form}B({self._table[:, 0].max()})"
        header["NAXIS1"], header["NAXIS2"] = 2 * self._table.dtype.itemsize, len(self._table)
        header["PCOUNT"] = self._heap_bytes
        total = add_sums(sum_of(self._table), self._heap_sum)  # the table's length is a multiple of 4
        block = sealed(header, total)
        size = self._table.nbytes + self._heap_bytes
        file.write(block)
        file.write(self._table.tobytes())
        self._heap.seek(0)
        shutil.copyfileobj(self._heap, file, 1 << 22)
        file.write(bytes(padding(size)))
        return block, size + padding(size), total


def _last_axes(shape: Sequence[int]) -> tuple[int, int]:
    """The two fastest axes that are not of length 1, else the last ones."""
    long = [axis for axis, size in enumerate(shape) if size > 1][-2:]
    spare = [axis for axis in reversed(range(len(shape))) if axis not in long]
    while len(long) < 2:
        long.insert(0, spare.pop(0))
    return long[0], long[1]


def tile_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Whole rows of one plane, as many as fit into `TILE_BYTES`.

    Example:
        >>> tile_shape((3, 1000, 2000), 4)
        (1, 16, 2000)
    """
    plane, row = _last_axes(shape)
    out = [1] * len(shape)
    out[row] = shape[row]
    out[plane] = min(shape[plane], max(1, TILE_BYTES // (shape[row] * itemsize)))
    return tuple(out)


def plane_bytes(shape: Sequence[int], itemsize: int) -> int:
    """The bytes of one plane, which tiles never leave."""
    plane, row = _last_axes(shape)
    return shape[plane] * shape[row] * itemsize


def table_cards(image_cards: fits.Header) -> fits.Header:
    """The structural cards of a compressed image: those of its table, and `image_cards` with their prefix Z."""
    header = fits.Header()
    header["XTENSION"], header["BITPIX"], header["NAXIS"] = "BINTABLE", 8, 2
    header["NAXIS1"], header["NAXIS2"], header["PCOUNT"], header["GCOUNT"] = 0, 0, 0, 1
    header["TFIELDS"], header["TTYPE1"], header["TFORM1"] = 1, "COMPRESSED_DATA", "1PB(0)"
    header["ZIMAGE"], header["ZCMPTYPE"] = True, "GZIP_2"
    for card in image_cards.cards:
        header.append(card, end=True)
    if image_cards["ZBITPIX"] < 0:
        header["ZQUANTIZ"] = "NONE"
    for axis in range(1, image_cards["ZNAXIS"] + 1):
        header[f"ZTILE{axis}"] = 1
    return header
