"""Losses of whole models: several terms, several scales, several heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from densepred.config.loading import field_faults
from densepred.config.loss import TERMS, LossConfig, Term
from densepred.losses.functions import LOSSES
from densepred.models.heads import Classification, HeadSpec, Segmentation

Terms: TypeAlias = "Mapping[str, float | Mapping[str, Any] | Term]"
"""Losses by their name in `LOSSES`, each with its weight, or with its `weight` and settings as in a recipe."""
_RATIOS = ("dice", "region_dice", "tversky", "lovasz", "cldice")
_DISTANCES = ("boundary", "hausdorff")
_OVERLAPS = ("tversky", "focal", "lovasz", "boundary", "hausdorff", "cldice")


def suitable(spec: HeadSpec) -> tuple[str, ...]:
    """Names of the losses that fit a head; the first is used by default, for segmentation the first two.

    Example:
        >>> suitable(Segmentation(3))[:3]
        ('dice', 'cross_entropy', 'tversky')
    """
    if isinstance(spec, Segmentation):
        return (*(("region_dice", "region_cross_entropy") if spec.regions else ("dice", "cross_entropy")), *_OVERLAPS)
    if isinstance(spec, Classification):
        return ("cross_entropy", "focal")
    return ("gaussian_nll",) if spec.variance else ("mean_squared", "mean_absolute", "huber")


class _WeightedSum(nn.Module):
    """Losses by name and weight, over one output or over the outputs of deep supervision."""

    def __init__(self, terms: Mapping[str, Term], batch_dice: bool, spacing: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = {name: term for name, term in terms.items() if term.weight}
        self.batch_dice, self.spacing = batch_dice, spacing

    def forward(self, outputs: Tensor | Mapping[str, Tensor], targets: Tensor, valid: Tensor | None = None) -> Tensor:
        """Outputs (B, C, ...), or a mapping of such with coarser ones after the full one; targets, valid -> scalar.

        An output at stride s (the largest over the axes) counts 1/s as much as the full one, and the weights sum to 1;
        its targets are the nearest ones.
        """
        scales = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
        full = scales[0].shape[2:]
        total, weights = torch.zeros((), device=targets.device), 0.0
        for one in scales:
            size = one.shape[2:]
            weight = min((here / there for here, there in zip(size, full, strict=True)), default=1.0)
            where = None if valid is None else resize_targets(valid, size)
            steps = [there / here for here, there in zip(size, full, strict=True)]
            total = total + weight * self._single(one, resize_targets(targets, size), where, steps)
            weights += weight
        return total / weights

    def _single(self, outputs: Tensor, targets: Tensor, valid: Tensor | None, steps: Sequence[float]) -> Tensor:
        loss = torch.zeros((), device=outputs.device)
        for name, term in self.terms.items():
            options = term.settings
            if name in _RATIOS:
                options["over_batch"] = self.batch_dice
            if name in _DISTANCES:  # at a coarser scale in the full one's unit
                spacing = self.spacing or [1.0] * len(steps)
                options["spacing"] = [size * step for size, step in zip(spacing, steps, strict=True)]
            loss = loss + term.weight * LOSSES[name](outputs, targets, valid, **options)
        return loss


class SegmentationLoss(_WeightedSum):
    """The loss of a recipe: its terms, over all scales.

    Args:
        config: the terms.
        regions: the classes are regions that may overlap, each by a sigmoid; else they exclude one another.
        spacing: of the voxels, for distances to boundaries; by default these are in voxels.

    Example:
        >>> round(SegmentationLoss(LossConfig()).at_chance(3), 2)
        2.1
    """

    def __init__(self, config: LossConfig, regions: bool = False, spacing: Sequence[float] | None = None) -> None:
        names = {"dice": "region_dice", "cross_entropy": "region_cross_entropy"} if regions else {}
        terms = {names.get(name, name): term for name, term in config.terms.items()}
        super().__init__(terms, config.batch_dice, spacing)
        self.regions = regions

    def at_chance(self, classes: int) -> float:
        """What an untrained network should roughly start from; nan if terms have no such value (boundary, hausdorff).

        That is ln K for the cross-entropy, less for the focal loss, and 1 for ratios such as the Dice.
        """
        choices = 2 if self.regions else classes
        total = 0.0
        for name, term in self.terms.items():
            if name in _RATIOS:
                chance = 1.0
            elif name in _DISTANCES:
                chance = math.nan
            else:
                chance = math.log(choices) * (1 - 1 / choices) ** term.settings.get("gamma", 0.0)
            total += term.weight * chance
        return total


class HeadLoss(_WeightedSum):
    """The loss of one head, of whichever kind, over all scales.

    Args:
        spec: the head's.
        terms: the losses by their name in `LOSSES`, each with a weight or with `weight` and settings; by default what
            `suitable` names first, with weight 1.
        batch_dice: Dice and other ratios over the batch as one volume rather than per sample.
        spacing: of the voxels, for distances to boundaries; by default these are in voxels.

    Raises:
        ValueError: a loss does not fit the head, a setting is not its, a weight is negative, or none is positive.

    Example:
        >>> HeadLoss(Segmentation(3))(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)).ndim
        0
        >>> loss = HeadLoss(Segmentation(3), {"dice": 1, "focal": {"weight": 0.5, "gamma": 3}})
        >>> loss.terms["focal"].gamma
        3.0
    """

    def __init__(
        self,
        spec: HeadSpec,
        terms: Terms | None = None,
        batch_dice: bool = True,
        spacing: Sequence[float] | None = None,
    ) -> None:
        fitting = suitable(spec)
        if terms is None:
            terms = dict.fromkeys(fitting[: 2 if isinstance(spec, Segmentation) else 1], 1.0)
        if not set(terms) <= set(fitting):
            raise ValueError(f"terms for {spec!r} must be among {', '.join(fitting)}, got {', '.join(terms)}")
        given = {name: _term(name, value) for name, value in terms.items()}
        if not any(term.weight for term in given.values()):
            raise ValueError(f"terms must have weights of at least 0 and one above, got {dict(terms)}")
        super().__init__(given, batch_dice, spacing)


def _term(name: str, value: float | Mapping[str, Any] | Term) -> Term:
    """The settings of a loss of `LOSSES`, of a weight or what a recipe says.

    Raises:
        ValueError: a setting is not among those of this loss, or is out of range.
    """
    if isinstance(value, Term):
        return value
    try:
        return TERMS[name].model_validate(dict(value) if isinstance(value, Mapping) else {"weight": value})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(path)}: {text}" for path, text in field_faults(error, TERMS[name]))
        raise ValueError(f"the term {name}: {faults}") from error


class MultiTaskLoss(nn.Module):
    """The weighted sum of the losses of several heads.

    Args:
        heads: for each head's name what it predicts and the weight of its loss; with weight 0 it is not looked at.
        terms: for some heads the terms of their `HeadLoss`, by the head's name.
        batch_dice: Dice over the batch as one volume rather than per sample.

    Raises:
        ValueError: a weight is negative, none is positive, or `terms` are for another head or do not fit it.

    Example:
        >>> from densepred.models.heads import Scalar
        >>> loss = MultiTaskLoss({"segmentation": (Segmentation(2), 1.0), "age": (Scalar(), 0.1)})
        >>> outputs = {"segmentation": torch.zeros(1, 2, 8, 8), "age": torch.zeros(1, 1)}
        >>> sorted(loss.parts(outputs, {"segmentation": torch.zeros(1, 8, 8), "age": torch.ones(1, 1)}))
        ['age', 'segmentation']
    """

    def __init__(
        self,
        heads: Mapping[str, tuple[HeadSpec, float]],
        terms: Mapping[str, Terms] | None = None,
        batch_dice: bool = True,
    ) -> None:
        super().__init__()
        terms = terms or {}
        weights = [weight for _, weight in heads.values()]
        if not any(weights) or min(weights) < 0:
            raise ValueError(f"heads must have weights of at least 0 and one above, got {dict(heads)}")
        if not set(terms) <= set(heads):
            raise ValueError(f"terms must be for the heads {', '.join(heads)}, got {', '.join(terms)}")
        self.weights = {name: weight for name, (_, weight) in heads.items()}
        losses = {name: HeadLoss(spec, terms.get(name), batch_dice) for name, (spec, _) in heads.items()}
        self.losses = nn.ModuleDict(losses)

    def parts(
        self,
        outputs: Tensor | Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each head of positive weight, before weighting.

        Args:
            outputs: what the model gives: by head, "NAME@s" being NAME's output at the coarser stride s; a tensor from
                a model with one head.
            targets: for each head its targets.
            valid: for some heads where to look.

        Raises:
            ValueError: outputs or targets of a head are missing, or there are outputs of a head that has no loss.
        """
        if isinstance(outputs, Tensor):
            outputs = dict.fromkeys(list(self.weights)[:1], outputs)
        scales: dict[str, dict[str, Tensor]] = {}
        for key, output in outputs.items():
            scales.setdefault(key.partition("@")[0], {})[key] = output
        if set(scales) != set(self.weights):
            raise ValueError(f"outputs must be of the heads {', '.join(self.weights)}, got {', '.join(scales)}")
        wanted = [name for name, weight in self.weights.items() if weight]
        missing = [name for name in wanted if name not in targets]
        if missing:
            raise ValueError(f"targets must hold {', '.join(wanted)}, got {', '.join(targets) or 'none'}")
        return {name: self.losses[name](scales[name], targets[name], (valid or {}).get(name)) for name in wanted}

    def forward(
        self,
        outputs: Tensor | Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The weighted sum of `parts`, a scalar."""
        parts = self.parts(outputs, targets, valid)
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()


def resize_targets(targets: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest values of (B, *spatial) or (B, K, *spatial) on a grid of another size; their type is kept."""
    axes = len(size)
    if targets.shape[targets.ndim - axes :] == tuple(size):
        return targets
    channels, spatial = targets.shape[: targets.ndim - axes], targets.shape[targets.ndim - axes :]
    planes = targets.to(torch.promote_types(targets.dtype, torch.float32)).reshape(channels[0], -1, *spatial)
    return F.interpolate(planes, tuple(size), mode="nearest-exact").reshape(*channels, *size).to(targets.dtype)
