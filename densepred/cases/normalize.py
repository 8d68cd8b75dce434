"""Normalisation of a case: its parameters are found once, from the finite voxels of the whole image.

The methods and their settings are in `densepred.config.normalize`, the formulas in `stretches.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from densepred.cases.background import BoxEstimate
from densepred.cases.estimates import CONSTANT, Estimate, Level, Limits, Moments, Quartiles, ZScaleLimits
from densepred.cases.fitted import Fill, Fitted
from densepred.cases.quantiles import Quantiles, finite, slab_thickness
from densepred.cases.stretches import Arsinh, Counts, Flattened, Linear, Stretch
from densepred.config.normalize import (
    Anscombe,
    Asinh,
    Background,
    CTWindow,
    Normalize,
    PerCase,
    Percentile,
    ZScale,
    ZScore,
)
from densepred.errors import InputError
from densepred.volumes import Volume

__all__ = ["Fill", "Fitted", "fit", "fit_dataset"]

_LARGEST = 1e140  # its square is still a float64, and so is the sum of many
_WINDOW = (0.005, 0.995)


class _Extent:
    """Of one channel: how many voxels are finite, and their range."""

    def __init__(self) -> None:
        self.valid, self.low, self.high = 0, np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        if values.size:
            self.valid += values.size
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


@dataclass
class _Group:
    """Channels that share parameters, and what finds them."""

    channels: tuple[int, ...]
    estimate: Estimate


def fit(volume: Volume, chosen: Sequence[Normalize], median: bool = False, thickness: int | None = None) -> Fitted:
    """Find the parameters of a normalisation, from the finite voxels of the whole image.

    The image is read slab by slab and verified: once for zscore, background, ct_window, anscombe and none; twice for
    zscale; for robust, asinh and percentile (and `median`) once where it is of integers of up to 16 bits, four times
    where it is of 64 bits, else twice. All channels share the passes.

    Args:
        volume: `(C, *spatial)`.
        chosen: the method of each channel. Those that are equal and `joint` share parameters.
        median: also find the medians, for `Fitted.fill`.
        thickness: planes of a slab; by default a few megabytes.

    Raises:
        InputError: a channel without finite voxels, with values that are too large, or without a scale though it is
            not constant (when most of its voxels are equal, say); or a damaged file.
        ValueError: not one method for each channel, or a ct_window that `fit_dataset` has not completed.

    Example:
        >>> from densepred.config.normalize import Robust
        >>> volume = Volume.from_array(np.array([[1.0, 2.0], [np.nan, 3.0]]), (1.0, 1.0))
        >>> fit(volume, [Robust()]).describe()[0]["offset"]
        2.0
    """
    if len(chosen) != volume.shape[0]:
        raise ValueError(f"chosen must have one method for each of {volume.shape[0]} channels, got {len(chosen)}")
    groups = [_Group(same, _estimate(chosen[same[0]], len(same), volume)) for same in _alike(chosen, True)]
    middles = [_Group((channel,), Quartiles(volume.dtype)) for channel in range(len(chosen) if median else 0)]
    extents = _gather(volume, [*groups, *middles], chosen, thickness or slab_thickness(volume.shape))
    levels: dict[int, Level] = {}
    for group in groups:
        levels |= dict.fromkeys(group.channels, _level(group, extents, chosen[group.channels[0]], volume))
    for same in (each for each in _alike(chosen, "scale") if len(each) > 1):
        scale = _common([levels[c].scale for c in same], [extents[c].valid for c in same])
        levels |= {c: Level(levels[c].offset, scale) for c in same}
    stretches = [_stretch(method, levels.get(channel), volume.shape) for channel, method in enumerate(chosen)]
    for channel, stretch in enumerate(stretches):
        _check_ends(stretch, extents[channel], f"channel {channel} under {chosen[channel].name}", volume)
    medians = [float(group.estimate.level().offset) for group in middles]
    return Fitted(volume.shape, chosen, stretches, [each.valid for each in extents], medians if median else None)


def fit_dataset(chosen: CTWindow, foreground: Callable[[], Iterable[np.ndarray]]) -> CTWindow:
    """Fill in what a ct_window leaves out: percentiles 0.5 and 99.5, mean and standard deviation of the foreground.

    All finite foreground voxels of the training set count alike; the percentiles are exact, of float32 values.

    Args:
        chosen: numbers that are given are kept.
        foreground: called once or twice; each time the values `(n,)` of the foreground, case by case.

    Raises:
        InputError: no foreground, or one without extent.

    Example:
        >>> fit_dataset(CTWindow(low=-100), lambda: [np.array([-200, 0, 50])]).mean
        -50.0

    Source: Isensee et al. 2021, Nature Methods 18, 203 (nnU-Net), "Intensity normalization".
    """
    if chosen.complete:
        return chosen
    moments, counting = Moments(), Quantiles(np.dtype(np.float32), _WINDOW)
    given = None not in (chosen.low, chosen.high)
    while not counting.values:
        for values in map(finite, foreground()):
            if not counting.passes:
                moments.add((), [values])
            counting.add(values.astype(np.float32))
        if not counting.count:
            raise InputError("no foreground voxel in the training cases", "choose another normalize than ct_window")
        if given or counting.finish():
            break
    low, high = counting.values or (0.0, 0.0)
    low, high = (found if own is None else own for own, found in ((chosen.low, low), (chosen.high, high)))
    mean = float(moments.mean) if chosen.mean is None else chosen.mean
    std = float(moments.std) if chosen.std is None else chosen.std
    if low >= high or std <= 0:
        what = f"the foreground of the training cases spans {low:g} to {high:g} with deviation {std:g}"
        raise InputError(f"ct_window: {what}", "give data.normalize low, high, mean and std, or choose another method")
    return CTWindow(low=low, high=high, mean=mean, std=std)


def _alike(chosen: Sequence[Normalize], joint: bool | str) -> list[tuple[int, ...]]:
    """The channels with parameters of their own, those together that are equal and have this `joint`."""
    groups: dict[object, list[int]] = {}
    for channel, method in enumerate(chosen):
        if isinstance(method, PerCase):
            groups.setdefault(method if method.joint == joint else channel, []).append(channel)
    return [tuple(group) for group in groups.values()]


def _estimate(method: Normalize, channels: int, volume: Volume) -> Estimate:
    """What finds the parameters of channels together."""
    match method:
        case Percentile():
            return Limits(volume.dtype, method.low / 100, method.high / 100)
        case ZScale():
            return ZScaleLimits(channels, method.samples, method.contrast)
        case Background():
            return BoxEstimate(volume.shape[1:], method.mesh, method.clip)
        case ZScore():
            return Moments()
    return Quartiles(volume.dtype)


def _gather(volume: Volume, groups: Sequence[_Group], chosen: Sequence[Normalize], thickness: int) -> list[_Extent]:
    """Read the volume until every estimate is finished."""
    extents = [_Extent() for _ in chosen]
    pending, first = list(groups), True
    while pending or first:
        for _, _, slab in volume.slabs(thickness):
            valid = [finite(planes) for planes in slab]
            if first:
                for extent, values in zip(extents, valid, strict=True):
                    extent.add(values)
            for group in pending:
                group.estimate.add([slab[c] for c in group.channels], [valid[c] for c in group.channels])
        for channel, extent in enumerate(extents):
            if not extent.valid:
                what = f"no voxel of channel {channel} is finite"
                raise InputError(what, "leave the image out", volume.path)
            if max(-extent.low, extent.high) > _LARGEST:
                what = f"values of channel {channel} are too large (over {_LARGEST:g})"
                raise InputError(what, "rescale it", volume.path)
        pending, first = [group for group in pending if not group.estimate.finish()], False
    return extents


def _level(group: _Group, extents: Sequence[_Extent], method: Normalize, volume: Volume) -> Level:
    """The parameters of a group; scale 0 where its voxels are all equal.

    Raises:
        InputError: no scale, though the voxels differ.
    """
    low, high = min(extents[c].low for c in group.channels), max(extents[c].high for c in group.channels)
    if low == high:
        return Level(low, 0.0)
    level = group.estimate.level()
    if isinstance(method, ZScore) or np.all(level.scale > np.maximum(CONSTANT * np.abs(level.offset), 1e-300)):
        return level
    where = ", ".join(map(str, group.channels))
    what = f"{method.name} finds no scale in channel {where}: values span {low:g} to {high:g}, but most are equal"
    raise InputError(what, "set data.normalize to zscore, or to percentile with wider limits", volume.path)


def _common(scales: Sequence[float | np.ndarray], weights: Sequence[int]) -> float | np.ndarray:
    """The root mean square of scales: of standard deviations, that of all channels about their own means."""
    mean = sum(weight * np.square(scale) for scale, weight in zip(scales, weights, strict=True)) / sum(weights)
    return np.sqrt(mean)


def _stretch(method: Normalize, level: Level | None, shape: tuple[int, ...]) -> Stretch:
    """The formula with its numbers."""
    if level is None:
        return _fixed(method)
    offset, scale = level.offset, level.scale
    if isinstance(scale, np.ndarray):
        return Flattened(np.broadcast_to(offset, scale.shape), scale, (shape[-2], shape[-1]))
    if isinstance(method, Asinh):
        return Arsinh(float(offset), float(scale), method.softening)
    return Linear(float(offset), float(scale), unit=isinstance(method, Percentile) and method.clip)


def _fixed(method: Normalize) -> Stretch:
    if isinstance(method, Anscombe):
        return Counts(method.gain, method.offset)
    if isinstance(method, CTWindow):
        if method.low is None or method.high is None or method.mean is None or method.std is None:
            raise ValueError("ct_window lacks numbers: complete it with fit_dataset")
        return Linear(method.mean, method.std, window=(method.low, method.high))
    return Linear(0.0, 1.0)


def _check_ends(stretch: Stretch, extent: _Extent, what: str, volume: Volume) -> None:
    if not isinstance(stretch, Flattened):
        with np.errstate(over="ignore"):
            ends = stretch.forward(np.array([extent.low, extent.high]), ()).astype(np.float32)
        if not np.isfinite(ends).all():
            text = f"values of {what} are too large for float32: {extent.low:g} to {extent.high:g}"
            raise InputError(text, "rescale it, or choose another data.normalize", volume.path)
