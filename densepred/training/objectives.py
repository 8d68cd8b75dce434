"""Training for several tasks at once: classes of voxels or regions, maps of numbers, classes or numbers of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepred import metrics
from densepred.augment.volume import Augmenter
from densepred.cases.cache import CachedCase
from densepred.cases.labels import IGNORE
from densepred.cases.patches import Batch, PatchSampler
from densepred.cases.plan import Plan
from densepred.cases.targets import covariates_of, read_table, truth_of
from densepred.config import Config, HeadConfig
from densepred.config.tasks import SEGMENTATION
from densepred.inference.heads import heads_of, of_whole, specs_of
from densepred.inference.slices import stream
from densepred.losses import MultiTaskLoss, SegmentationLoss
from densepred.models.build import build
from densepred.models.dense import DensePredictor
from densepred.models.heads import HeadSpec, Segmentation, predictions
from densepred.training.objective import Inputs, Objective, Outputs, Watch, inferer_for
from densepred.training.tallies import Choices, Errors, Overlap, Tally, Values, dice_of, dice_of_classes

_KNOWN = 0.5
"""Prepared maps are followed by 1 where they are known, else 0."""


@dataclass(frozen=True)
class DrawnTargets:
    """Patches with what a table says of their cases.

    Attributes:
        batch: images, labels, ids and seeds.
        truths: name -> `(B,)`, of a class its index, -1 if not known; of a number NaN.
        covariates: `(B, F)` float32.
    """

    batch: Batch
    truths: Mapping[str, NDArray[np.float64]]
    covariates: NDArray[np.float32]

    @property
    def ids(self) -> tuple[str, ...]:
        """The case of each sample."""
        return self.batch.ids

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each sample's augmentation."""
        return self.batch.seeds


