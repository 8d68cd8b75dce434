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
            self.planes[:, here].copy_(block[:, there])

    def read(self, corner: Sequence[int], out: Tensor) -> None:
        """Copies the window (C, *window) that begins at `corner` to `out`."""
        rest = extent(corner[1:], out.shape[2:])
        for here, there in self.spans(corner[0], corner[0] + out.shape[1]):
            out[:, there].copy_(self.planes[(slice(None), here, *rest)])


class Accumulator:
    """The weighted sum of windows, over the planes that a later window can still touch.

    Its memory is (K, depth, *rest) float32, whatever the depth of the volume: windows come in order of their first
    plane, `retire` hands out the planes that are finished and clears them for the next ones.

    Args:
        channels: K, channels of the logits.
        depth: planes held at once: those of a window.
        rest: shape of a plane.
        normalised: whether the weights over each voxel add up to one; if not, their sum is kept too, and divided by.
        device: where the planes live.
    """

    def __init__(self, channels: int, depth: int, rest: Sequence[int], normalised: bool, device: torch.device) -> None:
        self.start = 0
        self.values = Ring(channels, depth, rest, device)
        self.total = None if normalised else Ring(1, depth, rest, device)

    @property
    def nbytes(self) -> int:
        """Bytes held, the same from the first plane to the last."""
        return sum(ring.planes.nbytes for ring in (self.values, self.total) if ring is not None)

    def add(self, corner: Sequence[int], logits: Tensor, weight: Tensor) -> None:
        """Adds weight * logits: (*window) * (K, *window) float32, the window beginning at `corner`.

        Raises:
            ValueError: the window reaches a plane already retired or not yet free.
        """
        begin, end = corner[0], corner[0] + logits.shape[1]
        if not self.start <= begin <= end <= self.start + self.values.planes.shape[1]:
            raise ValueError(f"planes {begin}..{end} are outside the ring, which begins at plane {self.start}")
        rest = extent(corner[1:], logits.shape[2:])
        for here, there in self.values.spans(begin, end):
            self.values.planes[(slice(None), here, *rest)].addcmul_(logits[:, there], weight[there])
            if self.total is not None:
                self.total.planes[(slice(None), here, *rest)].add_(weight[there])

    def retire(self, stop: int, corner: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Takes out the planes below `stop`: a new tensor (K, n, *shape), cropped to what begins at `corner`."""
        rest = extent(corner, shape)
        with torch.inference_mode(False):  # a tensor the caller may change and train on
            slab = torch.empty(self.values.planes.shape[0], stop - self.start, *shape, device=self.values.planes.device)
        for here, there in self.values.spans(self.start, stop):
            slab[:, there].copy_(self.values.planes[(slice(None), here, *rest)])
            self.values.planes[:, here].zero_()
            if self.total is not None:
                slab[:, there].div_(self.total.planes[(slice(None), here, *rest)])
                self.total.planes[:, here].zero_()
        self.start = stop
        return slab


def extent(corner: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a box of shape `shape` at `corner`."""
    return tuple(slice(start, start + size) for start, size in zip(corner, shape, strict=True))
