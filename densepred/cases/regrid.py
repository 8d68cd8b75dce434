"""Moving planes from one grid to another, axis by axis, while they stream by.

The usual filter is linear interpolation between half-pixel centres; where an axis shrinks, the triangle is widened by
the factor, so that nothing aliases (the "antialias" of PIL and torch). Beyond the ends the last voxel goes on. Each
axis may have another filter: see `Kernel` and `kernels_for`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = 1 << 22  # of float32 planes worked on at a time: about what a processor's cache holds
COARSE = 3.0
"""Times the spacing of the next axis from which on one is too coarse to be interpolated as the others (nnU-Net's)."""
_POLE = math.sqrt(3) - 2  # of the filter that turns samples into coefficients of cubic B-splines
_SPLINE_REACH = 10  # voxels; what lies beyond has shares below 4e-6


class Kernel(NamedTuple):
    """The filter along one axis.

    Attributes:
        order: 0 the nearest voxel; 1 linear; 3 cubic: B-splines through the voxels where the axis grows (those of
            `scipy.ndimage.zoom`), the kernel of Keys (a = -0.5) where it shrinks.
        antialias: widen it by the factor where the axis shrinks. Without, cubic is B-splines there too.
    """

    order: int = 1
    antialias: bool = True


def kernels_for(
    method: str, spacing: Sequence[float], target: Sequence[float], labels: bool = False
) -> tuple[Kernel, ...]:
    """The filters of a way of resampling, for images, or for labels and logits.

    Where one axis alone is the coarsest, before or after, by more than `COARSE` times the finest, cubic goes linearly
    along it, and nnunet takes the nearest plane.

    Args:
        method: linear; cubic; or nnunet: cubic (labels: linear) without antialiasing, as nnU-Net has it.
        spacing: of the image.
        target: of the new grid.
        labels: linear instead of cubic.

    Example:
        >>> kernels_for("cubic", (5.0, 1.0, 1.0), (4.0, 1.0, 1.0))[0]
        Kernel(order=1, antialias=True)

    Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, "Image resampling".
    """
    if method == "linear":
        return (Kernel(),) * len(spacing)
    plain = Kernel(1 if labels else 3, method != "nnunet")
    coarse = _coarse_axis(spacing, target)
    apart = Kernel(0, False) if method == "nnunet" else Kernel()
    return tuple(apart if axis == coarse else plain for axis in range(len(spacing)))


def _coarse_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The axis of a volume that is too coarse; None where there is none, or several are alike."""
    for sizes in (spacing, target) if len(spacing) == 3 else ():
        if max(sizes) > COARSE * min(sizes):
            alike = [axis for axis, size in enumerate(sizes) if size == max(sizes)]
            return alike[0] if len(alike) == 1 else None
    return None


LINEAR = Kernel()


@dataclass(frozen=True)
class Taps:
    """Which voxels of an axis make each voxel of the new one, and their shares.

    Attributes:
        index: int64 (target, k), where the voxels lie.
        share: float32 (target, k), rows add up to 1.
    """

    index: Tensor
    share: Tensor

    @classmethod
    def of(cls, size: int, target: int, device: str | torch.device = "cpu", kernel: Kernel = LINEAR) -> Taps:
        """From an axis of `size` voxels to one of `target` over the same extent.

        Example:
            >>> Taps.of(4, 2).share[0] * 7  # 3/8, 3/8 and 1/8, without what lies beyond the end
            tensor([3., 3., 1.])
        """
        scale = size / target
        stretch = max(scale, 1.0) if kernel.antialias else 1.0
        splines = kernel.order == 3 and stretch == 1
        width = _SPLINE_REACH if splines else {0: 0.5, 1: 1.0, 3: 2.0}[kernel.order] * stretch
        centre = (np.arange(target) + 0.5) * scale
        first = np.floor(centre - width).astype(np.int64)
        first = first if splines else np.maximum(first, 0)
        index = first[:, None] + np.arange(int(np.ceil(2 * width)) + 2)
        distance = index + 0.5 - centre[:, None]
        if kernel.order == 0:  # of two alike the later, as floor(centre) is
            share = (index == np.floor(centre).astype(np.int64)[:, None]).astype(float)
        elif kernel.order == 1:
            share = np.maximum(1 - np.abs(distance) / stretch, 0)
        else:
            share = _spline(distance) if splines else _keys(np.abs(distance) / stretch)
        if splines:
            index = np.clip(index, 0, size - 1)  # beyond the ends the last voxel goes on
        share = share * (index < size)
        order = np.argsort(share == 0, axis=1, kind="stable")[:, : int((share != 0).sum(1).max())]
        index, share = (np.take_along_axis(part, order, 1) for part in (index, share))
        index = np.where(share != 0, index, index[:, :1])  # a share of none must not bring in a NaN from elsewhere
        share = (share / share.sum(1, keepdims=True)).astype(np.float32)
        return cls(torch.from_numpy(index).to(device), torch.from_numpy(share).to(device))

    @property
    def reach(self) -> tuple[int, int]:
        """From which voxel to which (exclusive) they go."""
        return int(self.index.min()), int(self.index.max()) + 1

    def part(self, start: int, stop: int) -> Taps:
        """Those of the voxels start..stop of the new axis, counted from the first voxel that these need."""
        part = Taps(self.index[start:stop], self.share[start:stop])
        return Taps(part.index - part.reach[0], part.share)


def _spline(distance: np.ndarray) -> np.ndarray:
    """The cubic B-spline that is 1 at 0 and 0 at all other integers, cut off at `_SPLINE_REACH`."""
    out = np.zeros(distance.shape)
    for knot in range(-_SPLINE_REACH - 3, _SPLINE_REACH + 4):
        x = np.abs(distance - knot)
        base = np.where(x < 1, 2 / 3 - x**2 + x**3 / 2, np.maximum(2 - x, 0) ** 3 / 6)
        out += math.sqrt(3) * _POLE ** abs(knot) * base
    return np.where(np.abs(distance) < _SPLINE_REACH, out, 0)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' kernel of distances, a = -0.5.

    Source: Keys 1981, doi:10.1109/TASSP.1981.1163711, eq. 15.
    """
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


class Regrid:
    """A ring of the planes that the next planes of the new grid need: planes go in in order, and come out so.

    Axes that shrink go first. What comes out is the same, bit for bit, however many planes go in or out at a time.

    Args:
        shape: spatial shape of the image, (Z, Y, X) or (Y, X).
        target: the new spatial shape.
        device: where the planes are.
        lines: of the new grid, from where to where along axis 1; by default all. Planes then go in with the lines
            that these need, `lines_needed`.
        kernels: the filter of each axis; by default linear.

    Example:
        >>> regrid = Regrid((2, 4), (4, 2))
        >>> regrid.add(torch.ones(1, 2, 4))
        >>> regrid.take(regrid.ready).shape
        torch.Size([1, 4, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        target: Sequence[int],
        device: str | torch.device = "cpu",
        lines: tuple[int, int] | None = None,
        kernels: Sequence[Kernel] | None = None,
    ) -> None:
        kernels = kernels or (LINEAR,) * len(shape)
        self.shape, self.target = tuple(shape), tuple(target)
        moved = [axis for axis, size in enumerate(shape) if axis == 0 or size != target[axis]]
        ratio = {axis: target[axis] / shape[axis] for axis in moved}  # of two alike, columns when the rows are fewer
        order = sorted(moved, key=lambda axis: (ratio[axis], axis if ratio[axis] < 1 else -axis))
        place = order.index(0)
        taps = {axis: Taps.of(shape[axis], target[axis], device, kernels[axis]) for axis in order if axis}
        self.lines_needed = lines or (0, target[1])
        if lines is not None and 1 in taps:
            self.lines_needed = Taps(taps[1].index[slice(*lines)], taps[1].share[slice(*lines)]).reach
            taps[1] = taps[1].part(*lines)
        self._before, self._after = (
            [(axis - len(shape), taps[axis]) for axis in axes] for axes in (order[:place], order[place + 1 :])
        )
        if lines is not None:  # what `piece` goes by
            low, high = self.lines_needed
            self.shape, self.target = (
                (shape[0], high - low, *shape[2:]),
                (target[0], lines[1] - lines[0], *target[2:]),
            )
        first = Taps.of(shape[0], target[0], kernel=kernels[0])
        linear = Taps.of(shape[0], target[0])  # all planes are asked for, also those that count nowhere
        lowest = torch.minimum(first.index.amin(1), linear.index.amin(1)).numpy()
        highest = torch.maximum(first.index.amax(1), linear.index.amax(1)).numpy()
        self._lowest = np.minimum.accumulate(lowest[::-1])[::-1]  # where a kernel is 0 a plane may need less than its
        self._highest = np.maximum.accumulate(highest)  # neighbours
        self._first = Taps(first.index.to(device), first.share.to(device))
        self._ring: Tensor | None = None
        self.restart(0)

    def restart(self, start: int) -> None:
        """Forget all planes: the next to come out is `start`, and the next to go in is then `read`."""
        self.done, self.read = start, self.first(start)

    def first(self, start: int) -> int:
        """The first plane of the image that those of the new grid from `start` on need."""
        return int(self._lowest[start])

    @property
    def ready(self) -> int:
        """The planes of the new grid, counted from its first, that can come out."""
        return int(np.searchsorted(self._highest, self.read))

    @property
    def depth(self) -> int:
        """The most planes of the image that one of the new grid needs."""
        return int((self._highest - self._lowest).max()) + 1

    def reach(self, stop: int) -> int:
        """How many planes of the image those of the new grid below `stop` need."""
        return int(self._highest[stop - 1]) + 1

    def piece(self, channels: int) -> int:
        """How many planes of the image are best put in at a time."""
        largest = max(math.prod(self.shape[1:]), math.prod(self.target) / self.shape[0])
        return max(1, int(PIECE_BYTES / (4 * channels * largest)))

    def add(self, planes: Tensor) -> None:
        """Put in the next planes, float32 (C, n, *rest), at most `piece`; what is ready must be out."""
        assert self.ready <= self.done
        planes = _within(planes, self._before)
        if self._ring is None:
            depth = self.depth + self.piece(len(planes))
            self._ring = planes.new_empty(len(planes), depth, *planes.shape[2:])
        for number, plane in enumerate(planes.unbind(1), self.read):
            self._ring[:, number % self._ring.shape[1]] = plane
        self.read += planes.shape[1]

    def take(self, stop: int) -> Tensor:
        """Take out the planes up to `stop`, which must be ready: (C, m, *target rest)."""
        assert self._ring is not None
        assert self.done < stop <= self.ready
        rows = slice(self.done, stop)
        taps = Taps(self._first.index[rows] % self._ring.shape[1], self._first.share[rows])
        self.done = stop
        return _within(along(self._ring, 1 - self._ring.ndim, taps), self._after)


def along(image: Tensor, axis: int, taps: Taps) -> Tensor:
    """Weighted sums of voxels along one axis.

    Args:
        image: float32, two axes or more.
        axis: which one, -1 for the last.
        taps: from the axis as it is to the new one.

    Returns:
        As `image`, with as many voxels along the axis as there are rows of taps.
    """
    if axis == -1:  # whole rows are added up quickest, so columns become rows
        return _turned(image, taps)
    before, behind = math.prod(image.shape[:axis]), math.prod(image.shape[axis + 1 : -1])
    rows, shares = taps.index, taps.share
    if before * behind > 1:  # (before, target, behind, k)
        starts = torch.arange(before, device=rows.device) * image.shape[axis]
        rows = (starts.view(-1, 1, 1, 1) + rows[:, None]) * behind
        rows = rows + torch.arange(behind, device=rows.device).view(-1, 1)
        shares = shares[:, None].expand(rows.shape).reshape(-1, rows.shape[-1])
        rows = rows.view(shares.shape)
    table = image.reshape(-1, image.shape[-1])
    if table.stride(1) != 1:  # rows of one voxel: another kernel would take them, which rounds otherwise
        table = table.clone(memory_format=torch.contiguous_format)
    out = F.embedding_bag(rows, table, mode="sum", per_sample_weights=shares)
    return out.view(*image.shape[:axis], len(taps.index), *image.shape[axis + 1 :])


def _turned(image: Tensor, taps: Taps) -> Tensor:
    """`along` the last axis."""
    if image.device.type != "cpu":
        return along(image.transpose(-1, -2).contiguous(), -2, taps).transpose(-1, -2).contiguous()
    out = image.new_empty(*image.shape[:-1], len(taps.index))
    for columns, rows in zip(image.flatten(0, -3), out.flatten(0, -3), strict=True):  # two axes are turned quickest
        rows.copy_(along(columns.t().contiguous(), -2, taps).t())
    return out


def _within(planes: Tensor, axes: Sequence[tuple[int, Taps]]) -> Tensor:
    """Planes (C, n, *rest) along each (axis from the last, its taps)."""
    for axis, taps in axes:
        planes = along(planes, axis, taps)
    return planes
