"""The settings of a whole recipe by each of the two rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from densepred.config import DataConfig
from densepred.planning import nnunet, own
from densepred.planning.fingerprint import Fingerprint
from densepred.planning.nnunet import Configuration, Sizes
from densepred.planning.own import Limits
from densepred.planning.recipe import (
    Setting,
    of_data,
    of_model,
    of_normalize,
    of_patch,
    one_sided,
    sizes_of,
)

NNUNET_LENGTH = (1000, 250)
"""Epochs, and steps of each."""
_SAME = 1e-6


def nnunet_configurations(fingerprint: Fingerprint, memory: float) -> dict[str, Configuration]:
    """What nnU-Net plans; images of two axes are to it volumes of one plane."""
    sizes = sizes_of(fingerprint)
    if fingerprint.dims == 3:
        return nnunet.configurations(sizes, memory)
    planes = Sizes(
        tuple((1, *shape) for shape in sizes.shapes),
        tuple((999.0, *spacing) for spacing in sizes.spacings),
        sizes.channels,
        sizes.labels,
    )
    flat = nnunet.configurations(planes, memory)["2d"]
    return {"2d": replace(flat, spacing=flat.spacing[1:], shape=flat.shape[1:], axis=None)}


def nnunet_settings(fingerprint: Fingerprint, data: DataConfig, one: Configuration) -> list[Setting]:
    """nnU-Net's recipe."""
    axes = tuple(range(one.dims))
    alike = all(
        abs(a - b) <= _SAME * b for case in fingerprint.cases for a, b in zip(case.spacing, one.spacing, strict=True)
    )
    covers, masked = f"{one.covers:.0%} of a typical image", fingerprint.relative_size < 0.75
    epochs, steps = NNUNET_LENGTH
    dice = "where a patch is a part of the image, Dice over the batch as one"
    settings = [
        *of_data(fingerprint, data, one, alike, "nnunet"),
        *of_normalize(fingerprint, data, "nnunet"),
        *of_model(one, "nnunet", one.net.coarser(one.net.stages - 3)),
        *of_patch(one, f"nnU-Net's estimate of memory allows it; {covers}", _batch_why(one), 0.33),
        Setting("augment.recipe", "nnunet"),
        Setting("augment.flip", axes, _flip_why(fingerprint)),
        Setting("loss.dice", 1.0),
        Setting("loss.cross_entropy", 1.0),
        Setting("loss.batch_dice", one.batch_dice, dice),
        Setting("optimizer.name", "sgd", "with Nesterov momentum"),
        Setting("optimizer.lr", 0.01),
        Setting("optimizer.momentum", 0.99),
        Setting("optimizer.weight_decay", 3e-5),
        Setting("optimizer.schedule", "polynomial", "power 0.9"),
        Setting("optimizer.clip", 12.0),
        Setting("optimizer.ema", 0.0, "nnU-Net keeps the last weights, not their average"),
        Setting("training.epochs", epochs),
        Setting("training.steps", steps),
        Setting("inference.overlap", 0.5),
        Setting("inference.mirror", axes, f"the mean of {2**one.dims} mirrored views"),
    ]
    if masked:
        why = f"cropping to where the images are not 0 leaves {fingerprint.relative_size:.0%}; nnU-Net would take mean "
        why += "and deviation from there alone"
        settings = [
            s._replace(why=f"{s.why}; {why}") if s.path in ("data.normalize", "data.images") else s for s in settings
        ]
    return settings


def _batch_why(one: Configuration) -> str:
    return "at least 2; what memory allows, but no more than 5 % of all voxels" if one.batch > 2 else "the least"


def _flip_why(fingerprint: Fingerprint) -> str:
    sided = one_sided(fingerprint.names)
    return "the classes tell left from right: take that axis out" if sided else "every axis is mirrored"


def own_settings(
    fingerprint: Fingerprint, data: DataConfig, one: Configuration, limits: Limits, length: tuple[int, int]
) -> list[Setting]:
    """densepred's recipe.

    Args:
        fingerprint: of the set.
        data: as given.
        one: the configuration.
        limits: that it keeps.
        length: epochs, and steps of each.
    """
    sizes = sizes_of(fingerprint)
    alike = own.are_alike(sizes, one.spacing)
    epochs, steps = length
    narrow = limits.base < 32
    settings = [
        *of_data(fingerprint, data, one, alike, "densepred"),
        *of_normalize(fingerprint, data, "densepred"),
        *_augment(data),
        *of_model(one, "plain", one.net.coarser(min(one.net.stages - 3, 2))),
        *of_patch(one, _patch_why(one, limits), _own_batch_why(one, limits), 0.33),
        *_flips(fingerprint, one),
        Setting("loss.batch_dice", True, "small patches may miss a class; the batch as one seldom does"),
        Setting("optimizer.name", "adamw", "less sensitive to its rate than SGD, and faster in short trainings"),
        Setting("optimizer.lr", 0.003 if narrow else 0.001, "narrow networks bear more" if narrow else ""),
        Setting("optimizer.warmup", min(100, max(epochs * steps // 20, 1)), "steps; a twentieth of all, at most 100"),
        Setting("optimizer.weight_decay", 0.01),
        Setting("optimizer.ema", _ema(epochs * steps), "averages over about a fiftieth of the training"),
        Setting("training.epochs", epochs),
        Setting("training.steps", steps),
    ]
    return settings


def _ema(steps: int) -> float:
    return round(min(0.999, max(0.9, 1 - 50 / steps)), 4)


def _augment(data: DataConfig) -> list[Setting]:
    """The recipe of augmentation: for FITS images one that interpolates nowhere."""
    if any(".fit" in pattern.lower() for pattern in data.patterns().values()):
        return [Setting("augment.recipe", "astronomy", "FITS: nothing is interpolated, which would blur stars")]
    return [Setting("augment.recipe", "light", "rotation, scaling, noise and intensities, mildly")]


def _flips(fingerprint: Fingerprint, one: Configuration) -> list[Setting]:
    """Mirrored axes: all, but not the last one (left and right in most orientations) where classes tell sides."""
    axes = tuple(range(one.dims))
    if one_sided(fingerprint.names):
        return [Setting("augment.flip", axes[:-1], "not the last axis: the classes tell left from right")]
    return [Setting("augment.flip", axes, "take out axes along which an object and its mirror image differ")]


def _patch_why(one: Configuration, limits: Limits) -> str:
    most = limits.voxels[one.dims]
    whole = all(a >= b for a, b in zip(one.net.patch, _shape(one), strict=True))
    if whole:
        return "a typical image as a whole, rounded up to what the strides divide"
    bound = "what the memory allows"
    if one.net.voxels * 1.5 > most:
        bound = "more would take long on a processor" if most == own.ON_CPU[one.dims] else "what the time allows"
    return f"{min(one.covers, 1):.0%} of the voxels of a typical image: {bound}"


def _shape(one: Configuration) -> Sequence[float]:
    return [n for axis, n in enumerate(one.shape) if one.dims == len(one.shape) or axis != one.axis]


def _own_batch_why(one: Configuration, limits: Limits) -> str:
    if one.batch == limits.batch[one.dims]:
        return "more is no faster per patch here"
    return "what fits the memory, and at most 5 % of all voxels"


__all__ = ["nnunet_configurations", "nnunet_settings", "own_settings"]
