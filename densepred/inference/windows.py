"""Where the windows lie and how much each of them counts: arithmetic alone, without tensors.

The windows of an image form a Cartesian grid: every axis has its own list of starts. A window's weight at a voxel is
the product of one weight per axis, so the weights are normalised axis by axis before anything is predicted, and
blending needs neither a count map of the size of the image nor a division at the end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from numpy.typing import NDArray


def even_starts(size: int, window: int, overlap: float, multiple: int = 1) -> tuple[int, ...]:
    """Starts spread evenly from the first to the last voxel, with at least the wished overlap (nnU-Net's rule).

    There are ceil((size - window) / (window (1 - overlap))) + 1 of them; a step is never below one voxel. All but the
    last are rounded to a `multiple`, of which then the largest step is one, too.
    """
    room, step = max(size - window, 0), window * (1 - overlap)
    if multiple > 1:  # else rounding would let two be further apart than wished, or than a window is long
        step = math.floor(step / multiple + 1e-9) * multiple
    steps = math.ceil(room / max(step, multiple) - 1e-9)  # 1 - 0.8 is a little below 0.2
    starts = (round(room / steps * i / multiple) * multiple for i in range(steps))
    return (*dict.fromkeys(start for start in starts if start < room), room)


def fixed_starts(size: int, window: int, overlap: float, multiple: int = 1) -> tuple[int, ...]:
    """Starts at multiples of int(window (1 - overlap)), the last one moved inside the image (MONAI's rule)."""
    step = max(int(window * (1 - overlap)) // multiple * multiple, multiple)
    room = max(size - window, 0)
    return tuple(min(i * step, room) for i in range(math.ceil(room / step) + 1))


def gaussian_kernel(window: int) -> NDArray[np.float64]:
    """nnU-Net's Gaussian along one axis: sigma an eighth of the window, centred on voxel window // 2, not clamped."""
    distance = np.arange(window) - window // 2
    return np.exp(-0.5 * (distance / (window / 8)) ** 2)


def constant_kernel(window: int) -> NDArray[np.float64]:
    """Every voxel of a window counts the same."""
    return np.ones(window)


def deepest_kernel(window: int) -> NDArray[np.float64]:
    """Each voxel counts in the window it lies deepest in: 150 powers of ten from the middle of a window to its edge.

    Where windows overlap by twice the reach of the network (half its receptive field), and begin at multiples of its
    stride, no voxel of the result knows where windows end: the overlap-tile strategy of Ronneberger et al. 2015.
    """
    return 10.0 ** (-300 * np.abs(np.arange(window) - (window - 1) / 2) / window)


def monai_gaussian_map(window: Sequence[int]) -> NDArray[np.float32]:
    """MONAI's Gaussian: centred between voxels and clamped from below at 1e-3 after the product over the axes.

    The clamp makes it a map of one whole window, of shape `window`, that no product of vectors equals.
    """
    axes = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2) for size in window]
    return np.maximum(outer(axes), 1e-3).astype(np.float32)


def outer(axes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The outer product of vectors: (Z,), (Y,), (X,) -> (Z, Y, X)."""
    return reduce(lambda left, right: left[..., None] * right, axes)


SPACINGS: dict[str, Callable[[int, int, float, int], tuple[int, ...]]] = {"even": even_starts, "fixed": fixed_starts}
KERNELS: dict[str, Callable[[int], NDArray[np.float64]]] = {
    "gaussian": gaussian_kernel,
    "constant": constant_kernel,
    "none": deepest_kernel,
}
MAPS: dict[str, Callable[[Sequence[int]], NDArray[np.float32]]] = {"gaussian_monai": monai_gaussian_map}
BORDERS = ("constant", "reflect")


@dataclass(frozen=True)
class AxisGrid:
    """The windows along one axis.

    An axis shorter than the window is widened on both sides to the window's size; `starts` count from the first voxel
    of the widened axis.

    Args:
        size: voxels of the image.
        window: voxels of a window.
        starts: first voxel of each window, ascending.
    """

    size: int
    window: int
    starts: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Voxels of the widened axis."""
        return max(self.size, self.window)

    @property
    def before(self) -> int:
        """Voxels added in front; behind, it is the same or one more."""
        return (self.padded - self.size) // 2

    def touching(self, start: int, stop: int) -> range:
        """Which windows, by their number, hold any of the voxels start..stop of the widened axis."""
        return range(bisect_right(self.starts, start - self.window), bisect_left(self.starts, stop))

    def weights(self, kernel: NDArray[np.float64]) -> NDArray[np.float32]:
        """Normalised weights (len(starts), window): those of the windows over a voxel add up to one."""
        total = np.zeros(self.padded)
        for start in self.starts:
            total[start : start + self.window] += kernel
        return np.stack([kernel / total[start : start + self.window] for start in self.starts]).astype(np.float32)

    def reflected(self) -> NDArray[np.int64]:
        """For each voxel of the widened axis the voxel of the image mirrored there (the edge itself not repeated)."""
        period = max(2 * (self.size - 1), 1)
        folded = np.arange(-self.before, self.padded - self.before) % period
        return np.where(folded < self.size, folded, period - folded)


@dataclass(frozen=True)
class WindowGrid:
    """The windows of one image, the Cartesian product of its axes.

    Example:
        >>> grid = WindowGrid.plan((100, 64), window=(64, 64), overlap=0.5)
        >>> [axis.starts for axis in grid.axes], len(grid)
        ([(0, 18, 36), (0,)], 3)
    """

    axes: tuple[AxisGrid, ...]

    @classmethod
    def plan(
        cls,
        shape: Sequence[int],
        window: int | Sequence[int],
        overlap: float | Sequence[float],
        spacing: str = "even",
        multiple: int | Sequence[int] = 1,
    ) -> WindowGrid:
        """Lays windows over an image of the spatial shape `shape`; a single number holds for all axes.

        All begin at multiples of `multiple`, such as the network's coarsest stride: elsewhere they would fall
        differently on its coarse grids and be predicted otherwise. For that they grow by less than `multiple`, and to
        it first where they are smaller.

        Raises:
            ValueError: an axis without voxels, or a window or overlap that does not fit the image.
        """
        windows, overlaps = per_axis("window", window, len(shape)), per_axis("overlap", overlap, len(shape))
        if min(shape, default=0) < 1:
            raise ValueError(f"shape must have at least one axis and one voxel along each, got {tuple(shape)}")
        check_windows(windows, overlaps)
        starts = SPACINGS[spacing]
        multiples = [int(m) for m in per_axis("multiple", multiple, len(shape))]
        windows = tuple(max(w, min(m, n)) for n, w, m in zip(shape, windows, multiples, strict=True))
        windows = tuple(w + max(n - w, 0) % m for n, w, m in zip(shape, windows, multiples, strict=True))
        axes = zip(shape, windows, overlaps, multiples, strict=True)
        return cls(tuple(AxisGrid(int(n), int(w), starts(int(n), int(w), o, m)) for n, w, o, m in axes))

    def __len__(self) -> int:
        return math.prod(len(axis.starts) for axis in self.axes)

    def touching(self, planes: tuple[int, int], lines: tuple[int, int]) -> tuple[range, range]:
        """The windows that hold any of these planes and lines of the image, by their numbers on axes 0 and 1."""
        first, second = (
            axis.touching(start + axis.before, stop + axis.before)
            for axis, (start, stop) in zip(self.axes, (planes, lines), strict=False)
        )
        return first, second

    def count(self, planes: tuple[int, int], lines: tuple[int, int]) -> int:
        """How many windows hold any of these planes of the image and of these lines."""
        rows, columns = self.touching(planes, lines)
        return len(rows) * len(columns) * math.prod(len(axis.starts) for axis in self.axes[2:])

    @property
    def window(self) -> tuple[int, ...]:
        """Spatial shape of a window."""
        return tuple(axis.window for axis in self.axes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Spatial shape of the image, widened to the window where it is smaller."""
        return tuple(axis.padded for axis in self.axes)

    def row(self, number: int, columns: range | None = None) -> Iterator[tuple[int, ...]]:
        """Index of each window that begins at start `number` of axis 0, in the order of the axes.

        Args:
            number: of the start.
            columns: the starts of axis 1 to take; all by default.
        """
        _, *rest = (range(len(axis.starts)) for axis in self.axes)
        return product((number,), *([columns, *rest[1:]] if rest and columns is not None else rest))

    def corner(self, index: Sequence[int]) -> tuple[int, ...]:
        """First voxel, in the widened image, of the window with this index."""
        return tuple(axis.starts[i] for axis, i in zip(self.axes, index, strict=True))


def per_axis(name: str, value: float | Sequence[float], dims: int) -> tuple[float, ...]:
    """One number for each axis; a single number is repeated.

    Raises:
        ValueError: a sequence of another length than `dims`.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims:
        raise ValueError(f"{name} must be one number or {dims} (one per spatial axis), got {len(values)}: {values}")
    return values


def check_windows(window: Sequence[float], overlap: Sequence[float]) -> None:
    """Raises ValueError where a window has no voxel or an overlap is not a share of the window."""
    if any(size < 1 or size != int(size) for size in window):
        raise ValueError(f"window must hold integers of at least 1, got {tuple(window)}")
    if any(not 0 <= share < 1 for share in overlap):
        raise ValueError(f"overlap must be at least 0 and below 1, got {tuple(overlap)}")
