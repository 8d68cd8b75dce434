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
    from matplotlib.figure import Figure

    from densepred.volumes.fits_header import FitsHeader

_SKY = {
    "RA": "right ascension", "DEC": "declination", "GLON": "galactic longitude", "GLAT": "galactic latitude",
    "ELON": "ecliptic longitude", "ELAT": "ecliptic latitude", "HPLN": "helioprojective longitude",
    "HPLT": "helioprojective latitude", "CRLN": "Carrington longitude", "CRLT": "Carrington latitude",
    "HGLN": "heliographic longitude", "HGLT": "heliographic latitude",
}  # fmt: skip


def sky_axes(figure: Figure, header: FitsHeader, index: int) -> Axes:
    """Empty axes for a slice, in pixels from 0, on which astropy writes world coordinates, distortions included.

    Args:
        figure: where to add them.
        header: of the image; its first two axes (NAXIS1, NAXIS2) are those of the picture.
        index: of the slice, along the volume's first axis.

    Returns:
        `astropy.visualization.wcsaxes.WCSAxes`.
    """
    wcs = header.wcs
    slices: list[str | int] = ["x", "y"]
    for number in range(2, wcs.naxis):
        axis = len(header.shape) - 1 - number
        through = len(header.spatial_axes) == 3 and axis == header.spatial_axes[0]
        slices.append(index if through else 0)
    with warnings.catch_warnings(action="ignore"):
        axes: Any = figure.add_subplot(projection=wcs, slices=slices)
    axes.coords.grid(color="white", alpha=0.5, linestyle=":", linewidth=0.8)
    for number, coordinate in enumerate(axes.coords):
        coordinate.set_axislabel(_world_name(wcs, number), color=INK, fontsize=9)
        coordinate.set_ticks(number=5)
        coordinate.set_ticklabel(exclude_overlapping=True, color=INK, size=8)
        coordinate.tick_params(direction="in", color="white", length=4)
    return axes


def keep_on_sky(axes: Axes, header: FitsHeader) -> None:
    """End a 2D picture at the centres of its outer pixels where only their outer edges are off the sky.

    The edges of an all-sky map lie beyond the poles, and astropy writes no ticks along an edge without coordinates.
    """
    wcs = header.wcs
    if wcs.naxis != 2:
        return
    rows, columns = header.shape[-2:]
    corners = np.array([(x, y) for x in (0, columns - 1) for y in (0, rows - 1)], np.float64)
    with warnings.catch_warnings(action="ignore"):
        inner = wcs.all_pix2world(corners, 0)
        outer = wcs.all_pix2world(corners + np.where(corners > 0, 0.5, -0.5), 0)
    if np.isfinite(inner).all() and not np.isfinite(outer).all():
        axes.set(xlim=(0, columns - 1), ylim=(0, rows - 1))


def _world_name(wcs: WCS, number: int) -> str:
    """What stands along an axis: the words for its CTYPE, the system of a celestial one, the unit of another."""
    kind = str(wcs.wcs.ctype[number])
    name = kind[:4].rstrip("-") if kind[4:5] == "-" else kind  # "RA---TAN", but "Solar-X"
    words = _SKY.get(name, name or f"axis {number + 1}")
    if name in ("RA", "DEC") and wcs.wcs.radesys:
        return f"{words} ({wcs.wcs.radesys})"
    unit = str(wcs.wcs.cunit[number])
    return words if number in (wcs.wcs.lng, wcs.wcs.lat) or not unit else f"{words} / {unit}"


def aspect_of(header: FitsHeader) -> float:
    """Height of a pixel over its width on the sky; 1 where the two are not of one kind."""
    if not header.has_wcs:
        return 1.0
    (high, unit), (wide, other) = header.pixel_scale[-2:]
    ratio = high / wide if unit == other and wide > 0 else 1.0
    return float(ratio) if np.isfinite(ratio) and ratio > 0 else 1.0
