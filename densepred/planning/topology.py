"""Which axes a U-Net halves at which stage, how large its kernels are, and how a patch is made to fit a budget.

The rules are nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, and its planner, version 2): an axis is
halved while eight voxels are left of it and its voxels are not yet twice as long as the shortest; its kernel is 1 until
its voxels are within a factor of two of the shortest, from then on 3. Only ratios of spacings count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_EDGE = 4
"""Voxels of the coarsest maps along an axis."""
SIMILAR = 2.0
"""Voxels less than so many times as long as others are as long as they."""


@dataclass(frozen=True)
class Topology:
    """The stages of a network for patches of a size.

    Attributes:
        patch: voxels per axis, a multiple of `divisor`.
        strides: of each stage, per axis; the first is 1.
        kernels: of each stage, per axis.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.strides)

    @property
    def divisor(self) -> tuple[int, ...]:
        """What the patch is a multiple of, per axis."""
        return tuple(math.prod(steps) for steps in zip(*self.strides, strict=True))

    @property
    def voxels(self) -> int:
        """Of a patch."""
        return math.prod(self.patch)

    def coarser(self, most: int) -> int:
        """How many of the next stages give outputs too, at most: their largest strides, which name them, must differ.

        Example:
            >>> topology((1.0, 1.0), (64, 64)).coarser(2)
            2
        """
        total, largest = [1] * len(self.patch), [1]
        for step in self.strides[1 : max(most, 0) + 1]:
            total = [a * b for a, b in zip(total, step, strict=True)]
            if max(total) == largest[-1]:
                break
            largest.append(max(total))
        return len(largest) - 1

    def moved(self, order: Sequence[int]) -> Topology:
        """With its axes in another order: axis i of the new one is `order[i]` of the old one."""

        def move(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(values[axis] for axis in order)

        return Topology(move(self.patch), tuple(map(move, self.strides)), tuple(map(move, self.kernels)))


def topology(spacing: Sequence[float], size: Sequence[float]) -> Topology:
    """The stages for patches of a size, which is then rounded up to what they divide.

    Args:
        spacing: of the voxels, per axis; only the ratios count.
        size: of the patch, per axis.

    Example:
        >>> topology((3.0, 1.0, 1.0), (16, 32, 32)).strides
        ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    """
    current, left = [float(one) for one in spacing], [float(one) for one in size]
    axes = range(len(current))
    kernel = [1] * len(current)
    strides, kernels = [(1,) * len(current)], []
    while True:
        long_enough = [axis for axis in axes if left[axis] >= 2 * LEAST_EDGE]
        finest = min((current[axis] for axis in long_enough), default=math.inf)
        halved = [axis for axis in long_enough if current[axis] / finest < SIMILAR]
        if not halved or (len(halved) == 1 and left[halved[0]] < 3 * LEAST_EDGE):
            break
        kernel = [3 if kernel[axis] == 3 or current[axis] / min(current) < SIMILAR else 1 for axis in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in axes))
        for axis in halved:
            current[axis] *= 2
            left[axis] = math.ceil(left[axis] / 2)
    kernels.append((3,) * len(current))
    divisor = [math.prod(steps) for steps in zip(*strides, strict=True)]
    patch = tuple(math.ceil(one / by) * by for one, by in zip(size, divisor, strict=True))
    return Topology(patch, tuple(strides), tuple(kernels))


def features(stages: int, base: int, most: int) -> tuple[int, ...]:
    """Feature maps of each stage: doubled from stage to stage, up to `most`.

    Example:
        >>> features(5, 32, 320)
        (32, 64, 128, 256, 320)
    """
    return tuple(min(most, base * 2**stage) for stage in range(stages))


def activations(net: Topology, channels: Sequence[int], outputs: int, convs: int = 2) -> int:
    """Numbers that the convolutions of a U-Net give for one patch, by which memory grows.

    Args:
        net: its stages.
        channels: feature maps of each stage.
        outputs: channels of its result.
        convs: convolutions of each stage, on the way down and on the way up.
    """
    total, size = 0, list(net.patch)
    for stage, (stride, maps) in enumerate(zip(net.strides, channels, strict=True)):
        size = [n // by for n, by in zip(size, stride, strict=True)]
        up = 0 if stage == net.stages - 1 else convs + 1  # and the transposed convolution that leads there
        total += (convs + up) * maps * math.prod(size)
    return total + outputs * net.voxels


def fitting(
    spacing: Sequence[float], shape: Sequence[float], most: float, too_large: Callable[[Topology], bool]
) -> Topology:
    """The largest patch that is not too large, in the proportions of the image.

    It starts as a patch of `most` voxels that is as long along each axis in the world, cut to the image's shape; then
    the axis that is longest by the image's shape is shortened, step by step.

    Args:
        spacing: of the voxels, per axis.
        shape: of a typical image, per axis.
        most: voxels of the first patch.
        too_large: whether a patch must be shortened further; one that cannot be is taken as it is.
    """
    inverse = 1 / np.asarray(spacing, np.float64)
    first = [round(float(one)) for one in inverse * (most / np.prod(inverse)) ** (1 / len(inverse))]
    net = topology(spacing, [min(one, of) for one, of in zip(first, shape, strict=True)])
    while too_large(net):
        axis = int(np.argsort([one / of for one, of in zip(net.patch, shape, strict=True)])[-1])
        shorter = list(net.patch)
        shorter[axis] -= net.divisor[axis]
        if shorter[axis] < 1:
            break
        step = topology(spacing, shorter).divisor[axis]  # fewer halvings let it be shortened by less
        size = list(net.patch)
        size[axis] -= step
        net = topology(spacing, size)
    return net
