"""Every picture the project draws: the style in one place, the curves of a training, masks over an image.

Figures are made without pyplot, so nothing global changes and no display is needed. Colours are those of Okabe and
Ito (https://jfly.uni-koeln.de/color/), which colour-blind readers tell apart; line styles tell truth from prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from densepred.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00")
INK, FAINT = "#333333", "#BBBBBB"
_HALO = "black"
_DASHES = (0, (3, 1.6))
_DPI = 120
_SCORES = ("dice_", "accuracy_", "explained_")
"""Columns that are drawn, at best 1."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    with atomic_path(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the curves of a training as PNG; see `curves_figure`.

    Args:
        rows: one an epoch, as in metrics.csv: epoch, loss, lr, and where there was a validation dice_mean and
            dice_<class>, accuracy_<target> or explained_<target>. Numbers may be text; missing, empty and non-finite
            entries are passed over.
        path: the file to write, or to replace in one step.

    Example:
        >>> training_curves([{"epoch": 1, "loss": 0.9, "lr": 0.01, "dice_mean": 0.4}], "curves.png")  # doctest: +SKIP
    """
    save_png(curves_figure(rows), path)


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and learning rate above, validation Dice per class and its mean (or other scores) below, over the epochs."""
    figure = new_figure(7.5, 6.5)
    above, below = figure.subplots(2, 1, sharex=True)
    _curve(above, rows, "loss", INK, "training loss")
    _style(above, "loss")
    rate = above.twinx()
    _curve(rate, rows, "lr", COLORS[5], "learning rate", linestyle=":")
    _style(rate, "learning rate")
    rate.spines["right"].set_visible(True)
    rate.grid(False)
    rate.set_ylim(bottom=0)
    _legend(rate, [*above.get_lines(), *rate.get_lines()], "upper right")
    _dice_panel(below, rows)
    return figure


def _dice_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    columns = list(dict.fromkeys(key for row in rows for key in row if key.startswith(_SCORES) and key != "dice_mean"))
    for index, column in enumerate(columns):
        _curve(axes, rows, column, color_of(index), column.removeprefix("dice_").replace("_", " "), marker=".")
    best = _curve(axes, rows, "dice_mean", INK, "mean", marker=".", linewidth=2)
    _style(axes, "validation Dice" if all(one.startswith("dice_") for one in columns) else "validation scores")
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if best is None and not axes.get_lines():
        axes.text(0.5, 0.5, "no validation yet", transform=axes.transAxes, ha="center", va="center", color=INK)
        return
    if best is not None:
        axes.axhline(best[1], color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(f"best mean {best[1]:.3f} in epoch {best[0]:g}", loc="right", fontsize=9, color=INK)
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1] + 0.02))
    _legend(axes, axes.get_lines()[: len(columns) + 1])


def _curve(
    axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, color: str, label: str, **style: Any
) -> tuple[float, float] | None:
    """Plot the finite entries of a column; returns the epoch and value of the highest, None if there are none."""
    points = [(_number(row.get("epoch")), _number(row.get(column))) for row in rows]
    points = [point for point in points if all(map(math.isfinite, point))]
    if not points:
        return None
    if len(points) == 1:
        style["marker"] = "."
    axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
    return max(points, key=lambda point: point[1])


def _number(entry: Any) -> float:
    return math.nan if entry is None or entry == "" else float(entry)


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _legend(axes: Axes, lines: Sequence[Any], place: Literal["best", "upper right"] = "best") -> None:
    legend = axes.legend(handles=list(lines), fontsize=9, loc=place, labelcolor=INK, ncols=1 + len(lines) // 12)
    legend.get_frame().set(edgecolor="white", alpha=0.85)
    _plain_text(legend)


def color_of(index: int) -> str:
    """The colour of the class at `index` among those with scores; seven colours, over again."""
    return COLORS[index % len(COLORS)]


def overlay(
    axes: Axes,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    colors: Mapping[int, str],
    aspect: float = 1.0,
) -> None:
    """Draw a slice in grey with the outline of every class: truth as a solid line, prediction as a white-dashed one.

    Args:
        axes: where to draw; emptied of ticks.
        image: (rows, columns) brightness; shown between its 1st and 99th percentile.
        truth, prediction: (rows, columns) integer labels.
        colors: the label values to outline, with their colours.
        aspect: height of a pixel over its width.
    """
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
    for value, color in colors.items():
        _outline(axes, truth == value, colors=color, linewidths=2.4, alpha=0.95)
    for value, color in colors.items():
        _outline(axes, prediction == value, colors=_HALO, linewidths=1.8)
        _outline(axes, prediction == value, colors=lighter(color), linewidths=1.1, linestyles=[_DASHES])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def labelled(axes: Axes, image: np.ndarray, label: np.ndarray, colors: Mapping[int, str], aspect: float = 1.0) -> None:
    """Draw a picture with an outline around every class; where there is no truth, hatching.

    Args:
        axes: where to draw; emptied of ticks.
        image: (rows, columns) or (rows, columns, 3), 0 to 1.
        label: (rows, columns) class indices, -1 without a truth.
        colors: the classes to outline, with their colours.
        aspect: height of a pixel over its width.
    """
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    if (label < 0).any():
        unknown = np.where(label < 0, 1.0, 0.0)
        rows, columns = (np.linspace(-0.5, size - 0.5, 4 * size + 1) for size in label.shape)
        cells = np.ix_(*(np.clip(np.round(at).astype(int), 0, len(at) // 4 - 1) for at in (rows, columns)))
        hatched = axes.contourf(columns, rows, unknown[cells], levels=[0.5, 1.5], colors=[FAINT], hatches=["////"])
        hatched.set(edgecolor="white", linewidth=0)
    for value, color in colors.items():
        _outline(axes, label == value, colors=_HALO, linewidths=1.8, alpha=0.6)
        _outline(axes, label == value, colors=color, linewidths=1.1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def legend_below(figure: Figure, named: Mapping[str, str], hatched: str) -> None:
    """A legend below pictures of `labelled`: a colour for each of `named`, and what hatching is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=color, linewidth=2.5, label=name) for name, color in named.items()]
    unknown = Patch(facecolor=FAINT, edgecolor="white", hatch="////", linewidth=0, label=hatched)
    columns = max(2, min(len(lines) + 1, int(figure.get_figwidth() / 1.5)))
    legend = figure.legend(
        handles=[*lines, unknown], loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
    )
    _plain_text(legend)


def outline_legend(figure: Figure, named: Mapping[str, str]) -> None:
    """A legend below an overlay: what solid and dashed lines are, and a colour for each of `named`."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=INK, linewidth=2.4, label="truth"),
        Line2D([], [], color=INK, linewidth=1.1, linestyle=_DASHES, label="prediction"),
        *(Line2D([], [], color=color, linewidth=6, label=name) for name, color in named.items()),
    ]
    columns = max(2, min(len(lines), int(figure.get_figwidth() / 1.5)))
    legend = figure.legend(
        handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK
    )
    _plain_text(legend)


def _plain_text(legend: Legend) -> None:
    """Take names as they are: a dollar sign in one does not start a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _outline(axes: Axes, mask: np.ndarray, **style: Any) -> None:
    """The border of a mask half-way between pixels, closed at the edge of the picture too."""
    if mask.any():
        rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
        axes.contour(columns, rows, np.pad(mask, 1).astype(float), levels=[0.5], **style)


def lighter(color: str, share: float = 0.6) -> str:
    """A hexadecimal colour mixed with a share of white."""
    parts = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)
