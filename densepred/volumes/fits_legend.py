"""The legend of a label map (a table LABELS) and the tables that a header's distortions refer to, as bytes of HDUs."""

from __future__ import annotations

import colorsys
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes.fits_sums import CHECKSUM_UNSET, padding, sealed, sum_of
from densepred.volumes.fits_tiles import Sealed

_DISTORTION = re.compile(r"(CPDIS|CQDIS|D2IMDIS)\d+[A-Z]?")
_COUNTED = 1 << 20  # values that are counted at once
_GOLDEN = 0.618034


@dataclass(frozen=True)
class Legend:
    """The classes of a label map.

    Args:
        names: label -> name.
        colours: label -> "#rrggbb"; those left out get hues that lie far apart, and 0 black.

    Example:
        >>> Legend({0: "sky", 1: "source"}).colour(0)
        '#000000'
    """

    names: Mapping[int, str]
    colours: Mapping[int, str] = field(default_factory=dict)

    def colour(self, label: int) -> str:
        """The colour of a label, "#rrggbb"."""
        if label in self.colours or label == 0:
            return self.colours.get(label, "#000000")
        red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.75, 0.95)
        return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"

    def table(self, counts: Mapping[int, int]) -> tuple[Sealed, bytes]:
        """The HDU LABELS: id, name, npix and colour of every class, and of labels that have no name.

        Args:
            counts: label -> how many pixels have it.
        """
        labels = sorted({*self.names, *(label for label, count in counts.items() if count)})
        names = [self.names.get(label, "") for label in labels]
        width = max(1, *map(len, names)) if names else 1
        columns = [
            fits.Column("id", "J", array=np.array(labels, np.int32)),
            fits.Column("name", f"{width}A", array=np.array(names, f"U{width}")),
            fits.Column("npix", "K", array=np.array([counts.get(label, 0) for label in labels], np.int64)),
            fits.Column("colour", "7A", array=np.array([self.colour(label) for label in labels], "U7")),
        ]
        return as_bytes(fits.BinTableHDU.from_columns(columns, name="LABELS"))


def count_labels(values: np.ndarray, counts: Counter[int]) -> None:
    """Add how often each label occurs."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _COUNTED):
        found, times = np.unique(flat[start : start + _COUNTED], return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))


def as_bytes(hdu: fits.hdu.base.ExtensionHDU) -> tuple[Sealed, bytes]:
    """A small extension HDU with its sums: what must be found on disk, and its bytes."""
    buffer = io.BytesIO()
    hdu.copy().writeto(buffer)
    whole = buffer.getvalue()
    with fits.open(io.BytesIO(whole), memmap=False) as written:
        info, header = written[1].fileinfo(), written[1].header.copy()
    data = whole[info["datLoc"] :]
    data = data.ljust(len(data) + padding(len(data)), b"\0")
    for keyword, value in (("CHECKSUM", CHECKSUM_UNSET), ("DATASUM", "0")):
        header.remove(keyword, ignore_missing=True)
        header[keyword] = value
    total = sum_of(data)
    block = sealed(header, total)
    return (block, len(data), total), block + data


def distortion_tables(header: fits.Header, path: Path | None) -> list[tuple[Sealed, bytes]]:
    """The HDUs that a header's look-up distortions and -TAB axes are read from, to go with a copy of it.

    Raises:
        InputError: they are not in the source.
    """
    distorted = any(_DISTORTION.fullmatch(keyword) for keyword in header)
    axes = [keyword for keyword in header if re.fullmatch(r"CTYPE\d+[A-Z]?", keyword)]
    tabulated = [axis[5:] for axis in axes if str(header[axis]).endswith("-TAB")]
    names = {"WCSDVARR", "D2IMARR"} if distorted else set()
    for axis in tabulated:
        number, version = re.fullmatch(r"(\d+)(.*)", axis).groups()  # type: ignore[union-attr]
        names.add(str(header.get(f"PS{number}_0{version}", "")).strip().upper())
    if not names:
        return []
    found = []
    if path is not None:
        with fits.open(path, memmap=False) as source:
            found = [as_bytes(hdu) for hdu in source[1:] if hdu.name.upper() in names]
    if not found:
        what = f"its world coordinates need tables ({', '.join(sorted(names))}) that are not in the source"
        raise InputError(what, "get the whole file, or remove the distortion cards", path)
    return found
