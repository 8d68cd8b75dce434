"""Outlines of labels over an image: where they run, their colours, and what the legend says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.figures import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from densepred.info_axes import Frame

_MOST_NAMED = len(COLORS)


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


def names_of(header: object, values: Sequence[int]) -> dict[int, str]:
    """The names that a header gives to classes (CLASSn cards of FITS); else their numbers."""
    cards: Any = getattr(header, "header", {})
    return {value: str(cards.get(f"CLASS{value}", "") if value >= 0 else "") or str(value) for value in values}


def _outline(axes: Axes, labels: np.ndarray, overlay: Overlay, frame: Frame, step: int) -> list[Any]:
    """Lines around every label in its colour; returns the entries of the legend."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    segments, owners = edges_of(labels)
    lines = frame.at((segments + 0.5) * step - 0.5)
    for number, color in enumerate(COLORS):
        own = lines[(owners - 1) % len(COLORS) == number]
        if len(own):
            for paint, width, over in (("black", 2.2, 3), (color, 1.2, 4)):
                style = {"colors": paint, "linewidths": width, "capstyle": "projecting", "zorder": over}
                axes.add_collection(LineCollection(own, **style), autolim=False)  # type: ignore[arg-type]
    values = np.unique(labels)
    names = names_of(overlay.volume.header, values.tolist()) | dict(overlay.names)
    return _named([Line2D, [], []], values, names)


def _named(kind: Sequence[Any], values: np.ndarray, names: Mapping[int, str]) -> list[Any]:
    """Entries of a legend: one for each label above 0, or one that counts them where they are many."""
    present = [value for value in values.tolist() if value > 0]
    make, *given = kind
    if len(present) > _MOST_NAMED:
        return [make(*given, color=COLORS[0], label=f"{len(present)} labels, seven colours in turn")]
    return [make(*given, color=color_of(value), label=names[value]) for value in present]


def color_of(value: int) -> str:
    """The colour of a label: seven of them, over again."""
    return COLORS[(int(value) - 1) % len(COLORS)]


def _colored(labels: np.ndarray) -> np.ndarray:
    """`(rows, columns, 3)`: 0 in black, every value above in its colour."""
    colors = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in COLORS], np.uint8)
    out = colors[(labels.astype(np.int64) - 1) % len(colors)]
    out[labels <= 0] = 0
    return out
