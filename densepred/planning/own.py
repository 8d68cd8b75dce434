"""densepred's rules: the shapes of nnU-Net's, with what training takes on this machine measured rather than foretold.

As nnU-Net: the target spacing, which axes are halved, and patches in the proportions of the image. Otherwise: memory is
that of a trial, networks and patches on a processor are smaller, and where time is short, narrower networks and smaller
patches come before fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from densepred.planning.nnunet import (
    COVERED,
    FIRST_PATCH,
    LEAST_BATCH,
    MOST_FEATURES,
    Configuration,
    Sizes,
    low_resolution,
    target_spacing,
    typical_shape,
)
from densepred.planning.topology import LEAST_EDGE, Topology, activations, features, fitting, topology

ALIKE = 0.01
"""Spacings that differ by less than this share are one."""
FEW_PLANES = 4
"""Volumes of fewer planes are images to a network: 2D is chosen."""
SEES_NOTHING, LEAST_PIECE = 0.02, 100
"""A patch that holds less of an image than this share is taken on the coarser grid, if objects keep so many voxels."""
LEAST_STEPS = 2000
"""A training of fewer steps learns little; before there are fewer, the network gets narrower and the patch smaller."""
LEAST_STAGES = 2
LEAST_BASE, LEAST_VOXELS = 8, {2: 64**2, 3: 24**3}
ON_CPU = {2: 256.0**2, 3: 64.0**3}
"""Voxels of the largest patch on a processor."""
MOST_BATCH = {2: 32, 3: 8}
ON_CPU_BATCH = {2: 8, 3: 2}
"""Patches per step at most: on a processor a larger batch is no faster per patch."""


@dataclass(frozen=True)
class Limits:
    """What a training may take.

    Attributes:
        memory: bytes in all.
        start: bytes that are taken before there is a network.
        each: bytes for each number that a convolution gives, with its gradient and all that is kept beside it.
        base: feature maps of the first stage.
        voxels: of a patch at most, by dimensions.
        batch: patches at most, by dimensions.
    """

    memory: float
    start: float
    each: float
    base: int
    voxels: dict[int, float]
    batch: dict[int, int]

    @classmethod
    def of_device(cls, kind: str, memory: float) -> Limits:
        """What to begin with, before a trial has measured `start` and `each`."""
        if kind == "cpu":
            return cls(memory, 4e8, 14.0, 16, dict(ON_CPU), dict(ON_CPU_BATCH))
        return cls(memory, 1e9, 10.0, 32, dict(FIRST_PATCH), dict(MOST_BATCH))

    def bytes(self, numbers: float) -> float:
        """That a training takes whose convolutions give so many numbers a step."""
        return self.start + self.each * numbers

    def smaller(self, dims: int) -> Limits | None:
        """The next faster: half as wide a network, then half as large a patch; None if there is none."""
        if self.base > LEAST_BASE:
            return replace(self, base=self.base // 2)
        if self.voxels[dims] / 2 >= LEAST_VOXELS[dims]:
            return replace(self, voxels=self.voxels | {dims: self.voxels[dims] / 2})
        return None


def channels(net: Topology, limits: Limits) -> tuple[int, ...]:
    """Feature maps of each stage."""
    most = MOST_FEATURES[len(net.patch)] * limits.base // 32
    return features(net.stages, limits.base, most)


def numbers(one: Configuration, outputs: int) -> int:
    """That the convolutions of a step give."""
    return one.batch * activations(one.net, one.channels, outputs)


def configurations(sizes: Sizes, limits: Limits) -> dict[str, Configuration]:
    """`3d_fullres`, `2d` and, where a patch sees little of an image, `3d_lowres`; of images of two axes `2d` alone.

    Example:
        >>> found = configurations(Sizes(((36, 50, 35),) * 260, ((1, 1, 1),) * 260, 1, 3), Limits.of_device("cpu", 4e9))
        >>> found["3d_fullres"].net.patch, found["3d_fullres"].channels, found["3d_fullres"].batch
        ((40, 56, 40), (16, 32, 64, 128), 2)
    """
    spacing = common_spacing(sizes)
    shape = typical_shape(sizes, spacing)
    voxels = math.prod(shape) * sizes.cases
    if len(spacing) == 2:
        return {"2d": _planned("2d", sizes, limits, spacing, shape, voxels)}
    full = _planned("3d_fullres", sizes, limits, spacing, shape, voxels)
    low = low_resolution(full, sizes.cases, partial(_planned, "3d_lowres", sizes, limits))
    across = int(np.argmax(spacing))
    in_plane, planes = (tuple(n for axis, n in enumerate(of) if axis != across) for of in (spacing, shape))
    flat = _planned("2d", sizes, limits, in_plane, planes, voxels)
    flat = replace(flat, spacing=spacing, shape=shape, axis=across)
    return {"3d_fullres": full, "2d": flat} | ({"3d_lowres": low} if low else {})


def recommended(found: dict[str, Configuration], piece: float) -> str:
    """The name of the one to take: 3D on the full grid, with two exceptions.

    2D for volumes of very few planes, and for images. The coarser grid where a patch on the full one would see next to
    nothing of an image, and the objects are still large on it.

    Args:
        found: what `configurations` gives.
        piece: voxels of a typical object of the class with the smallest ones, on the full grid.
    """
    flat, full, low = found["2d"], found.get("3d_fullres"), found.get("3d_lowres")
    if full is None or (flat.axis is not None and flat.shape[flat.axis] < FEW_PLANES):
        return "2d"
    if low is not None and full.covers < SEES_NOTHING:
        left = piece * math.prod(full.spacing) / math.prod(low.spacing)
        return "3d_lowres" if left >= LEAST_PIECE else "3d_fullres"
    return "3d_fullres"


def common_spacing(sizes: Sizes) -> tuple[float, ...]:
    """The target spacing: that of all cases where they agree, so that none is resampled, else by nnU-Net's rule."""
    first = np.asarray(sizes.spacings[0])
    if np.allclose(sizes.spacings, first, rtol=ALIKE, atol=0):
        return tuple(float(one) for one in np.median(sizes.spacings, 0))
    if len(first) == 2:
        return tuple(float(one) for one in np.median(sizes.spacings, 0))
    return target_spacing(sizes)


def are_alike(sizes: Sizes, spacing: Sequence[float]) -> bool:
    """Whether all cases have this spacing."""
    return bool(np.allclose(sizes.spacings, spacing, rtol=ALIKE, atol=0))


def _planned(
    name: str, sizes: Sizes, limits: Limits, spacing: Sequence[float], shape: Sequence[float], voxels: float
) -> Configuration:
    dims = len(spacing)

    def one_patch(net: Topology) -> int:
        return activations(net, channels(net, limits), sizes.labels)

    net = fitting(
        spacing,
        shape,
        limits.voxels[dims],
        lambda net: net.stages > LEAST_STAGES and limits.bytes(LEAST_BATCH * one_patch(net)) > limits.memory,
    )
    if net.stages < LEAST_STAGES:  # images of a few voxels; beyond them a patch is empty
        net = topology(spacing, [max(n, 3 * LEAST_EDGE) for n in shape])
    fits = int((limits.memory - limits.start) / (limits.each * one_patch(net)))
    covered = round(voxels * COVERED / net.voxels)
    batch = max(min(fits, covered, limits.batch[dims]), LEAST_BATCH)
    return Configuration(name, tuple(spacing), tuple(shape), net, channels(net, limits), batch, batch_dice=True)
