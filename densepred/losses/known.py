"""What counts in a loss, and sums over it."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -1
"""A label without a truth, here as in the whole program."""


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


def masked_mean(values: Tensor, known: Tensor) -> Tensor:
    """Mean of the values where they are known; 0 if nowhere."""
    rows = torch.where(known, values, 0).sum(-1)  # a float32 sum of one row is exact enough, and quick
    return (rows.sum(dtype=torch.float64) / known.sum().clamp(min=1)).to(values.dtype)


def soft_dice(predicted: Tensor, truth: Tensor, over_batch: bool, smooth: float) -> Tensor:
    """Of probabilities and truth (B, K, ...), both zero where nothing is known."""
    overlap, size = voxel_sums(predicted * truth), voxel_sums(predicted) + voxel_sums(truth)
    if over_batch:
        overlap, size = overlap.sum(0), size.sum(0)
    return (1 - ((2 * overlap + smooth) / (size + smooth)).mean()).to(predicted.dtype)


def voxel_sums(x: Tensor) -> Tensor:
    """Sums over the voxels: (B, K, ...) -> (B, K) float64."""
    rows = x.sum(-1) if x.ndim > 2 else x
    return rows.reshape(*x.shape[:2], -1).sum(-1, dtype=torch.float64)
