"""Losses of shape: distances to boundaries, and centre lines.

Their targets are labels (B, *spatial) of exclusive classes, of which the background has no term, or regions
(B, K, *spatial); the number of axes says which. Where the truth is unknown it is continued from the nearest voxel where
it is known, so that the edge of what is known is no boundary; such voxels themselves do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from densepred.losses.known import Shares, masked_mean, shares, voxel_sums
from densepred.models.layers import max_pool_3d


def boundary(
    logits: Tensor, targets: Tensor, valid: Tensor | None = None, spacing: Sequence[float] | None = None
) -> Tensor:
    """Mean of the probability times the signed distance to the truth's boundary.

    It is negative for good predictions, and without slope where a class is absent: use it beside another term, with a
    weight that keeps it smaller.

    Args:
        logits: (B, K, *spatial) float.
        targets: (B, *spatial) integers in -1..K-1, or (B, K, *spatial) of 0, 1 and -1 (or NaN).
        valid: bool (B, *spatial), for regions also (B, K, *spatial), where to look.
        spacing: of the voxels along each axis; by default 1. Distances are to the nearest voxel of the other side.

    Raises:
        ValueError: the shapes do not fit, or there are no spatial axes.

    Source: Kervadec et al. 2019 (arXiv:1812.07032), equation 5.

    Example:
        >>> truth = torch.tensor([[[0, 1, 1]]])
        >>> boundary(torch.zeros(1, 2, 1, 3), truth).item()  # (1 - 1 - 2) / 2 / 3
        -0.3333333432674408
    """
    predicted, truth, known = _dense(logits, targets, valid)
    distance = _distances(_continued(truth, known), spacing, signed=True).to(predicted)
    return masked_mean(predicted * distance, known)


def hausdorff(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    alpha: float = 2.0,
    one_sided: bool = False,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """Mean of the squared error times the sum of the distances to the boundaries of truth and prediction.

    The distances are computed on the CPU for every step, which takes about a second for 128^3 voxels and class.

    Args:
        logits: (B, K, *spatial) float.
        targets: (B, *spatial) integers in -1..K-1, or (B, K, *spatial) of 0, 1 and -1 (or NaN).
        valid: bool (B, *spatial), for regions also (B, K, *spatial), where to look.
        alpha: exponent of the distances.
        one_sided: take the truth's boundary alone.
        spacing: of the voxels along each axis; by default 1. Distances are to the nearest voxel of the other side.

    Raises:
        ValueError: the shapes do not fit, or there are no spatial axes.

    Source: Karimi and Salcudean 2019 (arXiv:1904.10030), equations 8 and 9.

    Example:
        >>> truth = torch.tensor([[[0, 1, 1]]])
        >>> hausdorff(torch.zeros(1, 2, 1, 3), truth, one_sided=True).item()  # (1 + 1 + 4) / 4 / 3
        0.5
    """
    predicted, truth, known = _dense(logits, targets, valid)
    whole = _continued(truth, known)
    weights = _distances(whole, spacing) ** alpha
    if not one_sided:
        guess = torch.where(known, predicted.detach() > 0.5, whole)
        weights = weights + _distances(guess, spacing) ** alpha
    return masked_mean((predicted - truth.to(predicted.dtype)).square() * weights.to(predicted), known)


def cldice(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    iterations: int = 3,
    over_batch: bool = True,
    smooth: float = 1.0,
) -> Tensor:
    """One minus the mean centre-line Dice of the foreground classes.

    It looks at centre lines alone, so it stands beside a loss of volume, such as the Dice.

    Args:
        logits: (B, K, *spatial) float.
        targets: (B, *spatial) integers in -1..K-1, or (B, K, *spatial) of 0, 1 and -1 (or NaN). What is unknown is
            taken for outside, in truth and prediction alike.
        valid: bool (B, *spatial), for regions also (B, K, *spatial), where to look.
        iterations: erosions of the soft skeleton, at least the largest radius in voxels.
        over_batch: sum over the batch before the ratios, or take ratios per sample.
        smooth: added above and below, positive.

    Raises:
        ValueError: the shapes do not fit, or there are no 2 or 3 spatial axes.

    Source: Shit et al. 2021 (arXiv:2003.07311), algorithms 1 and 2.

    Example:
        >>> line = torch.zeros(1, 1, 9, 9)
        >>> line[..., 4, :] = 1
        >>> round(cldice(200 * line - 100, line).item(), 4)
        0.0
    """
    predicted, truth, _ = _dense(logits, targets, valid)
    if logits.ndim not in (4, 5):
        raise ValueError(f"cldice needs 2 or 3 spatial axes, got logits {tuple(logits.shape)}")
    true = truth.to(predicted.dtype)
    lines = [_skeleton(image, iterations) for image in (predicted, true)]
    sums = [voxel_sums(x) for x in (lines[0] * true, lines[0], lines[1] * predicted, lines[1])]
    if over_batch:
        sums = [one.sum(0) for one in sums]
    precision, recall = (sums[0] + smooth) / (sums[1] + smooth), (sums[2] + smooth) / (sums[3] + smooth)
    return (1 - (2 * precision * recall / (precision + recall)).mean()).to(predicted.dtype)


def _dense(logits: Tensor, targets: Tensor, valid: Tensor | None) -> Shares:
    if logits.ndim < 3:
        raise ValueError(f"this loss needs spatial axes, got logits {tuple(logits.shape)}")
    return shares(logits, targets, valid, background=False)


def _continued(truth: Tensor, known: Tensor) -> Tensor:
    """The truth (B, C, *spatial), where it is unknown that of the nearest known voxel; outside if all is unknown."""
    if bool(known.all()):
        return truth
    found, where = truth.cpu().numpy().copy(), known.cpu().numpy()
    for place in np.ndindex(found.shape[:2]):
        if where[place].any() and not where[place].all():
            at = ndimage.distance_transform_edt(~where[place], return_distances=False, return_indices=True)
            found[place] = found[place][tuple(at)]
    return torch.from_numpy(found).to(truth.device)


def _distances(inside: Tensor, spacing: Sequence[float] | None, signed: bool = False) -> Tensor:
    """Distance of each voxel to the nearest of the other side: bool (B, C, *spatial) -> float32.

    Negative inside if `signed`; 0 wherever there is no other side.
    """
    masks = inside.cpu().numpy()
    found = np.zeros(masks.shape, np.float32)
    for place in np.ndindex(masks.shape[:2]):
        mask = masks[place]
        if mask.any() and not mask.all():
            within, beyond = (ndimage.distance_transform_edt(side, spacing) for side in (mask, ~mask))
            found[place] = beyond - within if signed else beyond + within
    return torch.from_numpy(found).to(inside.device)


def _skeleton(image: Tensor, iterations: int) -> Tensor:
    """The soft skeleton: what an opening removes, of the image and of each erosion of it."""
    eroded = _eroded(image)
    skeleton = F.relu(image - _dilated(eroded))
    for _ in range(iterations):
        image, eroded = eroded, _eroded(eroded)
        ridge = F.relu(image - _dilated(eroded))
        skeleton = skeleton + F.relu(ridge - skeleton * ridge)
    return skeleton


def _eroded(image: Tensor) -> Tensor:
    """The least of each voxel and its neighbours across faces."""
    dims = image.ndim - 2
    along = [[3 if other == axis else 1 for other in range(dims)] for axis in range(dims)]
    least, *others = [-_largest(-image, size) for size in along]
    for other in others:
        least = torch.minimum(least, other)
    return least


def _dilated(image: Tensor) -> Tensor:
    """The largest of each voxel and all its neighbours."""
    return _largest(image, [3] * (image.ndim - 2))


def _largest(image: Tensor, size: list[int]) -> Tensor:
    pool = F.max_pool2d if image.ndim == 4 else max_pool_3d
    return pool(image, size, [1] * len(size), [side // 2 for side in size])
