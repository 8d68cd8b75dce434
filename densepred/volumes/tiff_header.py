"""What the metadata of a TIFF file say: its axes, its voxel size, whether its directories are all there.

Sizes are in micrometres where the file names a unit, from the first of: OME-XML, ImageJ's description, and resolution
tags in centimetres. Dots per inch are the size on paper, not that of a voxel, and are not used.

References: TIFF 6.0; OME-XML schema 2016-06; ImageJ's TiffDecoder.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from densepred.errors import InputError
from densepred.volumes.arrays import stranger

UNITS = {"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "\\u00B5m": 1.0, "micron": 1.0}
UNITS |= {"microns": 1.0, "micrometer": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "inch": 25400.0, "in": 25400.0}
"""Unit -> micrometres."""
LABELS = "label map: the values are classes"
"""The description in OME-XML of what we write as labels."""
_NEEDED = {*range(254, 260), 262, 266, 270, 273, *range(277, 280), 282, 283, 284, 296, 317, *range(320, 326), 330}
_NEEDED |= {338, 339, 347, 530}
_TYPES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Bytes of a value, by the number of its type."""
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FIX = "get the file again from its source"


@dataclass(frozen=True)
class TiffHeader:
    """What a volume keeps of its TIFF file.

    Args:
        unit: "um" where the spacing is in micrometres; None where the file names no unit.
        colour: 3 where the channels are red, green and blue, 4 with alpha, else 0.
        alpha: "assocalpha" where the colours are multiplied by it, else "unassalpha".
        labels: the file says that its values are classes.
    """

    unit: str | None = None
    colour: int = 0
    alpha: str = "unassalpha"
    labels: bool = False


def check_directories(path: Path) -> None:
    """Follow the chain of image directories to its end.

    Raises:
        InputError: no TIFF file, or the chain leads out of the file or in a circle.
    """
    held = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
        if head[:4] not in _MAGIC:
            raise stranger("TIFF", path)
        order = "little" if head[:2] == b"II" else "big"
        big = head[2:4] in (b"\x2b\0", b"\0\x2b")
        width, entry, count = (8, 20, 8) if big else (4, 12, 2)
        at = int.from_bytes(head[8:16] if big else head[4:8], order)  # type: ignore[arg-type]
        seen: set[int] = set()
        while at:
            if at in seen:
                raise InputError(f"the directories of its pages run in a circle at byte {at}", _FIX, path)
            seen.add(at)
            file.seek(at)
            entries = int.from_bytes(file.read(count), order)  # type: ignore[arg-type]
            end = at + count + entries * entry + width
            if end > held:
                what = f"truncated: the directory of page {len(seen)} ends at byte {end} and the file at {held}"
                raise InputError(what, _FIX, path)
            for reach in _reaches(file.read(entries * entry), order, big):
                if reach > held:
                    raise InputError(f"truncated: holds {held} of {reach} bytes", _FIX, path)
            at = int.from_bytes(file.read(width), order)  # type: ignore[arg-type]
    if not seen:
        raise InputError("a TIFF file without any page", _FIX, path)


def _reaches(entries: bytes, order: str, big: bool) -> Iterator[int]:
    """Where the values end that do not fit into their entry."""
    form = ("<" if order == "little" else ">") + ("HHQQ" if big else "HHII")
    for _, kind, count, at in struct.iter_unpack(form, entries):
        size = _TYPES[kind] * count if kind < len(_TYPES) else 0
        if size > (8 if big else 4):
            yield at + size


@contextmanager
def no_errors_logged(path: Path) -> Iterator[None]:
    """tifffile drops a tag that it cannot read and says so in its log alone; here that is an error.

    Raises:
        InputError: a tag on which the pixels or their meaning depend is broken, or an image does not fit its metadata.
    """
    faults: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        tag = re.search(r"TiffTag (\d+)", text)
        if record.levelno >= logging.ERROR and record.thread == threading.get_ident():
            if tag is None or int(tag[1]) in _NEEDED:
                faults.append(text)
            return False
        return True

    log = logging.getLogger("tifffile")
    log.addFilter(note)
    try:
        yield
    finally:
        log.removeFilter(note)
    if faults:
        raise InputError(f"its directories are broken ({faults[0][:150]})", _FIX, path)


