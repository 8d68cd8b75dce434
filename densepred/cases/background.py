"""The background of an image and its noise, from boxes: sigma-clipped, median-filtered, joined by a bicubic spline.

In each box pixels further than `clip` standard deviations from the median are left out until none is. The level is then
SExtractor's mode, 2.5 median - 1.5 mean, or the median where mean and median lie 0.3 deviations or more apart (crowded
boxes); the noise is the standard deviation of what is left, not corrected for the clipped wings (1.4 % at 3).
A box of which no more than half is left, or all equal, says nothing: it takes the mean of its ten nearest neighbours,
weighted by inverse distance, as in photutils. A 3 x 3 median over the boxes follows; at the edge its window shrinks on
both sides alike, so a gradient is kept. The spline is natural; beyond the outer boxes' middles it goes on as mirrored
at these points.

Sources: Bertin & Arnouts 1996, A&AS 117, 393, section 3, and the SExtractor manual, "Modeling the background";
Paillassa et al. 2020, A&A 634, A48 (MaxiMask).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.linalg import solve_banded
from scipy.spatial import KDTree

from densepred.cases.estimates import CONSTANT, Level
from densepred.cases.quantiles import finite

_CROWDED = 0.3
_MIN_LEFT = 0.5
_NEIGHBOURS = 10


def box_edges(size: int, mesh: int) -> np.ndarray:
    """Where the boxes of an axis begin, and its end: as many of nearly equal size as come nearest to `mesh`.

    Example:
        >>> box_edges(300, 128).tolist()
        [0, 150, 300]
    """
    boxes = max(1, round(size / mesh))
    return np.arange(boxes + 1) * size // boxes


class BoxEstimate:
    """Level and noise of the boxes of each plane, from slabs that come forward.

    Args:
        shape: spatial, `(Y, X)` or `(Z, Y, X)`.
        mesh: side of a box, in pixels.
        clip: in standard deviations.
    """

    def __init__(self, shape: tuple[int, ...], mesh: int, clip: float) -> None:
        self._shape, self._clip = shape, clip
        self._down, self._across = (box_edges(size, mesh) for size in shape[-2:])
        self._rows: list[np.ndarray] = []  # (columns, 2): level and noise
        self._held: list[Sequence[np.ndarray]] = []  # rows of a 2D image that do not fill a row of boxes yet
        self._seen = 0

    def add(self, planes: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> None:
        """Take the next planes `(n, *rest)` of each channel; the channels of a box are pooled."""
        if len(self._shape) == 3:
            for z in range(len(planes[0])):
                for top, bottom in pairwise(self._down):
                    self._add_row([plane[z, top:bottom] for plane in planes])
            return
        taken = 0
        while taken < len(planes[0]):
            bottom = self._down[len(self._rows) + 1]
            part = [plane[taken : taken + bottom - self._seen] for plane in planes]
            self._held.append(part)
            taken += len(part[0])
            self._seen += len(part[0])
            if self._seen == bottom:
                self._add_row([np.concatenate(parts) for parts in zip(*self._held, strict=True)])
                self._held = []

    def _add_row(self, rows: Sequence[np.ndarray]) -> None:
        found = []
        for left, right in pairwise(self._across):
            values = np.concatenate([finite(row[:, left:right]) for row in rows])
            pixels = len(rows) * len(rows[0]) * (right - left)
            found.append(clipped_level(values, self._clip, _MIN_LEFT * pixels))
        self._rows.append(np.array(found))

    def finish(self) -> bool:
        """End the pass; it is the only one."""
        return True

    def level(self) -> Level:
        """Level and noise of the boxes, each `(planes, rows, columns)`; NaN if no box of any plane says something."""
        planes = 1 if len(self._shape) == 2 else self._shape[0]
        grid = np.array(self._rows).reshape(planes, -1, len(self._rows[0]), 2)
        return Level(smoothed(grid[..., 0]), smoothed(grid[..., 1]))


def clipped_level(values: np.ndarray, clip: float, needed: float) -> tuple[float, float]:
    """Level and noise of one box of finite values `(n,)`; NaN where `needed` or fewer are left, or all are equal."""
    values = np.sort(values).astype(np.float64)
    while len(values) > needed and values[0] < values[-1]:
        middle = (len(values) - 1) // 2, len(values) // 2
        median = (values[middle[0]] + values[middle[1]]) / 2
        mean, noise = values.mean(), values.std()
        low, high = (
            np.searchsorted(values, median - clip * noise),
            np.searchsorted(values, median + clip * noise, "right"),
        )
        if low == 0 and high == len(values):
            if noise <= CONSTANT * abs(mean):
                break
            crowded = abs(mean - median) >= _CROWDED * noise
            return float(median if crowded else 2.5 * median - 1.5 * mean), float(noise)
        values = values[low:high]
    return np.nan, np.nan


def smoothed(grid: np.ndarray) -> np.ndarray:
    """Boxes `(planes, rows, columns)` with the unknown ones filled, and a 3 x 3 median over each plane."""
    known = np.isfinite(grid)
    full = np.flatnonzero(known.any((1, 2)))
    if not len(full):
        return grid
    out = np.empty_like(grid)
    for z in full:
        out[z] = _filled(grid[z], known[z])
    for z in np.setdiff1d(np.arange(len(grid)), full):  # a plane without any: that of the nearest plane
        out[z] = out[full[np.abs(full - z).argmin()]]
    padded = np.pad(out, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2)).copy()
    windows[:, 0, :, 2], windows[:, -1, :, 0] = np.nan, np.nan
    windows[:, :, 0, :, 2], windows[:, :, -1, :, 0] = np.nan, np.nan
    return np.nanmedian(windows.reshape(*grid.shape, 9), axis=-1)


def _filled(grid: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unknown boxes as the mean of the nearest known ones, weighted by inverse distance (Shepard 1968)."""
    if known.all():
        return grid
    nearest = range(1, min(_NEIGHBOURS, int(known.sum())) + 1)
    distances, indices = KDTree(np.argwhere(known)).query(np.argwhere(~known), k=list(nearest))
    out = grid.copy()
    out[~known] = (grid[known][indices] / distances).sum(1) / (1 / distances).sum(1)
    return out


