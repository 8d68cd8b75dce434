"""The tiles of a compressed image, decoded many at a time; what is rare is left to astropy.

astropy takes some twenty steps in Python for each tile, and a tile is mostly one row. Here are RICE and gzip, of
integers, of floats without loss, and of quantised floats, as `fpack`, astropy and our writer make them.

Reference: FITS standard 4.0, sections 10.1 (the table of tiles), 10.2 (quantised floats), 10.4 (codecs) and appendix I
(the random numbers of dithering).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeAlias

import imagecodecs
import numpy as np
from astropy.io import fits
from isal import isal_zlib
from numpy.lib.stride_tricks import sliding_window_view

from densepred.volumes.fits_scan import TYPES, Hdu

Octets: TypeAlias = "Any"
"""A memoryview, which `imagecodecs` takes but does not name among its types."""
_FORMS = {"P": (">i4", (2,)), "Q": (">i8", (2,)), "J": ">i4", "E": ">f4", "D": ">f8"}
_DITHERS = ("NO_DITHER", "SUBTRACTIVE_DITHER_1", "SUBTRACTIVE_DITHER_2")
_ZERO = -2147483646  # a float 0.0, in SUBTRACTIVE_DITHER_2
_RANDOMS = 10000
_BATCH = 1 << 16  # pixels of small tiles that are decoded at once
_SHORT = 1 << 14  # bytes of a tile that cannot do harm, whatever they expand to
_SLACK = 1 << 20
_GUARD = b"\xff" * 16  # behind what is decoded: RICE looks for the next bit that is set


class UnusualError(Exception):
    """Only astropy can read this, or say what is wrong with it."""


class TileReader:
    """The tiles of one compressed image.

    Args:
        file: the content of the file, uncompressed.
        hdu: the compressed image in it.

    Raises:
        UnusualError: a codec, a column or a setting that is not known here.
    """

    def __init__(self, file: IO[bytes], hdu: Hdu) -> None:
        header = hdu.header
        self._file, self._hdu = file, hdu
        self._codec = str(header["ZCMPTYPE"]).strip().removesuffix("_1").removesuffix("_ONE")
        self._stored = np.dtype(TYPES[hdu.bitpix])
        self._row = _row_type(header)
        self._heap = hdu.data + int(header.get("THEAP", header["NAXIS1"] * header["NAXIS2"]))
        self._heap_bytes = hdu.data + hdu.size - self._heap
        count = len(hdu.shape)
        sizes = [header.get(f"ZTILE{count - axis}", 1 if axis < count - 1 else hdu.shape[-1]) for axis in range(count)]
        self._tile = tuple(int(size) for size in sizes)
        self._quantised = "ZSCALE" in self._names
        self._coded = np.dtype(np.int32) if self._quantised else self._stored
        if self._codec == "RICE":
            self._nblock = int(_setting(header, "BLOCKSIZE", 32))
            self._coded = np.dtype({1: "u1", 2: "i2", 4: "i4"}.get(int(_setting(header, "BYTEPIX", 4)), "V"))
        self._dither = str(header.get("ZQUANTIZ", "NO_DITHER")).strip()
        self._seed = int(header.get("ZDITHER0", 1))
        self._blank = header.get("ZBLANK", header.get("BLANK"))
        self._check()

    @property
    def _names(self) -> Sequence[str]:
        return self._row.names or ()

    def _check(self) -> None:
        floats, names = self._stored.kind == "f", set(self._names)
        known = {"COMPRESSED_DATA", "GZIP_COMPRESSED_DATA", "ZSCALE", "ZZERO", "ZBLANK"}
        rare = "COMPRESSED_DATA" not in names or not names <= known or self._codec not in ("RICE", "GZIP", "GZIP_2")
        rare |= self._heap_bytes < 0 or ("ZBLANK" in names and not self._quantised)
        if self._quantised:
            rare |= not floats or "ZZERO" not in names or self._dither not in _DITHERS
            rare |= self._coded != np.int32 or self._seed < 1
        elif floats:
            rare |= self._codec == "RICE" or self._blank is not None
        elif self._codec == "RICE":
            rare |= self._coded.kind == "V" or self._coded.itemsize < self._stored.itemsize
        if rare:
            raise UnusualError

    def read(self, out: np.ndarray, window: Sequence[tuple[int, int]]) -> None:
        """Fill `out`, of the stored type in native byte order, with a window of the image.

        Raises:
            UnusualError: a tile is damaged, or is stored in a way that is not known here.
        """
        grid = [range(start // size, -(-stop // size)) for (start, stop), size in zip(window, self._tile, strict=True)]
        edges = [
            [(n * size, min((n + 1) * size, whole)) for n in axis]
            for axis, size, whole in zip(grid, self._tile, self._hdu.shape, strict=True)
        ]
        lengths = functools.reduce(np.multiply.outer, [np.array([b - a for a, b in axis]) for axis in edges])
        sizes = lengths.reshape(-1)
        total = int(sizes.sum())
        counts = [-(-whole // size) for whole, size in zip(self._hdu.shape, self._tile, strict=True)]
        rows = np.ravel_multi_index(np.ix_(*grid), counts).reshape(-1)
        in_order = total == out.size and out.flags.c_contiguous and _in_order(edges)
        flat = out.reshape(-1) if in_order else np.empty(total, self._stored)
        try:
            self._decode(rows, sizes, flat)
        except (RuntimeError, ValueError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
            raise UnusualError from error
        if not in_order:
            _scatter(flat, edges, out, window)

    def _decode(self, rows: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
        """Decode tiles of `sizes` pixels one behind the other into `out`, some equal ones at a time."""
        table = self._table[rows]
        packed = self._packed(table["COMPRESSED_DATA"], out.nbytes)
        spare = np.flatnonzero(table["COMPRESSED_DATA"][:, 0] == 0)
        if spare.size and "GZIP_COMPRESSED_DATA" not in self._names:
            raise UnusualError
        lossless = self._packed(table["GZIP_COMPRESSED_DATA"][spare], out.nbytes) if spare.size else iter(())
        for tiles, pixels, size in _equal(sizes):
            target = out[pixels].reshape(-1, size)
            some = list(itertools.islice(packed, len(target)))  # all at once would keep the garbage collector busy
            self._decode_equal(some, table[tiles], rows[tiles], target)
        starts = np.cumsum(sizes) - sizes
        for number, data in zip(spare.tolist(), lossless, strict=True):
            start = int(starts[number])
            _gunzip([data], out[np.newaxis, start : start + int(sizes[number])], shuffled=False)

    def _decode_equal(self, packed: list[Octets], table: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode tiles into `out`, `(len(packed), pixels)`; what is empty is left for later."""
        coded = out if self._coded == self._stored else np.empty(out.shape, self._coded)
        if self._codec == "RICE":
            for data, tile in zip(packed, coded, strict=True):
                if data:
                    imagecodecs.rcomp_decode(data, nblock=self._nblock, out=tile)
        else:
            _gunzip(packed, coded, shuffled=self._codec == "GZIP_2")
        if self._quantised:
            self._dequantise(coded, out, table, rows)
        elif coded is not out:
            out[...] = coded

    @functools.cached_property
    def _table(self) -> np.ndarray:
        self._file.seek(self._hdu.data)
        count = int(self._hdu.header["NAXIS2"])
        return np.frombuffer(self._file.read(count * self._row.itemsize), self._row, count)

    def _packed(self, places: np.ndarray, expected: int) -> Iterator[Octets]:
        """The compressed bytes of tiles, read at once where they lie together."""
        sizes, offsets = places.astype(np.int64).T
        within = (sizes >= 0) & (offsets >= 0) & (sizes <= self._heap_bytes) & (offsets <= self._heap_bytes - sizes)
        if not within.all() or sizes.sum() > 2 * expected + _SLACK:
            raise UnusualError
        held = sizes > 0
        first = int(offsets[held].min(initial=self._heap_bytes))
        last = int((offsets + sizes)[held].max(initial=first))
        if last - first > 2 * sizes.sum() + _SLACK:
            return (self._piece(at, size)[:size] for size, at in zip(sizes.tolist(), offsets.tolist(), strict=True))
        data, starts = self._piece(first, last - first), offsets - first
        return map(data.__getitem__, map(slice, starts.tolist(), (starts + sizes).tolist()))

    def _piece(self, offset: int, size: int) -> Octets:
        held = bytearray(size + len(_GUARD))
        held[size:] = _GUARD
        self._file.seek(self._heap + offset)
        if self._file.readinto(memoryview(held)[:size]) != size:  # type: ignore[attr-defined]
            raise UnusualError
        return memoryview(held)

    def _dequantise(self, coded: np.ndarray, out: np.ndarray, table: np.ndarray, rows: np.ndarray) -> None:
        """Scale integers back to floats, in float64 as `funpack` does."""
        values = self._undithered(coded, rows)
        values *= table["ZSCALE"].astype(np.float64)[:, np.newaxis]
        values += table["ZZERO"].astype(np.float64)[:, np.newaxis]
        if self._dither == "SUBTRACTIVE_DITHER_2":
            values[coded == _ZERO] = 0
        if "ZBLANK" in self._names:
            values[coded == table["ZBLANK"][:, np.newaxis]] = np.nan
        elif self._blank is not None:
            values[coded == self._blank] = np.nan
        out[...] = values

    def _undithered(self, integers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self._dither == "NO_DITHER":
            return integers.astype(np.float64)
        values = integers - _noise((rows + self._seed - 1) % _RANDOMS, integers.shape[1])
        values += 0.5
        return np.asarray(values)


def _equal(sizes: np.ndarray) -> Iterator[tuple[slice, slice, int]]:
    """Runs of tiles of one size, and their pixels, up to a batch at a time."""
    at = 0
    for start, stop in itertools.pairwise([0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]):
        size = int(sizes[start])
        step = max(1, _BATCH // size)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            end = at + (last - first) * size
            yield slice(first, last), slice(at, end), size
            at = end


def _gunzip(packed: list[Octets], out: np.ndarray, shuffled: bool) -> None:
    """Decompress big-endian values into native ones, `(len(packed), pixels)`; `shuffled`: sorted by bytes' weight."""
    expected = out.nbytes // len(out)
    tiles = [_gunzip_one(data, expected) for data in packed]
    octets = np.frombuffer(tiles[0] if len(tiles) == 1 else b"".join(tiles), np.uint8)
    size = out.dtype.itemsize
    if not shuffled or size == 1:
        out[...] = octets.view(out.dtype.newbyteorder(">")).reshape(out.shape)
        return
    bits = out.view(f"u{size}")
    planes = octets.reshape(len(out), size, -1)
    bits[...] = planes[:, 0]
    for weight in range(1, size):
        np.left_shift(bits, 8, out=bits)
        np.bitwise_or(bits, planes[:, weight], out=bits)


def _gunzip_one(data: Octets, expected: int) -> bytes:
    """`expected` bytes, zeros where there are no data; libdeflate is faster, but takes long to begin."""
    if not data:
        return bytes(expected)
    short = len(data) <= _SHORT
    tile = isal_zlib.decompress(data, 31, expected) if short else bytes(imagecodecs.gzip_decode(data, out=expected))
    if len(tile) != expected:
        raise UnusualError
    return tile


def _in_order(edges: list[list[tuple[int, int]]]) -> bool:
    """Whether tiles follow each other in the image as they do in the table."""
    axis = 0
    while axis < len(edges) and all(stop - start == 1 for start, stop in edges[axis]):
        axis += 1
    return all(len(along) == 1 for along in edges[axis + 1 :])


def _scatter(
    flat: np.ndarray, edges: list[list[tuple[int, int]]], out: np.ndarray, window: Sequence[tuple[int, int]]
) -> None:
    """Put decoded tiles where they belong, less what lies outside of the window."""
    at = 0
    for place in np.ndindex(*[len(along) for along in edges]):
        box = [along[n] for along, n in zip(edges, place, strict=True)]
        shape = [stop - start for start, stop in box]
        tile = flat[at : at + math.prod(shape)].reshape(shape)
        at += tile.size
        inner, outer = [], []
        for (start, stop), (first, last) in zip(box, window, strict=True):
            low, high = max(start, first), min(stop, last)
            inner.append(slice(low - start, high - start))
            outer.append(slice(low - first, high - first))
        out[tuple(outer)] = tile[tuple(inner)]


def _row_type(header: fits.Header) -> np.dtype:
    """The type of a row of the table."""
    names, forms = [], []
    for column in range(1, int(header["TFIELDS"]) + 1):
        found = re.fullmatch(r"1?(?:([PQ])B.*|([JED]))", str(header.get(f"TFORM{column}", "")).strip())
        if found is None or f"TSCAL{column}" in header or f"TZERO{column}" in header:
            raise UnusualError
        names.append(str(header.get(f"TTYPE{column}", "")).strip().upper())
        forms.append(_FORMS[found[1] or found[2]])
    if len(set(names)) < len(names) or "" in names:
        raise UnusualError
    described: Any = {"names": names, "formats": forms}
    dtype = np.dtype(described)
    if dtype.itemsize != header["NAXIS1"]:
        raise UnusualError
    return dtype


def _setting(header: fits.Header, name: str, default: int) -> Any:
    """One of the codec's own settings, ZNAMEn and ZVALn."""
    for number in range(1, 100):
        if str(header.get(f"ZNAME{number}", "")).strip().upper() == name:
            return header.get(f"ZVAL{number}", default)
    return default


@functools.cache
def _randoms() -> np.ndarray:
    """The standard's sequence: seed * 16807 modulo 2^31 - 1, as a fraction in float32."""
    out, seed = np.empty(_RANDOMS, np.float32), 1
    for at in range(_RANDOMS):
        seed = seed * 16807 % 2147483647
        out[at] = seed / 2147483647
    return out


def _noise(first: np.ndarray, size: int) -> np.ndarray:
    """`(len(first), size)` random numbers: for each tile from its own place in the sequence, again and again."""
    begins = (_randoms() * np.float32(500)).astype(int)
    randoms = _randoms().astype(np.float64)
    if size <= _RANDOMS - 500:
        return np.asarray(sliding_window_view(randoms, size)[begins[first]])
    out = np.empty((len(first), size))
    for row, place in zip(out, first.tolist(), strict=True):
        at = 0
        while at < size:
            piece = randoms[begins[place] :][: size - at]
            row[at : at + piece.size] = piece
            at, place = at + piece.size, (place + 1) % _RANDOMS
    return out
