"""Boxes put into samples, and samples mixed with others of their batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from densepred.augment.draws import Numbers
from densepred.config.transforms import CutMix, Cutout, MixUp
from densepred.losses import IGNORE


def cutout(image: Tensor, label: Tensor, settings: Cutout, numbers: Numbers, channels: Sequence[int]) -> None:
    """Put the mean of each channel into boxes of one sample, in place (DeVries and Taylor 2017, arXiv:1708.04552).

    Args:
        image: (C, *spatial).
        label: (*spatial) integers, or (T, *spatial) float; of an image as a whole it is left alone.
        settings: how often and how large.
        numbers: of this sample.
        channels: those to change.
    """
    fires, seed = numbers.fires(settings.probability), numbers.seed()
    if not fires:
        return
    means = image.flatten(1).mean(1)
    inner = Numbers(np.random.default_rng(seed).random(settings.boxes * 2 * (image.ndim - 1)).tolist())
    for _ in range(settings.boxes):
        box = draw_box(image.shape[1:], settings.range, inner)
        for channel in channels:
            image[channel][box] = means[channel]
        if settings.ignore and label.ndim:
            _inside(label, box).fill_(float("nan") if label.is_floating_point() else IGNORE)


def _inside(values: Tensor, box: tuple[slice, ...]) -> Tensor:
    """The part of (..., *spatial) in a box; all of what is no image."""
    for axis, part in enumerate(reversed(box), 1):
        values = values.narrow(-axis, part.start, part.stop - part.start) if values.ndim >= axis else values
    return values


def draw_box(shape: Sequence[int], limits: tuple[float, float], numbers: Numbers) -> tuple[slice, ...]:
    """A box that lies wholly within the patch, its sides drawn as shares of the patch's."""
    box = []
    for size in shape:
        side = max(1, round(numbers.between(limits) * size))
        start = int(numbers.uniform() * (size - side + 1))
        box.append(slice(start, start + side))
    return tuple(box)


def cutmix(image: Tensor, label: Tensor, settings: CutMix, numbers: Sequence[Numbers]) -> tuple[Tensor, Tensor]:
    """Put boxes of other samples into image and label (Yun et al. 2019, arXiv:1905.04899).

    Args:
        image: (B, C, *spatial); all channels go along.
        label: (B, *spatial) integers, or (B, T, *spatial) float; classes (B,) of whole images stay.
        settings: how often and how large.
        numbers: of each sample.
    """
    out, out_label = image.clone(), label.clone()
    for index, (partner, own) in enumerate(_partners(settings.probability, numbers)):
        box = draw_box(image.shape[2:], settings.range, own)
        if partner is not None:
            _inside(out[index], box).copy_(_inside(image[partner], box))
            if label.ndim > 1:
                _inside(out_label[index], box).copy_(_inside(label[partner], box))
    return out, out_label


def mixup(
    image: Tensor, label: Tensor, settings: MixUp, numbers: Sequence[Numbers], channels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Blend samples with others of the batch (Zhang et al. 2018, arXiv:1710.09412).

    MixUp draws a share from Beta(a, a) and mixes images and labels alike. For a loss that is linear in the label, such
    as cross-entropy, its mean over all pairs is that of keeping the own label and drawing the own share from
    Beta(1 + a, a): exchanging the two samples of a pair turns the one into the other. So class maps stay whole numbers,
    and voxels without a truth stay so. Float labels are mixed by the same share.

    Args:
        image: (B, C, *spatial).
        label: (B, ...) integers, which stay, or float.
        settings: how often, and `alpha`.
        numbers: of each sample.
        channels: those to blend; others stay.
    """
    out, out_label = image.clone(), label.clone()
    for index, (partner, own) in enumerate(_partners(settings.probability, numbers)):
        share = float(np.random.default_rng(own.seed()).beta(1 + settings.alpha, settings.alpha))
        if partner is not None:
            for channel in channels:
                out[index, channel].lerp_(image[partner, channel], 1 - share)
            if label.is_floating_point():
                out_label[index].lerp_(label[partner], 1 - share)
    return out, out_label


def _partners(probability: float, numbers: Sequence[Numbers]) -> list[tuple[int | None, Numbers]]:
    """For each sample another of the batch by its own numbers, or None."""
    count, found = len(numbers), []
    for index, own in enumerate(numbers):
        fires, step = own.fires(probability), 1 + int(own.uniform() * (count - 1))
        found.append(((index + step) % count if fires and count > 1 else None, own))
    return found