class MeshMap:
    """A smooth map through the middles of boxes, to be had at any pixels.

    Args:
        grid: `(planes, rows, columns)` of finite values.
        box: mean size of a box (y, x), in pixels.
        bounded: the map stays within the range of the boxes of its plane.
    """

    def __init__(self, grid: np.ndarray, box: tuple[float, float], bounded: bool = False) -> None:
        self._box = box
        self._range = (grid.min((1, 2)), grid.max((1, 2))) if bounded else None
        self._coefficients = _coefficients(_coefficients(grid, 1), 2)

    def at(self, plane: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The map `(len(y), len(x))` at pixels of one plane; a pixel does not depend on the others asked for."""
        coefficients = self._coefficients[plane]
        above, down = _taps(y, self._box[0])
        before, across = _taps(x, self._box[1])
        rows = sum(coefficients[above + k] * down[k][:, None] for k in range(4))
        out = sum(rows[:, before + k] * across[k] for k in range(4))
        return out if self._range is None else np.clip(out, self._range[0][plane], self._range[1][plane])


def _coefficients(values: np.ndarray, axis: int) -> np.ndarray:
    """B-spline coefficients of the natural cubic spline along an axis, with two more beyond either end."""
    lines = np.moveaxis(values, axis, 0)
    out = lines.reshape(len(lines), -1).copy()
    inner = len(lines) - 2
    if inner > 0:
        right = 6 * out[1:-1]
        right[0] -= out[0]
        right[-1] -= out[-1]
        out[1:-1] = solve_banded((1, 1), np.repeat([[1.0], [4.0], [1.0]], inner, axis=1), right)
    out = np.pad(out, ((2, 2), (0, 0)), mode="reflect", reflect_type="odd")
    return np.moveaxis(out.reshape(-1, *lines.shape[1:]), 0, axis)


def _taps(pixels: np.ndarray, box: float) -> tuple[np.ndarray, np.ndarray]:
    """The first of the four coefficients `(n,)` that a pixel depends on, and their cubic B-spline weights `(4, n)`."""
    at = (pixels + 0.5) / box - 0.5
    first = np.floor(at).astype(np.int64)
    t = at - first
    return first + 1, np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (t + t**2 - t**3) + 1, t**3]) / 6
