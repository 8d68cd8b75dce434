"""Changes of intensities, on rows: channels of samples, each with its own strength and its own random numbers.

Every function takes `Rows` and gives new values (n, *spatial); what it does to a row does not depend on the others.
Images have no NaN here: what is invalid was filled when the case was prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from densepred.augment.axes import along_axes
from densepred.augment.draws import Change, Numbers, changes
from densepred.augment.pieces import at_once
from densepred.config import transforms as t

_TINY = 1e-7


@dataclass(frozen=True)
class Rows:
    """Channels that one transform changes."""

    values: Tensor
    """(n, *spatial)."""
    strengths: Tensor
    """(n, k), on the same device."""
    on_cpu: list[tuple[float, ...]]
    """The same as plain numbers."""
    seeds: list[int]
    planes: bool
    """Whether axis 0 is left alone (`dummy_2d`)."""

    def strength(self, place: int = 0) -> Tensor:
        """One of the k strengths, (n, 1, ...)."""
        return self.strengths[:, place].view(self.one)

    @property
    def one(self) -> list[int]:
        """The shape of one number a row."""
        return [-1] + [1] * (self.values.ndim - 1)

    def randn(self) -> Tensor:
        """Standard normal numbers, (n, *spatial), each row from its own seed, on the device."""
        drawn = [
            torch.randn(self.values.shape[1:], generator=_generator(s, self.values.device), device=self.values.device)
            for s in self.seeds
        ]
        return torch.stack(drawn) if len(drawn) > 1 else drawn[0].unsqueeze(0)

    def limits(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each row, (n, 1, ...)."""
        low, high = self.values.flatten(1).aminmax(dim=1)
        return low.view(self.one), high.view(self.one)

    def mean(self) -> Tensor:
        """(n, 1, ...)."""
        return self.values.flatten(1).mean(1).view(self.one)


def _generator(seed: int, device: torch.device) -> Generator:
    return Generator(device=device).manual_seed(seed)


def noise(rows: Rows, settings: t.Noise) -> Tensor:
    """Add Gaussian noise."""
    strength = rows.strength()
    return torch.addcmul(rows.values, rows.randn(), strength.sqrt() if settings.of == "variance" else strength)


def poisson_noise(rows: Rows, settings: t.PoissonNoise) -> Tensor:
    """Counts between the darkest (none) and the brightest voxel."""
    low, high = rows.limits()
    span = (high - low).clamp(min=_TINY) / rows.strength().exp()
    rates = (rows.values - low) / span
    counts = [torch.poisson(r, generator=_generator(s, r.device)) for r, s in zip(rates, rows.seeds, strict=True)]
    return torch.stack(counts) * span + low


def rician_noise(rows: Rows, settings: t.RicianNoise) -> Tensor:
    """The magnitude of signal and noise (Gudbjartsson and Patz 1995, doi:10.1002/mrm.1910340618)."""
    low, _ = rows.limits()
    real = torch.addcmul(rows.values - low, rows.randn(), rows.strength())
    imaginary = Rows(rows.values, rows.strengths, rows.on_cpu, [s ^ 1 for s in rows.seeds], rows.planes).randn()
    return torch.hypot(real, imaginary * rows.strength()) + low


def blur(rows: Rows, settings: t.Blur) -> Tensor:
    """Gaussian blur, the kernel cut at 4 standard deviations, edge voxels repeated beyond the edges."""
    return _each_axis(rows, lambda size, strengths, axis: blur_matrix(size, strengths[axis]))


def low_resolution(rows: Rows, settings: t.LowResolution) -> Tensor:
    """Nearest voxels of a coarser grid, then linear back."""
    first = 1 if rows.planes else 0
    return _each_axis(rows, lambda size, strengths, axis: coarse_matrix(size, strengths[0]) if axis >= first else None)


def _each_axis(rows: Rows, matrix: Callable[[int, tuple[float, ...], int], Tensor | None]) -> Tensor:
    """Multiply along every axis with a matrix for each row, made on the CPU."""
    matrices: list[Tensor | None] = []
    for axis, size in enumerate(rows.values.shape[1:]):
        made = [matrix(size, strengths, axis) for strengths in rows.on_cpu]
        known = [m for m in made if m is not None]
        matrices.append(torch.stack(known).to(rows.values.device, non_blocking=True) if known else None)
    return along_axes(rows.values, matrices)


def blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size): a Gaussian kernel along one axis."""
    if sigma < 1e-3:
        return torch.eye(size)
    radius = int(4 * sigma + 0.5)
    taps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    places = (torch.arange(size).unsqueeze(1) + taps).clamp(0, size - 1)
    return torch.zeros(size, size).scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))


def coarse_matrix(size: int, share: float) -> Tensor:
    """(size, size): the nearest of `size * share` voxels, and linear interpolation back; centres of voxels are kept."""
    count = max(1, round(size * share))
    source = ((torch.arange(count) + 0.5) * size / count).floor().long()
    at = ((torch.arange(size) + 0.5) * count / size - 0.5).clamp(0, count - 1)
    low = at.floor().long().clamp(max=max(count - 2, 0))
    high = (low + 1).clamp(max=count - 1)
    part = (at - low).unsqueeze(1)
    out = torch.zeros(size, size)
    out.scatter_add_(1, source[low].unsqueeze(1), 1 - part)
    return out.scatter_add_(1, source[high].unsqueeze(1), part)


def brightness(rows: Rows, settings: t.Brightness) -> Tensor:
    """Multiply."""
    return rows.values * rows.strength()


def brightness_shift(rows: Rows, settings: t.BrightnessShift) -> Tensor:
    """Add."""
    return rows.values + rows.strength()


def contrast(rows: Rows, settings: t.Contrast) -> Tensor:
    """Multiply the distance from the mean, within the range of the row."""
    low, high = rows.limits()
    mean = rows.mean()
    return torch.addcmul(mean, rows.values - mean, rows.strength()).clamp_(low, high)


def gamma(rows: Rows, settings: t.Gamma) -> Tensor:
    """A power of the row scaled to 0..1; its mean and deviation are kept."""
    low, high = rows.limits()
    span = (high - low).clamp(min=_TINY)
    scaled = (rows.values - low).div_(span)
    bent = torch.stack([row.pow_(strength[0]) for row, strength in zip(scaled, rows.on_cpu, strict=True)])
    mean, deviation = _moments(rows.values)
    bent_mean, bent_deviation = _moments(bent)
    factor = deviation / bent_deviation.clamp(min=_TINY)
    return bent.sub_(bent_mean).mul_(factor).add_(mean)


def inverted_gamma(rows: Rows, settings: t.InvertedGamma) -> Tensor:
    """The same on the negative."""
    return gamma(Rows(-rows.values, rows.strengths, rows.on_cpu, rows.seeds, rows.planes), settings).neg_()


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row; in two passes, which is several times faster than torch's own."""
    one = [-1] + [1] * (rows.ndim - 1)
    flat = rows.flatten(1)
    mean = flat.mean(1, keepdim=True)
    deviation = (flat - mean).square_().mean(1).sqrt()
    return mean.view(one), deviation.view(one)


def bias_field(rows: Rows, settings: t.BiasField) -> Tensor:
    """Multiply by the exponential of a polynomial (the model of Van Leemput et al. 1999, doi:10.1109/42.811268)."""
    shape, order = rows.values.shape[1:], settings.order
    dims = len(shape)
    degrees = torch.stack(torch.meshgrid(*[torch.arange(order + 1)] * dims, indexing="ij")).sum(0)
    allowed = (degrees > 0) & (degrees <= order)
    drawn = [torch.rand(degrees.shape, generator=Generator().manual_seed(s)) * 2 - 1 for s in rows.seeds]
    device = rows.values.device
    terms = (torch.stack(drawn) * allowed).to(device, non_blocking=True) * rows.strength()
    powers = [
        torch.linspace(-1, 1, size, device=device).unsqueeze(1) ** torch.arange(order + 1, device=device)
        for size in shape
    ]
    low, _ = rows.limits()
    return (rows.values - low).mul_(along_axes(terms, powers).exp_()).add_(low)


CHANGES: dict[type[t.Channelwise], Callable[[Rows, Any], Tensor]] = {
    t.Noise: noise,
    t.PoissonNoise: poisson_noise,
    t.RicianNoise: rician_noise,
    t.Blur: blur,
    t.Brightness: brightness,
    t.BrightnessShift: brightness_shift,
    t.Contrast: contrast,
    t.Gamma: gamma,
    t.InvertedGamma: inverted_gamma,
    t.LowResolution: low_resolution,
    t.BiasField: bias_field,
}
_AROUND_ONE = (t.Brightness, t.Contrast, t.Gamma)


def draw_changes(settings: t.Channelwise, numbers: Numbers, channels: Sequence[int]) -> list[Change]:
    """What happens to the channels of one sample."""
    if isinstance(settings, t.PoissonNoise):  # evenly in the logarithm
        low, high = settings.range
        logs = settings.model_copy(update={"range": (math.log(low), math.log(high))})
        return changes(logs, numbers, channels)
    if isinstance(settings, t.BiasField) and not settings.per_channel:  # one field for all channels
        drawn = changes(settings, numbers, channels)
        return [change._replace(seed=drawn[0].seed) for change in drawn]
    count = 3 if isinstance(settings, t.Blur) else 1
    return changes(settings, numbers, channels, count, around_one=isinstance(settings, _AROUND_ONE))


def apply_changes(image: Tensor, settings: t.Channelwise, drawn: Sequence[Sequence[Change]], planes: bool) -> None:
    """Change the channels of a batch in place.

    On a CPU one after the other, each while it is in the cache; on a GPU all at once.

    Args:
        image: (B, C, *spatial), contiguous.
        settings: of the transform.
        drawn: for each sample what happens to its channels.
        planes: whether low resolution leaves axis 0 alone.
    """
    rows = image.view(-1, *image.shape[2:])
    all_of_it = [(index * image.shape[1] + c.channel, c) for index, sample in enumerate(drawn) for c in sample]
    if not all_of_it:
        return
    change = CHANGES[type(settings)]
    groups = [all_of_it] if at_once(image.device) else [[one] for one in all_of_it]
    for group in groups:
        places = [place for place, _ in group]
        alone = len(places) == 1
        where = torch.tensor(places).to(image.device, non_blocking=True)
        values = [c.values for _, c in group]
        chosen = rows[places[0] : places[0] + 1] if alone else rows.index_select(0, where)
        strengths = torch.tensor(values).to(image.device, image.dtype, non_blocking=True)
        out = change(Rows(chosen, strengths, values, [c.seed for _, c in group], planes), settings)
        if alone:
            chosen.copy_(out)
        else:
            rows.index_copy_(0, where, out)
