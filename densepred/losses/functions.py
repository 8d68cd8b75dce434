"""The losses themselves; see the package for what their arguments have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.losses.known import (
    IGNORE,
    generalised_dice,
    hardest_mean,
    in_full,
    known_error,
    known_labels,
    known_regions,
    masked_mean,
    per_class,
    shares,
    soft_dice,
)
from densepred.losses.overlap import focal, lovasz, tversky
from densepred.losses.shape import boundary, cldice, hausdorff
from densepred.models.heads import LEAST_LOG_VARIANCE

Loss = Callable[..., Tensor]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    class_weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    top: float = 1.0,
) -> Tensor:
    """Mean negative log-likelihood of exclusive classes.

    Args:
        logits: (B, K, ...) float.
        labels: (B, ...) integers in -1..K-1.
        valid: bool (B, ...), where to look.
        class_weights: a factor for each class; the mean is weighted by those of the truth.
        smoothing: share of the truth that is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567).
        top: share of the known voxels that counts, those with the largest loss (Wu et al. 2016, arXiv:1605.06885).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> cross_entropy(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4))  # ln 2
        tensor(0.6931)
    """
    known = known_labels(logits, labels, valid)
    target = labels.long().masked_fill(~known, IGNORE)
    factors = per_class(class_weights, logits)
    losses = F.cross_entropy(
        in_full(logits), target, factors, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    weights = None if factors is None else factors[target.clamp(min=0)]
    return hardest_mean(losses, weights, known, top)


def dice(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    over_batch: bool = True,
    smooth: float = 1e-5,
    generalised: bool = False,
) -> Tensor:
    """One minus the mean soft Dice of the foreground classes (all but 0).

    Args:
        logits: (B, K, ...) float, K being 2 or more.
        labels: (B, ...) integers in -1..K-1.
        valid: bool (B, ...), where to look.
        over_batch: sum over the batch before the ratio, or take a ratio per sample.
        smooth: added above and below, positive; makes an absent class that is not predicted score 1.
        generalised: one ratio for all classes, with the background, each by 1 / (its true size squared); an absent one
            counts as much as the smallest present (Sudre et al. 2017, arXiv:1707.03237).

    Raises:
        ValueError: the shapes do not fit, or there is no foreground class.

    Source: Milletari et al. 2016 (arXiv:1606.04797), in the first-power form of nnU-Net (Isensee et al. 2021).

    Example:
        >>> dice(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4))  # 1 - 2 * 8 / (8 + 16)
        tensor(0.3333)
    """
    if logits.shape[1] < 2:
        raise ValueError("dice needs at least 2 exclusive classes, got 1; a single region takes region_dice")
    known_labels(logits, labels, valid)  # of these shapes, not regions
    predicted, truth, _ = shares(logits, labels, valid, background=generalised)
    return (generalised_dice if generalised else soft_dice)(predicted, truth, over_batch, smooth)


def region_cross_entropy(
    logits: Tensor,
    regions: Tensor,
    valid: Tensor | None = None,
    class_weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    top: float = 1.0,
) -> Tensor:
    """Mean binary cross-entropy of regions that may overlap.

    Args:
        logits: (B, K, ...) float.
        regions: (B, K, ...) of 1 inside, 0 outside and -1 (or NaN) unknown; each region has its own unknown voxels.
        valid: bool (B, ...) or (B, K, ...), where to look.
        class_weights: a factor for each region; the mean is weighted by them.
        smoothing: share of the truth that is spread evenly over inside and outside.
        top: share of the known voxels, of all regions together, that counts: those with the largest loss.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> region_cross_entropy(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))  # ln 2
        tensor(0.6931)
    """
    truth, known = known_regions(logits, regions, valid)
    truth = truth * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(in_full(logits), truth, reduction="none")
    factors = per_class(class_weights, logits)
    if factors is None:
        return hardest_mean(losses, None, known, top)
    weights = factors.view(1, -1, *[1] * (logits.ndim - 2)).expand_as(losses)
    return hardest_mean(losses * weights, weights, known, top)


def region_dice(
    logits: Tensor,
    regions: Tensor,
    valid: Tensor | None = None,
    over_batch: bool = True,
    smooth: float = 1e-5,
    generalised: bool = False,
) -> Tensor:
    """One minus the mean soft Dice of regions that may overlap, all of them; arguments as for the two above.

    Example:
        >>> region_dice(torch.full((1, 3, 4, 4), 99.0), torch.ones(1, 3, 4, 4)).item()
        0.0
    """
    truth, known = known_regions(logits, regions, valid)
    predicted = in_full(logits).sigmoid() * known
    return (generalised_dice if generalised else soft_dice)(predicted, truth, over_batch, smooth)


def mean_squared(means: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared error.

    Args:
        means: (B, K, ...) float.
        targets: (B, K, ...), NaN where unknown.
        valid: bool (B, ...) or (B, K, ...), where to look.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> mean_squared(torch.zeros(1, 1, 2), torch.tensor([[[3.0, torch.nan]]])).item()
        9.0
    """
    error, known = known_error(means, targets, valid)
    return masked_mean(error.square(), known)


