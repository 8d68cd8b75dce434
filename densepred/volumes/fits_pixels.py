"""The pixels of one HDU, read by windows; its checksums, taken while it is read or in one pass of their own.

Rows that lie together are read as they are, tiles by `fits_untile`, and everything else through astropy's `section`.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes.fits_guard import check_tiles
from densepred.volumes.fits_scan import Hdu, card, reason
from densepred.volumes.fits_sums import BLOCK, add_sums, sum_of, sum_of_stream
from densepred.volumes.fits_untile import TileReader, UnusualError
from densepred.volumes.fits_values import Values, values_of
from densepred.volumes.volume import Key, check_memory, full_key, span

Checksum: TypeAlias = Literal["verify", "ignore", "require"]
"""What `verify()` does with CHECKSUM and DATASUM: compare those there are, nothing, or refuse a file without them."""
_BLOCK = 1 << 23  # bytes read at once
_PIECE = 1 << 19  # bytes of those that are summed and converted while they are in the processor's cache
_TILES_BLOCK = 1 << 26  # bytes decompressed at once: astropy prepares each call, and reads a whole image's at a time
_ROW_BYTES = 1 << 16  # rows shorter than this are read whole: a call of astropy's costs more
_AGAIN = "get the file again from its source"
_AGAIN_OR_IGNORE = (
    f"{_AGAIN}, or, if it was edited by a program that does not update checksums, say checksum=ignore "
    "(data.checksum=ignore in recipes and predict, --checksum ignore in the other commands)"
)


class FitsPixels:
    """The pixels of an HDU as `shape`, `(C, *spatial)`, an array of its stored shape without axes of length 1.

    Args:
        file: the content of the file, uncompressed.
        hdu: which part of it.
        shape: of the result.
        path: for messages.
        checksum: see `Checksum`.
    """

    def __init__(self, file: IO[bytes], hdu: Hdu, shape: tuple[int, ...], path: Path, checksum: Checksum) -> None:
        self._file, self._hdu, self._path, self._checksum = file, hdu, path, checksum
        try:
            with warnings.catch_warnings(action="ignore"):
                self._open = fits.open(file, memmap=False, lazy_load_hdus=True, do_not_scale_image_data=True)
                self._image = self._open[hdu.index]
                self.header: fits.Header = self._image.header.copy()
                tile = getattr(self._image, "tile_shape", (1,) * len(hdu.shape))
        except Exception as error:  # whatever astropy meets in a broken header
            what = f"HDU {hdu.index}: the header makes no sense ({reason(error)})"
            raise InputError(what, _AGAIN, path) from error
        self._tile = tuple(int(size) for size in tile)
        self._tiles: TileReader | None = None
        if hdu.kind == "compressed":
            with suppress(Exception):  # whatever is rare or broken is left to astropy
                self._tiles = TileReader(file, hdu)
        self._block = _BLOCK if hdu.kind == "image" or self._tiles else _TILES_BLOCK
        self._values = values_of(self.header, hdu.bitpix, hdu.index, path)
        self._plain = self._values == Values(self._values.stored, self._values.stored)
        self._checked = False  # whether its tiles can be left to astropy
        self._summed = self._sum = 0  # how many bytes of the data were read forward, and their sum
        self.shape, self.dtype = shape, self._values.dtype

    def __getitem__(self, key: Key) -> np.ndarray:
        index = full_key(key, self.shape)
        spans = [span(item, size) for item, size in zip(index, self.shape, strict=True)]
        lengths = [stop - start for start, stop, _ in spans]
        check_memory(int(np.prod(lengths, dtype=object)) * self.dtype.itemsize, self._path)
        out = np.empty(lengths, self.dtype)
        if out.size:
            windows = iter(
                [(start, stop) for (start, stop, _), size in zip(spans, self.shape, strict=True) if size > 1]
            )
            stored = [(0, 1) if size == 1 else next(windows) for size in self._hdu.shape]
            self._fill(out.reshape([stop - start for start, stop in stored]), stored)
        return out[tuple(inner for _, _, inner in spans)]

    def _fill(self, out: np.ndarray, window: list[tuple[int, int]]) -> None:
        """Read `window` of the stored array, in pieces up to the size of a block that end where tiles do."""
        size = out.size * self._values.stored.itemsize
        for axis, (start, stop) in enumerate(window):
            step = _pieces((stop - start) * self._block // size, self._tile[axis])
            if step < stop - start:
                first = start
                while first < stop:
                    last = min(stop, (first + step) // self._tile[axis] * self._tile[axis])
                    piece = [*window[:axis], (first, last), *window[axis + 1 :]]
                    chosen = (slice(None),) * axis + (slice(first - start, last - start),)
                    self._fill(out[chosen], piece)
                    first = last
                return
        self._read(out, window)

    def _read(self, out: np.ndarray, window: list[tuple[int, int]]) -> None:
        if self._tiles is not None:
            if self._untile(out, window):
                return
            self._tiles, self._block = None, _TILES_BLOCK  # astropy knows more, or says what is wrong
        if self._hdu.kind == "compressed" and not self._checked:
            check_tiles(self._file, self._hdu, self._path)
            self._checked = True
        if self._hdu.kind == "image" and out.flags.c_contiguous and (at := self._run(window)) is not None:
            self._read_run(at, out.reshape(-1))
            return
        width = self._hdu.shape[-1]
        start, stop = window[-1]
        whole = self._hdu.kind == "image" and width * self._values.stored.itemsize <= _ROW_BYTES
        if whole:
            window = [*window[:-1], (0, width)]
        try:
            with warnings.catch_warnings(action="ignore"):
                raw = self._image.section[tuple(slice(*ends) for ends in window)]
        except MemoryError:
            raise
        except Exception as error:  # zlib's, wcslib's, numpy's: astropy's codecs raise many kinds
            verb = "decompressed" if self._hdu.kind == "compressed" else "read"
            what = f"HDU {self._hdu.index}: cannot be {verb} ({reason(error)})"
            raise InputError(what, _AGAIN, self._path) from error
        self._convert(raw[..., start:stop] if whole else raw, out)

    def _convert(self, raw: np.ndarray, out: np.ndarray) -> None:
        try:
            self._values.convert(raw, out)
        except ValueError as error:
            raise InputError(
                f"HDU {self._hdu.index}: {error}", "remove its BLANK or BSCALE card", self._path
            ) from error

    def _untile(self, out: np.ndarray, window: list[tuple[int, int]]) -> bool:
        """Decode the tiles of a window, straight into `out` where the values are as stored."""
        assert self._tiles is not None
        raw = out if self._plain else np.empty(out.shape, self._values.stored)
        try:
            self._tiles.read(raw, window)
        except UnusualError:
            return False
        if raw is not out:
            self._convert(raw, out)
        return True

    def _run(self, window: list[tuple[int, int]]) -> int | None:
        """Where a window starts among the values, if it is one run of them."""
        at, split = 0, False
        for (start, stop), size in zip(window, self._hdu.shape, strict=True):
            if split and (start, stop) != (0, size):
                return None
            at = at * size + start
            split = split or stop - start > 1
        return at

    def _read_run(self, at: int, out: np.ndarray) -> None:
        """Read values from the `at`-th on."""
        stored = self._values.stored
        held = np.empty(min(out.size, _PIECE // stored.itemsize), stored.newbyteorder(">"))
        for first in range(0, out.size, held.size):
            raw = held[: out.size - first]
            octets, offset = raw.view(np.uint8), (at + first) * stored.itemsize
            try:
                self._file.seek(self._hdu.data + offset)
                if self._file.readinto(octets.data) != octets.size:  # type: ignore[attr-defined]
                    raise EOFError("the file has become shorter since it was opened")
            except (OSError, EOFError) as error:
                what = f"HDU {self._hdu.index}: cannot be read ({reason(error)})"
                raise InputError(what, _AGAIN, self._path) from error
            self._take_sum(octets, offset)
            self._convert(raw, out[first : first + raw.size])

    def _take_sum(self, octets: np.ndarray, at: int) -> None:
        """Sum what is read from the start of the data on, for `verify`."""
        if at == 0:
            self._summed = self._sum = 0
        if at == self._summed and self._is_summed:
            self._sum = add_sums(self._sum, sum_of(octets, at))
            self._summed += octets.size

    def verify(self) -> None:
        """Compare CHECKSUM and DATASUM with the file.

        Raises:
            InputError: they differ, or are asked for and missing; or the file has become shorter.
        """
        if self._file.seek(0, 2) < self._hdu.data + self._hdu.held:
            raise InputError(
                f"HDU {self._hdu.index}: the file has become shorter since it was opened", _AGAIN, self._path
            )
        if self._checksum == "ignore":
            return
        data_sum, checksum = (self._card(name) for name in ("DATASUM", "CHECKSUM"))
        if not (data_sum or checksum):
            if self._checksum == "require":
                what = f"HDU {self._hdu.index}: has neither CHECKSUM nor DATASUM, and one is required"
                raise InputError(what, "set `checksum` to verify", self._path)
            return
        self._file.seek(self._hdu.start)
        head = sum_of_stream(self._file, self._hdu.data - self._hdu.start)
        self._file.seek(self._summed, 1)
        left = self._hdu.size + -self._hdu.size % BLOCK - self._summed
        data = add_sums(self._sum, sum_of_stream(self._file, left, self._summed))
        self._summed = self._sum = 0  # said once of what was read once
        sound = data_sum.isdecimal() and int(data_sum) == data
        if data_sum and not sound:
            what = f"HDU {self._hdu.index}: its data sum to {data} and DATASUM says {data_sum}: the file is corrupt"
            raise InputError(what, _AGAIN_OR_IGNORE, self._path)
        if checksum and add_sums(head, data) not in (0, 0xFFFFFFFF):
            where = "the data are as DATASUM says, so the header was changed" if sound else "the file is corrupt"
            what = f"HDU {self._hdu.index}: CHECKSUM does not match, off by {add_sums(head, data):#010x}: {where}"
            raise InputError(what, _AGAIN_OR_IGNORE, self._path)

    @cached_property
    def _is_summed(self) -> bool:
        return self._checksum != "ignore" and any(self._card(name) for name in ("DATASUM", "CHECKSUM"))

    def _card(self, name: str) -> str:
        value = card(self._hdu.header, name, "", self._hdu.index, self._path)
        return str(value).strip()

    def close(self) -> None:
        """Let go of the file."""
        self._open.close()
        self._file.close()

    def __del__(self) -> None:  # a volume that is dropped lets go at once, not when the garbage is next collected
        with suppress(Exception):
            self.close()


def _pieces(length: int, tile: int) -> int:
    """The multiple of `tile` up to `length`, at least one."""
    return max(1, length // tile) * tile
