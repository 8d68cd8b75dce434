"""Sampling images and labels at other places: linear, with labels by the largest linear share.

Where the eight (in 2D four) neighbours of each voxel stand is computed once for all channels and the labels. Of labels
the lowest and highest around are looked up: only where they differ, at the borders of classes, are shares computed. On
a CPU the output is made in slabs that stay in its cache; on a GPU in one piece, where nothing waits for a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.augment.pieces import at_once
from densepred.losses import IGNORE

_BORDER = 2
"""Voxels around the image: two, so that what lies outside is in a cell of which all corners do."""
_SLAB = 2**17
"""Voxels computed at a time on a CPU."""


@dataclass(frozen=True)
class Warp:
    """Where each output voxel of n samples is taken from, in voxels: `matrix @ output position + offset + bend`."""

    matrix: Tensor
    """(n, dims, dims) float, on the CPU."""
    offset: Tensor
    """(n, dims)."""
    bend: list[Tensor | None]
    """For each sample what is added, (dims, *spatial) on the device, or None."""


@dataclass(frozen=True)
class _Cells:
    """The cell of the padded grid that each output voxel lies in, flattened over samples and voxels."""

    base: Tensor
    """Index of its first corner."""
    share: list[Tensor]
    """Along each axis, how far towards the next corner, 0 to 1."""
    corners: list[int]
    """What to add to `base` for every corner, the last axis fastest."""

    def chosen(self, places: Tensor) -> _Cells:
        """Some of them."""
        share = [t.index_select(0, places) for t in self.share]
        return _Cells(self.base.index_select(0, places), share, self.corners)

    @staticmethod
    def joined(parts: Sequence[_Cells]) -> _Cells:
        """All of several."""
        share = [torch.cat(each) for each in zip(*(part.share for part in parts), strict=True)]
        return _Cells(torch.cat([part.base for part in parts]), share, parts[0].corners)


def resample(
    image: Tensor, label: Tensor, warp: Warp, classes: int, flags: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Sample n images and labels elsewhere.

    Args:
        image: (n, C, *spatial) float; outside it lies 0, towards which the outermost voxels fade over one voxel.
        label: (n, *spatial) integers, -1 outside; or (n, T, *spatial) float, NaN outside.
        warp: where to.
        classes: number of classes.
        flags: channels of the image that are taken from the nearest voxel.

    Returns:
        Both, of the same shapes and types. A label is that of the class with the largest linear share (the lower of
        equal ones), or -1 where less than half of its surroundings has a class.

    Example:
        >>> warp = Warp(torch.eye(2)[None], torch.tensor([[0.0, 0.5]]), [None])
        >>> image = torch.tensor([[[[0.0, 2.0, 4.0]]]])
        >>> resample(image, image[:, 0].long(), warp, 5)[0].tolist()
        [[[[1.0, 3.0, 2.0]]]]
    """
    spatial = image.shape[2:]
    pad = (_BORDER, _BORDER) * len(spatial)
    integer = not label.is_floating_point()
    channels = [_flat(image[:, c], pad, 0.0) for c in range(image.shape[1])]
    if integer:
        small = label.to(torch.int8 if classes < 127 else torch.int32)
        labels = _Labels.of(F.pad(small, pad, value=IGNORE))
    else:
        maps = [_flat(label[:, t], pad, math.nan) for t in range(label.shape[1])]
    out, out_label = torch.empty_like(image), torch.empty_like(label, memory_format=torch.contiguous_format)
    borders: list[tuple[Tensor, _Cells]] = []
    done = 0
    for samples, rows in _slabs(image):
        cells = _cells(warp, spatial, samples, rows, image.device)
        shape = (samples.stop - samples.start, rows.stop - rows.start, *spatial[1:])
        nearest = _nearest(cells) if flags else cells.base
        for c, flat in enumerate(channels):
            values = flat.index_select(0, nearest) if c in flags else _linear(flat, cells)
            out[samples, c, rows] = values.view(shape)
        if integer:
            found, mixed = _classes_at(labels, cells, classes)
            out_label[samples, rows] = found.view(shape).to(label.dtype)
            if mixed is not None:
                borders.append((mixed + done, cells.chosen(mixed)))
                done += len(found)
        else:
            for t, flat in enumerate(maps):
                out_label[samples, t, rows] = _linear(flat, cells).view(shape)
    if borders:
        places, parts = torch.cat([place for place, _ in borders]), _Cells.joined([cells for _, cells in borders])
        largest = _largest_share(labels.corners(parts), parts.share, classes)
        out_label.view(-1).index_copy_(0, places, largest.to(label.dtype))
    return out, out_label


def _flat(values: Tensor, pad: tuple[int, ...], value: float) -> Tensor:
    return F.pad(values, pad, value=value).reshape(-1)


