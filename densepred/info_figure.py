"""The picture of `densepred info`: the middle slice with physical coordinates on its axes, and outlines of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from densepred.errors import InputError
from densepred.figures import INK, new_figure, save_png
from densepred.info_axes import Frame, add_axes, frame_of, slice_title
from densepred.info_outline import colored, draw_outlines, legend_of, names_of
from densepred.info_sky import keep_on_sky
from densepred.volumes import Volume
from densepred.volumes.channels import check_grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from densepred.volumes.fits_header import FitsHeader

HOLE = "#B9A3D6"
"""The colour of pixels without a value."""
_MOST_PIXELS = 1200  # along a side; more are passed over
_ROWS = 256
_SHARES = (1, 99)  # percentiles


@dataclass(frozen=True)
class Overlay:
    """Labels whose outlines are drawn over an image.

    Args:
        volume: the labels, on the grid of the image.
        names: of their values; else those of its header, or the numbers.
    """

    volume: Volume
    names: Mapping[int, str] = field(default_factory=dict)


def draw_volume(volume: Volume, png: str | Path, overlay: Overlay | None = None) -> None:
    """Write the middle slice of a volume as PNG; see `figure_of`."""
    save_png(figure_of(volume, overlay), png)


def figure_of(volume: Volume, overlay: Overlay | None = None) -> Figure:
    """The middle slice across the first axis, or the image if it is 2D.

    Three or four channels of bytes are shown as colours, labels in a colour each, else the first channel in grey: FITS
    between astropy's zscale limits, others between the 1st and 99th percentile, as the scale beside it says. Pixels
    without a value have a colour of their own. For the coordinates along the axes see `info_axes.frame_of`.

    Args:
        volume: the image.
        overlay: labels to outline.

    Raises:
        InputError: the labels lie on another grid, or are none.

    Example:
        >>> image = Volume.from_array(np.random.default_rng(0).normal(size=(40, 50)), (0.5, 0.5))
        >>> figure_of(image, Overlay(image.like(np.eye(40, 50, dtype=int)))).axes[0].get_xlabel()
        'x / unknown unit'
    """
    index, (height, width) = _index(volume), volume.shape[-2:]
    frame = frame_of(volume, index)
    tall = abs(height * frame.y[1] * frame.aspect / (width * frame.x[1]))
    figure = new_figure(7.0, float(np.clip(5.4 * tall, 2.5, 8.5)) + 1.0)
    figure.set_layout_engine("compressed", h_pad=0.08, w_pad=0.08)  # no gaps beside a picture of fixed proportions
    outlined = None if overlay is None else _outlined(volume, overlay)
    plane, step = middle(volume), _step(volume)
    axes = add_axes(figure, volume, frame, index)
    handles = _show(figure, axes, volume, plane, frame, step)
    if overlay is not None and outlined is not None:
        draw_outlines(axes, outlined, frame, step)
        handles += legend_of(outlined, names_of(overlay.volume.header) | dict(overlay.names), lines=True)
    if handles:
        columns = min(len(handles), 4)
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set_title(slice_title(volume, index, frame), fontsize=10, color=INK, loc="left", parse_math=False)
    return figure


def middle(volume: Volume) -> np.ndarray:
    """`(C, rows, columns)` of the middle slice, every n-th pixel where it is very large."""
    step, height = _step(volume), volume.shape[-2]
    if volume.dims == 3:
        return volume[:, _index(volume), ::step, ::step]
    rows = _ROWS * step
    return np.concatenate([volume[:, at : at + rows][:, ::step, ::step] for at in range(0, height, rows)], axis=1)


def _index(volume: Volume) -> int:
    return volume.shape[1] // 2 if volume.dims == 3 else 0


def _step(volume: Volume) -> int:
    return -(-max(volume.shape[-2:]) // _MOST_PIXELS)


def _show(figure: Figure, axes: Axes, volume: Volume, plane: np.ndarray, frame: Frame, step: int) -> list[Any]:
    """The image itself; returns what the legend says of it."""
    from matplotlib.patches import Patch

    handles: list[Any] = []
    scale = ""
    if volume.labels:
        shown: dict[str, Any] = {"X": colored(plane[0])}
        handles = legend_of(plane[0], names_of(volume.header), lines=False)
    elif volume.shape[0] in (3, 4) and volume.dtype == np.uint8:
        shown = {"X": np.moveaxis(plane[:3], 0, -1)}
    else:
        image = plane[0].astype(np.float64)
        low, high, scale = stretch(image, sky=hasattr(volume.header, "has_wcs"))
        shown = {"X": np.ma.masked_invalid(image), "cmap": "gray", "vmin": low, "vmax": high}
        axes.set_facecolor(HOLE)
        if not np.isfinite(image).all():
            handles = [Patch(color=HOLE, label="no value")]
    rows, columns = plane.shape[-2:]
    picture = axes.imshow(
        **shown,
        extent=frame.extent(rows * step, columns * step),
        origin="lower" if frame.upward else "upper",
        interpolation="nearest",
    )
    left, right, low, high = frame.extent(*volume.shape[-2:])  # every n-th pixel may end beyond
    axes.set(xlim=(left, right), ylim=(low, high), aspect=frame.aspect)
    if getattr(volume.header, "has_wcs", False):
        keep_on_sky(axes, cast("FitsHeader", volume.header))
    if scale:
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, pad=0.02)
        bar.set_label(f"{value_unit(volume)}, {scale}", color=INK, fontsize=9, parse_math=False)
        bar.ax.tick_params(colors=INK, labelsize=8)
    return handles


def stretch(image: np.ndarray, sky: bool = False) -> tuple[float, float, str]:
    """Which values are shown black and white, and how these were chosen; pixels without a value do not count.

    Args:
        image: `(rows, columns)`.
        sky: take the limits of IRAF's zscale (`astropy.visualization.ZScaleInterval`), not percentiles.

    Example:
        >>> stretch(np.arange(101.0).reshape(1, 101))
        (1.0, 99.0, '1st to 99th percentile')
    """
    finite = image[np.isfinite(image)]
    if not finite.size:
        return 0.0, 1.0, "no value"
    if sky:
        from astropy.visualization import ZScaleInterval

        low, high = map(float, ZScaleInterval().get_limits(finite))
        if high > low:
            return low, high, "zscale"
    low, high = np.percentile(finite, _SHARES).tolist()
    if high > low:
        return low, high, "1st to 99th percentile"
    low, high = float(finite.min()), float(finite.max())
    return (low, high, "least to greatest") if high > low else (low, low + max(1e-6, 1e-6 * abs(low)), "constant")


def value_unit(volume: Volume) -> str:
    """What the grey values count: BUNIT of FITS, else "value"."""
    cards: Any = getattr(volume.header, "header", {})
    return str(cards.get("BUNIT", "") or "value").strip() or "value"


def _outlined(volume: Volume, overlay: Overlay) -> np.ndarray:
    """The labels of the middle slice, `(rows, columns)`.

    Raises:
        InputError: they lie on another grid, or are none.
    """
    labels = overlay.volume
    check_grids(volume, labels, "image and labels")
    if labels.shape[0] != 1:
        what = f"a label map has one channel, and this has {labels.shape[0]}"
        raise InputError(what, "give a file with one channel", labels.path)
    plane = middle(labels)[0]
    if plane.dtype.kind == "f":
        odd = plane[plane != np.round(plane)]  # NaN too
        if odd.size:
            what = f"labels are integers, and {odd.size} of {plane.size} values are not, such as {odd[0]:g}"
            raise InputError(what, "give a label map", labels.path)
    return plane.astype(np.int64)
