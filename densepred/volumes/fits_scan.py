"""The structure of a FITS file, read from its headers alone, checked before anything is allocated.

astropy reads headers of any length, allocates what they declare and names no file; so sizes are checked here first.

Reference: FITS standard 4.0 (2018), sections 3.1, 3.3.2, 4.4.1 and 10.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from astropy.io import fits

from densepred.errors import InputError

BLOCK = 2880
MAX_HEADER = 16 << 20
"""Bytes of the longest header that is believed: 200,000 cards."""
TYPES = {8: "uint8", 16: "int16", 32: "int32", 64: "int64", -32: "float32", -64: "float64"}
"""BITPIX -> the stored type."""
MAX_RATIO = {"RICE_1": 2100, "RICE_ONE": 2100, "GZIP_1": 1100, "GZIP_2": 1100, "NOCOMPRESS": 16}
"""Bytes that one compressed byte can stand for; RICE needs 5 bits for a block, deflate 1 for 1032."""
_FIX = "mend the header, or get the file again from its source"
_AGAIN = "get the file again from its source"


class CutHeaderError(InputError):
    """The file ends within a header."""


@dataclass(frozen=True)
class Hdu:
    """One HDU as it lies on disk.

    Args:
        index: its number.
        name: EXTNAME without trailing blanks; "PRIMARY" for a nameless first HDU.
        version: EXTVER.
        kind: "image", "compressed" (a tile-compressed image) or "table" (anything else).
        shape: of the image, in numpy's order; empty where there is none.
        header: as stored; for a compressed image, the table's.
        start: byte at which the header starts.
        data: byte at which the data start.
        size: bytes of the data, without padding.
        held: how many of these bytes the file has.
        cut_padding: how many bytes of the padding behind the data it lacks.
    """

    index: int
    name: str
    version: int
    kind: str
    shape: tuple[int, ...]
    header: fits.Header
    start: int
    data: int
    size: int
    held: int
    cut_padding: int

    @property
    def is_image(self) -> bool:
        """Whether it has an array of two axes or more."""
        return self.kind != "table" and len(self.shape) > 1 and 0 not in self.shape

    @property
    def bitpix(self) -> int:
        """BITPIX of the image."""
        return int(self.header["ZBITPIX" if self.kind == "compressed" else "BITPIX"])

    def __str__(self) -> str:
        name = f" {self.name},{self.version}" if self.name else ""
        if self.kind == "table":
            return f"{self.index}{name}: a table"
        return f"{self.index}{name}: {TYPES[self.bitpix]} {self.shape}" if self.shape else f"{self.index}{name}: empty"


@dataclass(frozen=True)
class Structure:
    """All HDUs of a file, and the bytes behind them that are no HDU."""

    hdus: tuple[Hdu, ...]
    rest: int


def scan(file: IO[bytes], path: Path) -> Structure:
    """Read all headers of an uncompressed `file`; `path` is for messages.

    Raises:
        InputError: it is no FITS, a header is cut short or has no end, or sizes in it make no sense.
    """
    total = file.seek(0, 2)
    hdus: list[Hdu] = []
    at = 0
    while at < total:
        file.seek(at)
        first = file.read(BLOCK)
        if at == 0 and not first.startswith(b"SIMPLE  ="):
            raise _stranger(first, path)
        if at and not first.startswith(b"XTENSION"):
            return Structure(tuple(hdus), total - at if first.strip(b"\0 ") else 0)
        raw = _header_bytes(file, first, len(hdus), path)
        hdu = _hdu(raw, len(hdus), at, total, path)
        hdus.append(hdu)
        at = hdu.data + -(-hdu.size // BLOCK) * BLOCK
    if not hdus:
        raise InputError("the file is empty (0 bytes)", _AGAIN, path)
    return Structure(tuple(hdus), 0)


def _stranger(head: bytes, path: Path) -> InputError:
    text = head[:200].decode("ascii", "replace")
    if sum(sign.isprintable() or sign.isspace() for sign in text.replace("\ufffd", "")) > 0.9 * len(text):
        start = text.strip().split("\n")[0][:40]
        return InputError(f"no FITS file: starts with '{start}'", "get the image itself, not a page of text", path)
    return InputError(f"no FITS file: starts with the bytes {head[:4].hex(' ')}", "convert it to FITS", path)


def _header_bytes(file: IO[bytes], block: bytes, index: int, path: Path) -> bytes:
    blocks = []
    while True:
        blocks.append(block)
        if any(block[card : card + 8] == b"END     " for card in range(0, len(block), 80)):
            return b"".join(blocks).ljust(len(blocks) * BLOCK)
        held = len(blocks) * BLOCK
        if len(block) < BLOCK:
            what = f"HDU {index}: the file ends within the header (no END in {held - BLOCK + len(block)} bytes)"
            raise CutHeaderError(what, _AGAIN, path)
        if held >= MAX_HEADER:
            raise InputError(f"HDU {index}: no END in the first {held} bytes of the header", _FIX, path)
        block = file.read(BLOCK)


def _hdu(raw: bytes, index: int, start: int, total: int, path: Path) -> Hdu:
    header = fits.Header.fromstring(raw)
    sizes = _sizes(header, "", index, path)
    kind = _kind(header, index, path)
    shape = {"image": sizes, "compressed": (), "table": ()}[kind]
    if kind == "compressed":
        shape = _sizes(header, "Z", index, path)
        _check_tiles(header, shape, index, path)
    counts = sizes[:-1] if card(header, "GROUPS", False, index, path) is True else sizes  # NAXIS1 = 0 stands last
    groups = _whole(header, "GCOUNT", index, path, 1)
    values = groups * (_whole(header, "PCOUNT", index, path, 0) + (math.prod(counts) if sizes else 0))
    size = abs(int(header["BITPIX"])) // 8 * values
    data = start + len(raw)
    name = str(card(header, "EXTNAME", "" if index else "PRIMARY", index, path)).rstrip()
    version = card(header, "EXTVER", 1, index, path)
    number = version if isinstance(version, int) else 1
    held = max(0, min(size, total - data))
    missing = max(0, data - (-size // BLOCK) * BLOCK - total) if held == size else 0
    return Hdu(index, name, number, kind, shape, header, start, data, size, held, missing)


def _kind(header: fits.Header, index: int, path: Path) -> str:
    if index == 0:
        if card(header, "SIMPLE", True, index, path) is not True:
            raise InputError("not standard FITS: SIMPLE = F", "convert it to standard FITS", path)
        return "table" if card(header, "GROUPS", False, index, path) is True else "image"
    extension = str(card(header, "XTENSION", "", index, path)).strip()
    if extension == "BINTABLE" and card(header, "ZIMAGE", False, index, path) is True:
        return "compressed"
    return "image" if extension in ("IMAGE", "IUEIMAGE") else "table"


def _sizes(header: fits.Header, prefix: str, index: int, path: Path) -> tuple[int, ...]:
    """NAXISn in numpy's order, checked."""
    bitpix = card(header, f"{prefix}BITPIX", None, index, path)
    if bitpix not in TYPES:
        raise InputError(f"HDU {index}: impossible {prefix}BITPIX = {bitpix}", _FIX, path)
    count = card(header, f"{prefix}NAXIS", None, index, path)
    if type(count) is not int or not 0 <= count <= 999:
        raise InputError(f"HDU {index}: impossible {prefix}NAXIS = {count}", _FIX, path)
    return tuple(_whole(header, f"{prefix}NAXIS{axis}", index, path) for axis in range(count, 0, -1))


