"""Losses for classes of very different size: Tversky, focal, Lovász.

Their targets are labels (B, ...) of exclusive classes, seen through a softmax, or regions (B, K, ...) that may overlap,
each seen through a sigmoid; the number of axes says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.losses.known import in_full, known_labels, known_regions, masked_mean, per_class, shares, voxel_sums


def tversky(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    over_batch: bool = True,
    smooth: float = 1e-5,
) -> Tensor:
    """Mean of (1 - Tversky index) ** gamma over the foreground classes.

    The index is TP / (TP + alpha FP + beta FN): with 1/2 and 1/2 it is the Dice, with 1 and 1 the intersection over
    union; a larger beta favours recall.

    Args:
        logits: (B, K, ...) float.
        targets: (B, ...) integers in -1..K-1, or (B, K, ...) of 0, 1 and -1 (or NaN).
        valid: bool (B, ...), for regions also (B, K, ...), where to look.
        alpha: weight of what is predicted and not true.
        beta: weight of what is true and not predicted.
        gamma: positive; Abraham and Khan (2018, arXiv:1810.07842) write 1/gamma.
        over_batch: sum over the batch before the ratio, or take a ratio per sample.
        smooth: added above and below, positive; makes an absent class that is not predicted score 1.

    Raises:
        ValueError: the shapes do not fit, or there is no foreground class.

    Source: Salehi et al. 2017 (arXiv:1706.05721), equation 4.

    Example:
        >>> tversky(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4))  # 1 - 8 / (8 + 0.7 * 8)
        tensor(0.4118)
    """
    predicted, truth, _ = shares(logits, targets, valid, background=False)
    right, given, true = voxel_sums(predicted * truth), voxel_sums(predicted), voxel_sums(truth)
    if over_batch:
        right, given, true = right.sum(0), given.sum(0), true.sum(0)
    index = (right + smooth) / (right + alpha * (given - right) + beta * (true - right) + smooth)
    missing = 1 - index
    if gamma != 1:  # the root of 0 has no slope
        missing = missing.clamp(min=torch.finfo(torch.float32).tiny) ** gamma * (missing > 0)
    return missing.mean().to(predicted.dtype)


def focal(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean of -(1 - p) ** gamma log p, p being the probability given to the truth.

    Args:
        logits: (B, K, ...) float.
        targets: (B, ...) integers in -1..K-1, or (B, K, ...) of 0, 1 and -1 (or NaN).
        valid: bool (B, ...), for regions also (B, K, ...), where to look.
        gamma: 0 or more; 0 is the cross-entropy.
        class_weights: a factor for each class; unlike that of the cross-entropy, the mean is not weighted by it.

    Raises:
        ValueError: the shapes do not fit.

    Source: Lin et al. 2017 (arXiv:1708.02002), equation 5.

    Example:
        >>> focal(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4))  # ln 2 / 4
        tensor(0.1733)
    """
    factors = per_class(class_weights, logits)
    if targets.ndim == logits.ndim:
        truth, known = known_regions(logits, targets, valid)
        log_p = -F.binary_cross_entropy_with_logits(in_full(logits), truth, reduction="none")
        weights = None if factors is None else factors.view(1, -1, *[1] * (logits.ndim - 2))
    else:
        known = known_labels(logits, targets, valid)
        label = targets.long().masked_fill(~known, 0)
        log_p = in_full(logits).log_softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)
        weights = None if factors is None else factors[label]
    missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny)  # 1 - p, of a finite slope at 0
    losses = -log_p * missing**gamma
    return masked_mean(losses if weights is None else losses * weights, known)


def lovasz(logits: Tensor, targets: Tensor, valid: Tensor | None = None, over_batch: bool = True) -> Tensor:
    """One minus the intersection over union, made convex in the errors, as mean over the classes that occur.

    Args:
        logits: (B, K, ...) float.
        targets: (B, ...) integers in -1..K-1, the background being a class as in the paper, or (B, K, ...) of 0, 1 and
            -1 (or NaN).
        valid: bool (B, ...), for regions also (B, K, ...), where to look.
        over_batch: take the batch as one image, or each sample by itself.

    Raises:
        ValueError: the shapes do not fit, or there is a single exclusive class.

    Source: Berman et al. 2018 (arXiv:1705.08790), equations 8 to 11. Counts are integers here, so that nothing is lost
    beyond 2^24 voxels.

    Example:
        >>> lovasz(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4))  # every error is 1/2
        tensor(0.5000)
    """
    predicted, truth, known = shares(logits, targets, valid, background=True)
    errors = torch.where(known, (truth.to(predicted.dtype) - predicted).abs(), 0)  # the unknown come last, and add 0
    if over_batch:
        errors, truth = errors.transpose(0, 1).unsqueeze(0), truth.transpose(0, 1).unsqueeze(0)
    errors, truth = errors.flatten(2), truth.flatten(2)
    ordered, at = errors.sort(-1, descending=True)
    losses = (ordered.double() * _steps(truth.gather(-1, at))).sum(-1)
    present = truth.any(-1)
    each = (losses * present).sum(1) / present.sum(1).clamp(min=1)
    return (each.sum() / present.any(1).sum().clamp(min=1)).to(predicted.dtype)


def _steps(truth: Tensor) -> Tensor:
    """How much the Jaccard loss grows as each error, the largest first, is added: bool (B, C, N) -> float64."""
    size = truth.sum(-1, keepdim=True)
    overlap, union = size - truth.cumsum(-1), size + (~truth).cumsum(-1)  # int64
    jaccard = 1 - overlap.double() / union
    return torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)
