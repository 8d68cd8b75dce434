"""Looking at compressed tiles before astropy decodes them.

Its decoder of HCOMPRESS believes the sizes within a tile, and writes past its buffer where they are wrong; that of gzip
allocates whatever comes out. Neither may happen.

Reference: FITS standard 4.0, sections 10.1.2 and 10.4.3; R. White, "H-compress" (the head of a tile: two bytes dd 99,
then two sizes of four bytes).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes.bombs import FREE, expands
from densepred.volumes.fits_scan import Hdu

_AGAIN = "get the file again from its source"
_RATIO, _HEAD = 1040, 10


def check_tiles(file: IO[bytes], hdu: Hdu, path: Path) -> None:
    """Look at all tiles of a compressed image whose codec is not safe.

    Raises:
        InputError: one has other sizes than it should, or expands to more than a tile.
    """
    codec = str(hdu.header.get("ZCMPTYPE", "")).strip()
    heap = hdu.data + int(hdu.header.get("THEAP", hdu.header["NAXIS1"] * hdu.header["NAXIS2"]))
    for name, places in _descriptors(file, hdu, path):
        packed = "GZIP" if name == "GZIP_COMPRESSED_DATA" else codec
        if packed.startswith("HCOMPRESS"):
            for number, ((size, offset), pixels) in enumerate(zip(places.tolist(), _pixels(hdu), strict=True), 1):
                if size:
                    file.seek(max(0, heap + offset))
                    _check_head(file.read(_HEAD), pixels, f"HDU {hdu.index}: tile {number}", path)
        elif packed.startswith("GZIP"):
            most = 8 * max(_pixels(hdu))
            for number in np.flatnonzero(places[:, 0] * _RATIO > most + FREE).tolist():
                size, offset = places[number].tolist()
                file.seek(max(0, heap + offset))
                if expands(file.read(min(size, hdu.size)), "gzip", most):
                    what = f"HDU {hdu.index}: tile {number + 1} expands to more than the {most} bytes of a tile"
                    raise InputError(what, _AGAIN, path)


def _check_head(head: bytes, pixels: int, where: str, path: Path) -> None:
    rows, columns = (int.from_bytes(head[at : at + 4], "big", signed=True) for at in (2, 6))
    if head[:2] != b"\xdd\x99" or rows < 1 or columns < 1 or rows * columns != pixels:
        what = f"{where} of {pixels} pixels says that it has {rows} x {columns}: the file is corrupt"
        raise InputError(what, _AGAIN, path)


def _pixels(hdu: Hdu) -> Iterator[int]:
    """The number of pixels of each tile, in the order of the table."""
    count = len(hdu.shape)
    tile = [
        int(hdu.header.get(f"ZTILE{count - axis}", 1 if axis < count - 1 else hdu.shape[-1])) for axis in range(count)
    ]
    lengths = [
        [min(size, whole - start) for start in range(0, whole, size)]
        for size, whole in zip(tile, hdu.shape, strict=True)
    ]
    return map(math.prod, itertools.product(*lengths))


def _descriptors(file: IO[bytes], hdu: Hdu, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of compressed tiles, with size and offset of each."""
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = fits.open(file, memmap=False, lazy_load_hdus=True, disable_image_compression=True)
            rows = np.asarray(opened[hdu.index].data).view(np.ndarray)
            opened.close(closed=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever astropy meets in a broken table
        raise InputError(f"HDU {hdu.index}: its table of tiles cannot be read", _AGAIN, path) from error
    for name in rows.dtype.names or ():
        if name.upper() in ("COMPRESSED_DATA", "GZIP_COMPRESSED_DATA") and rows[name].ndim == 2:
            yield name.upper(), rows[name].astype(np.int64)
