"""What a network is trained for: how a batch becomes tensors, its loss, and the scores of whole cases.

The trainer knows only `Objective`; each task of a recipe has one of its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from densepred import metrics
from densepred.augment.volume import Augmenter
from densepred.cases.cache import CachedCase
from densepred.cases.patches import PatchSampler
from densepred.cases.plan import Plan
from densepred.config import Config
from densepred.inference.compute import batch_of
from densepred.inference.slices import stream
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.losses import SegmentationLoss
from densepred.models.build import build
from densepred.training.tallies import Overlap, dice_of_classes

Inputs = Tensor | tuple[Tensor, ...]
Outputs = Tensor | Mapping[str, Tensor]
Watch = Callable[[int, int], None]
"""Told how far a long computation is, (done, total); may raise to end it."""


class Drawn(Protocol):
    """A batch as it is drawn: arrays of any kind, sample after sample, with what names a sample in a report."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The case of each sample."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each sample's augmentation."""


class Objective(ABC):
    """What a network is trained for.

    Attributes:
        at_chance: the loss that an untrained network should roughly start from; infinity where that is not known.
    """

    at_chance: float = math.inf

    @abstractmethod
    def network(self) -> nn.Module:
        """A network of the recipe with fresh weights, a function of the seed."""

    def check(self, case: CachedCase) -> None:  # noqa: B027
        """Raise InputError where a validation case lacks what `judge` needs."""

    @abstractmethod
    def draw(self, epoch: int, step: int) -> Drawn:
        """The batch of a step of an epoch, both from 0; called in threads, ahead of its time."""

    @abstractmethod
    def tensors(self, drawn: Any, samples: slice, device: torch.device) -> tuple[Inputs, Any]:
        """Some of the samples of a batch that `draw` gave, augmented, on the device.

        Every random number is a function of a sample's seed, so that it does not matter how a batch is split.

        Returns:
            The image (B, C, *spatial), in a tuple with covariates (B, F) if there are any; and the targets: a tensor,
            or a mapping of tensors, (B, ...) each.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """The loss, a scalar, of what the network gave and the targets of `tensors`."""

    @abstractmethod
    def judge(self, model: nn.Module, case: CachedCase, watch: Watch) -> list[float]:
        """What `scores` needs to know of one validation case, always equally many numbers."""

    @abstractmethod
    def scores(self, judged: Sequence[Sequence[float]]) -> dict[str, float]:
        """The columns of metrics.csv, from what `judge` said of each case."""

    @abstractmethod
    def merit(self, scores: Mapping[str, float]) -> float:
        """The one number that tells whether weights are better: larger is better, NaN says nothing."""


class SegmentationObjective(Objective):
    """Exclusive classes from patches, scored by the Dice of whole volumes.

    Args:
        config: the recipe.
        plan: how files become arrays.
        train: cases to learn from.
        device, precision: where and in what numbers whole volumes are predicted.
    """

    def __init__(
        self, config: Config, plan: Plan, train: Sequence[CachedCase], device: torch.device, precision: torch.dtype
    ) -> None:
        self.config, self.plan, self.device, self.precision = config, plan, device, precision
        self.tally = Overlap(plan.classes[1:])
        self.criterion = SegmentationLoss(config.loss, spacing=plan.typical_spacing)
        self.at_chance = self.criterion.at_chance(len(plan.classes))
        self.augment = Augmenter(config.augment, len(plan.classes), plan.typical_spacing, plan.flag_channels)
        training = config.training
        self.sampler = PatchSampler.of(config.patch, train, plan, training.seed, training.steps)

    def network(self) -> nn.Module:
        """See `Objective`."""
        plan = self.plan
        return build(self.config.model, len(plan.channels), len(plan.classes), self.config.training.seed)

    def draw(self, epoch: int, step: int) -> Drawn:
        """See `Objective`."""
        return self.sampler.batch(epoch, step)

    def tensors(self, drawn: Any, samples: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """The image and the classes (B, *spatial), int64, -1 where there is no truth."""
        given, taken = self.augment.seen(samples)
        image = torch.from_numpy(drawn.image[given]).to(device, non_blocking=True)
        label = torch.from_numpy(drawn.label[given]).to(device, non_blocking=True).long()
        image, label = self.augment(image, label, drawn.seeds[given])
        return image[taken], label[taken]

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """See `Objective`."""
        return self.criterion(outputs, targets)

    def judge(self, model: nn.Module, case: CachedCase, watch: Watch) -> list[float]:
        """The Dice of each class but the background; NaN where it is neither there nor predicted."""
        classes, inferer = len(self.plan.classes), inferer_for(self.config, self.device, self.precision, model)
        counts = np.zeros((classes, classes), np.int64)
        for start, stop, logits in stream(inferer, model, case.image, self.plan.slices, watch):
            labels = logits.max(0).indices.cpu().numpy()
            counts += metrics.confusion(case.label[start:stop], labels, classes)
        return [float(value) for value in dice_of_classes(counts)]

    def scores(self, judged: Sequence[Sequence[float]]) -> dict[str, float]:
        """Dice per class, the mean over the cases that have it in truth or prediction, and the mean of those."""
        return self.tally.scores(np.array(judged, np.float64))

    def merit(self, scores: Mapping[str, float]) -> float:
        """The mean Dice."""
        return scores.get("dice_mean", math.nan)


def inferer_for(config: Config, device: torch.device, precision: torch.dtype, model: nn.Module) -> SlidingWindowInferer:
    """What predicts validation cases: by the windows, views and borders that the recipe has for prediction.

    Args:
        config: the recipe.
        device, precision: where and in what numbers.
        model: which tells the multiple of which windows begin where none are blended.
    """
    settings = config.inference
    return SlidingWindowInferer(
        settings.window or config.patch.size,
        settings.overlap,
        settings.blend,
        batch_of(settings, device),
        device,
        str(precision).removeprefix("torch."),
        mirror_axes=settings.mirror,
        multiple=model.stride if settings.blend == "none" else 1,  # type: ignore[arg-type]
    )


def make_objective(
    config: Config, plan: Plan, train: Sequence[CachedCase], device: torch.device, precision: torch.dtype
) -> Objective:
    """The objective of a recipe.

    Args:
        config: the recipe.
        plan: how files become arrays.
        train: cases to learn from.
        device, precision: where and in what numbers validation cases are predicted.
    """
    if plan.targets or plan.regions:
        from densepred.training.objectives import TasksObjective  # which is built on this module

        return TasksObjective(config, plan, train, device, precision)
    return SegmentationObjective(config, plan, train, device, precision)