def metadata(tif: Any, number: int, page: Any, path: Path) -> tuple[dict[str, float], TiffHeader]:
    """The stated voxel sizes, by axis in upper case, and what else is kept.

    Args:
        tif: the open `TiffFile`.
        number: of the series.
        page: its first page.

    Raises:
        InputError: a voxel size that makes no sense.
    """
    labels = False
    if tif.is_ome:
        sizes, unit, labels = _ome(tif.ome_metadata, number, path)
    elif tif.is_imagej:
        sizes, unit = _imagej(tif.imagej_metadata or {}, page)
    else:
        sizes = _resolution(page) if _tag(page, 296) == 3 else {}
        sizes, unit = {axis: size * UNITS["cm"] for axis, size in sizes.items()}, "um" if sizes else None
    for axis, size in sizes.items():
        if not 0 < size < math.inf:
            raise InputError(f"impossible voxel size along {axis}: {size:g}", "write the true size there", path)
    alpha = "assocalpha" if 1 in (page.extrasamples or ()) else "unassalpha"
    samples = int(page.samplesperpixel)
    return sizes, TiffHeader(unit, samples if int(page.photometric) == 2 and samples in (3, 4) else 0, alpha, labels)


def spacing(sizes: dict[str, float], dims: int, path: Path) -> tuple[float, ...]:
    """Sizes along (Z, Y, X) or (Y, X); 1 where none is stated, and a warning where only some are."""
    wanted = "ZYX"[-dims:]
    stated = [axis for axis in wanted if axis in sizes]
    if stated and len(stated) < dims:
        size = sizes[stated[-1]]
        missing = ", ".join(axis for axis in wanted if axis not in sizes)
        what = f"no voxel size is stated along {missing}; {size:g}, that along {stated[-1]}, is taken"
        warnings.warn(f"{path}: {what}", stacklevel=4)
        sizes = {axis: sizes.get(axis, size) for axis in wanted}
    return tuple(sizes.get(axis, 1.0) for axis in wanted)


def _ome(text: str, number: int, path: Path) -> tuple[dict[str, float], str | None, bool]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"its OME-XML is broken ({error})", "write it again with sound metadata", path) from error
    images = root.findall("{*}Image")
    image = images[number] if number < len(images) else None
    pixels = None if image is None else image.find("{*}Pixels")
    if image is None or pixels is None:
        return {}, None, False
    sizes, units = {}, set()
    for axis in "XYZ":
        value = pixels.get(f"PhysicalSize{axis}")
        if value is not None:
            unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
            units.add(unit in UNITS)
            try:
                sizes[axis] = float(value) * UNITS.get(unit, 1.0)
            except ValueError:
                sizes[axis] = math.nan
    if len(units) > 1:
        raise InputError("its OME-XML gives sizes with and without a unit", "write one unit for all axes", path)
    labels = (image.findtext("{*}Description") or "").strip() == LABELS
    return sizes, "um" if units == {True} else None, labels


def _imagej(info: dict[str, Any], page: Any) -> tuple[dict[str, float], str | None]:
    """ImageJ's own unit, else that of the resolution tags; sizes without any are kept as they are."""
    sizes = _resolution(page)
    if isinstance(info.get("spacing"), (int, float)):
        sizes["Z"] = abs(float(info["spacing"]))  # negative where the planes run downwards
    unit = str(info.get("unit") or {2: "inch", 3: "cm"}.get(_tag(page, 296), ""))
    if unit not in UNITS:
        return ({} if set(sizes.values()) == {1.0} else sizes), None
    return {axis: size * UNITS[unit] for axis, size in sizes.items()}, "um"


def _resolution(page: Any) -> dict[str, float]:
    """Size of a pixel in the unit of the tags; a resolution of 0 is unset."""
    sizes = {}
    for axis, code in (("X", 282), ("Y", 283)):
        value = _tag(page, code)
        if value is not None and value[0] and value[1]:
            sizes[axis] = value[1] / value[0]
    return sizes


def _tag(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value