class TasksObjective(Objective):
    """All heads of a recipe, alone or jointly, from patches.

    Heads for whole images learn from patches too: give patches the size of the images where that matters.

    Args:
        config: the recipe.
        plan: how files become arrays.
        train: cases to learn from.
        device, precision: where and in what numbers validation cases are predicted.

    Raises:
        InputError: the table lacks a row, or has what training did not know.
    """

    def __init__(
        self, config: Config, plan: Plan, train: Sequence[CachedCase], device: torch.device, precision: torch.dtype
    ) -> None:
        self.config, self.plan, self.device, self.precision = config, plan, device, precision
        self.specs = specs_of(config, plan)
        self.table = read_table(config.data)
        training = config.training
        self.sampler = PatchSampler.of(config.patch, train, plan, training.seed, training.steps)
        self.augment = Augmenter(config.augment, max(len(plan.classes), 1), plan.typical_spacing, plan.flag_channels)
        self.criterion, self.at_chance = self._criterion()
        self.tallies = {name: self._tally(name, spec) for name, spec in self.specs.items()}
        for case in train:  # a fault of the table is found before anything is computed
            self._told(case.id)

    def _criterion(self) -> tuple[MultiTaskLoss, float]:
        """The loss, and what it should roughly start from."""
        heads = {name: self.config.heads.get(name, HeadConfig()) for name in self.specs}
        weights = {name: (spec, heads[name].weight) for name, spec in self.specs.items()}
        loss, chance = MultiTaskLoss(weights, {name: one.loss for name, one in heads.items() if one.loss}), 0.0
        for name, spec in self.specs.items():
            if isinstance(spec, Segmentation):
                one = SegmentationLoss(self.config.loss, spec.regions, self.plan.typical_spacing)
                loss.losses[name] = one
                chance += heads[name].weight * one.at_chance(spec.classes)
            elif hasattr(spec, "classes"):
                chance += heads[name].weight * math.log(spec.classes)
            else:
                chance += heads[name].weight  # numbers are standard
        return loss, chance

    def _tally(self, name: str, spec: HeadSpec) -> Tally:
        if isinstance(spec, Segmentation):
            return Overlap(tuple(self.plan.regions) or self.plan.classes[1:])
        kind = self.plan.targets[name].kind
        if kind == "classification":
            return Choices(name, len(self.plan.targets[name].classes))
        return Errors(name) if kind == "regression" else Values(name)

    def network(self) -> nn.Module:
        """See `Objective`."""
        heads = heads_of(self.config, self.plan)
        return build(self.config.model, len(self.plan.channels), heads, self.config.training.seed)

    def draw(self, epoch: int, step: int) -> DrawnTargets:
        """See `Objective`."""
        batch = self.sampler.batch(epoch, step)
        told = [self._told(case) for case in batch.ids]
        truths = {name: np.array([values[name] for values, _ in told]) for name in told[0][0]}
        return DrawnTargets(batch, truths, np.stack([covariates for _, covariates in told]))

    def check(self, case: CachedCase) -> None:
        """See `Objective`."""
        self._told(case.id)

    def _told(self, case: str) -> tuple[dict[str, float], NDArray[np.float32]]:
        """Of a case the truths of whole images, and the covariates."""
        truths = {}
        for name, spec in self.specs.items():
            if not spec.dense:
                assert self.table is not None  # the recipe was checked for it
                truths[name] = truth_of(name, self.plan.targets[name], self.table, case)
        return truths, covariates_of(self.plan, self.table, case)

    def tensors(self, drawn: Any, samples: slice, device: torch.device) -> tuple[Inputs, dict[str, Tensor]]:
        """See `Objective`; the targets are by head."""
        image, label, maps = self._moved(drawn.batch, samples, device)
        targets: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            if isinstance(spec, Segmentation):
                targets[name] = self._regions(label) if spec.regions else label
            elif spec.dense:
                at = self.plan.maps.index(name)
                targets[name] = maps[:, at : at + 1]
            else:
                truth = torch.from_numpy(drawn.truths[name][samples]).to(device, non_blocking=True)
                targets[name] = truth.long() if hasattr(spec, "classes") else truth.float().unsqueeze(1)
        if not self.plan.covariates:
            return image, targets
        return (image, torch.from_numpy(drawn.covariates[samples]).to(device, non_blocking=True)), targets

    def _moved(self, batch: Batch, samples: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label, and maps (B, T, *spatial) with NaN where they are not known; all augmented alike."""
        given, taken = self.augment.seen(samples)
        both = torch.from_numpy(batch.image[given]).to(device, non_blocking=True)
        channels, seeds = len(self.plan.channels), batch.seeds[given]
        image, maps = both[:, :channels], both[:, channels::2]
        maps = maps.masked_fill(both[:, channels + 1 :: 2] < _KNOWN, math.nan)
        label = torch.from_numpy(batch.label[given]).to(device, non_blocking=True).long()
        moved = self.augment(image, label, seeds) if self.plan.classes or not self.plan.maps else None
        if self.plan.maps:  # the same changes, as these are a function of the seeds
            image, maps = self.augment(image, maps, seeds)
        image, label = (image, label) if moved is None else moved
        return image[taken], label[taken], maps[taken]

    def _regions(self, label: Tensor) -> Tensor:
        """Class indices (B, *spatial) -> 1 inside and 0 outside each region, -1 where not known: (B, K, *spatial)."""
        members = torch.zeros(len(self.plan.regions), len(self.plan.classes), dtype=torch.int8)
        for row, classes in zip(members, self.plan.regions.values(), strict=True):
            row[list(classes)] = 1
        inside = members.to(label.device, non_blocking=True)[:, label.clamp(min=0)].movedim(0, 1)
        return inside.masked_fill((label == IGNORE).unsqueeze(1), IGNORE)

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """See `Objective`."""
        loss: Tensor = self.criterion(outputs, targets)
        return loss

    def judge(self, model: nn.Module, case: CachedCase, watch: Watch) -> list[float]:
        """The numbers of each head's tally, one after the other."""
        assert isinstance(model, DensePredictor)
        found = self._judge_maps(model.part(dense=True), case, watch) if model.dense else {}
        if any(not spec.dense for spec in self.specs.values()):
            found |= self._judge_whole(model.part(dense=False), case)
        return [float(value) for name in self.specs for value in found[name]]

    def _judge_maps(self, model: DensePredictor, case: CachedCase, watch: Watch) -> dict[str, np.ndarray]:
        image, channels = case.image, len(self.plan.channels)
        inferer = inferer_for(self.config, self.device, self.precision, model)
        sums: dict[str, Any] = {}
        widths = [spec.channels for spec in model.specs.values()]
        seen = _Leading(image, channels)
        for start, stop, outputs in stream(inferer, _Joined(model), seen, self.plan.slices, watch):
            for name, part in zip(model.specs, outputs.split(widths), strict=True):
                truth = case.label[start:stop] if name == SEGMENTATION else image[channels:, start:stop]
                found = self._planes(name, part, truth)
                sums[name] = sums[name] + found if name in sums else found
        return {name: self._summed(name, value) for name, value in sums.items()}

    def _planes(self, name: str, outputs: Tensor, truth: np.ndarray) -> np.ndarray | metrics.MapErrors:
        """Counts of some planes: outputs (C, n, *rest), and the labels (n, *rest) or maps (2 T, n, *rest)."""
        spec = self.specs[name]
        if not isinstance(spec, Segmentation):
            at, target = 2 * self.plan.maps.index(name), self.plan.targets[name]
            wanted = np.where(truth[at + 1] >= _KNOWN, truth[at], np.nan).astype(np.float64)
            got = outputs[0].cpu().numpy().astype(np.float64)
            return metrics.MapErrors.of(*(values * target.deviation + target.mean for values in (wanted, got)))
        if spec.regions:
            inside = self._regions(torch.from_numpy(truth.astype(np.int64))[None])[0]
            return Overlap.of_regions(inside.numpy(), (outputs > 0).cpu().numpy())
        return metrics.confusion(truth, outputs.max(0).indices.cpu().numpy(), spec.classes)

    def _summed(self, name: str, counts: np.ndarray | metrics.MapErrors) -> np.ndarray:
        spec = self.specs[name]
        if isinstance(counts, metrics.MapErrors):
            return Errors.row(counts)
        return dice_of(counts) if isinstance(spec, Segmentation) and spec.regions else dice_of_classes(counts)

    def _judge_whole(self, model: DensePredictor, case: CachedCase) -> dict[str, np.ndarray]:
        truths, covariates = self._told(case.id)
        outputs = of_whole(model, case.image[: len(self.plan.channels)], covariates, self.config, self.device)
        found = {}
        for name, spec in model.specs.items():
            told, target = predictions(spec, outputs[name]), self.plan.targets[name]
            if target.kind == "classification":
                found[name] = np.array([truths[name], *told["probabilities"][0].tolist()])
            else:
                truth = truths[name] * target.deviation + target.mean
                found[name] = np.array([truth, float(told["mean"][0, 0])])
        return found

    def scores(self, judged: Sequence[Sequence[float]]) -> dict[str, float]:
        """The scores of every head."""
        numbers, at = np.array(judged, np.float64), 0
        out: dict[str, float] = {}
        for tally in self.tallies.values():
            out |= tally.scores(numbers[:, at : at + tally.width])
            at += tally.width
        return out

    def merit(self, scores: Mapping[str, float]) -> float:
        """The mean over the heads, by their weights: Dice, explained variance, accuracy; NaN without validation."""
        merits = {name: tally.merit(dict(scores)) for name, tally in self.tallies.items()} if scores else {}
        known = {name: one for name, one in merits.items() if math.isfinite(one)}
        weights = {name: self.config.heads.get(name, HeadConfig()).weight for name in known}
        total = sum(weights.values())
        return sum(weights[name] * one for name, one in known.items()) / total if total else math.nan


class _Leading:
    """The first channels of an image, read plane by plane as they are asked for."""

    def __init__(self, image: Any, channels: int) -> None:
        self.image, self.channels, self.shape = image, channels, (channels, *image.shape[1:])

    def __getitem__(self, key: Any) -> Any:
        return self.image[(slice(self.channels), *key[1:])]


class _Joined(nn.Module):
    """A network whose dense outputs are one tensor, one after the other."""

    def __init__(self, model: DensePredictor) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, sum of K, *spatial)."""
        outputs = self.model(x)
        if isinstance(outputs, Tensor):
            return outputs
        return torch.cat([outputs[name] for name in self.model.specs], 1)


__all__ = ["DrawnTargets", "TasksObjective"]
