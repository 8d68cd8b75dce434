"""Moving labels from one grid to another while their planes stream by: the class with the largest share wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from densepred.cases.regrid import LINEAR, PIECE_BYTES, Kernel, Taps, along

_TIE = np.float32(1e-5)  # more than rounding makes of equal shares


class Relabel:
    """Holds the planes of labels that the next planes of the new grid need: planes go in in order, and come out so.

    Each class is an image of its own, of ones and zeros, and the largest share wins; where shares are equal, that of
    the nearest voxel. So no value comes out that did not go in. Only the classes in the planes at hand cost time.

    Args:
        shape: of the labels, (Z, Y, X) or (Y, X).
        target: the new shape.
        kernels: the filter of each axis, of order 0 or 1; by default linear.

    Attributes:
        done, read: planes of the new grid that have come out; of the old one that went in.
        piece: how many planes are best put in at a time.

    Example:
        >>> relabel = Relabel((1, 2), (1, 4))
        >>> relabel.add(np.array([[0, 7]]))
        >>> relabel.take(relabel.ready)
        array([[0, 0, 7, 7]])
    """

    def __init__(self, shape: Sequence[int], target: Sequence[int], kernels: Sequence[Kernel] | None = None) -> None:
        kernels = kernels or (LINEAR,) * len(shape)
        self.shape, self.target = tuple(shape), tuple(target)
        self._taps = made = [Taps.of(a, b, kernel=one) for a, b, one in zip(shape, target, kernels, strict=True)]
        moved = [axis for axis, size in enumerate(shape) if size != target[axis]]
        self._nearest = [
            Taps.of(a, b, kernel=Kernel(0)).index[:, 0].numpy() for a, b in zip(shape, target, strict=True)
        ]
        self._order = sorted(moved, key=lambda axis: target[axis] / shape[axis])  # those that shrink first
        self._highest = np.maximum.accumulate(made[0].index.amax(1).numpy())
        self.done = self.read = 0
        largest = max(math.prod(self.shape[1:]), math.prod(self.target[1:]))
        self.piece = max(1, PIECE_BYTES // (4 * largest))
        self._held = np.empty((0, *self.shape[1:]))
        self._from = 0

    @property
    def ready(self) -> int:
        """The planes of the new grid, counted from its first, that can come out."""
        return int(np.searchsorted(self._highest, self.read))

    def add(self, planes: np.ndarray) -> None:
        """Put in the next planes, integers (n, *rest)."""
        first = int(self._taps[0].index[self.done :].min()) if self.done < self.target[0] else self.read
        kept = self._held[max(first - self._from, 0) :].astype(planes.dtype)
        self._from = max(first, self._from) if len(kept) else self.read
        self._held = np.concatenate([kept, planes])
        self.read += len(planes)

    def take(self, stop: int) -> np.ndarray:
        """Take out the planes up to `stop`, which must be ready: (m, *target rest)."""
        assert self.done < stop <= self.ready
        rows = Taps(self._taps[0].index[self.done : stop], self._taps[0].share[self.done : stop])
        low, high = rows.reach
        planes, rows = self._held[low - self._from : high - self._from], Taps(rows.index - low, rows.share)
        values = np.unique(planes)
        shape = (stop - self.done, *self.target[1:])
        start, self.done = self.done, stop
        if len(values) == 1:
            return np.full(shape, values[0], planes.dtype)
        best, out = np.zeros(shape, np.float32), np.full(shape, values[0], planes.dtype)
        near = planes[np.ix_(self._nearest[0][start:stop] - low, *self._nearest[1:])]
        for value in values:
            share = self._share(planes == value, rows) + _TIE * (near == value)
            better = share > best
            out[better] = value
            np.maximum(best, share, out=best)
        return out

    def _share(self, mask: np.ndarray, rows: Taps) -> np.ndarray:
        """Of one class, float32."""
        image = torch.from_numpy(mask.astype(np.float32))[None]
        for axis in self._order:
            image = along(image, axis - mask.ndim, self._taps[axis] if axis else rows)
        if 0 not in self._order:
            image = image[:, rows.index[:, 0]]
        return image[0].numpy()
