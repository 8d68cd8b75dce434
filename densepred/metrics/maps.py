"""Errors of predicted numbers: of maps, or of values for whole images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_CONSTANT = 1e-12
"""A deviation below this share of the mean is rounding."""


@dataclass(frozen=True)
class MapErrors:
    """Errors and moments of predictions and truths; those of slabs, cases and sets add up.

    Moments are kept about the means (Chan, Golub and LeVeque 1983), so that a large mean costs no digits.

    Args:
        count: known values.
        squares: sum of (prediction - truth) squared.
        absolutes: sum of |prediction - truth|.
        means: of truth and prediction.
        moments: sums of the squared deviations of truth and of prediction, and of their product.

    Example:
        >>> found = MapErrors.of(np.array([1.0, 2.0, np.nan]), np.array([2.0, 4.0, 0.0]))
        >>> found.mse, found.mae, found.bias, round(found.pearson, 6)
        (2.5, 1.5, 1.5, 1.0)
    """

    count: int = 0
    squares: float = 0.0
    absolutes: float = 0.0
    means: tuple[float, float] = (0.0, 0.0)
    moments: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, truth: np.ndarray, prediction: np.ndarray, known: np.ndarray | None = None) -> MapErrors:
        """Sum up.

        Args:
            truth: float of any shape, NaN where it is not known.
            prediction: float of the same shape, NaN where nothing was predicted: such values are left out as well.
            known: bool of the same shape, where to look.

        Raises:
            ValueError: the shapes differ.
        """
        if truth.shape != prediction.shape or (known is not None and known.shape != truth.shape):
            raise ValueError(f"truth, prediction, known must have one shape, got {truth.shape}, {prediction.shape}")
        where = np.isfinite(truth) & np.isfinite(prediction)
        where = where if known is None else where & known
        ours, theirs = truth[where].astype(np.float64), prediction[where].astype(np.float64)
        if not ours.size:
            return cls()
        error, means = theirs - ours, (float(ours.mean()), float(theirs.mean()))
        ours, theirs = ours - means[0], theirs - means[1]
        moments = tuple(float(np.dot(one, other)) for one, other in ((ours, ours), (theirs, theirs), (ours, theirs)))
        return cls(error.size, float(np.dot(error, error)), float(np.abs(error).sum()), means, moments)  # type: ignore[arg-type]

    def __add__(self, other: MapErrors) -> MapErrors:
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = [theirs - ours for ours, theirs in zip(self.means, other.means, strict=True)]
        weight = self.count * other.count / count
        shifts = (apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1])
        one, two, both = (
            a + b + weight * shift for a, b, shift in zip(self.moments, other.moments, shifts, strict=True)
        )
        truth, prediction = (mean + step * other.count / count for mean, step in zip(self.means, apart, strict=True))
        squares, absolutes = self.squares + other.squares, self.absolutes + other.absolutes
        return MapErrors(count, squares, absolutes, (truth, prediction), (one, two, both))

    @property
    def mse(self) -> float:
        """Mean squared error; nan without values, as all here."""
        return self.squares / self.count if self.count else math.nan

    @property
    def rmse(self) -> float:
        """The root of the mean squared error."""
        return math.sqrt(self.mse)

    @property
    def mae(self) -> float:
        """Mean absolute error."""
        return self.absolutes / self.count if self.count else math.nan

    @property
    def bias(self) -> float:
        """Mean of prediction less truth."""
        return self.means[1] - self.means[0] if self.count else math.nan

    @property
    def pearson(self) -> float:
        """Pearson's correlation coefficient; nan too if either is constant."""
        if self._is_constant(0) or self._is_constant(1):
            return math.nan
        return self.moments[2] / (math.sqrt(self.moments[0]) * math.sqrt(self.moments[1]))

    @property
    def r2(self) -> float:
        """1 - squared error / variance of the truth; nan too if the truth is constant."""
        return math.nan if self._is_constant(0) else 1 - self.squares / self.moments[0]

    def _is_constant(self, side: int) -> bool:
        """Whether the truth (0) or the prediction (1) is the same everywhere, to rounding."""
        deviation = math.sqrt(self.moments[side] / self.count) if self.count else 0.0
        return deviation <= _CONSTANT * abs(self.means[side])
