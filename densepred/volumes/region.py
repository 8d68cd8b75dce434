"""Which part of an image is meant: a box of voxels, or a place and size on the sky."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from densepred.errors import InputError
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.grid import Box
from densepred.volumes.volume import Volume

if TYPE_CHECKING:
    from astropy.wcs import WCS

_FORMS = "write y0:y1,x0:x1 (z0:z1 before them for a volume), or ra,dec,size such as 10h24m30s,-01d12m,2arcmin"
_RANGE = re.compile(r"\s*([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_UNITS = {"deg": 1.0, "d": 1.0, "arcmin": 1 / 60, "'": 1 / 60, "arcsec": 1 / 3600, '"': 1 / 3600}
"""The units of a size, in degrees."""


@dataclass(frozen=True)
class PixelBox:
    """A box of voxels.

    Args:
        ranges: start and stop (exclusive), from 0, along each spatial axis, slowest first; None: as far as it goes.

    Example:
        >>> image = Volume.from_array(np.zeros((40, 50)), (1.0, 1.0))
        >>> PixelBox(((10, 20), (30, None))).resolve(image)
        ((10, 20), (30, 50))
    """

    ranges: tuple[tuple[int | None, int | None], ...]

    def resolve(self, volume: Volume) -> Box:
        """The box within a volume; a part outside is cut off, with a warning.

        Raises:
            InputError: not as many ranges as axes, or nothing of the image is in it.
        """
        if len(self.ranges) != volume.dims:
            what = f"the box has {len(self.ranges)} ranges and the image has {volume.dims} axes {volume.shape[1:]}"
            raise InputError(what, f"write {','.join('zyx'[-volume.dims :])} ranges, ':' for a whole axis", volume.path)
        sizes = volume.shape[1:]
        whole = [
            (0 if start is None else start, size if stop is None else stop)
            for (start, stop), size in zip(self.ranges, sizes, strict=True)
        ]
        return _clipped(whole, volume)


@dataclass(frozen=True)
class SkyBox:
    """A box around a place on the sky; its sides are along the axes of the image.

    Args:
        ra: right ascension (ICRS) in degrees.
        dec: declination in degrees.
        width: angle on the sky along x, in degrees.
        height: along y.

    Example:
        >>> parse_region("10h24m00s,-01d12m,30arcsec").dec
        -1.2
    """

    ra: float
    dec: float
    width: float
    height: float

    def resolve(self, volume: Volume) -> Box:
        """The box of pixels around the place, distortions included; a part outside is cut off, with a warning.

        Its size in pixels is that angle over the size of a pixel at the place, rounded. Axes of a cube that are not on
        the sky are whole.

        Raises:
            InputError: the image has no celestial coordinates, or the box does not overlap it.
        """
        wcs, axes = _celestial(volume)
        x, y = self._pixel(wcs, volume)
        scales = _scales(wcs, x, y)
        if not np.isfinite(scales).all():
            raise self._outside(volume)
        box = [(0, size) for size in volume.shape[1:]]
        for axis, place, angle, scale in zip(axes, (x, y), (self.width, self.height), scales, strict=True):
            length = max(1, round(angle / scale))
            start = int(np.ceil(place - length / 2))
            box[axis] = (start, start + length)
        return _clipped(box, volume)

    def _pixel(self, wcs: WCS, volume: Volume) -> tuple[float, float]:
        """Where the place is, from 0."""
        from astropy.coordinates import SkyCoord
        from astropy.wcs import NoConvergence
        from astropy.wcs.utils import wcs_to_celestial_frame
        from astropy.wcs.wcs import InvalidCoordinateError

        try:
            frame = wcs_to_celestial_frame(wcs)
            place = SkyCoord(self.ra, self.dec, unit="deg", frame="icrs").transform_to(frame).spherical
        except (ValueError, TypeError) as error:  # coordinates of the Sun or a planet
            kinds = " and ".join(wcs.wcs.ctype)
            what = f"its coordinates {kinds} cannot be had from right ascension and declination"
            raise InputError(what, "give a box of pixels, y0:y1,x0:x1", volume.path) from error
        world = np.empty((1, 2))
        world[0, wcs.wcs.lng], world[0, wcs.wcs.lat] = place.lon.deg, place.lat.deg
        try:
            with warnings.catch_warnings(action="ignore"):
                x, y = wcs.all_world2pix(world, 0)[0].tolist()
        except (NoConvergence, InvalidCoordinateError) as error:
            raise self._outside(volume) from error
        if not np.isfinite([x, y]).all():
            raise self._outside(volume)
        return x, y

    def _outside(self, volume: Volume) -> InputError:
        what = f"ra {self.ra:.6g}, dec {self.dec:.6g} is not on the image of {' x '.join(map(str, volume.shape[1:]))}"
        return InputError(what, "check the coordinates (degrees, or hours as 10h24m30s)", volume.path)


Region: TypeAlias = PixelBox | SkyBox


def parse_region(text: str) -> Region:
    """What a user writes for a part of an image.

    Args:
        text: "y0:y1,x0:x1" or "z0:z1,y0:y1,x0:x1", from 0 and without the last, ":" for a whole axis; or
            "ra,dec,size" with degrees or sexagesimal coordinates (ICRS) and one angle, or "2arcminx3arcmin" along x
            and y.

    Raises:
        InputError: it is neither, or makes no sense.

    Example:
        >>> parse_region("100:200,50:80")
        PixelBox(ranges=((100, 200), (50, 80)))
        >>> parse_region("150.5,-1.25,0.5degx30arcmin")
        SkyBox(ra=150.5, dec=-1.25, width=0.5, height=0.5)
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 3 and ":" not in parts[2]:
        ra, dec = _angle(parts[0], "right ascension"), _angle(parts[1], "declination")
        return SkyBox(ra, dec, *_size(parts[2]))
    found = [_RANGE.fullmatch(part) for part in parts]
    if len(parts) not in (2, 3) or None in found:
        raise InputError(f"no region: '{text}'", _FORMS)
    ends = [[None if end is None else int(end) for end in match.groups()] for match in found if match]
    ranges = tuple((start, stop) for start, stop in ends)
    for part, (start, stop) in zip(parts, ranges, strict=True):
        if start is not None and stop is not None and stop <= start:
            raise InputError(f"the range {part} of '{text}' is empty", "write start:stop with start below stop")
    return PixelBox(ranges)


