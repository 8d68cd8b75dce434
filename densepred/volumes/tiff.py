"""TIFF, BigTIFF and OME-TIFF, read page by page (of a large page only the strips or tiles asked for).

Pages are planes along Z, unless the file's OME or ImageJ metadata or `axes` say that they are channels; samples of a
pixel are channels, alpha among them, whether it is opaque or not. Values are those stored: a colour table is not
applied, and "0 is white" not inverted. A page of its own is an image (Y, X).
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes import tiff_header
from densepred.volumes.arrays import FileArray, declared
from densepred.volumes.volume import Volume

try:
    import tifffile
    from PIL import Image
except ImportError as error:
    raise InputError("TIFF files need tifffile", "pip install tifffile pillow") from error

if TYPE_CHECKING:
    from tifffile import TiffPage, TiffPageSeries

from densepred.volumes.tiff_writer import open_writer

__all__ = ["open_writer", "read"]

_LETTERS = {"X": "x", "Y": "y", "Z": "z", "C": "c", "S": "c", "I": "z", "Q": "z"}
"""tifffile's axes -> ours; I and Q are pages or axes without a meaning."""
_IMAGES = (6, 7, 33003, 33004, 33005, 33007, 34712, 34892, 34927, 34933, 50001)
"""Compressions by whole images: JPEG, JPEG 2000, PNG, WebP."""
_SPARE = 1 << 22  # pixels by which such an image may be larger
_FIX = "get the file again from its source"


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a file: its directories are read and checked, its pixels are left for later.

    Args:
        path: a TIFF file, tiled or in strips, compressed or not.
        axes: what the stored axes hold, one of `arrays.AXES`, where the metadata do not say or are wrong.
        part: the number of one of several images, from 0; or "index", to take a colour-table image as class map.

    Returns:
        A volume with spacing in micrometres where the file names a unit (`volume.header.unit` is then "um").

    Raises:
        InputError: no TIFF file, damaged, several images and no `part`, or axes that are not plain.

    Example:
        >>> read("stack.tif", axes="cyx").shape  # doctest: +SKIP
        (3, 512, 512)
    """
    path = Path(path)
    stored = TiffArray(path, None if part == "index" else part)
    try:
        return _volume(stored, axes, part == "index", path)
    except (TypeError, ValueError, KeyError) as error:  # of a tag that is none
        stored.close()
        raise _senseless(error, path) from error
    except InputError:
        stored.close()
        raise


def _volume(stored: TiffArray, axes: str | None, index: bool, path: Path) -> Volume:
    page = stored.series.keyframe
    photometric = int(page.photometric)
    if index and photometric != 3:
        raise InputError("it has no colour table, so no [index]", "leave the brackets out", path)
    if photometric == 0:
        warnings.warn(f"{path}: 0 is white in this file; its values are given as stored", stacklevel=4)
    letters = declared(stored.shape, axes, path) if axes else _named(stored.axes, stored.shape, path)
    array = FileArray(stored, letters, path)
    sizes, header = tiff_header.metadata(stored.tif, stored.number, page, path)
    spacing = tiff_header.spacing(sizes, len(array.shape) - 1, path)
    return Volume(array, spacing, header=header, path=path, labels=header.labels or index)


def _named(axes: str, shape: tuple[int, ...], path: Path) -> str:
    """The letters of `FileArray` for tifffile's axes; axes of size 1 other than Y and X are dropped."""
    letters = ""
    for axis, size in zip(axes, shape, strict=True):
        letter = "1" if size == 1 and axis not in "YX" else _LETTERS.get(axis, "?")
        if letter == "?" or (letter != "1" and letter in letters):
            found = ", ".join(f"{axis} of {size}" for axis, size in zip(axes, shape, strict=True) if size > 1)
            times = axis == "T"
            what = f"holds {size} times" if times else "what lies along its axes is not plain"
            fix = "save each time as a file of its own" if times else "declare `axes`, such as czyx, zcyx or zyxc"
            raise InputError(f"{what} (axes {found})", fix, path)
        letters += letter
    return letters


