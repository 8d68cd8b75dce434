"""The heads of a recipe's network, from the recipe and the plan of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densepred.cases.plan import Plan
from densepred.cases.targets import Target
from densepred.config import Config, HeadConfig, TargetConfig
from densepred.config.tasks import SEGMENTATION, kind_of
from densepred.models.build import Heads
from densepred.models.dense import DensePredictor
from densepred.models.heads import Classification, HeadSpec, Regression, Scalar, Segmentation


def heads_of(config: Config, plan: Plan) -> Heads:
    """What the network is built with: the number of classes where these are all, else heads by name."""
    return specs_of(config, plan) if plan.targets or plan.regions else len(plan.classes)


def untrained_heads_of(config: Config, classes: int) -> Heads:
    """What the network is built with, as far as a recipe tells without its data: numbers are not standardised.

    Args:
        config: the recipe.
        classes: of voxels. A target has two where the training cases tell which (`classes: auto`).
    """
    targets = {
        name: Target(kind=kind_of(one), classes=_names_of(one), unit=one.unit)
        for name, one in config.data.targets.items()
    }
    regions = len(config.data.regions)
    classes = classes if config.data.segments else 0
    return _specs(config, classes, regions, targets, len(config.data.covariates)) if targets or regions else classes


def _names_of(target: TargetConfig) -> tuple[str, ...]:
    return ("0", "1") if target.classes == "auto" else target.classes or ()


def specs_of(config: Config, plan: Plan) -> dict[str, HeadSpec]:
    """What is predicted, by name: the segmentation first, then the targets in the order of the recipe."""
    return _specs(config, len(plan.classes), len(plan.regions), plan.targets, len(plan.covariates))


def _specs(
    config: Config, classes: int, regions: int, targets: Mapping[str, Target], covariates: int
) -> dict[str, HeadSpec]:
    specs: dict[str, HeadSpec] = {}
    if classes:
        specs[SEGMENTATION] = Segmentation(regions or classes, regions=bool(regions))
    for name, target in targets.items():
        head = config.heads.get(name, HeadConfig())
        numbers: dict[str, Any] = {"unit": target.unit, "positive": head.positive, "variance": head.variance}
        numbers |= {"mean": target.mean, "deviation": target.deviation}
        if target.kind == "regression":
            specs[name] = Regression(**numbers)
        elif target.kind == "scalar":
            specs[name] = Scalar(**numbers, covariates=covariates, hidden=head.hidden)
        else:
            specs[name] = Classification(len(target.classes), covariates, head.hidden)
    return specs


def chosen(specs: Mapping[str, HeadSpec], name: str | None) -> str | None:
    """The head whose map is written: the one asked for, else the first for voxels; None if there is none."""
    dense = [one for one, spec in specs.items() if spec.dense]
    return name if name in dense else next(iter(dense), None)


def whole(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """An image as a head for whole images sees it: in the middle of zeros where it is smaller than the patches were.

    Args:
        image: `(C, *spatial)`, prepared.
        size: of the patches.

    Returns:
        `(C, *spatial)`, at least `size` along each axis.

    Example:
        >>> whole(np.ones((1, 2, 5)), (4, 4)).shape
        (1, 4, 5)
    """
    missing = [max(wanted - length, 0) for length, wanted in zip(image.shape[1:], size, strict=True)]
    if not any(missing):
        return np.asarray(image)
    return np.pad(image, [(0, 0), *((short // 2, short - short // 2) for short in missing)])


@torch.inference_mode()
def of_whole(
    model: DensePredictor, image: np.ndarray, covariates: np.ndarray, config: Config, device: torch.device
) -> dict[str, Tensor]:
    """What heads for whole images say of one.

    Args:
        model: with such heads alone, in evaluation mode or not, on the device.
        image: `(C, *spatial)`, prepared.
        covariates: `(F,)`, standard.
        config: the recipe.
        device: where to compute.

    Returns:
        Name -> (1, K), on the CPU; in float32 whatever the precision, as the image is gone through once.
    """
    x = torch.from_numpy(np.ascontiguousarray(whole(image, config.patch.size), np.float32))[None].to(device)
    beside = torch.from_numpy(covariates)[None].to(device) if len(covariates) else None
    training = model.training
    try:
        outputs = model.eval()(x, beside)
    finally:
        model.train(training)
    outputs = outputs if isinstance(outputs, dict) else {next(iter(model.specs)): outputs}
    return {name: one.float().cpu() for name, one in outputs.items()}
