"""What the header of a FITS output keeps of its source, drops, and gets.

A header starts as a copy, never from a parsed WCS: that would lose SIP, TPV and look-up tables and turn CD into PC.
Reference: FITS standard 4.0, sections 4.4 (keywords), 8 (world coordinates) and 10 (compression).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from astropy.io import fits

import densepred
from densepred.errors import InputError
from densepred.volumes import arrays
from densepred.volumes.fits_sums import CHECKSUM_UNSET
from densepred.volumes.volume import Volume, label_dtype

Provenance: TypeAlias = "Mapping[str, str | int | float | bool | Sequence[str] | None]"

PROVENANCE = {
    "DPVERS": "version of densepred",
    "DPMODEL": "model",
    "DPMODSHA": "SHA-256 of its weights",
    "DPCFGSHA": "SHA-256 of its configuration",
    "DPINPUT": "input",
    "DPINSUM": "DATASUM of the input",
    "DPDATE": "time of writing (UTC)",
    "DPTILE": "window size",
    "DPOVERLP": "overlap of the windows",
    "DPDEVICE": "device",
}
"""The provenance cards and their comments."""
_STRUCTURE = re.compile(
    r"SIMPLE|XTENSION|BITPIX|NAXIS\d*|EXTEND|[PG]COUNT|GROUPS|BLOCKED|EXTNAME|EXTVER|EXTLEVEL|NEXTEND|END"
    r"|BSCALE|BZERO|BLANK|BUNIT|BTYPE|DATAMIN|DATAMAX|CHECKSUM|DATASUM"
    r"|TFIELDS|THEAP|T(TYPE|FORM|UNIT|DIM|NULL|SCAL|ZERO|DISP)\d+"
    r"|Z(IMAGE|CMPTYPE|BITPIX|NAXIS\d*|TILE\d+|NAME\d+|VAL\d+|MASKCMP|QUANTIZ|DITHER0|BLANK|SCALE|ZERO)"
    r"|Z(SIMPLE|TENSION|EXTEND|BLOCKED|[PG]COUNT|HECKSUM|DATASUM)|FZ(ALGOR|TILE|QMETHD|QVALUE|DTHRSD|INT2F)"
)
_OWN = re.compile(rf"CLASS\d+|CHAN\d+|{'|'.join(PROVENANCE)}")
_OF_AXIS = re.compile(r"(CTYPE|CUNIT|CRVAL|CDELT|CRPIX|CROTA|CNAME|CRDER|CSYER|CZPHS|CPERI|LTV)(\d+)([A-Z]?)")
_OF_PAIR = re.compile(r"(CD|PC|LTM)(\d+)_(\d+)([A-Z]?)")
_OF_PARAMETER = re.compile(r"(PV|PS)(\d+)_(\d+)([A-Z]?)")
_UNITS = {
    "\u00c5": "Angstrom",
    "\u00b0": "deg",
    "\u207b": "-",
    "\u2212": "-",
    "\u00b7": ".",
    "\u22c5": ".",
    "\u00d7": "*",
}


def card_text(text: str) -> str:
    """A text as far as FITS has signs for it: accents are taken off, µ is u, others become "?".

    Example:
        >>> card_text("Läsion, 5 µJy, ∑")
        'Lasion, 5 uJy, ?'
    """
    plain = unicodedata.normalize("NFKD", text.replace("\u00b5", "u").replace("\u03bc", "u"))
    return "".join(sign if " " <= sign <= "~" else "?" for sign in plain if not unicodedata.combining(sign))


def unit_text(unit: str) -> str:
    """A unit in the signs of FITS, and by the names it gives to Å and °; see `card_text`.

    Example:
        >>> unit_text("µJy/Å"), unit_text("°"), unit_text("10⁻¹⁷ erg·s⁻¹")
        ('uJy/Angstrom', 'deg', '10-17 erg.s-1')
    """
    named = unicodedata.normalize("NFC", unit)
    for sign, word in _UNITS.items():
        named = named.replace(sign, word)
    return card_text(named)


@dataclass(frozen=True)
class Contents:
    """What the values of an output are.

    Args:
        names: of the channels; by default their numbers. Those of a cube become cards, CLASSn of probabilities and
            else CHANn.
        probability: they are probabilities of classes.
        unit: their physical unit; the source's is never taken over.
        quantity: what they are in a word, for BTYPE.
        layout: several channels as one HDU each ("hdus") or as one array ("cube"), whose channel axis is the source's
            if that has as many channels and these are no probabilities, else a new slowest one.
        name: EXTNAME of a single image; with "hdus" the names follow `names`: "PROB_<name>" for probabilities.
        version: EXTVER.

    Example:
        >>> Contents(names=["sky", "star"], probability=True, layout="hdus").hdu_name(1)
        'PROB_star'
    """

    names: Sequence[str] = ()
    probability: bool = False
    unit: str = ""
    quantity: str = ""
    layout: Literal["hdus", "cube"] = "cube"
    name: str | None = None
    version: int | None = None

    @property
    def axis_name(self) -> str:
        """CTYPE of a new axis of channels."""
        return "CLASS" if self.probability else "CHANNEL"

    def hdu_name(self, channel: int) -> str:
        """EXTNAME of the HDU of one channel."""
        name = self.names[channel] if self.names else str(channel)
        return f"PROB_{name}" if self.probability else name if self.names else f"CHANNEL_{name}"


def stored_dtype(dtype: np.dtype, labels: bool) -> np.dtype:
    """The type that is written for `dtype`: one that FITS has and all programs read.

    Raises:
        ValueError: labels that are no integers, or a type without real numbers.

    Example:
        >>> stored_dtype(np.dtype(bool), True), stored_dtype(np.dtype(np.float16), False)
        (dtype('uint8'), dtype('float32'))
    """
    if dtype.kind in "iu" and not labels and dtype != np.int8:
        return dtype.newbyteorder("=")  # FITS has 64 bits, too
    stored = arrays.stored_dtype(dtype, labels)
    return label_dtype(np.iinfo(stored).max, np.iinfo(stored).min) if stored.kind in "iu" else stored


def kept(header: fits.Header, inherit: bool = True) -> fits.Header:
    """A copy of a header without the cards that describe its own data.

    Args:
        header: of an image.
        inherit: keep INHERIT, which has a meaning in an extension only.

    Example:
        >>> list(kept(fits.Header({"NAXIS": 2, "BUNIT": "Jy", "CRPIX1": 5.0, "OBJECT": "M 31"})))
        ['CRPIX1', 'OBJECT']
    """
    ours = "DPVERS" in header
    out = fits.Header()
    for card in header.cards:
        dropped = _STRUCTURE.fullmatch(card.keyword) or (ours and _OWN.fullmatch(card.keyword))
        if not dropped and (inherit or card.keyword != "INHERIT"):
            out.append(card, end=True)
    return out


def without_axis(header: fits.Header, axis: int) -> fits.Header:
    """A copy without the world coordinates of one axis; those above it move down.

    Args:
        header: as from `kept`.
        axis: its number in FITS, from 1.

    Raises:
        InputError: the axis is coupled with another one.

    Example:
        >>> dict(without_axis(fits.Header({"WCSAXES": 3, "CRPIX2": 5.0, "CRPIX3": 6.0}), 2))
        {'WCSAXES': 2, 'CRPIX2': 6.0}
    """

    def moved(number: str) -> int:
        return int(number) - (int(number) > axis)

    out = fits.Header()
    for card in header.cards:
        keyword, value = card.keyword, card.value
        if found := _OF_AXIS.fullmatch(keyword) or _OF_PARAMETER.fullmatch(keyword):
            if int(found[2]) == axis:
                continue
            keyword = found[1] + str(moved(found[2])) + keyword[found.end(2) :]
        elif found := _OF_PAIR.fullmatch(keyword):
            row, column = int(found[2]), int(found[3])
            if row != column and axis in (row, column) and value:
                what = f"the axis of channels is coupled with another one: {keyword} = {value}"
                raise InputError(what, "split the file into one image per channel")
            if axis in (row, column):
                continue
            keyword = f"{found[1]}{moved(found[2])}_{moved(found[3])}{found[4]}"
        elif re.fullmatch("WCSAXES[A-Z]?", keyword) and value >= axis:
            value -= 1
        same = (keyword, value) == (card.keyword, card.value)
        out.append(card if same else fits.Card(keyword, value, card.comment), end=True)
    return out


def with_axis(header: fits.Header, axis: int, name: str) -> fits.Header:
    """A copy with world coordinates of a further axis: those are the channels' numbers from 0.

    Raises:
        InputError: the header describes such an axis already.

    Example:
        >>> with_axis(fits.Header({"CD1_1": 2.0, "CD2_2": 2.0}), 3, "CLASS")["CD3_3"]
        1.0
    """
    if f"CTYPE{axis}" in header:
        what = f"the header describes an axis {axis} beyond those of its image: CTYPE{axis} = {header[f'CTYPE{axis}']}"
        raise InputError(what, "write one HDU per channel (layout: hdus)")
    out = header.copy()
    if "WCSAXES" in out:
        out["WCSAXES"] = axis
    for keyword, value in (("CTYPE", name), ("CRPIX", 1.0), ("CRVAL", 0.0), ("CDELT", 1.0)):
        out.append((f"{keyword}{axis}", value), end=True)
    if any(re.fullmatch(r"CD\d+_\d+", keyword) for keyword in out):
        out.append((f"CD{axis}_{axis}", 1.0), end=True)
    return out


def of_grid(like: Volume) -> fits.Header:
    """Linear world coordinates from a volume's affine, or else its spacing; none where that is 1 and no more is known.

    The first pixel's centre is at the affine's origin, or at 0. No unit is stated: the volume does not know it.

    Example:
        >>> of_grid(Volume.from_array(np.zeros((4, 5)), (2.0, 0.5)))["CDELT1"]
        0.5
    """
    header = fits.Header()
    dims = like.dims
    if like.affine is None and set(like.spacing) == {1.0}:
        return header
    for axis, name in enumerate("XYZ"[:dims]):
        header[f"CTYPE{axis + 1}"] = name
        header[f"CRPIX{axis + 1}"] = 1.0
        header[f"CRVAL{axis + 1}"] = 0.0 if like.affine is None else float(like.affine[axis, 3])
        if like.affine is None:
            header[f"CDELT{axis + 1}"] = like.spacing[dims - 1 - axis]
            continue
        for column in range(dims):
            header[f"CD{axis + 1}_{column + 1}"] = float(like.affine[axis, column])
    return header


def structure(shape: Sequence[int], dtype: np.dtype, extension: bool, prefix: str = "") -> fits.Header:
    """The cards that say how an array lies on disk.

    Args:
        shape: in numpy's order; empty for no array.
        dtype: as from `stored_dtype`; unsigned types get their BZERO.
        extension: of an extension, not the primary HDU.
        prefix: "Z" for the cards of a compressed image, which stand among those of its table.

    Example:
        >>> structure((4, 5), np.dtype(np.uint16), extension=False)["BZERO"]
        32768
    """
    header = fits.Header()
    bits = dtype.itemsize * (-8 if dtype.kind == "f" else 8)
    if prefix:
        header["ZTENSION"] = "IMAGE"
    elif extension:
        header["XTENSION"] = "IMAGE"
    else:
        header["SIMPLE"] = True
    header[f"{prefix}BITPIX"], header[f"{prefix}NAXIS"] = bits, len(shape)
    for axis, size in enumerate(reversed(shape), 1):
        header[f"{prefix}NAXIS{axis}"] = size
    if extension:
        header[f"{prefix}PCOUNT"], header[f"{prefix}GCOUNT"] = 0, 1
    else:
        header["EXTEND"] = True
    if dtype.kind == "u" and dtype.itemsize > 1:
        header["BSCALE"], header["BZERO"] = 1, 1 << (8 * dtype.itemsize - 1)
    return header


def finished(
    structural: fits.Header,
    contents: Contents | None,
    name: str | None,
    body: fits.Header,
    provenance: Provenance,
    labels: bool = False,
) -> fits.Header:
    """A whole header, with room for DATASUM and CHECKSUM.

    Args:
        structural: from `structure`.
        contents: None for an HDU without data.
        name: EXTNAME.
        body: what is kept of the source.
        provenance: card -> value; None leaves one out; "HISTORY" is a line or several.
        labels: the values are classes.
    """
    header = structural.copy()
    if name is not None:
        header["EXTNAME"] = name
    if contents is not None:
        if contents.version is not None:
            header["EXTVER"] = contents.version
        header["BUNIT"] = contents.unit
        quantity = "label" if labels else "probability" if contents.probability else contents.quantity
        if quantity:
            header["BTYPE"] = quantity.upper()
    header["CHECKSUM"], header["DATASUM"] = CHECKSUM_UNSET, "0"
    for card in body.cards:
        header.append(card, end=True)
    for keyword, value in {"DPVERS": densepred.__version__, **provenance}.items():
        if keyword == "HISTORY":
            for line in [value] if isinstance(value, str) else value or ():  # type: ignore[union-attr]
                header.append(("HISTORY", line), end=True)
        elif value is not None:
            header.append((keyword, value, PROVENANCE.get(keyword, "")), end=True)
    return header


def name_cards(keyword: Literal["CLASS", "CHAN"], names: Iterable[tuple[int, str]]) -> fits.Header:
    """The cards CLASS0 to CLASS999, or CHAN0 to CHAN9999, of numbered names; the legend table holds them all."""
    room = 10 ** (8 - len(keyword))
    return fits.Header([(f"{keyword}{number}", name) for number, name in names if 0 <= number < room])
