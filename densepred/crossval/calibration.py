"""How far probabilities are to be trusted: one temperature for the logits, fitted to held-out cases.

Reference: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS, DOUBT = 15, 0.01
COLDEST, HOTTEST = 0.05, 20.0
_HALVINGS = 60
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Voxels of one case.

    Args:
        case: its id.
        logits: `(n, K)`.
        truth: `(n,)`, class indices.
        weight: `(n,)`, for how much of the case each voxel stands; they sum to 1.
        contested: `(n,)`, foreground has a probability above `DOUBT`.
    """

    case: str
    logits: NDArray[np.float32]
    truth: NDArray[np.int64]
    weight: Floats
    contested: NDArray[np.bool_]


@dataclass(frozen=True)
class Reliability:
    """How often predictions of a certain confidence are right.

    Args:
        confidence, accuracy: `(BINS,)`, the means in each bin of confidence; nan in an empty one.
        share: `(BINS,)`, how much of all is in each.
    """

    confidence: Floats
    accuracy: Floats
    share: Floats

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence and accuracy."""
        return float(np.nansum(np.abs(self.confidence - self.accuracy) * self.share))


def log_shares(logits: NDArray[np.floating], temperature: float) -> Floats:
    """Logarithms of the softmax of logits `(n, K)` divided by a temperature."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))


def loss(sample: Sample, temperature: float) -> float:
    """The mean negative log-likelihood of a case, in nats."""
    found = log_shares(sample.logits, temperature)[np.arange(len(sample.truth)), sample.truth]
    return float(-(sample.weight * found).sum())


def fit_temperature(samples: Sequence[Sample]) -> float:
    """The temperature with the least mean negative log-likelihood over the cases, each of which counts alike.

    The likelihood is convex in 1 / T, so its derivative, the mean of (expected logit - logit of the truth), has one
    root, which is found by halving; at an end of [0.05, 20] where there is none between.

    Raises:
        ValueError: no sample.

    Example:
        >>> sure = Sample("a", np.array([[0.0, 4.0]] * 4, np.float32), np.array([1, 1, 1, 0]), np.full(4, 0.25),
        ...     np.full(4, True))
        >>> round(fit_temperature([sure]), 3)  # right in 3 of 4: log(3) = 4 / T
        3.641
    """
    if not samples:
        raise ValueError("samples must not be empty")
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        if _slope(samples, middle) > 0:
            high = middle
        else:
            low = middle
    return 1 / float(np.sqrt(low * high))


def _slope(samples: Sequence[Sample], inverse: float) -> float:
    """The derivative of the loss by 1 / T."""
    total = 0.0
    for one in samples:
        shares = np.exp(log_shares(one.logits, 1 / inverse))
        true = one.logits[np.arange(len(one.truth)), one.truth]
        total += float((one.weight * ((shares * one.logits).sum(1) - true)).sum())
    return total


def reliability(samples: Sequence[Sample], temperature: float, contested: bool = False) -> Reliability:
    """Confidence and accuracy of the likeliest class, in bins of equal width.

    Args:
        samples: each case counts alike.
        temperature: of the probabilities.
        contested: only voxels to which the model itself gives foreground a probability above `DOUBT`. Nearly all
            others are easy, and hide what is wrong with these. (A choice by the truth would favour its own class.)
    """
    counts, sure, right = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    for one in samples:
        chosen = one.contested if contested else np.ones(len(one.truth), bool)
        if not chosen.any():
            continue
        shares = np.exp(log_shares(one.logits[chosen], temperature))
        confidence, hit = shares.max(1), shares.argmax(1) == one.truth[chosen]
        weight = one.weight[chosen] / one.weight[chosen].sum()
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        counts += np.bincount(bins, weight, BINS)
        sure += np.bincount(bins, weight * confidence, BINS)
        right += np.bincount(bins, weight * hit, BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(sure / counts, right / counts, counts / max(counts.sum(), 1e-300))
