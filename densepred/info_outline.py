"""Outlines of labels over an image: where they run, their colours, and what the legend says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.figures import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from densepred.info_axes import Frame


def edges_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outlines of labels, along the edges of pixels.

    Args:
        labels: `(rows, columns)`, integers; 0 and below have no outline, at the border of the picture the others do.

    Returns:
        Segments `(n, 2, 2)`, each two points of column and row from 0 at pixel centres, so edges are at halves; and the
        label `(n,)` that each bounds. An edge between two labels is there twice.

    Example:
        >>> segments, owners = edges_of(np.array([[0, 7]]))
        >>> sorted(segments.tolist())[0], owners.tolist()
        ([[0.5, -0.5], [0.5, 0.5]], [7, 7, 7, 7])
    """
    padded = np.pad(labels, 1)
    found: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for axis in (0, 1):
        before = padded[:-1, 1:-1] if axis == 0 else padded[1:-1, :-1]
        after = padded[1:, 1:-1] if axis == 0 else padded[1:-1, 1:]
        for mine in (before, after):
            rows, columns = np.nonzero((before != after) & (mine > 0))
            start = np.stack([columns, rows], axis=1) - 0.5
            step = np.array([1.0, 0.0] if axis == 0 else [0.0, 1.0])
            found.append(np.stack([start, start + step], axis=1))
            owners.append(mine[rows, columns])
    return np.concatenate(found), np.concatenate(owners)


def names_of(header: object) -> dict[int, str]:
    """The names that a header gives to classes: the CLASSn cards of FITS."""
    cards: Any = getattr(header, "header", {})
    found = {card[5:]: str(cards[card]).strip() for card in cards if card[:5] == "CLASS"}
    return {int(number): name for number, name in found.items() if number.isdecimal() and name}


def draw_outlines(axes: Axes, labels: np.ndarray, frame: Frame, step: int = 1) -> None:
    """Draw lines around every label in its colour.

    Args:
        axes: where to draw.
        labels: `(rows, columns)`, every `step`-th pixel of a slice.
        frame: where its pixels lie.
        step: as there.
    """
    from matplotlib.collections import LineCollection

    segments, owners = edges_of(labels)
    lines = frame.at((segments + 0.5) * step - 0.5)
    for number, color in enumerate(COLORS):
        own = lines[(owners - 1) % len(COLORS) == number]
        for paint, width, over in (("black", 2.2, 3), (color, 1.2, 4)):
            if len(own):
                drawn = LineCollection(own, colors=paint, linewidths=width, capstyle="projecting", zorder=over)
                axes.add_collection(drawn, autolim=False)


def legend_of(labels: np.ndarray, names: Mapping[int, str], lines: bool) -> list[Any]:
    """What a legend says of labels: a name for each above 0, or how many there are where they outnumber the colours.

    Args:
        labels: `(rows, columns)`.
        names: of their values; else these stand for themselves.
        lines: of outlines, else of areas.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = [value for value in np.unique(labels).tolist() if value > 0]
    named = {value: names.get(value) or str(value) for value in present}
    if len(present) > len(COLORS):
        named = {1: f"{len(present)} labels, {len(COLORS)} colours in turn"}
    if lines:
        return [Line2D([], [], color=color_of(value), label=name) for value, name in named.items()]
    return [Patch(color=color_of(value), label=name) for value, name in named.items()]


def color_of(value: int) -> str:
    """The colour of a label: seven of them, over again."""
    return COLORS[(int(value) - 1) % len(COLORS)]


def colored(labels: np.ndarray) -> np.ndarray:
    """`(rows, columns, 3)`: 0 in black, every value above in its colour."""
    colors = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in COLORS], np.uint8)
    out = colors[(labels.astype(np.int64) - 1) % len(colors)]
    out[labels <= 0] = 0
    return out
