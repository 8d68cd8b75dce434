"""The picture of `densepred info`: the middle slice with physical coordinates on its axes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from densepred.figures import COLORS, INK, new_figure, save_png
from densepred.info import orientation_of, unit_of
from densepred.volumes import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PIXELS = 1200  # along a side; more are passed over
_ROWS = 256


def draw_volume(volume: Volume, png: str | Path) -> None:
    """Write the middle slice of a volume as PNG; see `figure_of`."""
    save_png(figure_of(volume), png)


def figure_of(volume: Volume) -> Figure:
    """The middle slice across the first axis, or the image if it is 2D.

    Three or four channels of bytes are shown as colours, labels in a colour each, else the first channel in grey
    between its 1st and 99th percentile. Along the axes stand world coordinates where a FITS header has them, else the
    distance from the first voxel's centre in the unit of the file, with the direction of the patient's axes.
    """
    plane = middle(volume)
    height, width = volume.shape[-2:]
    tall = height * volume.spacing[-2] / (width * volume.spacing[-1])
    figure = new_figure(7.0, float(np.clip(5.6 * tall, 2.5, 9.0)) + 0.9)
    axes, extent, origin = _axes(figure, volume)
    if volume.labels:
        shown: dict[str, Any] = {"X": _colored(plane[0])}
    elif volume.shape[0] in (3, 4) and volume.dtype == np.uint8:
        shown = {"X": np.moveaxis(plane[:3], 0, -1)}
    else:
        image = plane[0].astype(np.float64)
        finite = image[np.isfinite(image)]
        low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
        shown = {"X": image, "cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6 * max(1.0, abs(low)))}
    picture = axes.imshow(**shown, extent=extent, origin=origin, interpolation="nearest")
    axes.set_aspect("equal")
    if "cmap" in shown:
        bar = figure.colorbar(picture, ax=axes, shrink=0.85)
        bar.ax.tick_params(colors=INK, labelsize=8)
    axes.set_title(_title(volume), fontsize=10, color=INK, loc="left", parse_math=False)
    return figure


def middle(volume: Volume) -> np.ndarray:
    """`(C, rows, columns)` of the middle slice, every n-th pixel where it is very large."""
    height, width = volume.shape[-2:]
    step = -(-max(height, width) // _MOST_PIXELS)
    if volume.dims == 3:
        return volume[:, volume.shape[1] // 2, ::step, ::step]
    rows = _ROWS * step
    return np.concatenate([volume[:, at : at + rows][:, ::step, ::step] for at in range(0, height, rows)], axis=1)


def _colored(labels: np.ndarray) -> np.ndarray:
    """`(rows, columns, 3)`: 0 in black, every other value in one of seven colours."""
    colors = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in COLORS], np.uint8)
    out = colors[(labels.astype(np.int64) - 1) % len(colors)]
    out[labels == 0] = 0
    return out


def _axes(figure: Figure, volume: Volume) -> tuple[Axes, tuple[float, float, float, float], Literal["upper", "lower"]]:
    """Axes with their labels, the extent (left, right, bottom, top) of the picture in them, and where row 0 lies."""
    height, width = volume.shape[-2:]
    header: Any = volume.header
    if getattr(header, "has_wcs", False):
        wcs = header.spatial_wcs
        if wcs.naxis == volume.dims:
            slices = ("x", "y", volume.shape[1] // 2)[: volume.dims]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                axes = figure.add_subplot(projection=wcs, slices=slices)
            for number, kind in enumerate(list(wcs.wcs.ctype)[:2]):
                axes.coords[number].set_axislabel(str(kind).split("-")[0], color=INK)
            return axes, (-0.5, width - 0.5, -0.5, height - 0.5), "lower"
    axes = figure.add_subplot()
    unit = unit_of(volume)
    codes = orientation_of(volume)
    down, right = volume.spacing[-2:]
    words = [f"{name} / {unit}" if unit else name for name in "xy"]
    if codes:
        words = [f"{word}, towards {code}" for word, code in zip(words, codes, strict=False)]
    axes.set_xlabel(words[0], color=INK)
    axes.set_ylabel(words[1], color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    left, first = -0.5 * right, -0.5 * down
    last = (height - 0.5) * down
    if codes and codes[1] in "RAS":
        return axes, (left, (width - 0.5) * right, first, last), "lower"
    return axes, (left, (width - 0.5) * right, last, first), "upper"


def _title(volume: Volume) -> str:
    name = "" if volume.path is None else volume.path.name
    return f"{name}   slice {volume.shape[1] // 2} of {volume.shape[1]}" if volume.dims == 3 else name
