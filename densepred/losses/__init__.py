"""Losses on what heads give, each `loss(outputs, targets, valid=None) -> scalar`.

Outputs are raw: logits (B, K, ...), means (B, K, ...), or K means and then K log-variances (B, 2K, ...); `...` is
`*spatial` for dense heads and nothing for global ones. What counts nowhere, in any loss: a label of -1 (`IGNORE`), a
target that is not finite, and wherever `valid`, bool (B, ...) or like the targets, is false. If nothing counts at all
the loss is 0 and so is every gradient.

Everything is computed in float32 at least, whatever the outputs are; sums over voxels are made row by row and then in
float64, and counts are integers, so that nothing is lost beyond 2^24 voxels.
"""

from __future__ import annotations

from densepred.losses.functions import (
    LOSSES,
    boundary,
    cldice,
    cross_entropy,
    dice,
    focal,
    gaussian_nll,
    hausdorff,
    huber,
    lovasz,
    mean_absolute,
    mean_squared,
    region_cross_entropy,
    region_dice,
    tversky,
)
from densepred.losses.known import IGNORE
from densepred.losses.tasks import HeadLoss, MultiTaskLoss, SegmentationLoss, Terms, resize_targets, suitable

__all__ = [
    "IGNORE",
    "LOSSES",
    "HeadLoss",
    "MultiTaskLoss",
    "SegmentationLoss",
    "Terms",
    "boundary",
    "cldice",
    "cross_entropy",
    "dice",
    "focal",
    "gaussian_nll",
    "hausdorff",
    "huber",
    "lovasz",
    "mean_absolute",
    "mean_squared",
    "region_cross_entropy",
    "region_dice",
    "resize_targets",
    "suitable",
    "tversky",
]
