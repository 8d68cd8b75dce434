"""`FitsHeader`: where an image of a FITS file comes from, and its world coordinates (WCS).

Importing this module does not import astropy. Reference: Greisen & Calabretta 2002, A&A 395, 1061 (FITS paper I).
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from densepred.errors import InputError

if TYPE_CHECKING:
    from astropy.io.fits import Header
    from astropy.wcs import WCS

WCS_TOLERANCE = 0.1
"""Pixels by which the channels of one case may lie apart."""
POLYNOMIALS = ("TPV", "TPD", "TPU", "TNX", "ZPX")
"""Projections with a distortion by a polynomial."""
_FLAT = ("A_ORDER", "B_ORDER", "CPDIS1", "CPDIS2", "D2IMDIS1", "D2IMDIS2")
"""Distortions of the first two axes."""
_TABLES = ("CPDIS1", "CPDIS2", "CQDIS1", "CQDIS2", "D2IMDIS1", "D2IMDIS2", "PS1_0", "PS2_0", "PS3_0")


@dataclass(frozen=True)
class FitsHeader:
    """The header of one HDU, and how the axes of its array became those of a `Volume`.

    Args:
        header: a copy of the HDU's header; of a compressed image, the image's, not the table's.
        index: the HDU's number, the primary's is 0.
        name: EXTNAME without trailing blanks, "PRIMARY" for a nameless first HDU, else "".
        version: EXTVER.
        shape: as stored, in numpy's order (NAXISn ... NAXIS1).
        squeezed: the axes of `shape`, all of length 1, that the volume does not have.
        channels_axis: the axis of `shape` that the volume has as channels; None where it has one channel.
        path: the file, from which tables of distortions are read.
        compression: ZCMPTYPE of a tile-compressed image ("RICE_1"), or None.
    """

    header: Header
    index: int
    name: str
    version: int
    shape: tuple[int, ...]
    squeezed: tuple[int, ...] = ()
    channels_axis: int | None = None
    path: Path | None = None
    compression: str | None = None

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """The axes of `shape` that are the volume's (Z, Y, X) or (Y, X)."""
        dropped = {*self.squeezed, self.channels_axis}
        return tuple(axis for axis in range(len(self.shape)) if axis not in dropped)

    @cached_property
    def wcs(self) -> WCS:
        """astropy's WCS of all stored axes, distortions included; of a distorted cube, that of its first two axes.

        Raises:
            InputError: its cards contradict each other.
        """
        return _wcs_of(self)

    @property
    def has_wcs(self) -> bool:
        """Whether the header says anything about world coordinates."""
        cards = (f"{card}{axis + 1}" for card in ("CTYPE", "CRPIX", "CRVAL") for axis in range(len(self.shape)))
        return any(card in self.header for card in cards)

    @property
    def spatial_wcs(self) -> WCS:
        """The WCS of the spatial axes alone; of all axes where these cannot be told apart.

        Raises:
            InputError: as `wcs`.
        """
        from astropy.wcs import InvalidSubimageSpecificationError

        if len(self.spatial_axes) == len(self.shape):
            return self.wcs
        try:
            numbers = [len(self.shape) - axis for axis in reversed(self.spatial_axes)]
            return self.wcs.sub([number for number in numbers if number <= self.wcs.naxis])
        except InvalidSubimageSpecificationError:
            return self.wcs

    @property
    def pixel_scale(self) -> tuple[tuple[float, str], ...]:
        """Size and unit of a pixel along each spatial axis at the reference point; angles in arcsec, "" if unitless.

        Raises:
            InputError: as `wcs`.

        Example:
            >>> from astropy.io.fits import Header
            >>> cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -1 / 3600, "CDELT2": 2 / 3600}
            >>> cards |= {"CUNIT1": "deg", "CUNIT2": "deg"}
            >>> FitsHeader(Header(cards), 0, "PRIMARY", 1, (50, 60)).pixel_scale
            ((2.0, 'arcsec'), (1.0, 'arcsec'))
        """
        from astropy import units
        from astropy.wcs.utils import proj_plane_pixel_scales

        sizes, out = proj_plane_pixel_scales(self.wcs), []
        for axis in self.spatial_axes:
            number = len(self.shape) - 1 - axis
            if number >= len(sizes):
                out.append((1.0, ""))
                continue
            size = sizes[number] * units.Unit(self.wcs.wcs.cunit[number])
            if size.unit.physical_type == "angle":
                size = size.to(units.arcsec)
            out.append((round(float(size.value), 12), size.unit.to_string()))
        return tuple(out)


