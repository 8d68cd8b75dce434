"""Overlap scores, all derived from one exact table of counts.

A confusion matrix `(K, K)` int64 has the truth in rows and the prediction in columns. Counts add up: the matrix of a
set is the sum of its cases', of a volume the sum of its slabs'. No count passes through floating point, so none is
lost beyond 2^24 voxels.

A class that neither the truth nor the prediction holds has no score: its Dice and IoU are nan, and nan is left out of
every mean. Likewise precision is nan where nothing was predicted, and recall where there is nothing to find.

Definitions: Taha and Hanbury, "Metrics for evaluating 3D medical image segmentation", BMC Medical Imaging 15:29, 2015.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int, ignore: int = -1) -> np.ndarray:
    """Count the voxels of every pair of true and predicted class.

    Args:
        truth: class indices of any shape, below `classes`; voxels of the value `ignore` are not counted.
        prediction: class indices of the same shape; only counted voxels are looked at.
        classes: K, the number of classes with the background.
        ignore: the value of truth that means "not known".

    Returns:
        (K, K) int64, `[i, j]` being the voxels of class i that were predicted as class j.

    Raises:
        TypeError: an array does not hold integers.
        ValueError: the shapes differ, or a counted value is not in [0, classes).

    Example:
        >>> confusion(np.array([0, 1, 1, -1]), np.array([0, 1, 0, 1]), classes=2)
        array([[1, 0],
               [1, 1]])
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth and prediction must have one shape, got {truth.shape} and {prediction.shape}")
    known = truth != ignore
    rows, columns = truth[known], prediction[known]
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.dtype.kind not in "iub":
            raise TypeError(f"{name} must hold integers, got {values.dtype}")
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"{name} must lie in [0, {classes}), got [{values.min()}, {values.max()}]")
    pairs = rows.astype(np.int64) * classes + columns.astype(np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def dice(confusion: np.ndarray) -> np.ndarray:
    """Twice the overlap over the sum of both sizes, per class: (K, K) -> (K,) float64."""
    overlap, true, predicted = _sizes(confusion)
    return _ratio(2 * overlap, true + predicted)


def iou(confusion: np.ndarray) -> np.ndarray:
    """The overlap over the union (Jaccard), per class: (K, K) -> (K,) float64."""
    overlap, true, predicted = _sizes(confusion)
    return _ratio(overlap, true + predicted - overlap)


def precision(confusion: np.ndarray) -> np.ndarray:
    """The share of the predicted voxels that is right, per class: (K, K) -> (K,) float64."""
    overlap, _, predicted = _sizes(confusion)
    return _ratio(overlap, predicted)


def recall(confusion: np.ndarray) -> np.ndarray:
    """The share of the true voxels that was found, per class: (K, K) -> (K,) float64."""
    overlap, true, _ = _sizes(confusion)
    return _ratio(overlap, true)


METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dice": dice,
    "iou": iou,
    "precision": precision,
    "recall": recall,
}


def _sizes(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlap, true and predicted voxels of each class, (K,) int64."""
    return np.diagonal(confusion), confusion.sum(1), confusion.sum(0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
