"""Losses on logits (B, K, *spatial) and integer labels (B, *spatial), where label -1 counts nowhere.

A batch without a valid voxel gives a finite loss with zero gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.config import LossConfig

IGNORE = -1


def cross_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood over the valid voxels.

    Args:
        log_probabilities: (B, K, *spatial) float.
        labels: (B, *spatial) int64 in -1..K-1.
    """
    valid = labels != IGNORE
    picked = log_probabilities.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)  # (B, *spatial)
    return -(picked * valid).sum() / valid.sum().clamp(min=1)


def soft_dice(probabilities: Tensor, labels: Tensor, over_batch: bool, smooth: float = 1e-5) -> Tensor:
    """One minus the mean soft Dice of the foreground classes (all but 0), over the valid voxels.

    Args:
        probabilities: (B, K, *spatial) float.
        labels: (B, *spatial) int64 in -1..K-1.
        over_batch: sum over the batch before the ratio, or take a ratio per sample.
        smooth: added above and below; makes an absent class that is not predicted score 1.

    Source: Milletari et al. 2016 (arXiv:1606.04797), in the first-power form of nnU-Net (Isensee et al. 2021).
    """
    valid = (labels != IGNORE).unsqueeze(1)
    classes = torch.arange(1, probabilities.shape[1], device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
    truth = labels.unsqueeze(1) == classes  # (B, K - 1, *spatial)
    predicted = probabilities[:, 1:] * valid
    axes = tuple(range(2, probabilities.ndim))
    overlap, size = (predicted * truth).sum(axes), predicted.sum(axes) + truth.sum(axes)  # (B, K - 1)
    if over_batch:
        overlap, size = overlap.sum(0), size.sum(0)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


class SegmentationLoss(nn.Module):
    """The weighted sum of Dice and cross-entropy, over one output or over the outputs of deep supervision.

    An output at stride s (the largest over the axes) counts 1/s as much as the full one, and the weights sum to 1; its
    labels are the nearest ones.

    Args:
        config: the weights of the terms.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Tensor | Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Outputs: logits (B, K, *spatial), or a mapping of such with coarser ones; labels (B, *spatial) -> scalar."""
        scales = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
        labels = labels.long()
        total, weights = torch.zeros((), device=labels.device), 0.0
        for logits in scales:
            weight = min(here / full for here, full in zip(logits.shape[2:], scales[0].shape[2:], strict=True))
            total = total + weight * self._single(logits, resize_labels(labels, tuple(logits.shape[2:])))
            weights += weight
        return total / weights

    def _single(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = logits.float().log_softmax(1)
        loss = torch.zeros((), device=logits.device)
        if self.config.cross_entropy:
            loss = loss + self.config.cross_entropy * cross_entropy(log_probabilities, labels)
        if self.config.dice:
            loss = loss + self.config.dice * soft_dice(log_probabilities.exp(), labels, self.config.batch_dice)
        return loss

    def at_chance(self, classes: int) -> float:
        """What an untrained network should roughly start from: ln K for the cross-entropy, 1 for the Dice."""
        return self.config.cross_entropy * float(torch.tensor(float(classes)).log()) + self.config.dice


def resize_labels(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Nearest labels (B, *spatial) on a grid of another size."""
    if tuple(labels.shape[1:]) == size:
        return labels
    return F.interpolate(labels.unsqueeze(1).float(), size, mode="nearest-exact").squeeze(1).long()