def _wcs_of(header: FitsHeader) -> WCS:
    from astropy.io import fits
    from astropy.wcs import WCS

    cards, axes = header.header, len(header.shape)
    most = 2 if axes > 2 and _is_distorted(cards) else None
    with warnings.catch_warnings(action="ignore"):  # units and dates that astropy mends
        try:
            if header.path is not None and any(name in cards for name in _TABLES):
                with fits.open(header.path, memmap=False) as file:
                    wcs = WCS(cards, file, naxis=most)
            else:
                wcs = WCS(cards, naxis=most)
            wcs = wcs if wcs.naxis <= axes else wcs.sub(axes)
            wcs.wcs.set()
            return wcs
        except Exception as error:  # wcslib's errors have no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            what = f"HDU {header.index}: the world coordinates make no sense: {reason}"
            raise InputError(what, "mend the WCS cards of its header", header.path) from error


def _is_distorted(cards: Header) -> bool:
    """Whether astropy handles these world coordinates in two dimensions only (it cannot copy others of wcslib's)."""
    projections = [str(cards.get(f"CTYPE{axis}", ""))[5:].strip("-") for axis in (1, 2)]
    return any(name in cards for name in _FLAT) or any(name in POLYNOMIALS for name in projections)


def wcs_offset(first: FitsHeader, second: FitsHeader) -> float:
    """How far apart the corners and the centre of two images lie by their world coordinates, in pixels of the first.

    Points that are off the sky in both (the corners of an all-sky map) are left out.

    Returns:
        The largest distance; 0 where either header has no world coordinates; infinite where they cannot be compared.

    Raises:
        ValueError: the spatial shapes differ.

    Example:
        >>> from astropy.io.fits import Header
        >>> first, second = (FitsHeader(Header({"CRPIX1": x}), 0, "", 1, (50, 60)) for x in (1.0, 1.5))
        >>> wcs_offset(first, second)
        0.5
    """
    sizes = [[header.shape[axis] for axis in header.spatial_axes] for header in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the spatial shapes must agree, got {sizes[0]} and {sizes[1]}")
    if not (first.has_wcs and second.has_wcs):
        return 0.0
    ends = [(0.0, size - 1.0) for size in reversed(sizes[0])]
    spots = [*itertools.product(*ends), tuple(sum(pair) / 2 for pair in ends)]
    ours, theirs = first.spatial_wcs, second.spatial_wcs
    if ours.naxis != theirs.naxis:
        return float("inf")
    places = np.zeros((len(spots), len(first.shape)))
    places[:, [len(first.shape) - 1 - axis for axis in reversed(first.spatial_axes)]] = spots
    pixels = np.array(spots) if ours.naxis == len(ends) else places[:, : ours.naxis]
    return _apart(pixels, _carried(pixels, theirs, ours))


def _carried(pixels: np.ndarray, source: WCS, target: WCS) -> np.ndarray:
    """The pixels of `target` that lie where those of `source` do; NaN off the sky."""
    from astropy.wcs.utils import pixel_to_pixel

    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        if _system(source) != _system(target):
            try:
                return np.stack(pixel_to_pixel(source, target, *pixels.T), axis=1)
            except Exception:  # a system that astropy does not know, or no common one
                return np.full_like(pixels, np.inf)
        world, own = source.all_pix2world(pixels, 0), target.all_pix2world(pixels, 0)
        if target.wcs.lng >= 0:
            turns = np.round((own - world)[:, target.wcs.lng] / 360)
            world[:, target.wcs.lng] += 360 * np.nan_to_num(turns)
        if np.allclose(world, own, rtol=0, atol=1e-13, equal_nan=True):
            return np.where(np.isnan(world), np.nan, pixels)
        return np.asarray(target.all_world2pix(world, 0, quiet=True))


def _system(wcs: WCS) -> tuple[object, ...]:
    """What the world coordinates of two images must share to be compared as numbers."""
    units = [str(unit) for unit in wcs.wcs.cunit]
    kinds = [kind[:4] for kind in wcs.wcs.ctype]
    equinox = None if np.isnan(wcs.wcs.equinox) else wcs.wcs.equinox
    return kinds, units, wcs.wcs.radesys, equinox, wcs.wcs.specsys


def _apart(pixels: np.ndarray, others: np.ndarray) -> float:
    distances = np.linalg.norm(others - pixels, axis=1)
    seen = ~np.isnan(distances)
    return float(distances[seen].max()) if seen.any() else 0.0
