"""Exact quantiles of images larger than memory, by counting.

The bits of a number are mapped to an unsigned key that has the order of the numbers. A pass counts 16 bits of the keys,
and the next pass the following 16 bits of those keys alone that begin like a wanted one: 65,536 counters for each
wanted number. So integers of up to 16 bits take one pass, other types of up to 32 bits two, of 64 bits four.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densepred.errors import InputError
from densepred.volumes import Volume

_DIGIT = 16
_SIZE = 1 << _DIGIT
_SLAB_VOXELS = 1 << 21


def quantiles(volume: Volume, channel: int, probabilities: Sequence[float]) -> tuple[float, ...]:
    """Quantiles of the finite voxels of a channel, interpolated linearly, as `numpy.quantile` does in float64.

    Args:
        volume: `(C, *spatial)`; read once, twice or four times, slab by slab.
        channel: which.
        probabilities: each from 0 to 1.

    Raises:
        InputError: no voxel is finite.

    Example:
        >>> quantiles(Volume.from_array(np.array([[0.0, 1.0], [np.nan, 4.0]]), (1.0, 1.0)), 0, (0.5, 0.75))
        (1.0, 2.5)
    """
    counting, unfinished = Quantiles(volume.dtype, probabilities), True
    while unfinished:
        for _, _, slab in volume.slabs(slab_thickness(volume.shape)):
            counting.add(finite(slab[channel]))
        if not counting.count:
            raise InputError(f"no voxel of channel {channel} is finite", "leave the image out", volume.path)
        unfinished = not counting.finish()
    return counting.values


def slab_thickness(shape: tuple[int, ...]) -> int:
    """Planes of a volume `(C, *spatial)` that fill a few megabytes."""
    return max(1, _SLAB_VOXELS * shape[1] // int(np.prod(shape)))


def finite(values: np.ndarray) -> np.ndarray:
    """The finite ones `(n,)`, in the order of the array."""
    values = values.reshape(-1)
    if values.dtype.kind != "f":
        return values
    valid = np.isfinite(values)
    return values if valid.all() else values[valid]


class Quantiles:
    """Quantiles of numbers that come in parts, in several passes over the same parts.

    Args:
        dtype: of the numbers: bool, integers or floats of up to 64 bits.
        probabilities: each from 0 to 1.

    Attributes:
        count: of numbers.
        values: the quantiles, once `finish` has returned True.

    Example:
        >>> counting = Quantiles(np.dtype(np.int16), (0.5,))
        >>> counting.add(np.array([3, 1], np.int16))
        >>> counting.finish(), counting.values
        (True, (2.0,))
    """

    def __init__(self, dtype: np.dtype, probabilities: Sequence[float]) -> None:
        dtype = np.dtype(dtype)
        if not all(0 <= probability <= 1 for probability in probabilities):
            raise ValueError(f"probabilities must be from 0 to 1, got {tuple(probabilities)}")
        self.count = 0
        self.values: tuple[float, ...] = ()
        self._probabilities = tuple(probabilities)
        self._dtype: np.dtype = dtype.newbyteorder("=")
        if dtype.kind == "f" and dtype.itemsize not in (4, 8):  # half, and the long double of some files
            self._dtype = np.dtype(np.float32 if dtype.itemsize < 4 else np.float64)
        self._bits = max(_DIGIT, 8 * self._dtype.itemsize)
        self._known = 0  # leading bits that the passes so far have found
        self._counters = {0: np.zeros(_SIZE, np.int64)}  # leading bits -> counts of the next ones
        self._ranks: dict[int, tuple[int, int]] = {}  # rank -> leading bits, rank among the keys that have them

    def add(self, numbers: np.ndarray) -> None:
        """Count finite numbers `(n,)`."""
        keys = _keys(numbers.astype(self._dtype, copy=False))
        shift = self._bits - self._known - _DIGIT
        if not self._known:
            self.count += numbers.size
            self._counters[0] += np.bincount((keys >> shift).astype(np.int64), minlength=_SIZE)
            return
        leading = keys >> (shift + _DIGIT)
        for bits, counters in self._counters.items():
            chosen = keys[leading == bits] >> shift
            counters += np.bincount((chosen & (_SIZE - 1)).astype(np.int64), minlength=_SIZE)

    def finish(self) -> bool:
        """End a pass; whether it was the last.

        Raises:
            ValueError: there were no numbers.
        """
        if not self._known:
            if not self.count:
                raise ValueError("no number was added")
            self._ranks = {rank: (0, rank) for each in self._probabilities for rank in self._neighbours(each)[:2]}
        below = {bits: np.cumsum(counters) for bits, counters in self._counters.items()}
        for rank, (bits, within) in self._ranks.items():
            digit = int(np.searchsorted(below[bits], within, side="right"))
            before = int(below[bits][digit - 1]) if digit else 0
            self._ranks[rank] = (bits << _DIGIT | digit, within - before)
        self._known += _DIGIT
        self._counters = {bits: np.zeros(_SIZE, np.int64) for bits, _ in self._ranks.values()}
        if self._known < self._bits:
            return False
        self.values = tuple(self._quantile(probability) for probability in self._probabilities)
        return True

    @property
    def passes(self) -> int:
        """How many are finished."""
        return self._known // _DIGIT

    def _quantile(self, probability: float) -> float:
        *ranks, share = self._neighbours(probability)
        low, high = (_number(self._ranks[rank][0], self._dtype) for rank in ranks)
        return float(np.quantile(np.array([low, high]), share))  # numpy's own interpolation

    def _neighbours(self, probability: float) -> tuple[int, int, float]:
        """The ranks on both sides of a quantile, and how far it lies from the lower one."""
        place = probability * (self.count - 1)
        rank = int(place)
        return rank, min(rank + 1, self.count - 1), place - rank


def _keys(numbers: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the numbers; negative zero comes before zero."""
    kind, size = numbers.dtype.kind, numbers.dtype.itemsize
    bits = numbers.view(f"u{size}")
    if kind in "bu":
        return bits
    top = np.array(1 << (8 * size - 1), bits.dtype)
    if kind == "i":
        return bits ^ top
    negative = (numbers.view(f"i{size}") >> (8 * size - 1)).view(bits.dtype)  # all ones, or all zeros
    return bits ^ (negative | top)


def _number(key: int, dtype: np.dtype) -> float:
    """The number of a key."""
    kind, size = dtype.kind, dtype.itemsize
    top = 1 << (8 * size - 1)
    if kind == "i":
        return float(key - top)
    if kind == "f":
        key = key ^ top if key & top else key ^ (2 * top - 1)
        return float(np.array(key, f"u{size}").view(dtype))
    return float(key)
