"""World coordinates of points in a volume, and the size of a voxel there.

A FITS header gives those of its WCS, with all its distortions; an affine millimetres (RAS); a spacing with a unit alone
micrometres from the centre of the first voxel.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from astropy import units

from densepred.volumes.arrays import micrometres
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.volume import Volume, spacing_affine

_TAKEN = frozenset(("id", "class", "name", "voxels", "area", "volume", "a", "b", "c", "theta", "edge"))
_TAKEN |= {"sum", "mean", "max", "invalid"}
"""Names of other columns of a catalogue."""
_STERADIAN = float(units.sr.to(units.arcsec**2))


class World(Protocol):
    """The world that the indices of a volume lie in.

    Attributes:
        names, units: of its coordinates; a unit may be "".
        frame: the reference frame, "ICRS" or "RAS" for one; "" if there is none.
        size_unit: of `sizes`, such as "mm3"; "" if the size of a voxel is not known.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    frame: str
    size_unit: str

    def coordinates(self, points: np.ndarray) -> np.ndarray:
        """World coordinates `(N, W)` of indices `(N, d)` in the order of the array; NaN where there are none."""

    def sizes(self, points: np.ndarray) -> np.ndarray:
        """Area or volume `(N,)` of a voxel at indices `(N, d)`."""


def world_of(volumes: Sequence[Volume]) -> World | None:
    """The world of the first volume that has a WCS, else of the first with an affine or a unit; None if none has.

    Raises:
        InputError: the cards of a WCS contradict each other.

    Example:
        >>> volume = Volume(np.zeros((1, 4, 5, 6)), (3.0, 2.0, 1.0), np.diag([1.0, 2.0, 3.0, 1.0]))
        >>> world = world_of([volume])
        >>> world.names, world.coordinates(np.array([[1.0, 1.0, 1.0]])).tolist()
        (('x', 'y', 'z'), [[1.0, 2.0, 3.0]])
    """
    for volume in volumes:
        if isinstance(volume.header, FitsHeader) and volume.header.has_wcs:
            return FitsWorld(volume.header)
    for with_affine, volume in itertools.product((True, False), volumes):
        unit = _unit_in_micrometres(volume)
        if unit is not None and (volume.affine is not None) == with_affine:
            return LinearWorld(volume, unit)
    return None


def _unit_in_micrometres(volume: Volume) -> float | None:
    known, name = micrometres(volume), getattr(volume.header, "unit", None)
    if known is not None or not name:
        return known
    try:
        return float(units.Unit(name).to(units.um))
    except (ValueError, units.UnitConversionError):
        return None


class LinearWorld:
    """Millimetres by an affine, or micrometres by a spacing.

    Args:
        volume: has either.
        unit: of its spacing, in micrometres.
    """

    def __init__(self, volume: Volume, unit: float) -> None:
        self.frame, name = ("", "um") if volume.affine is None else ("RAS", "mm")
        factor = unit / (1.0 if volume.affine is None else 1e3)
        affine = spacing_affine(volume.spacing) if volume.affine is None else volume.affine
        used = [*range(volume.dims), 3]
        rows = 3 if volume.affine is not None and affine[2, used].any() else volume.dims  # an image may lie askew
        self._matrix = factor * affine[:rows][:, used]
        self.names, self.units = ("x", "y", "z")[:rows], (name,) * rows
        self.size_unit = f"{name}{volume.dims}"

    def coordinates(self, points: np.ndarray) -> np.ndarray:
        """World coordinates; see `World`."""
        return np.asarray(points[:, ::-1] @ self._matrix[:, :-1].T + self._matrix[:, -1])

    def sizes(self, points: np.ndarray) -> np.ndarray:
        """The size of a voxel, the same everywhere."""
        edges = self._matrix[:, :-1]
        return np.full(len(points), np.sqrt(np.linalg.det(edges.T @ edges)))