def mean_absolute(means: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean absolute error; arguments as for `mean_squared`.

    Example:
        >>> mean_absolute(torch.zeros(1, 1, 2), torch.tensor([[[-3.0, torch.nan]]])).item()
        3.0
    """
    error, known = known_error(means, targets, valid)
    return masked_mean(error.abs(), known)


def huber(means: Tensor, targets: Tensor, valid: Tensor | None = None, delta: float = 1.0) -> Tensor:
    """Half the squared error up to `delta`, straight beyond (Huber 1964); other arguments as for `mean_squared`.

    Args:
        delta: the error, in the targets' unit, where the square turns into a line; positive.

    Example:
        >>> huber(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()  # (0.5 + 2.5) / 2
        1.5
    """
    error, known = known_error(means, targets, valid)
    size = error.abs()
    inner = size.clamp(max=delta)
    return masked_mean(0.5 * inner.square() + delta * (size - inner), known)


def gaussian_nll(outputs: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of a normal distribution of predicted mean and variance, less its constant.

    Args:
        outputs: (B, 2K, ...) float: K means, then K log-variances.
        targets: (B, K, ...), NaN where unknown.
        valid: bool (B, ...) or (B, K, ...), where to look.

    Raises:
        ValueError: the shapes do not fit.

    Source: Kendall & Gal 2017 (arXiv:1703.04977), equation 8.

    Example:
        >>> gaussian_nll(torch.zeros(1, 2), torch.tensor([[3.0]])).item()  # (0 + 3 ** 2) / 2
        4.5
    """
    if outputs.shape[1] != 2 * targets.shape[1]:
        raise ValueError(
            f"outputs must have a mean and a log-variance for each of the {targets.shape[1]} targets, "
            f"got {outputs.shape[1]} channels"
        )
    mean, log_variance = in_full(outputs).chunk(2, dim=1)
    error, known = known_error(mean, targets, valid)
    log_variance = torch.where(known, log_variance, 0)
    with torch.no_grad():  # the gradient does not notice, so that a variance that fell too low can rise again
        log_variance.clamp_(min=LEAST_LOG_VARIANCE)
    return masked_mean(0.5 * (log_variance + error.square() * (-log_variance).exp()), known)


LOSSES: dict[str, Loss] = {  # their settings stand in densepred.config.loss.TERMS
    "cross_entropy": cross_entropy,
    "dice": dice,
    "region_cross_entropy": region_cross_entropy,
    "region_dice": region_dice,
    "tversky": tversky,
    "focal": focal,
    "lovasz": lovasz,
    "boundary": boundary,
    "hausdorff": hausdorff,
    "cldice": cldice,
    "mean_squared": mean_squared,
    "mean_absolute": mean_absolute,
    "huber": huber,
    "gaussian_nll": gaussian_nll,
}
