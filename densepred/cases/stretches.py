"""The formulas of normalisation and their inverses, on planes of one channel in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from densepred.cases.background import MeshMap

Positions = tuple[np.ndarray, ...]
"""The indices of planes in their image, along each spatial axis."""


class Stretch(Protocol):
    """A formula with its parameters."""

    def forward(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """Normalise planes `(n, *rest)` of any type; float64."""

    def inverse(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """The values `(n, *rest)`, float64, that were normalised to these."""

    def describe(self) -> dict[str, object]:
        """The parameters, for JSON."""


@dataclass(frozen=True)
class Linear:
    """(x - offset) / scale, and 0 where the scale is 0; x clipped before to `window`, or the result to 0..1.

    Attributes:
        offset, scale: in the unit of the image.
        window: lowest and highest value that is told apart.
        unit: clip the result to 0..1.
    """

    offset: float
    scale: float
    window: tuple[float, float] | None = None
    unit: bool = False

    def forward(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """Normalise planes `(n, *rest)`."""
        if self.window is not None:
            values = np.clip(values.astype(np.float64), *self.window)
        out = np.subtract(values, self.offset, dtype=np.float64)
        out *= 1 / self.scale if self.scale > 0 else 0.0
        return np.clip(out, 0, 1, out=out) if self.unit else out

    def inverse(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """The values of planes `(n, *rest)`; exact where nothing was clipped."""
        return values * self.scale + self.offset

    def describe(self) -> dict[str, object]:
        """Offset and scale."""
        return {"offset": float(self.offset), "scale": float(self.scale)}


@dataclass(frozen=True)
class Arsinh:
    """asinh((x - offset) / (softening scale)) / asinh(1 / softening), and 0 where the scale is 0.

    Source: Lupton, Gunn, Szalay 1999, AJ 118, 1406.
    """

    offset: float
    scale: float
    softening: float

    def forward(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """Normalise planes `(n, *rest)`."""
        out = Linear(self.offset, self.softening * self.scale).forward(values, where)
        return np.arcsinh(out, out=out) / np.arcsinh(1 / self.softening)

    def inverse(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """The values of planes `(n, *rest)`."""
        linear = np.sinh(values * np.arcsinh(1 / self.softening))
        return Linear(self.offset, self.softening * self.scale).inverse(linear, where)

    def describe(self) -> dict[str, object]:
        """Offset and scale."""
        return {"offset": float(self.offset), "scale": float(self.scale)}


@dataclass(frozen=True)
class Counts:
    """2 sqrt(n + 3/8) of the counts n = gain (x - offset); the inverse is the algebraic one.

    Source: Anscombe 1948, Biometrika 35, 246.
    """

    gain: float
    offset: float

    def forward(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """Normalise planes `(n, *rest)`."""
        counts = np.subtract(values, self.offset, dtype=np.float64) * self.gain
        return 2 * np.sqrt(np.maximum(counts + 0.375, 0))

    def inverse(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """The values of planes `(n, *rest)`; where counts were below -3/8, those of -3/8."""
        return (np.square(values / 2) - 0.375) / self.gain + self.offset

    def describe(self) -> dict[str, object]:
        """Nothing beyond the settings."""
        return {}


class Flattened:
    """(x - B(y, x)) / sigma(y, x), maps through the boxes of each plane.

    Args:
        level, noise: of the boxes, `(planes, rows, columns)`, finite, the noise positive.
        size: of the image, `(Y, X)`.
    """

    def __init__(self, level: np.ndarray, noise: np.ndarray, size: tuple[int, int]) -> None:
        box = size[0] / level.shape[1], size[1] / level.shape[2]
        self._level, self._noise = MeshMap(level, box), MeshMap(noise, box, bounded=True)
        self._summary = {"boxes": list(level.shape), **_range("level", level), **_range("noise", noise)}

    def forward(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """Normalise planes `(n, *rest)`."""
        return self._by_plane(values, where, lambda part, level, noise: (part - level) / noise)

    def inverse(self, values: np.ndarray, where: Positions) -> np.ndarray:
        """The values of planes `(n, *rest)`."""
        return self._by_plane(values, where, lambda part, level, noise: part * noise + level)

    def _by_plane(self, values: np.ndarray, where: Positions, formula: Callable[..., np.ndarray]) -> np.ndarray:
        *planes, y, x = where
        parts = values if planes else values[np.newaxis]
        out = np.empty(parts.shape)
        for number, z in enumerate(planes[0] if planes else (0,)):
            out[number] = formula(parts[number], self._level.at(z, y, x), self._noise.at(z, y, x))
        return out.reshape(values.shape)

    def describe(self) -> dict[str, object]:
        """The boxes, with the range of their level and noise."""
        return self._summary


def _range(name: str, grid: np.ndarray) -> dict[str, object]:
    return {f"{name}_{what}": float(of(grid)) for what, of in (("min", np.min), ("median", np.median), ("max", np.max))}
