"""Axes with world coordinates of FITS along them, through astropy's WCSAxes.

Reference: Greisen & Calabretta 2002, A&A 395, 1061; Thompson 2006, A&A 449, 791 (the Sun).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.figures import INK

if TYPE_CHECKING:
    from astropy.wcs import WCS
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from densepred.volumes.fits_header import FitsHeader

_SKY = {
    "RA": "right ascension", "DEC": "declination", "GLON": "galactic longitude", "GLAT": "galactic latitude",
    "ELON": "ecliptic longitude", "ELAT": "ecliptic latitude", "HPLN": "helioprojective longitude",
    "HPLT": "helioprojective latitude", "CRLN": "Carrington longitude", "CRLT": "Carrington latitude",
    "HGLN": "heliographic longitude", "HGLT": "heliographic latitude",
}  # fmt: skip


def sky_axes(figure: FigureBase, header: Any, index: int) -> Axes:
    """WCSAxes of a slice: astropy writes the world coordinates, distortions included."""
    wcs: WCS = header.wcs
    dims = len(header.spatial_axes)
    slices: list[str | int] = ["x", "y"]
    for number in range(2, wcs.naxis):
        axis = len(header.shape) - 1 - number
        slices.append(index if dims == 3 and axis == header.spatial_axes[0] else 0)
    with warnings.catch_warnings(action="ignore"):
        axes: Any = figure.add_subplot(projection=wcs, slices=slices)
    axes.coords.grid(color="white", alpha=0.35, linestyle=":", linewidth=0.8)
    for number, coordinate in enumerate(axes.coords):
        name = _world_name(wcs, number)
        coordinate.set_axislabel(name, color=INK, fontsize=9)
        coordinate.set_ticks(number=5)
        coordinate.set_ticklabel(exclude_overlapping=True, color=INK, size=8)
        coordinate.tick_params(direction="in", color="white", length=4)
    return axes


def keep_on_sky(axes: Axes, volume: Volume) -> None:
    """End a picture at the centres of its outer pixels where their outer edges are off the sky.

    An all-sky map reaches the poles there; astropy writes no ticks along an edge without coordinates.
    """
    header: Any = volume.header
    if not getattr(header, "has_wcs", False) or header.wcs.naxis != 2:
        return
    rows, columns = volume.shape[-2:]
    ends = np.array([(x, y) for x in (-0.5, columns - 0.5) for y in (-0.5, rows - 0.5)])
    with warnings.catch_warnings(action="ignore"):
        off = [not np.isfinite(header.wcs.all_pix2world(points, 0)).all() for points in (ends, np.clip(ends, 0, None))]
    if off[0]:
        axes.set(xlim=(0, columns - 1), ylim=(0, rows - 1))


def _world_name(wcs: WCS, number: int) -> str:
    """What stands along an axis: the words for its CTYPE, the system of a celestial one, the unit of another."""
    kind = str(wcs.wcs.ctype[number])
    name = kind.split("-")[0] if kind[4:5] == "-" or kind[:3] in ("RA-",) else kind
    words = _SKY.get(name, name or f"axis {number + 1}")
    if name in ("RA", "DEC") and wcs.wcs.radesys:
        return f"{words} ({wcs.wcs.radesys})"
    unit = str(wcs.wcs.cunit[number])
    return words if number in (wcs.wcs.lng, wcs.wcs.lat) or not unit else f"{words} / {unit}"


def aspect_of(header: Any) -> float:
    """Height of a pixel over its width on the sky; 1 where the two are not of one kind."""
    if not header.has_wcs:
        return 1.0
    (high, unit), (wide, other) = header.pixel_scale[-2:]
    ratio = high / wide if unit == other and wide > 0 else 1.0
    return float(ratio) if np.isfinite(ratio) and ratio > 0 else 1.0