class FitsWorld:
    """The WCS of a FITS header; longitudes are in [0, 360) degrees, of HPLN and HGLN in [-180, 180).

    Where the axes of the space cannot be told apart from the others, these stand at their first pixel.
    """

    def __init__(self, header: FitsHeader) -> None:
        numbers = [len(header.shape) - axis for axis in reversed(header.spatial_axes)]
        known = [number for number in numbers if number <= header.wcs.naxis]
        self._wcs: Any = header.spatial_wcs
        whole = self._wcs.naxis != len(known)
        self._at = [number - 1 if whole else at for at, number in enumerate(known)]
        self._columns = [numbers.index(number) for number in known]
        moved = self._wcs.axis_correlation_matrix[:, self._at].any(1)
        self._kept = np.flatnonzero(moved)
        cards = self._wcs.wcs
        self.names = _names([str(cards.ctype[axis]) for axis in self._kept])
        self.units = tuple(cards.cunit[axis].to_string() for axis in self._kept)
        self.frame = str(cards.radesys)
        self._plane = len(numbers) == len(self._kept) == 2 and cards.lng in self._kept and cards.lat in self._kept
        self._pixel, self.size_unit = (0.0, "arcsec2") if self._plane else _constant_size(header)

    def coordinates(self, points: np.ndarray) -> np.ndarray:
        """World coordinates; see `World`."""
        return self._world(points)[:, self._kept]

    def _world(self, points: np.ndarray) -> np.ndarray:
        pixels = np.zeros((len(points), self._wcs.naxis))
        pixels[:, self._at] = points[:, ::-1][:, self._columns]
        pixels[np.isnan(pixels).any(1)] = np.nan
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            world = np.asarray(self._wcs.all_pix2world(pixels, 0)) if len(pixels) else pixels
        axis = self._wcs.wcs.lng
        if axis >= 0:
            start = -180.0 if str(self._wcs.wcs.ctype[axis])[:2] in ("HP", "HG") else 0.0
            world[:, axis] = (world[:, axis] - start) % 360 + start
        return world

    def sizes(self, points: np.ndarray) -> np.ndarray:
        """The size of a pixel; on the sky where it lies: the area between its edges' middles, spanned on the sphere."""
        if not self._plane:
            return np.full(len(points), self._pixel)
        steps = []
        for step in np.eye(2) / 2:
            ends = [
                _on_sphere(self._world(points + sign * step)[:, [self._wcs.wcs.lng, self._wcs.wcs.lat]])
                for sign in (1, -1)
            ]
            steps.append(ends[0] - ends[1])
        return np.asarray(np.linalg.norm(np.cross(*steps), axis=1) * _STERADIAN)


def _on_sphere(degrees: np.ndarray) -> np.ndarray:
    """Unit vectors `(N, 3)` of longitudes and latitudes `(N, 2)`."""
    longitude, latitude = np.radians(degrees).T
    return np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1)


def _names(kinds: Sequence[str]) -> tuple[str, ...]:
    """Names of columns from CTYPE: `RA---TAN` gives ra; `world_1` where it gives none of its own."""
    names = [re.sub(r"\W", "", kind.split("-")[0].lower()) for kind in kinds]
    own = [bool(name) and names.count(name) == 1 and name not in _TAKEN for name in names]
    return tuple(name if ok else f"world_{number}" for number, (name, ok) in enumerate(zip(names, own, strict=True), 1))


def _constant_size(header: FitsHeader) -> tuple[float, str]:
    """The size of a pixel and its unit, where all axes are lengths."""
    scales = header.pixel_scale
    if any(not unit or units.Unit(unit).physical_type != "length" for _, unit in scales):
        return 0.0, ""
    unit = units.Unit(scales[0][1])
    lengths = [size * units.Unit(name).to(unit) for size, name in scales]
    return float(np.prod(lengths)), (unit ** len(scales)).to_string()
