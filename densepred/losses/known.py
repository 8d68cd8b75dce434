"""What counts in a loss, and sums over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -1
"""A label without a truth, here as in the whole program."""


class Shares(NamedTuple):
    """What is predicted and what is true of each class or region: (B, C, ...).

    Args:
        predicted: probabilities, zero where nothing is known.
        truth: bool, false where nothing is known.
        known: bool, where anything is.
    """

    predicted: Tensor
    truth: Tensor
    known: Tensor


def in_full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def known_labels(logits: Tensor, labels: Tensor, valid: Tensor | None) -> Tensor:
    """Where labels count: bool (B, ...)."""
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels must be {expected} for logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    return _known(labels, valid, channels=False) & (labels != IGNORE)


def known_regions(logits: Tensor, regions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The truth, float (B, K, ...), zero where it does not count, and where it counts."""
    _same_shape(logits, regions)
    known = _known(regions, valid) & (regions != IGNORE)
    return regions.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~known, 0), known


def shares(logits: Tensor, targets: Tensor, valid: Tensor | None, background: bool) -> Shares:
    """Probabilities and truths of exclusive classes, labels (B, ...), or of regions (B, K, ...).

    Args:
        background: class 0 of exclusive classes is one of them; regions have none.

    Raises:
        ValueError: the shapes do not fit, or there is a single exclusive class.
    """
    if targets.ndim == logits.ndim:
        truth, known = known_regions(logits, targets, valid)
        return Shares(in_full(logits).sigmoid() * known, truth > 0.5, known)
    if logits.shape[1] < 2:
        raise ValueError("this loss needs at least 2 exclusive classes, got 1; a single region has targets (B, 1, ...)")
    first = 0 if background else 1
    known = known_labels(logits, targets, valid).unsqueeze(1)
    classes = torch.arange(first, logits.shape[1], device=targets.device).view(1, -1, *[1] * (targets.ndim - 1))
    truth = (targets.unsqueeze(1) == classes) & known
    return Shares(in_full(logits).softmax(1)[:, first:] * known, truth, known.expand_as(truth))


def known_error(means: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean less target (B, K, ...), zero where the target is not known, and where it is."""
    _same_shape(means, targets)
    means, known = in_full(means), _known(targets, valid)
    return torch.where(known, means - targets.to(means.dtype), 0), known


def _same_shape(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(f"targets must be {tuple(outputs.shape)} like the outputs, got {tuple(targets.shape)}")


def _known(targets: Tensor, valid: Tensor | None, channels: bool = True) -> Tensor:
    """Where targets are finite and valid: bool of their shape, which is (B, K, ...) if they have `channels`."""
    known = targets.isfinite()
    if valid is None:
        return known
    if channels and valid.ndim == targets.ndim - 1:
        valid = valid.unsqueeze(1).expand(-1, targets.shape[1], *valid.shape[1:])
    if valid.shape != targets.shape:
        raise ValueError(f"valid must be of the targets' shape {tuple(targets.shape)}, got {tuple(valid.shape)}")
    return known & valid.bool()


def per_class(weights: Sequence[float] | None, logits: Tensor) -> Tensor | None:
    """A factor for each of the K channels of logits: (K,).

    Raises:
        ValueError: there are not K.
    """
    if weights is None:
        return None
    if len(weights) != logits.shape[1]:
        raise ValueError(f"class_weights must be {logits.shape[1]}, one for each class, got {len(weights)}")
    return torch.tensor(weights, dtype=in_full(logits[:0]).dtype).to(logits.device, non_blocking=True)


def masked_mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean of the values where they are known; 0 if nowhere."""
    rows = torch.where(known, values, 0).sum(-1)  # a float32 sum of one row is exact enough, and quick
    return (rows.sum(dtype=torch.float64) / known.sum().clamp(min=1)).to(values.dtype)


def hardest_mean(values: Tensor, weights: Tensor | None, known: Tensor, top: float) -> Tensor:
    """Mean, over the known voxels, of the `top` share of the values that is largest; 0 if nothing is known.

    Args:
        values: of any shape, 0 or more, each times its weight.
        weights: of the same shape, what the sum is divided by; by default each counts 1.
        known: bool, of the same shape.
        top: above 0; at least one voxel is taken.
    """
    if top == 1 and weights is None:
        return masked_mean(values, known)
    chosen = known
    if top < 1:
        count = max(1, round(top * int(known.sum())))
        at = values.detach().masked_fill(~known, -1).flatten().topk(count).indices
        chosen = torch.zeros_like(known).flatten().index_fill(0, at, True).view_as(known) & known
    if weights is None:
        return masked_mean(values, chosen)
    whole = torch.where(chosen, weights, 0).sum(dtype=torch.float64)
    total = torch.where(chosen, values, 0).sum(dtype=torch.float64)
    return (total / whole.clamp(min=torch.finfo(torch.float32).tiny)).to(values.dtype)


def soft_dice(predicted: Tensor, truth: Tensor, over_batch: bool, smooth: float) -> Tensor:
    """Of probabilities and truth (B, K, ...), both zero where nothing is known."""
    overlap, size = voxel_sums(predicted * truth), voxel_sums(predicted) + voxel_sums(truth)
    if over_batch:
        overlap, size = overlap.sum(0), size.sum(0)
    return (1 - ((2 * overlap + smooth) / (size + smooth)).mean()).to(predicted.dtype)


def generalised_dice(predicted: Tensor, truth: Tensor, over_batch: bool, smooth: float) -> Tensor:
    """Of probabilities and truth (B, K, ...), both zero where nothing is known: one ratio for all classes.

    A class counts by 1 / (its true size squared), one that is absent as much as the smallest that is present.

    Source: Sudre et al. 2017 (arXiv:1707.03237), section 2.
    """
    overlap, true = voxel_sums(predicted * truth), voxel_sums(truth)
    size = voxel_sums(predicted) + true
    if over_batch:
        overlap, size, true = overlap.sum(0), size.sum(0), true.sum(0)
    smallest = true.masked_fill(true == 0, torch.inf).amin(-1, keepdim=True)
    weights = torch.where(
        true > 0, smallest / true, 1.0
    ).square()  # at most 1, so that `smooth` stays small beside them
    ratio = (2 * (weights * overlap).sum(-1) + smooth) / ((weights * size).sum(-1) + smooth)
    return (1 - ratio.mean()).to(predicted.dtype)


def voxel_sums(x: Tensor) -> Tensor:
    """Sums over the voxels: (B, K, ...) -> (B, K) float64."""
    rows = x.sum(-1) if x.ndim > 2 else x
    return rows.reshape(*x.shape[:2], -1).sum(-1, dtype=torch.float64)
