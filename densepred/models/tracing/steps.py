"""What an operation does along one axis of the image: which voxels of its input a voxel of its output reads."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

Range = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Window:
    """Output voxel i reads the input voxels i * stride - padding + dilation * t for t in [0, kernel).

    In a transposed one it reads the input voxels j for which it is j * stride - padding + dilation * t.

    Example:
        >>> low, high = Window(3, stride=2, padding=1).needs(np.array([0, 5]), np.array([0, 5]))
        >>> low.tolist(), high.tolist()
        ([-1, 9], [1, 11])
    """

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    transposed: bool = False

    def needs(self, low: np.ndarray, high: np.ndarray) -> Range:
        """The first and last input voxels that the output voxels low to high read."""
        reach = self.dilation * (self.kernel - 1)
        if self.transposed:
            return -((reach - self.padding - low) // self.stride), (high + self.padding) // self.stride
        return low * self.stride - self.padding, high * self.stride - self.padding + reach

    def stride_after(self, stride: int) -> int:
        """Voxels of the image per output voxel, from those per input voxel."""
        return max(stride // self.stride, 1) if self.transposed else stride * self.stride


Kind = Literal["linear", "aligned", "nearest", "nearest-exact", "cubic", "adaptive"]


@dataclass(frozen=True)
class Resample:
    """Interpolation, or pooling to a given size.

    Attributes:
        ratio: input voxels per output voxel.
        kind: as torch's modes; "aligned" is linear with the centres of the outer voxels kept, "adaptive" the windows
            of adaptive pooling.

    Example:
        >>> low, high = Resample(Fraction(1, 2), "linear").needs(np.array([4]), np.array([4]))  # at 1.75
        >>> int(low[0]), int(high[0])
        (1, 2)
    """

    ratio: Fraction
    kind: Kind

    def needs(self, low: np.ndarray, high: np.ndarray) -> Range:
        """The first and last input voxels that the output voxels low to high read."""
        return self._reads(low)[0], self._reads(high)[1]

    def _reads(self, i: np.ndarray) -> Range:
        p, q = self.ratio.numerator, self.ratio.denominator
        if self.kind == "adaptive":
            return i * p // q, -(-(i + 1) * p // q) - 1
        if self.kind.startswith("nearest"):
            at = i * p // q if self.kind == "nearest" else (2 * i + 1) * p // (2 * q)
            return at, at
        over, under = (i * p, q) if self.kind == "aligned" else ((2 * i + 1) * p - q, 2 * q)
        low, high = over // under, -(-over // under)
        beyond = (low < high).astype(int) if self.kind == "cubic" else 0  # on a voxel's centre the others weigh nothing
        return low - beyond, high + beyond

    def stride_after(self, stride: int) -> int:
        """Voxels of the image per output voxel, from those per input voxel."""
        return max(round(stride * self.ratio), 1)


Step = Window | Resample


def shift(start: int) -> Window:
    """Output voxel i is input voxel i + start."""
    return Window(padding=-start)


def grow(factor: int) -> Window:
    """Output voxel i reads input voxel i // factor."""
    return Window(factor, factor, transposed=True)


def shrink(factor: int) -> Window:
    """Output voxel i reads the `factor` input voxels from i * factor."""
    return Window(factor, factor)
