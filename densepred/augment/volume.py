"""Augmentation of whole batches on their device, in 2D and 3D.

Every number drawn is a function of the sample's seed alone, so a sample comes out the same in any batch, on any number
of workers and after any interruption. Geometry is applied to image and labels together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.config import AugmentConfig, RandomConfig
from densepred.losses import IGNORE


@dataclass(frozen=True)
class Draw:
    """What happens to one sample; None or empty where nothing does."""

    flips: tuple[int, ...]
    angles: tuple[float, ...] | None
    zoom: float | None
    noise: float | None
    brightness: float | None
    contrast: float | None
    gamma: float | None


class Augmenter:
    """Flips, rotation, scaling, noise, brightness, contrast and gamma.

    Args:
        config: probabilities and ranges.
        classes: number of classes of the labels.
        spacing: voxel spacing (slowest axis first), so that rotations are rigid on anisotropic grids; equal if None.
        flags: channels of ones and zeros, which are moved like the others and keep their values.
    """

    def __init__(
        self,
        config: AugmentConfig,
        classes: int,
        spacing: Sequence[float] | None = None,
        flags: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.classes, self.flags = classes, list(flags)
        self.spacing = tuple(spacing) if spacing else None

    def __call__(self, image: Tensor, label: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Image (B, C, *spatial) float, label (B, *spatial) int64, one seed a sample -> both changed, same shapes."""
        generators = [Generator().manual_seed(int(seed) % 2**63) for seed in seeds]
        draws = [self.draw(generator, image.ndim - 2) for generator in generators]
        image, label = self._warp(image, label, draws)
        image = image.clone()
        label = label.clone()
        for index, (draw, generator) in enumerate(zip(draws, generators, strict=True)):
            sample = _intensity(image[index], draw, generator)
            if self.flags:
                sample[self.flags] = image[index, self.flags]
            axes = [axis + 1 for axis in draw.flips]
            image[index] = sample.flip(axes)
            label[index] = label[index].flip(draw.flips)
        return image, label

    def draw(self, generator: Generator, dims: int) -> Draw:
        """The changes of one sample. Every number is drawn whether it is used or not, so the streams stay aligned."""
        config = self.config
        flips = tuple(axis for axis in range(3) if _uniform(generator) < 0.5 and axis in config.flip and axis < dims)
        turn = _fires(config.rotation, generator)
        angles = tuple(math.radians(_between(config.rotation.range, generator)) for _ in range(3))
        return Draw(
            flips=flips,
            angles=angles if turn else None,
            zoom=_maybe(config.scaling, generator, around_one=True),
            noise=_maybe(config.noise, generator),
            brightness=_maybe(config.brightness, generator, around_one=True),
            contrast=_maybe(config.contrast, generator, around_one=True),
            gamma=_maybe(config.gamma, generator, around_one=True),
        )

    def _warp(self, image: Tensor, label: Tensor, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """Rotate and scale the samples that drew it: image linear, labels by the largest linear share, -1 outside."""
        chosen = [i for i, draw in enumerate(draws) if draw.angles is not None or draw.zoom is not None]
        if not chosen:
            return image, label
        shape = image.shape[2:]
        theta = torch.stack([self.matrix(draws[i], tuple(shape)) for i in chosen]).to(image)
        grid = F.affine_grid(theta, [len(chosen), 1, *shape], align_corners=False)
        onehot = torch.stack([label[chosen] == k for k in range(self.classes)], 1).to(image.dtype)
        both = torch.cat([image[chosen], onehot], 1).contiguous()
        warped = F.grid_sample(both, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        shares = warped[:, image.shape[1] :]
        image, label = image.clone(), label.clone()
        image[chosen] = warped[:, : image.shape[1]]
        label[chosen] = torch.where(shares.sum(1) < 0.5, IGNORE, shares.argmax(1)).to(label.dtype)
        return image, label

    def matrix(self, draw: Draw, shape: tuple[int, ...]) -> Tensor:
        """The map from output to input positions (dims, dims + 1), in `affine_grid`'s coordinates: x first, -1..1."""
        dims = len(shape)
        turn = rotation(draw.angles or (0.0, 0.0, 0.0), dims) / (draw.zoom or 1.0)
        size = torch.tensor(shape, dtype=torch.float64) * torch.tensor(
            self.spacing or (1.0,) * dims, dtype=torch.float64
        )
        normal = turn * size.unsqueeze(0) / size.unsqueeze(1)  # slowest axis first
        return torch.cat([normal.flip(0, 1), torch.zeros(dims, 1, dtype=torch.float64)], 1)


def rotation(angles: Sequence[float], dims: int) -> Tensor:
    """The rotation matrix (dims, dims) for angles in radians: in 2D the first, in 3D about the axes 0, 1, 2 in turn."""
    matrix = torch.eye(dims, dtype=torch.float64)
    planes = [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)]
    for (a, b), angle in zip(planes, angles, strict=False):
        turn = torch.eye(dims, dtype=torch.float64)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _intensity(sample: Tensor, draw: Draw, generator: Generator) -> Tensor:
    """Change the values of one sample (C, *spatial)."""
    axes = tuple(range(1, sample.ndim))
    if draw.noise is not None:
        sample = sample + draw.noise * torch.randn(sample.shape, generator=generator).to(sample)
    if draw.brightness is not None:
        sample = sample * draw.brightness
    if draw.contrast is not None:
        low, high = sample.amin(axes, keepdim=True), sample.amax(axes, keepdim=True)
        mean = sample.mean(axes, keepdim=True)
        sample = ((sample - mean) * draw.contrast + mean).clamp(low, high)
    if draw.gamma is not None:
        sample = _gamma(sample, draw.gamma, axes)
    return sample


def _gamma(sample: Tensor, gamma: float, axes: tuple[int, ...]) -> Tensor:
    low = sample.amin(axes, keepdim=True)
    span = (sample.amax(axes, keepdim=True) - low).clamp(min=1e-7)
    mean, std = sample.mean(axes, keepdim=True), sample.std(axes, keepdim=True, correction=0)
    bent = ((sample - low) / span).pow(gamma)
    spread = bent.std(axes, keepdim=True, correction=0).clamp(min=1e-7)
    return (bent - bent.mean(axes, keepdim=True)) / spread * std + mean


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _between(limits: tuple[float, float], generator: Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * _uniform(generator)


def _fires(config: RandomConfig, generator: Generator) -> bool:
    return _uniform(generator) < config.probability


def _maybe(config: RandomConfig, generator: Generator, around_one: bool = False) -> float | None:
    """A strength, or None; `around_one` shrinks and enlarges equally often, however lopsided the range."""
    fires, side = _fires(config, generator), _uniform(generator)
    low, high = config.range
    if around_one and low < 1 < high:
        low, high = (low, 1.0) if side < 0.5 else (1.0, high)
    value = _between((low, high), generator)
    return value if fires else None
