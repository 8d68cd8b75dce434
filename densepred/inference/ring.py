"""Planes in a ring: memory that moves along axis 0 of a volume, however deep it is, without shifting copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ring:
    """`depth` consecutive planes of a volume; plane z lies at index z modulo `depth`.

    Args:
        channels: channels of a plane.
        depth: planes held at once.
        rest: shape of a plane: (Y, X) of a volume, (X,) of an image.
        device: where the planes live, as float32.
    """

    def __init__(self, channels: int, depth: int, rest: Sequence[int], device: torch.device) -> None:
        self.planes = torch.zeros(channels, depth, *rest, device=device)

    def spans(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Planes start..stop as one or two pairs (indices in the ring, indices counted from `start`).

        Raises:
            ValueError: more planes than the ring holds.
        """
        depth, count = self.planes.shape[1], stop - start
        if count > depth:
            raise ValueError(f"planes {start}..{stop} are {count}, the ring holds {depth}")
        first = start % depth
        head = min(count, depth - first)
        whole = [(slice(first, first + head), slice(0, head))]
        return whole if head == count else [*whole, (slice(0, count - head), slice(head, count))]

    def write(self, start: int, block: Tensor) -> None:
        """Puts planes (C, n, *rest) at start..start + n."""
        for here, there in self.spans(start, start + block.shape[1]):
            self.planes[:, here].copy_(block[:, there], non_blocking=True)

    def views(self, corner: Sequence[int], shape: Sequence[int]) -> list[tuple[Tensor, slice]]:
        """The window of `shape` that begins at `corner`, in one or two parts (C, n, *rest), and the planes of each."""
        rest = extent(corner[1:], shape[1:])
        return [
            (self.planes[(slice(None), here, *rest)], there)
            for here, there in self.spans(corner[0], corner[0] + shape[0])
        ]

    def read(self, corner: Sequence[int], out: Tensor) -> None:
        """Copies the window (C, *window) that begins at `corner` to `out`."""
        for part, planes in self.views(corner, out.shape[1:]):
            out[:, planes].copy_(part)


class Accumulator:
    """The weighted sum of windows, over the planes that a later window can still touch.

    Its memory is (K, depth, *rest) float32, whatever the depth of the volume: windows come in order of their first
    plane, `retire` hands out the planes that are finished and clears them for the next ones. What a window holds
    outside of the part that is summed up is left out.

    Args:
        channels: K, channels of the logits.
        depth: planes held at once: those of a window.
        lower: the first voxel of the part of the image that is summed up.
        rest: its extent along the axes behind the first.
        normalised: whether the weights over each voxel add up to one; if not, their sum is kept too, and divided by.
        device: where the planes live.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        lower: Sequence[int],
        rest: Sequence[int],
        normalised: bool,
        device: torch.device,
    ) -> None:
        self.start, self._first, self._lower = lower[0], lower[0], tuple(lower[1:])
        self.values = Ring(channels, depth, rest, device)
        self.total = None if normalised else Ring(1, depth, rest, device)

    def add(self, corner: Sequence[int], logits: Tensor, weight: Tensor) -> None:
        """Adds weight * logits: (*window) * (K, *window) float32, the window beginning at `corner`.

        Raises:
            ValueError: the window reaches a plane already retired or not yet free.
        """
        begin, end = corner[0], corner[0] + logits.shape[1]
        if end > self.start + self.values.planes.shape[1] or begin < self.start != self._first:
            raise ValueError(f"planes {begin}..{end} are outside the ring, which begins at plane {self.start}")
        lower = (self.start, *self._lower)
        upper = (end, *(low + size for low, size in zip(self._lower, self.values.planes.shape[2:], strict=True)))
        inside = [
            (max(low - at, 0), min(high - at, size))
            for at, size, low, high in zip(corner, logits.shape[1:], lower, upper, strict=True)
        ]
        if any(first >= last for first, last in inside):
            return
        box = tuple(slice(first, last) for first, last in inside)
        at = [c + first - low for c, (first, _), low in zip(corner, inside, (0, *self._lower), strict=True)]
        shape = [last - first for first, last in inside]
        logits, weight = logits[(slice(None), *box)], weight[box]
        for part, planes in self.values.views(at, shape):
            part.addcmul_(logits[:, planes], weight[planes])
        if self.total is not None:
            for part, planes in self.total.views(at, shape):
                part.add_(weight[planes])

    def retire(self, stop: int) -> Tensor:
        """Takes out the planes below `stop`: a new tensor (K, n, *rest)."""
        shape = (stop - self.start, *self.values.planes.shape[2:])
        with torch.inference_mode(False):  # a tensor the caller may change and train on
            slab = torch.empty(self.values.planes.shape[0], *shape, device=self.values.planes.device)
        for here, there in self.values.spans(self.start, stop):
            slab[:, there].copy_(self.values.planes[:, here])
            self.values.planes[:, here].zero_()
            if self.total is not None:
                slab[:, there].div_(self.total.planes[:, here])
                self.total.planes[:, here].zero_()
        self.start = stop
        return slab


def extent(corner: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a box of shape `shape` at `corner`."""
    return tuple(slice(start, start + size) for start, size in zip(corner, shape, strict=True))