class TiffArray:
    """One image of a file in the order of its axes there, `axes` in tifffile's letters.

    Raises:
        InputError: as `read`.
    """

    def __init__(self, path: Path, part: str | None) -> None:
        self._path = path
        tiff_header.check_directories(path)
        with tiff_header.no_errors_logged(path):
            try:
                self.tif = tifffile.TiffFile(path)
                series = list(self.tif.series)
            except Exception as error:  # a broken tag shows as almost any
                raise _senseless(error, path) from error
        try:
            self.number = _choose(series, part, path)
            self.series: TiffPageSeries = series[self.number]
            self._lay_out()
            self.verify()
        except InputError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise _senseless(error, path) from error

    def _lay_out(self) -> None:
        series, page = self.series, self.series.keyframe
        if series.is_multifile:
            raise InputError("its OME metadata spread the image over several files", "merge them into one", self._path)
        axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
        if axes[-1] == "S" and shape[-1] == 1 and "S" not in page.axes:
            axes, shape = axes[:-1], shape[:-1]
        if shape[-page.ndim :] != page.shape:
            axes, shape = series.axes, series.shape
        odd = series.transform is not None or page.shaped[1] != 1 or page.dtype is None  # SGI volumes, odd samples
        if odd or shape[-page.ndim :] != page.shape:
            what = f"a layout that is not supported: {axes} of {shape} in pages of {page.axes} {page.shape}"
            raise InputError(what, "save it as plain TIFF or OME-TIFF", self._path)
        self.shape, self.axes = tuple(int(size) for size in shape), axes
        self.dtype = np.dtype(series.dtype)
        self._leading = len(self.shape) - page.ndim
        start = series.dataoffset  # of one run of bytes, which may lack directories for its pages
        self._offset = None if start is None else int(start)

    def verify(self) -> None:
        """All pages lie within the file; TIFF has no checksum.

        Raises:
            InputError: the file is truncated, or misses pages, strips or tiles.
        """
        held = self._path.stat().st_size
        needed = 0
        if self._offset is not None:
            needed = self._offset + int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        else:
            for number in range(len(self.series)):
                page: Any = self.series[number]
                if page is None:
                    raise InputError(f"page {number + 1} of {len(self.series)} is missing", _FIX, self._path)
                offsets, counts = page.dataoffsets, page.databytecounts
                whole = int(np.prod(page.chunked))
                if not len(offsets) == len(counts) == whole or 0 in counts:
                    missing = whole - min(len(offsets), len(counts)) + counts.count(0)
                    what = f"page {number + 1} misses {missing} of {whole} strips or tiles"
                    raise InputError(what, "fill them where the file was made (no sparse TIFF)", self._path)
                needed = max(needed, *(at + count for at, count in zip(offsets, counts, strict=True)))
        if needed > held:
            raise InputError(f"truncated: holds {held} of {needed} bytes", _FIX, self._path)

    def close(self) -> None:
        """Let go of the file."""
        self.tif.close()

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """See `Stored.read`.

        Raises:
            InputError: a strip or tile cannot be decoded.
        """
        if self._offset is not None:
            dtype = self.dtype.newbyteorder(self.tif.byteorder)
            return np.array(np.memmap(self._path, dtype, "r", self._offset, self.shape)[key])
        leading, inner = key[: self._leading], key[self._leading :]
        grid = [range(part.start, part.stop) for part in leading]
        out = np.empty([part.stop - part.start for part in key], self.dtype)
        for place in np.ndindex(*(len(run) for run in grid)):
            chosen = [run[at] for run, at in zip(grid, place, strict=True)]
            number = int(np.ravel_multi_index(chosen, self.shape[: self._leading])) if grid else 0
            try:
                out[place] = _read_page(self.series[number], inner, self.axes[self._leading :])
            except Exception as error:  # a codec may raise anything
                what = f"page {number + 1} cannot be read ({str(error).strip()[:150]})"
                raise InputError(what, _FIX, self._path) from error
        return out


def _senseless(error: Exception, path: Path) -> InputError:
    return InputError(f"its directories make no sense ({type(error).__name__}: {str(error)[:150]})", _FIX, path)


def _choose(series: list[TiffPageSeries], part: str | None, path: Path) -> int:
    if part is None and len(series) == 1:
        return 0
    if part is not None and part.isdecimal() and int(part) < len(series):
        return int(part)
    shown = [f"[{n}] {one.axes} {one.shape} {one.dtype}" for n, one in enumerate(series[:20])]
    listed = "; ".join(shown) + ("; ..." if len(series) > 20 else "")
    what = f"holds {len(series)} images: {listed}" if part is None else f"has no image [{part}], but {listed}"
    raise InputError(what, f"say which: '{path.name}[0]'", path)


def _read_page(page: Any, key: tuple[slice, ...], axes: str) -> np.ndarray:
    """A box of one page; only the strips or tiles that it touches are decoded."""
    frame: TiffPage = page.keyframe
    separate, _, length, width, contig = frame.shaped
    boxes = dict(zip(axes, key, strict=True))
    rows, columns = boxes.get("Y", slice(0, length)), boxes.get("X", slice(0, width))
    samples = boxes.get("S", slice(0, max(separate, contig)))
    planes = samples if separate > 1 else slice(0, 1)
    out = np.empty((separate, rows.stop - rows.start, columns.stop - columns.start, contig), frame.dtype)
    tables = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader} if page.jpegtables else {}
    handle = page.parent.filehandle
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        _, (plane, _, top, left, _), (_, high, wide, _) = frame.decode(None, number)
        if not (planes.start <= plane < planes.stop and _touch(rows, top, high) and _touch(columns, left, wide)):
            continue
        handle.seek(offset)
        data = handle.read(count)
        _check_image(data, frame)
        segment = np.asarray(frame.decode(data, number, **tables)[0])[0]
        y0, y1 = max(top, rows.start), min(top + high, rows.stop)
        x0, x1 = max(left, columns.start), min(left + wide, columns.stop)
        target = out[plane, y0 - rows.start : y1 - rows.start, x0 - columns.start : x1 - columns.start]
        target[...] = segment[y0 - top : y1 - top, x0 - left : x1 - left]
    if separate > 1:
        return out[planes, :, :, 0]
    return out[0, :, :, samples] if "S" in axes else out[0, :, :, 0]


def _check_image(data: bytes, frame: TiffPage) -> None:
    """A strip or tile that is an image of its own, such as JPEG, is not much larger than it should be.

    Raises:
        ValueError: it is.
    """
    if int(frame.compression) not in _IMAGES:
        return
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"a strip or tile holds a far larger image: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError):
        return  # the decoder says what is wrong
    if width * height > 4 * int(np.prod(frame.chunks)) + _SPARE:
        raise ValueError(f"a strip or tile of {frame.chunks} holds an image of {width} x {height}")


def _touch(wanted: slice, start: int, size: int) -> bool:
    return bool(start < wanted.stop and start + size > wanted.start)
