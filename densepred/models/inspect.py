"""What a network really looks at, and whether its way up leaves a pattern: numbers and maps to draw.

`densepred.model_figures` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from densepred.models.dense import Model
from densepred.models.summary import evaluating, inputs, main_output, summarize, trace

SHARE = 0.95
Span = tuple[int, int]


@dataclass(frozen=True)
class EffectiveField:
    """How much the middle voxel of the output depends on each voxel of the image.

    Attributes:
        gradient: (*size), the mean magnitude of the gradient, summed over the channels of the image; the largest is 1.
        effective: the shortest stretch along each axis that holds `SHARE` of the gradient: its first voxel and one past
            its last.
        theoretical: likewise the voxels that it can depend on; None where that may be the whole axis. They may lie
            beyond the image's ends.
    """

    gradient: np.ndarray
    effective: tuple[Span, ...]
    theoretical: tuple[Span | None, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Of the image."""
        return tuple(self.gradient.shape)

    @property
    def extent(self) -> tuple[int, ...]:
        """Voxels of the effective field, along each axis."""
        return tuple(last - first for first, last in self.effective)

    @property
    def possible(self) -> tuple[Span, ...]:
        """The theoretical field, as much of it as is within the image."""
        spans = zip(self.theoretical, self.size, strict=True)
        return tuple((0, n) if span is None else (max(span[0], 0), min(span[1], n)) for span, n in spans)

    @property
    def fraction(self) -> float:
        """Volume of the effective field relative to that of the theoretical one within the image."""
        return math.prod(self.extent) / math.prod(last - first for first, last in self.possible)


