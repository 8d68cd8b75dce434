"""nnU-Net's default rules: from a fingerprint to target spacing, patch, batch and network of each configuration.

The numbers are those of nnU-Net v2's default planner (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z): the sum of
the feature maps of all convolutions stands for the memory, with 560 million for two patches in 3D and 85 million for
twelve in 2D meaning 8 GB. `tests/test_planning_nnunet.py` holds them against that planner itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from densepred.planning.topology import Topology, activations, features, fitting

REFERENCE = {2: 85e6, 3: 560e6}
"""Feature-map elements of a patch that stand for `REFERENCE_BYTES`, by dimensions."""
REFERENCE_BATCH = {2: 12, 3: 2}
REFERENCE_BYTES = 8e9
FIRST_PATCH = {2: 2048.0**2, 3: 256.0**3}
"""Voxels of the patch to start from."""
BASE = 32
MOST_FEATURES = {2: 512, 3: 320}
LEAST_BATCH = 2
COVERED = 0.05
"""Share of the voxels of all cases that a batch may hold."""
ANISOTROPIC = 3.0
"""The longest voxel axis is special where it is so many times as long as the next."""
LOW_RESOLUTION = 0.25
"""A patch that holds less than this share of a typical image calls for a coarser grid, too."""
COARSER, LEAST_GAIN = 1.03, 2.0
"""Steps towards that grid, and by how many times fewer voxels it must have."""


@dataclass(frozen=True)
class Sizes:
    """What the rules look at: a row per case, axes as in the files, slowest first.

    Attributes:
        shapes: voxels per axis, after cropping to where the image is not zero.
        spacings: of the voxels, in any unit that the axes share.
        channels: of the images.
        labels: the background, the classes, and a label to ignore.
    """

    shapes: tuple[tuple[int, ...], ...]
    spacings: tuple[tuple[float, ...], ...]
    channels: int
    labels: int

    @property
    def cases(self) -> int:
        """How many there are."""
        return len(self.shapes)


@dataclass(frozen=True)
class Configuration:
    """A network and what it is trained on; axes as in the files.

    Attributes:
        name: 2d, 3d_fullres or 3d_lowres.
        spacing: to resample to, for all axes of the files.
        shape: of a typical image there.
        net: stages, of the axes of a patch.
        channels: feature maps of each stage.
        batch: patches per step.
        batch_dice: Dice over the batch as one.
        axis: in 2D of volumes, the axis that the slices lie across.
    """

    name: str
    spacing: tuple[float, ...]
    shape: tuple[float, ...]
    net: Topology
    channels: tuple[int, ...]
    batch: int
    batch_dice: bool
    axis: int | None = None

    @property
    def dims(self) -> int:
        """Of the network."""
        return len(self.net.patch)

    @property
    def covers(self) -> float:
        """Share of a typical image that a patch holds."""
        shape = [n for axis, n in enumerate(self.shape) if axis != self.axis]
        return self.net.voxels / math.prod(shape)


Planned = Callable[[tuple[float, ...], tuple[float, ...], float], Configuration]


def target_spacing(sizes: Sizes) -> tuple[float, ...]:
    """The median per axis; the 10th percentile along one with long voxels and few of them, so as to lose no slices.

    Example:
        >>> target_spacing(Sizes(((10, 250, 250),) * 3, ((10, 1.5, 1.5), (10, 1.5, 1.5), (5, 1.5, 1.5)), 1, 2))
        (6.0, 1.5, 1.5)
    """
    spacings = np.vstack(sizes.spacings)
    target = np.percentile(spacings, 50, 0)
    typical = np.percentile(np.vstack(sizes.shapes), 50, 0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != worst]
    coarse = target[worst] > ANISOTROPIC * max(target[others])
    if coarse and typical[worst] * ANISOTROPIC < min(typical[others]):
        finer = float(np.percentile(spacings[:, worst], 10))
        longest = float(max(target[others]))
        target[worst] = longest + 1e-5 if finer < longest else finer
    return tuple(float(one) for one in target)


def typical_shape(sizes: Sizes, spacing: Sequence[float]) -> tuple[float, ...]:
    """The median shape of the cases on a grid of this spacing."""
    rows = zip(sizes.shapes, sizes.spacings, strict=True)
    resampled = [[round(a / b * n) for a, b, n in zip(old, spacing, shape, strict=True)] for shape, old in rows]
    return tuple(float(one) for one in np.median(resampled, 0))


def configurations(sizes: Sizes, memory: float = REFERENCE_BYTES) -> dict[str, Configuration]:
    """All that nnU-Net would train: `2d`, and for volumes `3d_fullres` and, where a patch sees little, `3d_lowres`.

    Args:
        sizes: of the cases; images are volumes of one plane.
        memory: bytes of the GPU it is for; the reference grows in proportion.

    Example:
        >>> found = configurations(Sizes(((36, 50, 35),) * 260, ((1, 1, 1),) * 260, 1, 3))
        >>> found["3d_fullres"].net.patch, found["3d_fullres"].batch, found["2d"].batch
        ((40, 56, 40), 9, 366)
    """
    spacing = target_spacing(sizes)
    worst = int(np.argmax(spacing))
    order = [worst, *(axis for axis in range(3) if axis != worst)]  # nnU-Net puts the coarsest axis first
    turned = tuple(spacing[axis] for axis in order)
    shape = typical_shape(sizes, spacing)
    turned_shape = tuple(shape[axis] for axis in order)
    voxels = float(np.prod(turned_shape)) * sizes.cases
    found: dict[str, Configuration] = {}
    if turned_shape[0] != 1:
        full = _planned("3d_fullres", sizes, memory, turned, turned_shape, voxels)
        low = low_resolution(full, sizes.cases, partial(_planned, "3d_lowres", sizes, memory))
        found["3d_fullres"] = replace(full, batch_dice=low is not None)
        found |= {"3d_lowres": low} if low else {}
    flat = _planned("2d", sizes, memory, turned[1:], turned_shape[1:], voxels)
    back = tuple(order.index(axis) for axis in range(3))
    found = {name: _moved(one, back) for name, one in found.items()}
    return found | {"2d": replace(flat, spacing=spacing, shape=shape, axis=worst)}


def _planned(
    name: str, sizes: Sizes, memory: float, spacing: Sequence[float], shape: Sequence[float], voxels: float
) -> Configuration:
    """Patch, stages and batch on a grid of this spacing, where the cases have so many voxels in all."""
    dims = len(spacing)
    reference, batch = REFERENCE[dims] * (memory / REFERENCE_BYTES), REFERENCE_BATCH[dims]

    def estimate(net: Topology) -> int:
        return activations(net, features(net.stages, BASE, MOST_FEATURES[dims]), sizes.labels)

    net = fitting(spacing, shape, FIRST_PATCH[dims], lambda net: estimate(net) / batch * LEAST_BATCH > reference)
    fits, covered = round(reference / estimate(net) * batch), round(voxels * COVERED / net.voxels)
    chosen = max(min(fits, covered), LEAST_BATCH)
    channels = features(net.stages, BASE, MOST_FEATURES[dims])
    return Configuration(name, tuple(spacing), tuple(shape), net, channels, chosen, batch_dice=dims == 2)


def low_resolution(full: Configuration, cases: int, planned: Planned) -> Configuration | None:
    """The grid, coarsened step by step, on which a patch holds a quarter of a typical image.

    Args:
        full: the configuration on the full grid.
        cases: how many there are.
        planned: what would be done on a grid of a spacing and typical shape, where the cases have so many voxels.

    Returns:
        None where none is needed, or where it would not be much coarser.
    """
    fine, shape = np.asarray(full.spacing), np.asarray(full.shape)
    spacing, voxels = fine.copy(), float(np.prod(shape))
    whole, low = voxels, None
    while (low or full).net.voxels / voxels < LOW_RESOLUTION:
        lagging = spacing.max() / spacing > 2  # the finer axes first, until they are within a factor of two
        spacing[lagging if lagging.any() else slice(None)] *= COARSER
        coarse = fine / spacing * shape
        voxels = float(np.prod(coarse))
        rounded = tuple(float(round(float(one))) for one in coarse)
        low = planned(tuple(map(float, spacing)), rounded, voxels * cases)
    return low if low is not None and whole / voxels >= LEAST_GAIN else None


def _moved(one: Configuration, order: Sequence[int]) -> Configuration:
    spacing, shape = (tuple(values[axis] for axis in order) for values in (one.spacing, one.shape))
    return replace(one, spacing=spacing, shape=shape, net=one.net.moved(order))
