"""FITS images: one HDU as a `Volume`, plain, tile-compressed (`.fz`), gzipped or bzip2ed, read by windows.

numpy's order of axes is FITS' reversed, so the array is `(Z, Y, X)` as it comes. Spacing is 1 pixel along every axis;
the world coordinates are the header's (`FitsHeader.wcs`).
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from densepred.errors import InputError
from densepred.volumes import fits_select
from densepred.volumes.fits_header import FitsHeader, wcs_offset
from densepred.volumes.fits_pixels import Checksum, FitsPixels
from densepred.volumes.fits_scan import Hdu, card, scan
from densepred.volumes.fits_scratch import open_plain
from densepred.volumes.record import Provenance, Record
from densepred.volumes.volume import Volume

if TYPE_CHECKING:
    from astropy.io.fits import Header

    from densepred.volumes.fits_writer import Contents, Legend

RECORDS = True
CHECKSUMS = ("verify", "ignore", "require")
__all__ = ["CHECKSUMS", "FitsHeader", "images", "open_writer", "read", "wcs_offset"]


def read(path: str | Path, axes: str | None = None, part: str | None = None, checksum: Checksum = "verify") -> Volume:
    """Open an image of a FITS file: headers are read and checked, pixels are left for later.

    Invalid pixels (BLANK, NaN) read as NaN. A gzipped or bzip2ed file is decompressed once, into the folder for
    temporary files.

    Args:
        path: the file.
        axes: what its axes hold, NAXIS1 last: None or "yx", "zyx" for a volume, "cyx" or "czyx" for channels.
        part: which HDU: an index ("1"), a name ("SCI") or a name and version ("SCI,2"); None: the only image there is.
        checksum: what `Volume.verify` does: compare the checksums there are, "ignore" them, or "require" them.

    Returns:
        A volume `(C, *spatial)` with a `FitsHeader` as `header`, spacing 1 and no affine.

    Raises:
        InputError: no FITS file, truncated, a header that makes no sense, or an image or axes that are not declared.
        ResourceError: the disk cannot take the decompressed file.
        OSError: it cannot be opened.

    Example:
        >>> from astropy.io import fits
        >>> fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.eye(3), name="SCI")]).writeto("eye.fits", overwrite=True)
        >>> with read("eye.fits", part="sci") as volume:
        ...     volume.shape, volume.header.version
        ((1, 3, 3), 1)
    """
    path = Path(path)
    if checksum not in CHECKSUMS:
        raise ValueError(f"checksum must be one of {', '.join(CHECKSUMS)}, got {checksum!r}")
    file = open_plain(path)
    try:
        hdu = fits_select.select(scan(file, path), part, path)
        squeezed, channels_axis = fits_select.layout(hdu, axes, path)
        _check_held(hdu, path)
        left = tuple(size for axis, size in enumerate(hdu.shape) if axis not in squeezed)
        array = FitsPixels(file, hdu, left if channels_axis is not None else (1, *left), path, checksum)
    except BaseException:
        file.close()
        raise
    compression = str(hdu.header.get("ZCMPTYPE", "")).strip() if hdu.kind == "compressed" else None
    header = FitsHeader(
        array.header, hdu.index, hdu.name, hdu.version, hdu.shape, squeezed, channels_axis, path, compression
    )
    unit = str(card(array.header, "BUNIT", "", hdu.index, path)).strip()
    labels = _is_labels(array, hdu.index, path)
    classes = _classes(array.header) if labels else {}
    return Volume(array, (1.0,) * (len(array.shape) - 1), None, header, path, labels, unit, classes)


def images(path: str | Path, part: str = "all") -> list[str]:
    """What to write in brackets for each image of a file, in order: "SCI,2" where that names one HDU, else its index.

    Args:
        path: the file.
        part: "all", or "SCI,all" for the images of one name; what names one image comes back as it is.

    Raises:
        InputError: as `read`, or there is no such image.
    """
    path = Path(path)
    with open_plain(path) as file:
        structure = scan(file, path)
    chosen = fits_select.select_all(structure, part, path)
    names = [(hdu.name.upper(), hdu.version) for hdu in structure.hdus]
    return [part] if chosen is None else [_part(hdu, names) for hdu in chosen]


def _part(hdu: Hdu, names: list[tuple[str, int]]) -> str:
    plain = hdu.name and not set(hdu.name) & set(",[]") and hdu.name.isascii()
    unique = names.count((hdu.name.upper(), hdu.version)) == 1
    return f"{hdu.name},{hdu.version}" if plain and unique else str(hdu.index)


def _check_held(hdu: Hdu, path: Path) -> None:
    """The data are all there; that only padding is missing is worth a warning."""
    if hdu.held < hdu.size:
        what = f"HDU {hdu.index} holds {hdu.held} of {hdu.size} bytes (file truncated or download incomplete)"
        raise InputError(what, "get the file again from its source", path)
    if hdu.cut_padding:
        what = f"HDU {hdu.index}: {hdu.cut_padding} bytes of padding are missing at the end; all pixels are there"
        warnings.warn(f"{path}: {what}", stacklevel=4)


def _is_labels(array: FitsPixels, index: int, path: Path) -> bool:
    """Whether the header says that its integers are classes, in the words that we write."""
    kind = str(card(array.header, "BTYPE", "", index, path)).strip().upper()
    return array.dtype.kind in "iu" and (kind == "LABEL" or "CLASS0" in array.header)


def _classes(header: Header) -> dict[int, str]:
    """The names of the classes, from the cards CLASSn."""
    found = (re.fullmatch(r"CLASS(\d+)", keyword) for keyword in header)
    return {int(match[1]): str(header[match[0]]).strip() for match in found if match}


def open_writer(
    path: str | Path,
    like: Volume,
    dtype: np.dtype,
    channels: int = 1,
    labels: bool = False,
    record: Record | None = None,
) -> AbstractContextManager[Any]:
    """Write a file slab by slab; see `fits_writer.open_writer`. A record becomes cards, and a legend of labels.

    An image of an extension keeps EXTNAME and EXTVER.
    """
    from densepred.volumes import fits_writer
    from densepred.volumes.fits_layout import default_contents

    contents, legend, cards = recorded(record, channels, labels)
    source = like.header if isinstance(like.header, FitsHeader) else None
    if source is not None and source.index > 0 and source.name:
        contents = contents or default_contents(like, np.dtype(dtype), channels, labels)
        contents = replace(contents, version=source.version)
        if channels == 1 or contents.layout == "cube":
            contents = replace(contents, name=source.name)
    return fits_writer.open_writer(path, like, dtype, channels, labels, contents, legend, cards)


def recorded(
    record: Record | None, channels: int, labels: bool
) -> tuple[Contents | None, Legend | None, dict[str, str | float | list[str]]]:
    """What `fits_writer.open_writer` takes: contents, legend and cards of provenance; in ASCII, as FITS wants it."""
    from densepred.volumes.fits_writer import Contents, Legend

    if record is None:
        return None, None, {}
    record = _in_ascii(record)
    cards = {} if record.provenance == Provenance() else _cards(record.provenance)
    if labels:
        return None, Legend(record.names), cards
    names = [record.names[number] for number in range(channels)] if record.names else []
    layout: Literal["hdus", "cube"] = "hdus" if record.probability else "cube"
    contents = Contents(names, record.probability, record.unit, record.quantity, layout)
    return contents, None, cards


def _in_ascii(record: Record) -> Record:
    from densepred.volumes.fits_cards import card_text, unit_text

    texts: dict[str, Any] = {k: card_text(text) for k, text in vars(record.provenance).items() if isinstance(text, str)}
    plain = {value: card_text(name) for value, name in record.names.items()}
    alike = Counter(plain.values())
    lost = {value for value, name in plain.items() if alike[name] > 1 and name != record.names[value]}
    names = {value: f"{name} {value}" if value in lost else name for value, name in plain.items()}
    return replace(record, names=names, unit=unit_text(record.unit), provenance=replace(record.provenance, **texts))


def _cards(made: Provenance) -> dict[str, str | float | list[str]]:
    """The cards of `fits_cards.PROVENANCE`; hashes with 16 digits."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    cards: dict[str, str | float | list[str]] = {
        "DPMODEL": made.model,
        "DPMODSHA": made.model_sha[:16],
        "DPCFGSHA": made.config_sha[:16],
        "DPINPUT": made.source,
        "DPDATE": now,
        "DPTILE": made.window,
        "DPOVERLP": made.overlap,
        "DPDEVICE": made.device,
    }
    return cards | ({"HISTORY": [f"densepred: {made.command}"]} if made.command else {})
