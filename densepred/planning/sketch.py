"""The intensities of many images in little space: exact moments, and quantiles of the whole from those of the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from densepred.config import Section

_TAIL = np.linspace(0, 0.02, 41)
RANKS = np.unique(np.concatenate([_TAIL, np.linspace(0.02, 0.98, 193), 1 - _TAIL]))
"""Where the quantiles of a case are kept: every half per cent, and every twentieth of one in the tails."""
_NONE = 1e-12  # of the range: where the least value has much weight, bisection comes this near to it
MOST_VALUES = 1 << 22
"""Values of one case and channel that its quantiles are taken from; of larger images, a regular sample of so many."""


class Sketch(Section):
    """The distribution of some values.

    Merged sketches give the exact count, mean, deviation and range, and quantiles of the mixture: each part's
    distribution is taken to be linear between the quantiles that are kept of it.

    Example:
        >>> both = merged([sketch(np.arange(0.0, 101)), sketch(np.arange(100.0, 201))])
        >>> both.count, both.mean, both.high, round(both.quantile(0.5), 6)
        (202, 100.0, 200.0, 100.0)
    """

    count: int = 0
    """Values."""
    mean: float = 0.0
    """Their mean."""
    square: float = 0.0
    """Sum of the squared distances from it."""
    parts: tuple[tuple[int, tuple[float, ...]], ...] = Field(default=(), strict=False)
    """Of each part its count and its quantiles at `RANKS`."""

    @property
    def std(self) -> float:
        """Standard deviation, divided by the count."""
        return math.sqrt(self.square / self.count) if self.count else 0.0

    @property
    def low(self) -> float:
        """The smallest value."""
        return min((quantiles[0] for _, quantiles in self.parts), default=math.nan)

    @property
    def high(self) -> float:
        """The largest value."""
        return max((quantiles[-1] for _, quantiles in self.parts), default=math.nan)

    def quantile(self, probability: float) -> float:
        """That of all values; NaN where there are none."""
        if not self.count:
            return math.nan
        low, high = self.low, self.high
        parts = [(count, np.asarray(quantiles)) for count, quantiles in self.parts]
        for _ in range(60):  # bisection: the sum of the parts' shares below a value grows with it
            middle = (low + high) / 2
            below = sum(count * float(np.interp(middle, values, RANKS)) for count, values in parts)
            low, high = (middle, high) if below < probability * self.count else (low, middle)
        return self.low if high - self.low < _NONE * (self.high - self.low) else (low + high) / 2

    def facts(self) -> dict[str, float]:
        """The numbers by name, as nnU-Net's fingerprint has them."""
        return {
            "mean": self.mean,
            "median": self.quantile(0.5),
            "std": self.std,
            "min": self.low,
            "max": self.high,
            "percentile_00_5": self.quantile(0.005),
            "percentile_99_5": self.quantile(0.995),
        }


@dataclass
class Gathering:
    """Values of one channel as they come, slab by slab.

    Args:
        voxels: of the image, by which the sample is spaced.
    """

    voxels: int
    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    kept: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """Take finite values `(n,)`."""
        if not values.size:
            return
        every = max(1, -(-self.voxels // MOST_VALUES)) | 1  # odd, so that it does not stay in one column
        self.kept.append(values[(-self.count) % every :: every].astype(np.float32))
        mean, square = moments(values)
        total, delta = self.count + values.size, mean - self.mean
        self.square += square + delta**2 * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def sketch(self) -> Sketch:
        """Of all that came."""
        if not self.count:
            return Sketch()
        kept = np.concatenate(self.kept)
        quantiles = np.quantile(kept, RANKS) if kept.size else np.linspace(self.low, self.high, len(RANKS))
        quantiles[0], quantiles[-1] = self.low, self.high
        rounded = tuple(float(f"{one:.9g}") for one in np.maximum.accumulate(quantiles))
        return Sketch(count=self.count, mean=self.mean, square=self.square, parts=((self.count, rounded),))


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean, and the sum of the squared distances from it, in float64."""
    wide = values.astype(np.float64)
    mean = float(wide.mean())
    wide -= mean
    return mean, float(np.dot(wide, wide))


def sketch(values: np.ndarray) -> Sketch:
    """Of finite values `(n,)`."""
    gathering = Gathering(values.size)
    gathering.add(values)
    return gathering.sketch()


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """Of the values of all."""
    count, mean, square = 0, 0.0, 0.0
    for one in sketches:
        if one.count:
            total, delta = count + one.count, one.mean - mean
            square += one.square + delta**2 * count * one.count / total
            mean += delta * one.count / total
            count = total
    return Sketch(count=count, mean=mean, square=square, parts=tuple(part for one in sketches for part in one.parts))