def _angle(text: str, what: str) -> float:
    """Degrees; a plain number is in degrees, "10:24:30" in hours for a right ascension."""
    from astropy.coordinates import Angle

    right = what == "right ascension"
    try:
        if re.fullmatch(_NUMBER, text):
            value = float(text)
        elif not right and "h" in text:
            raise ValueError("a declination is in degrees")
        else:
            value = float(Angle(text, "hourangle" if right and ":" in text else "deg").degree)
    except (ValueError, TypeError) as error:
        raise InputError(f"no {what}: '{text}'", _FORMS) from error
    low, high = (0, 360) if right else (-90, 90)
    if not low <= value <= high:
        raise InputError(f"impossible {what}: {text} is {value:g} degrees", f"it lies within {low} to {high} degrees")
    return value


def _size(text: str) -> tuple[float, float]:
    angles = []
    for part in text.split("x"):
        found = re.fullmatch(rf"({_NUMBER})\s*({'|'.join(_UNITS)})", part.strip())
        if found is None or not float(found[1]) > 0:
            what = f"no size on the sky: '{text}'"
            raise InputError(what, "write an angle above 0 with its unit: 0.1deg, 2arcmin, 30arcsec, 2arcminx3arcmin")
        angles.append(float(found[1]) * _UNITS[found[2]])
    if len(angles) > 2:
        raise InputError(f"a size of {len(angles)} angles: '{text}'", "write one angle, or two: along x and along y")
    return angles[0], angles[-1]


def _celestial(volume: Volume) -> tuple[WCS, tuple[int, int]]:
    """The WCS of the two celestial axes, and which spatial axes of the volume are its x and y.

    Raises:
        InputError: there is none.
    """
    from astropy.wcs import InvalidSubimageSpecificationError

    if not (isinstance(volume.header, FitsHeader) and volume.header.has_wcs):
        what = "a place on the sky needs a FITS image with world coordinates"
        raise InputError(what, "give a box of pixels, y0:y1,x0:x1", volume.path)
    wcs = volume.header.spatial_wcs
    pair = sorted((wcs.wcs.lng, wcs.wcs.lat))
    try:
        if pair[0] < 0 or wcs.naxis > volume.dims:
            raise InvalidSubimageSpecificationError
        sky = wcs if wcs.naxis == 2 else wcs.sub([number + 1 for number in pair])
        sky.wcs.set()
    except InvalidSubimageSpecificationError as error:
        what = f"no plane of its axes ({', '.join(wcs.wcs.ctype)}) is on the sky"
        raise InputError(what, "give a box of pixels, y0:y1,x0:x1", volume.path) from error
    return sky, (volume.dims - 1 - pair[0], volume.dims - 1 - pair[1])


def _scales(wcs: WCS, x: float, y: float) -> np.ndarray:
    """Size of the pixel at (x, y) along x and along y on the sky, in degrees."""
    from astropy.coordinates import angular_separation

    ends = np.array([(x - 0.5, y), (x + 0.5, y), (x, y - 0.5), (x, y + 0.5)])
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        world = np.deg2rad(wcs.all_pix2world(ends, 0))
    lon, lat = world[:, wcs.wcs.lng], world[:, wcs.wcs.lat]
    return np.rad2deg(angular_separation(lon[::2], lat[::2], lon[1::2], lat[1::2]))


def _clipped(box: Sequence[tuple[int, int]], volume: Volume) -> Box:
    """The part of a box that is within the image.

    Raises:
        InputError: there is none.
    """
    sizes = volume.shape[1:]
    inside = tuple((max(start, 0), min(stop, size)) for (start, stop), size in zip(box, sizes, strict=True))
    if any(start >= stop for start, stop in inside):
        what = f"the box {_written(box)} is wholly outside the image of {' x '.join(map(str, sizes))}"
        raise InputError(what, "choose a region that overlaps the image", volume.path)
    if inside != tuple(box):
        shares = [(b - a) / (stop - start) for (a, b), (start, stop) in zip(inside, box, strict=True)]
        lost = 100 * (1 - float(np.prod(shares)))
        what = f"{lost:.3g} % of the box {_written(box)} is outside the image; cut to {_written(inside)}"
        warnings.warn(f"{volume.path or 'the image'}: {what}", stacklevel=3)
    return inside


def _written(box: Sequence[tuple[int, int]]) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in box)
