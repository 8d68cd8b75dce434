"""What a normalisation takes from an image: an offset and a scale, gathered slab by slab in one or more passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from densepred.cases.quantiles import Quantiles

CONSTANT = 1e-12
"""A scale below this share of the offset is rounding."""
IQR = 1.349
"""Interquartile range of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Level:
    """Offset and scale: numbers, or those of boxes `(planes, rows, columns)`."""

    offset: float | np.ndarray
    scale: float | np.ndarray


class Estimate(Protocol):
    """Gathers from the channels that share parameters."""

    def add(self, planes: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> None:
        """Take the next planes `(n, *rest)` of each channel, and their finite values."""

    def finish(self) -> bool:
        """End a pass; whether all is known."""

    def level(self) -> Level:
        """What was found."""


class Moments:
    """Count, mean and standard deviation in float64.

    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """

    def __init__(self) -> None:
        self._count = self.mean = self._square = np.float64(0)

    def add(self, planes: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> None:
        """Take more values; the planes are not looked at."""
        for part in valid:
            if not part.size:
                continue
            values = part.astype(np.float64)
            total, delta = self._count + values.size, values.mean() - self.mean
            with np.errstate(over="ignore", invalid="ignore"):  # such images are refused
                self._square += np.square(values - values.mean()).sum()
                self._square += delta**2 * self._count * values.size / total
            self.mean += delta * values.size / total
            self._count = total

    def finish(self) -> bool:
        """End the pass; it is the only one."""
        return True

    @property
    def std(self) -> np.float64:
        """The standard deviation, divided by the count; 0 where it is rounding."""
        std = np.sqrt(self._square / self._count)
        return std if std > CONSTANT * abs(self.mean) else np.float64(0)

    def level(self) -> Level:
        """Mean and standard deviation."""
        return Level(float(self.mean), float(self.std))


class _Spread:
    """Exact quantiles of all channels' values together."""

    def __init__(self, dtype: np.dtype, *probabilities: float) -> None:
        self._counting = Quantiles(dtype, probabilities)

    def add(self, planes: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> None:
        """Count more values; the planes are not looked at."""
        for values in valid:
            self._counting.add(values)

    def finish(self) -> bool:
        """End a pass; whether it was the last."""
        return self._counting.finish()


class Quartiles(_Spread):
    """The median, and the interquartile range in standard deviations of a normal distribution.

    Args:
        dtype: of the values.
    """

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__(dtype, 0.25, 0.5, 0.75)

    def level(self) -> Level:
        """Median and scaled range."""
        lower, median, upper = self._counting.values
        return Level(median, (upper - lower) / IQR)


class Limits(_Spread):
    """Two quantiles.

    Args:
        dtype: of the values.
        low, high: which, as probabilities.
    """

    def __init__(self, dtype: np.dtype, low: float, high: float) -> None:
        super().__init__(dtype, low, high)

    def level(self) -> Level:
        """The lower one, and how far the upper one lies above."""
        low, high = self._counting.values
        return Level(low, high - low)


class ZScaleLimits:
    """The limits of IRAF's zscale, by astropy's `ZScaleInterval` on the sample that it would take itself.

    Args:
        channels: how many are sampled together, one after the other.
        samples: size of the sample, on a regular grid over the valid voxels.
        contrast: by which the slope of the sorted sample is divided.
    """

    def __init__(self, channels: int, samples: int, contrast: float) -> None:
        self._samples, self._contrast = samples, contrast
        self._counts = np.zeros(channels, np.int64)
        self._stride = 0  # unknown until the values are counted
        self._next = np.zeros(channels, np.int64)  # values until the next sampled one
        self._taken: list[list[np.ndarray]] = [[] for _ in range(channels)]
        self._limits = (0.0, 0.0)

    def add(self, planes: Sequence[np.ndarray], valid: Sequence[np.ndarray]) -> None:
        """First count the values, then sample them; the planes are not looked at."""
        for channel, values in enumerate(valid):
            if not self._stride:
                self._counts[channel] += values.size
                continue
            self._taken[channel].append(values[self._next[channel] :: self._stride].copy())
            left = values.size - self._next[channel]
            self._next[channel] = -left if left <= 0 else -left % self._stride

    def finish(self) -> bool:
        """End a pass; whether it was the second."""
        if not self._stride:
            self._stride = int(max(1.0, self._counts.sum() / self._samples))
            self._next = -(np.cumsum(self._counts) - self._counts) % self._stride
            return False
        from astropy.visualization import ZScaleInterval  # slow to import

        sample = np.concatenate([part for parts in self._taken for part in parts])[: self._samples]
        low, high = ZScaleInterval(n_samples=self._samples, contrast=self._contrast).get_limits(sample)
        self._limits = float(low), float(high)
        return True

    def level(self) -> Level:
        """The lower limit, and how far the upper one lies above."""
        low, high = self._limits
        return Level(low, high - low)
