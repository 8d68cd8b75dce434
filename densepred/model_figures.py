"""Pictures of what is inside networks: the effective receptive field, and the pattern that upsampling leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.figures import COLORS, INK, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from densepred.models.inspect import Checkerboard, EffectiveField

_WIDTH = 3.7
_LEAST = 1e-4
_PERIODS = 8


def draw_receptive_field(field: EffectiveField, path: str | Path) -> Path:
    """Write a PNG of the gradient at the middle voxel, with the effective and theoretical fields as rectangles.

    In 3D the three planes through the middle are drawn side by side.

    Args:
        field: from `densepred.models.inspect.effective_receptive_field`.
        path: the file to write, or to replace in one step.

    Example:
        >>> from densepred.models.build import create_model
        >>> from densepred.models.inspect import effective_receptive_field
        >>> model = create_model(dims=2, channels=(4, 8))
        >>> draw_receptive_field(effective_receptive_field(model, (64, 64)), "field.png")  # doctest: +SKIP
    """
    return _written(receptive_field_figure(field), path)


def receptive_field_figure(field: EffectiveField) -> Figure:
    """See `draw_receptive_field`."""
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D

    figure, planes = _planes(field.size)
    dashed: dict[str, Any] = {"color": "white", "linestyle": (0, (4, 2))}
    for axes, (row, column) in planes:
        picture = np.maximum(_plane(field.gradient, row, column), _LEAST)
        image = _show(axes, picture, row, column, len(field.size), cmap="magma", norm=LogNorm(_LEAST, 1))
        _rectangle(axes, field.possible[row], field.possible[column], **dashed)
        _rectangle(axes, field.effective[row], field.effective[column], color=COLORS[1])
    _bar(figure, image, planes, "mean |gradient|, relative to the largest")
    theoretical = _voxels(["all" if span is None else span[1] - span[0] for span in field.theoretical])
    within = "" if field.possible == field.theoretical else " within the image"
    _title(
        figure,
        f"effective receptive field {_voxels(field.extent)} voxels",
        f"{_percent(field.fraction)} of the theoretical {theoretical}{within}",
    )
    lines = [
        Line2D([], [], color=COLORS[1], label="95 % of the gradient, along each axis"),
        Line2D([], [], **dashed, label="theoretical field"),
    ]
    legend = figure.legend(handles=lines, fontsize=8, loc="outside lower center", ncols=2, labelcolor="white")
    legend.get_frame().set(facecolor="#222222", edgecolor="none")
    return figure


def draw_checkerboard(result: Checkerboard, path: str | Path) -> Path:
    """Write a PNG of the response to a constant image, all of it above and its pattern over some periods below.

    In 3D the three planes through the middle are drawn side by side.

    Args:
        result: from `densepred.models.inspect.checkerboard`.
        path: the file to write, or to replace in one step.

    Example:
        >>> from densepred.models.build import create_model
        >>> from densepred.models.inspect import checkerboard
        >>> draw_checkerboard(checkerboard(create_model(dims=2, channels=(4, 8)), (64, 64)), "c.png")  # doctest: +SKIP
    """
    return _written(checkerboard_figure(result), path)


def checkerboard_figure(result: Checkerboard) -> Figure:
    """See `draw_checkerboard`."""
    size = result.response.shape
    repeats = [max(2, min(_PERIODS, 32 // p)) for p in result.period]
    tiled = np.tile(result.pattern, repeats)
    figure, planes = _planes(size, rows=2)
    count = len(planes) // 2
    spread = max(float(np.abs(tiled).max()), _LEAST)
    inner = result.response[tuple(slice(*span) for span in result.measured)]
    middle, reach = float(inner.mean()), max(3 * float(inner.std()), 1e-6)
    for axes, (row, column) in planes[:count]:
        above = _show(axes, _plane(result.response, row, column), row, column, len(size), cmap="viridis")
        above.set_clim(middle - reach, middle + reach)
        _rectangle(axes, result.measured[row], result.measured[column], color="white", linestyle=(0, (4, 2)))
        axes.set_title("response to a constant image", fontsize=9, color=INK)
    for axes, (row, column) in planes[count:]:
        below = _show(
            axes, _plane(tiled, row, column), row, column, len(size), cmap="RdBu_r", vmin=-spread, vmax=spread
        )
        axes.set_title(f"its pattern, {repeats[row]} x {repeats[column]} periods", fontsize=9, color=INK)
    _bar(figure, above, planes[:count], "response / mean")
    _bar(figure, below, planes[count:], "deviation / mean")
    _title(
        figure,
        f"uneven by {_percent(result.unevenness)} of the mean, period {_voxels(result.period)} voxels",
        "measured within the dashed line",
    )
    return figure


def _written(figure: Figure, path: str | Path) -> Path:
    save_png(figure, path)
    return Path(path)


def _planes(size: Sequence[int], rows: int = 1) -> tuple[Figure, list[tuple[Axes, tuple[int, int]]]]:
    """Room for each plane through the middle, in rows, and which axes of the array it extends along."""
    pairs = list(combinations(range(len(size)), 2))[::-1]
    scale = _WIDTH / max(size)
    widths, heights = [size[column] for _, column in pairs], [size[row] for row, _ in pairs]
    figure = new_figure(
        max(sum(widths) * scale + 0.6 * len(pairs), 3.6) + 1.1, max(max(heights) * scale, 1.2) * rows + 0.6 * rows + 0.8
    )
    grid = figure.subplots(rows, len(pairs), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_anchor("N")
    return figure, [(axes, pair) for line in grid for axes, pair in zip(line, pairs, strict=True)]


def _plane(volume: np.ndarray, row: int, column: int) -> np.ndarray:
    """The plane through the middle along two axes."""
    others = {axis: n // 2 for axis, n in enumerate(volume.shape) if axis not in (row, column)}
    return volume[tuple(others.get(axis, slice(None)) for axis in range(volume.ndim))]


def _show(axes: Axes, picture: np.ndarray, row: int, column: int, dims: int, **style: Any) -> AxesImage:
    names = "zyx"[-dims:]
    axes.set_xlabel(f"{names[column]} (voxels)", color=INK, fontsize=9)
    axes.set_ylabel(f"{names[row]} (voxels)", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.locator_params(integer=True, nbins=6)
    return axes.imshow(picture, interpolation="nearest", **style)


def _rectangle(axes: Axes, rows: tuple[int, int], columns: tuple[int, int], **style: Any) -> None:
    """The outline of some rows and columns, first and one past the last."""
    from matplotlib.patches import Rectangle

    (top, bottom), (left, right) = rows, columns
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, linewidth=1.4, **style))


def _title(figure: Figure, first: str, second: str) -> None:
    figure.suptitle(f"{first}\n{second}", fontsize=10, color=INK)


def _bar(figure: Figure, image: AxesImage, planes: Sequence[tuple[Axes, Any]], label: str) -> None:
    bar = figure.colorbar(image, ax=[axes for axes, _ in planes], fraction=0.05, pad=0.02)
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)


def _voxels(values: Sequence[int | str]) -> str:
    return " x ".join(map(str, values))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 1e-3 else f"{share:.1e}"
