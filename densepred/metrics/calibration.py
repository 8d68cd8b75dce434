"""Are probabilities right: expected calibration error and Brier score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_SUM = 1e-2
"""By how much the probabilities of a voxel may miss 1: files may hold them rounded."""


@dataclass(frozen=True)
class Calibration:
    """How often predictions of each confidence are right; the counts of slabs, cases and sets add up.

    The confidence is the largest probability of a voxel, and it is right if that class is the true one. Bins of
    confidence have equal width; bin i holds i/n < confidence <= (i + 1)/n.

    Args:
        counts: (n,) int64, voxels.
        right: (n,) int64, those whose likeliest class is the true one.
        confidence: (n,) float64, sum of the confidences.
        squares: sum over voxels and classes of (probability - truth) squared.

    Source: Guo et al. 2017 (arXiv:1706.04599), equations 2 to 5; Brier 1950.

    Example:
        >>> found = Calibration.of(np.array([[0.2, 0.1], [0.8, 0.9]]), np.array([1, 0]))
        >>> round(found.error, 2), round(found.brier, 2)  # (|1 - 0.8| + |0 - 0.9|) / 2, (2 * 0.04 + 2 * 0.81) / 2
        (0.55, 0.85)
    """

    counts: np.ndarray
    right: np.ndarray
    confidence: np.ndarray
    squares: float

    @classmethod
    def of(cls, probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
        """Count.

        Args:
            probabilities: (K, *spatial) of exclusive classes, which sum to 1; NaN where nothing was predicted.
            labels: integers (*spatial) in -1..K-1, -1 where the truth is not known.
            bins: of confidence.

        Raises:
            ValueError: the shapes do not fit, there are fewer than 2 classes, a value is out of range, or a sum not 1.
        """
        if probabilities.shape[1:] != labels.shape or len(probabilities) < 2:
            raise ValueError(f"probabilities must be (K, {labels.shape}), K > 1, got {probabilities.shape}")
        known = np.isfinite(probabilities).all(0) & (labels != -1)
        shares, truth = probabilities[:, known].astype(np.float64), labels[known]
        if truth.size and not (truth.min() >= 0 and truth.max() < len(shares)):
            raise ValueError(f"labels must lie in [-1, {len(shares)}), got [{truth.min()}, {truth.max()}]")
        if truth.size and not (shares.min() >= 0 and shares.max() <= 1 + 1e-6):
            raise ValueError(f"probabilities must lie in [0, 1], got [{shares.min():g}, {shares.max():g}]")
        if truth.size and np.abs(shares.sum(0) - 1).max() > _SUM:
            raise ValueError("probabilities must sum to 1 over the classes: those of regions that may overlap do not")
        confidence, right = shares.max(0, initial=0), shares.argmax(0) == truth
        at = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        own = np.take_along_axis(shares, truth[None].astype(np.int64), 0)[0]
        squares = float((shares**2).sum() - 2 * own.sum() + own.size)
        counts, hits = np.bincount(at, minlength=bins), np.bincount(at[right], minlength=bins)
        return cls(counts, hits, np.bincount(at, confidence, bins), squares)

    def __add__(self, other: Calibration) -> Calibration:
        if len(self.counts) != len(other.counts):
            raise ValueError(f"bins must be as many, got {len(self.counts)} and {len(other.counts)}")
        return Calibration(
            self.counts + other.counts,
            self.right + other.right,
            self.confidence + other.confidence,
            self.squares + other.squares,
        )

    @property
    def error(self) -> float:
        """ECE: the mean over voxels of |accuracy - mean confidence| of their bin; nan without voxels."""
        total = int(self.counts.sum())
        return float(np.abs(self.right - self.confidence).sum() / total) if total else math.nan

    @property
    def worst(self) -> float:
        """MCE: the largest |accuracy - mean confidence| of a bin; nan without voxels."""
        some = self.counts > 0
        gaps = np.abs(self.right - self.confidence)[some] / self.counts[some]
        return float(gaps.max()) if gaps.size else math.nan

    @property
    def brier(self) -> float:
        """The mean over voxels of the sum over classes of (probability - truth) squared, 0 to 2; nan without voxels.

        Of two classes it is twice what is often given, the square for one of them.
        """
        total = int(self.counts.sum())
        return self.squares / total if total else math.nan

    @property
    def reliability(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean confidence and accuracy of each bin, (n,) each; nan where it is empty."""
        empty = np.full(len(self.counts), np.nan)
        some = self.counts > 0
        parts = (np.divide(side, self.counts, out=empty.copy(), where=some) for side in (self.confidence, self.right))
        confidence, accuracy = parts
        return confidence, accuracy