def effective_receptive_field(
    model: Model, size: Sequence[int], samples: int = 8, seed: int = 0, device: torch.device | str | None = None
) -> EffectiveField:
    """Measure what the middle voxel of the first output depends on, by gradients (Luo et al. 2016, arXiv:1701.04128).

    The gradient of the voxel's channels, added up with random signs so that none cancel for good, is taken with respect
    to images of normally distributed noise, and its magnitude averaged over them. Most of it usually lies well within
    the theoretical field, and training widens it. The statistics of norms are held fixed, as the theoretical field
    leaves them out. A global output is taken as it is.

    Args:
        model: the network, as it is in evaluation; it is not changed.
        size: spatial size of the images, slowest axis first.
        samples: images to average over.
        seed: of the images.
        device: where to compute; by default where the model is.

    Raises:
        ValueError: `size` is not `model.dims` positive numbers, or one that the model does not take; no samples; no
            gradient reaches the image.

    Example:
        >>> from densepred.models.build import create_model
        >>> model = create_model(dims=2, channels=(4, 8), seed=0)
        >>> field = effective_receptive_field(model, (32, 32))
        >>> field.theoretical, all(n <= 15 for n in field.extent)
        (((9, 24), (9, 24)), True)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")
    tracer, output = trace(model, size)
    theoretical = tracer.region(output, [n // 2 for n in output.shape[2:]] or [0] * model.dims)
    generator = torch.Generator("cpu").manual_seed(seed)
    where = _place(model) if device is None else torch.device(device)
    total = torch.zeros(tuple(size), dtype=torch.float64)
    with evaluating(model), _norms_as(model, _with_fixed_statistics), torch.enable_grad():
        for _ in range(samples):
            image = torch.randn((1, model.in_channels, *size), generator=generator).to(where).requires_grad_()
            middle = _middle(main_output(model(*inputs(model, image))))
            signs = torch.randint(0, 2, middle.shape, generator=generator) * 2 - 1
            (gradient,) = torch.autograd.grad(middle, image, signs.to(middle))
            total += gradient[0].abs().double().sum(0).cpu()
    if not total.isfinite().all() or not total.any():
        raise ValueError("no finite gradient reaches the image from the middle of the output")
    gradient_map = (total / total.max()).numpy()
    profiles = [gradient_map.sum(tuple({*range(model.dims)} - {axis})) for axis in range(model.dims)]
    return EffectiveField(gradient_map, tuple(map(_shortest, profiles)), theoretical)


def _place(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _middle(output: Tensor) -> Tensor:
    """(1, K, *spatial) -> (K) at the middle voxel."""
    for n in output.shape[2:]:
        output = output.select(2, n // 2)
    return output[0]


def _shortest(profile: np.ndarray) -> Span:
    """The shortest stretch that holds `SHARE` of a profile; of equally short ones the fullest."""
    total = np.concatenate([[0.0], np.cumsum(profile)])
    for length in range(1, len(profile)):
        held = total[length:] - total[:-length]
        if held.max() >= SHARE * total[-1]:
            return int(held.argmax()), int(held.argmax()) + length
    return 0, len(profile)


@dataclass(frozen=True)
class Checkerboard:
    """How evenly the way up covers the output.

    Attributes:
        unevenness: the standard deviation over the phases (places within a period) of the response to a constant image,
            relative to its mean; 0 where all voxels are treated alike.
        period: voxels along each axis after which the pattern repeats: the network's largest stride.
        response: (*spatial), that of the channel with the strongest pattern, relative to the mean of all channels.
        pattern: (*period), the mean of that at each phase, less what is common to all.
        measured: the voxels that were looked at along each axis, first and one past the last.
    """

    unevenness: float
    period: tuple[int, ...]
    response: np.ndarray
    pattern: np.ndarray
    measured: tuple[Span, ...]


def checkerboard(
    model: Model, size: Sequence[int], value: float = 1.0, device: torch.device | str | None = None
) -> Checkerboard:
    """Measure the pattern that strided upsampling leaves on a constant image.

    See Odena et al. 2016, "Deconvolution and checkerboard artifacts" (doi:10.23915/distill.00003).

    Norms over the whole map are left out, as they would leave of a constant one nothing but its border. What the border
    causes in the middle is smooth, and taken off by subtracting the mean over a period around each voxel; where the
    image is large enough, only voxels that the border does not reach are looked at.

    Args:
        model: the network, as it is in evaluation; it is not changed.
        size: spatial size of the image, slowest axis first.
        value: of the image.
        device: where to compute; by default where the model is.

    Raises:
        ValueError: `size` is not `model.dims` positive numbers, or one that the model does not take; the output is no
            map, or less than three periods wide; the response is zero.

    Example:
        >>> from densepred.models.build import create_model
        >>> for smooth in (False, True):
        ...     model = create_model(dims=2, channels=(4, 8), norm="none", seed=1, smooth_start=smooth)
        ...     print(checkerboard(model, (48, 48)).unevenness > 1e-3)
        True
        False
    """
    summary = summarize(model, size)
    strides = [[row.stride[axis] or 1 for row in summary.rows] for axis in range(model.dims)]
    period = tuple(map(max, strides))
    where = _place(model) if device is None else torch.device(device)
    with evaluating(model), _norms_as(model, _without_statistics), torch.no_grad():
        image = torch.full((1, model.in_channels, *size), value, device=where)
        output = main_output(model(*inputs(model, image)))[0].double().cpu().numpy()
    if output.ndim != model.dims + 1 or any(n < 3 * p for n, p in zip(output.shape[1:], period, strict=True)):
        raise ValueError(
            f"size must give a map of at least 3 x {period} voxels, got {output.shape[1:]} for {tuple(size)}"
        )
    spans = tuple(_span(*each) for each in zip(output.shape[1:], period, summary.receptive_field, strict=True))
    middle = output[(slice(None), *(slice(*span) for span in spans))]
    level = float(np.sqrt((middle.mean(tuple(range(1, middle.ndim))) ** 2).mean()))
    if not level > 0:
        raise ValueError(f"the response to a constant image of {value} is {level}: nothing to compare with")
    patterns = _patterns(output, period, spans)
    deviation = patterns.std(tuple(range(1, patterns.ndim)))
    worst = int(deviation.argmax())
    unevenness = float(np.sqrt((deviation**2).mean())) / level
    return Checkerboard(unevenness, period, output[worst] / level, patterns[worst] / level, spans)


def _span(n: int, period: int, field: int | None) -> Span:
    """Whole periods in the middle of n voxels: those that the border does not reach, or all but half a period."""
    for margin in ((field or n) // 2 + period, period // 2):
        first, last = -(-margin // period) * period, (n - margin) // period * period
        if last > first:
            return first, last
    raise AssertionError(f"{n} voxels hold no period of {period}")


def _patterns(output: np.ndarray, period: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
    """(K, *spatial) -> (K, *period): the mean at each phase of what is left when the mean of a period is taken off."""
    smooth = output
    for axis, p in enumerate(period, start=1):
        window = np.ones(p) if p % 2 else np.concatenate([[0.5], np.ones(p - 1), [0.5]])
        smooth = np.apply_along_axis(np.convolve, axis, smooth, window / p, mode="same")
    left = (output - smooth)[(slice(None), *(slice(*span) for span in spans))]
    for axis, p in enumerate(period, start=1):
        parts = (*left.shape[:axis], left.shape[axis] // p, p, *left.shape[axis + 1 :])
        left = left.reshape(parts).mean(axis)
    return left


_MAP_NORMS = (_InstanceNorm, nn.GroupNorm)


@contextmanager
def _norms_as(model: nn.Module, rule: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Norms with statistics of the map at hand follow a rule instead, times their weight, plus their bias."""

    def changed(layer: nn.Module, given: tuple[Any, ...], _: Tensor) -> Tensor:
        x: Tensor = rule(layer, given[0])
        shape = (-1, *(1 for _ in x.shape[2:]))
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        x = x if weight is None else x * weight.view(shape)
        return x if bias is None else x + bias.view(shape)

    norms = [layer for layer in model.modules() if isinstance(layer, _MAP_NORMS)]
    hooks = [n.register_forward_hook(changed) for n in norms if not getattr(n, "track_running_stats", False)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_statistics(layer: nn.Module, x: Tensor) -> Tensor:
    return x


def _with_fixed_statistics(layer: nn.Module, x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], getattr(layer, "num_groups", x.shape[1]), -1)
    mean, variance = groups.detach().mean(2, keepdim=True), groups.detach().var(2, correction=0, keepdim=True)
    return ((groups - mean) / (variance + layer.eps).sqrt()).reshape(x.shape)  # type: ignore[operator]
