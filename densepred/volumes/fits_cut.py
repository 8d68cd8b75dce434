"""The header of a part of a FITS image, or of its pixels averaged over blocks: every sky position stays where it is.

Reference: Greisen & Calabretta 2002, A&A 395, 1061 (FITS paper I); Shupe et al. 2005, ASP 347, 491 (SIP).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes.fits_header import POLYNOMIALS

_VERSION = re.compile(r"(?:CTYPE|CRVAL|CDELT|CRPIX|CUNIT)\d+([A-Z]?)|(?:CD|PC)\d+_\d+([A-Z]?)")
_TABLES = re.compile(r"(CPDIS|CQDIS|D2IMDIS)\d+[A-Z]?|AXISCORR|D2IMEXT")
_SIP = re.compile(r"([AB]|[AB]P)_(\d+)_(\d+)")


def cutout_header(header: fits.Header, box: Sequence[tuple[int, int]]) -> fits.Header:
    """The header of the pixels `start` to `stop` (exclusive) along each of the fastest axes.

    CRPIX of the primary and every alternate WCS is shifted and LTV says by how much; SIP and TPV go with them.

    Args:
        header: of the image.
        box: (start, stop) per axis in numpy's order; axes before those (of a cube, or of length 1) are whole.

    Raises:
        InputError: the distortion is a look-up table over the pixels of the whole image, or the box leaves the image.

    Example:
        >>> header = fits.Header({"NAXIS": 2, "NAXIS1": 9, "NAXIS2": 9, "CTYPE1": "RA---TAN", "CRPIX1": 5.0})
        >>> cutout_header(header, [(0, 9), (2, 6)])["CRPIX1"]
        3.0
    """
    _refuse_tables(header, "cut out of")
    out = header.copy()
    for axis, (start, stop) in enumerate(reversed(box), 1):
        size = header.get(f"NAXIS{axis}", 0)
        if not 0 <= start < stop <= size:
            what = f"the box {start} to {stop} is not within axis {axis} of {size} pixels"
            raise InputError(what, "choose a box within the image")
        out[f"NAXIS{axis}"] = stop - start
        for version in _versions(header):
            keyword = f"CRPIX{axis}{version}"
            out[keyword] = header.get(keyword, 0.0) - start
        out[f"LTV{axis}"] = float(header.get(f"LTV{axis}", 0.0)) - start
        out[f"LTM{axis}_{axis}"] = float(header.get(f"LTM{axis}_{axis}", 1.0))
        if f"CNPIX{axis}" in header:
            out[f"CNPIX{axis}"] = header[f"CNPIX{axis}"] + start
    return out


def binned_header(header: fits.Header, factor: int | Sequence[int]) -> fits.Header:
    """The header of an image whose pixels are blocks of `factor` of the given one's; incomplete blocks are left out.

    Args:
        header: of the image.
        factor: for the two fastest axes alike; or one per axis, in numpy's order, of the fastest axes.

    Raises:
        InputError: a distortion that cannot be scaled (look-up tables, TPV and its like, plate solutions), or a
            block larger than the image.
        ValueError: a factor below 1.

    Example:
        >>> header = fits.Header({"NAXIS": 2, "NAXIS1": 256, "NAXIS2": 256, "CTYPE1": "RA---TAN", "CRPIX1": 128.5})
        >>> binned_header(header, 2)["CRPIX1"]
        64.5
    """
    factors = [factor, factor] if isinstance(factor, int) else list(reversed(factor))
    if min(factors) < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    _refuse_tables(header, "binned from")
    _refuse_polynomials(header)
    out = header.copy()
    for axis, n in enumerate(factors, 1):
        size = header.get(f"NAXIS{axis}", 0)
        if n > size:
            what = f"blocks of {n} pixels are larger than axis {axis} of {size}"
            raise InputError(what, "choose a smaller factor")
        out[f"NAXIS{axis}"] = size // n
        for version in _versions(header):
            keyword = f"CRPIX{axis}{version}"
            out[keyword] = (header.get(keyword, 0.0) - 0.5) / n + 0.5
        out[f"LTV{axis}"] = (float(header.get(f"LTV{axis}", 0.0)) - 0.5) / n + 0.5
        out[f"LTM{axis}_{axis}"] = float(header.get(f"LTM{axis}_{axis}", 1.0)) / n
    for version in _versions(header):
        _scale_matrix(out, version, factors)
    _scale_sip(out, factors)
    return out


def _versions(header: fits.Header) -> list[str]:
    """The letters of the WCSs that are there, "" for the primary one."""
    found = filter(None, map(_VERSION.fullmatch, header))
    return sorted({match[1] or match[2] or "" for match in found})


def _refuse_tables(header: fits.Header, action: str) -> None:
    if tables := [keyword for keyword in header if _TABLES.fullmatch(keyword)]:
        what = f"the distortion is a look-up table over the whole image ({tables[0]}); no part can be {action} it"
        raise InputError(what, "process the whole image")


def _refuse_polynomials(header: fits.Header) -> None:
    for keyword in header:
        if re.fullmatch(r"CTYPE\d+[A-Z]?", keyword) and str(header[keyword])[5:].strip("-") in POLYNOMIALS:
            what = f"a {str(header[keyword])[5:]} distortion cannot be binned ({keyword} = '{header[keyword]}')"
            raise InputError(what, "write the result unbinned")
    if "AMDX1" in header and not str(header.get("CTYPE1", "")):
        raise InputError("a plate solution (AMDX1) cannot be binned", "write the result unbinned")


def _scale_matrix(header: fits.Header, version: str, factors: list[int]) -> None:
    """Multiply the columns of the pixel axes of the linear transformation: of CD, or of PC times CDELT."""
    sizes = dict(enumerate(factors, 1))
    linear = {key: found for key in header if (found := re.fullmatch(rf"(CD|PC)(\d+)_(\d+){version}", key))}
    has_cd = any(found[1] == "CD" for found in linear.values())
    mixed = {
        int(found[2])
        for key, found in linear.items()
        if header[key] and sizes.get(int(found[2]), 1) != sizes.get(int(found[3]), 1)
    }
    for key, found in linear.items():
        if found[1] == "CD":
            header[key] *= sizes.get(int(found[3]), 1)
    rotated = any(header.get(f"CROTA{axis}", 0) for axis in sizes)
    if not has_cd and (mixed or (rotated and len(set(factors[:2])) > 1)):
        raise InputError(f"axes that are rotated need one factor, got {factors}", "choose one factor for all axes")
    for axis, n in sizes.items():
        if not has_cd or f"CDELT{axis}{version}" in header:
            header[f"CDELT{axis}{version}"] = header.get(f"CDELT{axis}{version}", 1.0) * n


def _scale_sip(header: fits.Header, factors: list[int]) -> None:
    x, y = (*factors, 1)[:2]
    for keyword in list(header):
        if found := _SIP.fullmatch(keyword):
            own = x if found[1][0] == "A" else y
            header[keyword] *= float(x) ** int(found[2]) * float(y) ** int(found[3]) / own
        elif keyword in ("A_DMAX", "B_DMAX"):
            header[keyword] /= x if keyword[0] == "A" else y