def _slabs(image: Tensor) -> list[tuple[slice, slice]]:
    """The parts to compute one after the other: samples, and rows of axis 0."""
    count, rows = image.shape[0], image.shape[2]
    if at_once(image.device):
        return [(slice(0, count), slice(0, rows))]
    step = max(1, _SLAB // math.prod(image.shape[3:]))
    return [(slice(i, i + 1), slice(r, min(r + step, rows))) for i in range(count) for r in range(0, rows, step)]


def _cells(warp: Warp, spatial: Sequence[int], samples: slice, rows: slice, device: torch.device) -> _Cells:
    dims = len(spatial)
    padded = [size + 2 * _BORDER for size in spatial]
    steps = [math.prod(padded[axis + 1 :]) for axis in range(dims)]
    count = samples.stop - samples.start
    matrix, offset = (t[samples].to(device, torch.float32, non_blocking=True) for t in (warp.matrix, warp.offset))
    bends = warp.bend[samples]
    view = [count] + [1] * dims
    ranges = [
        torch.arange(*((rows.start, rows.stop) if a == 0 else (0, spatial[a])), device=device) for a in range(dims)
    ]
    lines = [r.view([1] + [-1 if a == b else 1 for b in range(dims)]).float() for a, r in enumerate(ranges)]
    large = samples.stop * math.prod(padded) >= 2**31
    index = torch.int64 if large else torch.int32
    base = torch.arange(samples.start, samples.stop, device=device, dtype=index).view(view) * math.prod(padded)
    share = []
    for axis in range(dims):
        at = offset[:, axis].view(view) + float(_BORDER)
        for a in range(dims):
            at = at + matrix[:, axis, a].view(view) * lines[a]
        for place, bend in enumerate(bends):
            if bend is not None:
                at[place].add_(bend[axis, rows])
        at.clamp_(0, spatial[axis] + _BORDER)
        first = at.floor()
        share.append(at.sub_(first).view(-1))
        base = torch.add(base, first.to(index), alpha=steps[axis])
    corners = [sum(s for s, bit in zip(steps, bits, strict=True) if bit) for bits in product((0, 1), repeat=dims)]
    return _Cells(base.view(-1), share, corners)


def _between(values: list[Tensor], share: list[Tensor]) -> Tensor:
    for t in reversed(share):
        values = [torch.lerp(a, b, t) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _linear(flat: Tensor, cells: _Cells) -> Tensor:
    return _between([flat[corner:].index_select(0, cells.base) for corner in cells.corners], cells.share)


def _nearest(cells: _Cells) -> Tensor:
    """Index of the nearest corner."""
    nearest = cells.base
    dims = len(cells.share)
    for axis, share in enumerate(cells.share):
        nearest = torch.add(nearest, (share >= 0.5).to(nearest.dtype), alpha=cells.corners[2 ** (dims - 1 - axis)])
    return nearest


@dataclass(frozen=True)
class _Labels:
    """Padded labels, and the lowest and highest around each cell by its first corner; all flat."""

    at: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, label: Tensor) -> _Labels:
        """Of labels (n, *spatial), padded."""
        low = high = label
        for axis in range(1, label.ndim):
            size = label.shape[axis] - 1
            low = torch.minimum(low.narrow(axis, 0, size), low.narrow(axis, 1, size))
            high = torch.maximum(high.narrow(axis, 0, size), high.narrow(axis, 1, size))
        back = (0, 1) * (label.ndim - 1)
        return cls(label.reshape(-1), F.pad(low, back).reshape(-1), F.pad(high, back).reshape(-1))

    def corners(self, cells: _Cells) -> list[Tensor]:
        """The labels at the corners of cells, as float."""
        return [self.at[corner:].index_select(0, cells.base).float() for corner in cells.corners]


def _classes_at(labels: _Labels, cells: _Cells, classes: int) -> tuple[Tensor, Tensor | None]:
    """The class of each cell; on a CPU also where corners differ, whose shares are still to be computed."""
    if at_once(labels.at.device):  # choosing voxels would wait for the device
        return _largest_share(labels.corners(cells), cells.share, classes), None
    found = labels.low.index_select(0, cells.base)
    return found, (found != labels.high.index_select(0, cells.base)).nonzero().view(-1)


def _largest_share(values: list[Tensor], share: list[Tensor], classes: int) -> Tensor:
    """The class with the largest share; candidates are all classes, or the corners' if these are fewer."""

    def share_of(candidate: Tensor | float) -> Tensor:  # 1 - min(|v - c|, 1) is 1 for the class c and 0 for others
        return 1 - _between([(v - candidate).abs_().clamp_(max=1) for v in values], share)

    candidates: list[Tensor | float] = [float(k) for k in range(classes)] if classes <= len(values) else [*values]
    best = torch.zeros_like(values[0])
    winner = torch.full_like(values[0], IGNORE)
    for candidate in candidates:
        own = share_of(candidate)
        better = own > best
        if isinstance(candidate, Tensor):
            better = (better | ((own == best) & (candidate < winner))) & (candidate >= 0)
        best, winner = torch.where(better, own, best), torch.where(better, candidate, winner)
    return winner.masked_fill_(share_of(float(IGNORE)) > 0.5, IGNORE)