def _whole(header: fits.Header, name: str, index: int, path: Path, default: int | None = None) -> int:
    value = card(header, name, default, index, path)
    if type(value) is not int or value < 0:
        raise InputError(f"HDU {index}: impossible sizes: {name} = {value}", _FIX, path)
    return value


def _check_tiles(header: fits.Header, shape: tuple[int, ...], index: int, path: Path) -> None:
    """Every tile has its row in the table, and the heap can hold what the rows decompress to."""
    tiles = [
        _whole(header, f"ZTILE{len(shape) - axis}", index, path, 1 if axis < len(shape) - 1 else shape[axis])
        for axis in range(len(shape))
    ]
    if 0 in tiles:
        raise InputError(f"HDU {index}: impossible sizes: tiles of {tuple(tiles)}", _FIX, path)
    needed = math.prod(-(-size // tile) for size, tile in zip(shape, tiles, strict=True))
    rows = _whole(header, "NAXIS2", index, path)
    if needed != rows:
        what = f"HDU {index}: an image of {shape} has {needed} tiles of {tuple(tiles)} and its table {rows}"
        raise InputError(what, _FIX, path)
    held = _whole(header, "NAXIS1", index, path) * rows + _whole(header, "PCOUNT", index, path)
    declared = math.prod(shape) * abs(int(header["ZBITPIX"])) // 8
    most = MAX_RATIO.get(str(card(header, "ZCMPTYPE", "", index, path)).strip(), 1 << 20)
    if declared > held * most:
        what = f"HDU {index}: {held} compressed bytes never hold the {declared} of {shape} that it declares"
        raise InputError(what, _FIX, path)


def card(header: fits.Header, name: str, default: object, index: int, path: Path) -> object:
    """The value of a card, or `default`.

    Raises:
        InputError: it cannot be parsed.
    """
    try:
        value = header.get(name, default)
    except Exception as error:  # astropy parses a card when it is asked for; broken ones raise several kinds
        raise InputError(f"HDU {index}: the card {name} cannot be read ({reason(error)})", _FIX, path) from error
    return default if isinstance(value, fits.card.Undefined) else value


def reason(error: Exception) -> str:
    """An error of a library's in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
