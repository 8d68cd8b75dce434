"""Augmentation of whole batches on their device, in 2D and 3D.

Every number drawn is a function of the sample's seed alone, so a sample comes out the same in any batch, on any number
of workers and after any interruption; only CutMix and MixUp take something from other samples. Geometry comes first, as
one interpolation of image and labels together, then the other transforms in the order of the recipe, then mixing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densepred.augment.draws import Numbers, numbers_of
from densepred.augment.geometry import Move, draw_move, in_planes
from densepred.augment.image2d import ImageTransform
from densepred.augment.intensity import apply_changes, draw_changes
from densepred.augment.mix import cutmix, cutout, mixup
from densepred.augment.resample import Warp, resample
from densepred.config import AugmentConfig
from densepred.config.transforms import NAMES, Albumentations, Channelwise, CutMix, Cutout, Dummy2d, Flip, MixUp


class Augmenter:
    """The transforms of a recipe.

    Args:
        config: probabilities and ranges.
        classes: number of classes of the labels.
        spacing: voxel spacing (slowest axis first), so that rotations are rigid on anisotropic grids; equal if None.
        flags: channels of ones and zeros, such as the validity, which are moved like the others and keep their values.

    Raises:
        InputError: a transform of albumentations that does not exist.

    Example:
        >>> augment = Augmenter(AugmentConfig.model_validate("nnunet"), classes=2)
        >>> image, label = augment(torch.rand(2, 1, 16, 16, 16), torch.zeros(2, 16, 16, 16).long(), seeds=[1, 2])
        >>> tuple(image.shape)
        (2, 1, 16, 16, 16)
    """

    def __init__(
        self,
        config: AugmentConfig,
        classes: int,
        spacing: Sequence[float] | None = None,
        flags: Sequence[int] = (),
    ) -> None:
        self.transforms = config.transforms
        self.classes, self.flags = classes, list(flags)
        self.spacing = tuple(spacing) if spacing else None
        self.images = {t: ImageTransform(s) for t, s in enumerate(self.transforms) if isinstance(s, Albumentations)}
        self.mixes = any(isinstance(settings, CutMix | MixUp) for settings in self.transforms)

    def __call__(self, image: Tensor, label: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            image: (B, C, *spatial) float.
            label: (B, *spatial) integers, -1 without a truth; (B, T, *spatial) float maps, NaN without a truth; or (B,)
                classes of whole images, which stay.
            seeds: one a sample.

        Returns:
            New tensors of the same shapes and types.
        """
        numbers = [numbers_of(seed, len(self.transforms), image.shape[1]) for seed in seeds]
        image, label = self._move(image, label, numbers)
        channels = [c for c in range(image.shape[1]) if c not in self.flags]
        planes = any(in_planes(settings, image.shape[2:]) for settings in self.transforms)
        for place, settings in enumerate(self.transforms):
            own = [row[place] for row in numbers]
            if isinstance(settings, Channelwise):
                apply_changes(image, settings, [draw_changes(settings, n, channels) for n in own], planes)
            elif isinstance(settings, Cutout):
                for index, drawn in enumerate(own):
                    cutout(image[index], label[index], settings, drawn, channels)
            elif isinstance(settings, Albumentations):
                for index, drawn in enumerate(own):
                    self.images[place](image[index], label[index], drawn, self.flags)
        return self._mix(image, label, numbers, channels)

    def seen(self, samples: slice) -> tuple[slice, slice]:
        """To change some samples of a batch: which of it to give, and which to take; mixing needs all of them."""
        return (slice(None), samples) if self.mixes else (samples, slice(None))

    def happened(self, seed: int, image: Tensor) -> list[str]:
        """The names of what happens to a sample with that seed in a batch (B, C, *spatial) such as `image`."""
        channels = [c for c in range(image.shape[1]) if c not in self.flags]
        names = []
        for settings, numbers in zip(
            self.transforms, numbers_of(seed, len(self.transforms), image.shape[1]), strict=True
        ):
            if isinstance(settings, Channelwise):
                fires = bool(draw_changes(settings, numbers, channels))
            elif isinstance(settings, Flip):
                fired = [numbers.fires(settings.probability) for _ in range(image.ndim - 2)]
                fires = any(fired[axis] for axis in settings.axes if axis < len(fired))
            else:
                fires = not isinstance(settings, Dummy2d) and numbers.fires(settings.probability)
            if fires:
                names.append(settings.name if isinstance(settings, Albumentations) else NAMES[type(settings)])
        return [name.replace("_", " ") for name in names]

    def _drawn(self, numbers: list[Numbers], shape: Sequence[int], dims: int) -> Move:
        return draw_move(zip(self.transforms, numbers, strict=True), shape, self.spacing or (1.0,) * dims)

    def _move(self, image: Tensor, label: Tensor, numbers: list[list[Numbers]]) -> tuple[Tensor, Tensor]:
        """Turn, mirror and warp; only those samples are interpolated that must be."""
        shape, dims = image.shape[2:], image.ndim - 2
        moves = [self._drawn(row, shape, dims) for row in numbers]
        out, out_label = torch.empty_like(image, memory_format=torch.contiguous_format), label.clone()
        dense = label.ndim > 1
        for index, move in enumerate(moves):
            parts = [(image, out), (label, out_label)] if dense else [(image, out)]
            for source, target in parts:
                moved = source[index]
                if move.quarters:
                    moved = moved.rot90(move.quarters, (-2, -1))
                if move.flips and not move.warped:
                    moved = moved.flip([axis - dims for axis in move.flips])
                target[index] = moved
        warped = [index for index, move in enumerate(moves) if move.warped]
        if warped:
            self._warp(out, out_label, dense, warped, [moves[index] for index in warped])
        return out, out_label

    def _warp(self, image: Tensor, label: Tensor, dense: bool, chosen: list[int], moves: list[Move]) -> None:
        """Interpolate the chosen samples in place; flips are part of it."""
        shape = image.shape[2:]
        maps = [move.voxels(shape, self.spacing or (1.0,) * len(shape)) for move in moves]
        bends = [move.bend(matrix, shape, image.device) for move, (matrix, _) in zip(moves, maps, strict=True)]
        warp = Warp(torch.stack([m for m, _ in maps]), torch.stack([o for _, o in maps]), bends)
        where = torch.tensor(chosen).to(image.device, non_blocking=True)
        source = image.index_select(0, where)
        target = label.index_select(0, where) if dense else source[:, :0]
        moved, moved_label = resample(source, target, warp, self.classes, self.flags)
        image.index_copy_(0, where, moved)
        if dense:
            label.index_copy_(0, where, moved_label)

    def _mix(
        self, image: Tensor, label: Tensor, numbers: list[list[Numbers]], channels: list[int]
    ) -> tuple[Tensor, Tensor]:
        for place, settings in enumerate(self.transforms):
            own = [row[place] for row in numbers]
            if isinstance(settings, CutMix):
                image, label = cutmix(image, label, settings, own)
            elif isinstance(settings, MixUp):
                image, label = mixup(image, label, settings, own, channels)
        return image, label
