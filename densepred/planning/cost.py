"""What a training will cost on this machine: memory, disk, seconds and hours, from a trial of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from densepred.cases.resample import resampled_shape
from densepred.config import Config
from densepred.errors import InputError
from densepred.planning.fingerprint import Fingerprint
from densepred.planning.trial import Trial

VALIDATION_SHARE = 0.1
"""Of the training's time that validations may take; they are that far apart."""
FORWARD = 1 / 3
"""Of a training step that is the forward pass."""
TRIED = 2
"""Cases that a trial prepares and learns from: those whose size is nearest to the median."""


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        memory: bytes at most, of the process or of the GPU.
        disk: bytes of the prepared cases.
        prepare: seconds to prepare them.
        step: seconds of one.
        validation: seconds of one.
        device: where.
        scaled: how many times larger a step is than that of the trial.
    """

    memory: float
    disk: float
    prepare: float
    step: float
    validation: float
    device: str
    scaled: float = 1.0

    def epoch(self, config: Config) -> float:
        """Seconds of an epoch, without validation."""
        return self.step * config.training.steps

    def total(self, config: Config) -> float:
        """Seconds of the whole training."""
        training = config.training
        validations = math.ceil(training.epochs / training.validate_every) if self.validation else 0
        return self.prepare + training.epochs * self.epoch(config) + validations * self.validation

    def steps_within(self, seconds: float) -> int:
        """How many there is time for, beside preparing the cases and validating now and then, at least at the end."""
        left = seconds - self.prepare
        return max(int((left - max(VALIDATION_SHARE * left, self.validation)) / self.step), 1)


def typical_cases(fingerprint: Fingerprint) -> list[str]:
    """The ids of those to try on."""
    sizes = {case.id: math.prod(case.shape) for case in fingerprint.cases}
    median = sorted(sizes.values())[len(sizes) // 2]
    return sorted(sizes, key=lambda case: (abs(sizes[case] - median), case))[:TRIED]


def shapes(fingerprint: Fingerprint, config: Config) -> list[tuple[int, ...]]:
    """Of the prepared cases."""
    found = []
    for case in fingerprint.cases:
        spacing = config.data.spacing
        target = fingerprint.median("spacing") if spacing == "median" else spacing or case.spacing
        if len(target) < len(case.spacing):  # planes of volumes: along the axis across them nothing is resampled
            axis = getattr(config.patch, "axis", 0)
            target = (*target[:axis], case.spacing[axis], *target[axis:])
        found.append(resampled_shape(case.shape, case.spacing, target))
    return found


def foretold(trial: Trial, config: Config, fingerprint: Fingerprint, scaled: float = 1.0) -> Cost:
    """What the whole training takes.

    Args:
        trial: a few steps of it.
        config: the recipe.
        fingerprint: of the set.
        scaled: how many times larger a step of the recipe is than that of the trial.
    """
    every = shapes(fingerprint, config)
    voxels = sum(math.prod(shape) for shape in every)
    step = trial.step * scaled
    validation = validated(fingerprint, config) * sum(_windows(shape, config) for shape in every) / len(every)
    validation *= step / config.patch.batch * FORWARD * 2 ** len(config.inference.mirror)
    memory = trial.start + (trial.peak - trial.start) * scaled
    disk, prepare = trial.stored * voxels, trial.prepare * voxels
    return Cost(memory, disk, prepare, step, validation, trial.device, scaled)


def validated(fingerprint: Fingerprint, config: Config) -> int:
    """Cases that are kept for validation."""
    data = config.data
    if data.fold == "all":
        return 0
    if data.splits:
        try:
            return len(json.loads((Path(data.root) / data.splits).read_text("utf-8-sig"))[data.fold]["val"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = f"fold {data.fold} cannot be read from it"
            raise InputError(what, "correct data.splits", Path(data.root) / data.splits) from error
    return max(1, len(fingerprint.cases) // data.folds)


def with_length(config: Config, cost: Cost, epochs: int, steps: int) -> Config:
    """The recipe with another length, and validations so far apart that they take their share of the time."""
    every = math.ceil(cost.validation / (VALIDATION_SHARE * cost.step * steps)) if cost.validation else 1
    length = {"epochs": epochs, "steps": steps, "validate_every": min(max(1, every), epochs)}
    return config.model_copy(update={"training": config.training.model_copy(update=length)})


def lighter(config: Config, by: float) -> tuple[Config, float]:
    """A recipe with steps about `by` times smaller, by fewer patches and then smaller ones; and by how many times.

    Example:
        >>> from densepred.config import DataConfig, PatchConfig
        >>> config = Config(data=DataConfig(dataset="a"), patch=PatchConfig(size=(128, 128, 128), batch=4))
        >>> found, factor = lighter(config, 8)
        >>> found.patch.size, found.patch.batch, factor
        ((64, 128, 128), 1, 8.0)
    """
    batch, size = config.patch.batch, list(config.patch.size)
    work = before = batch * math.prod(size)
    if by > 1:
        batch = max(1, int(batch / by))
        work = batch * math.prod(size)
    while before / work < by and max(size) > 16:
        largest = size.index(max(size))
        size[largest] = max(16, size[largest] // 2)
        work = batch * math.prod(size)
    patch = config.patch.model_copy(update={"batch": batch, "size": tuple(size)})
    return config.model_copy(update={"patch": patch}), before / work


def _windows(shape: Sequence[int], config: Config) -> int:
    """Forward passes for one image."""
    size = config.inference.window or config.patch.size
    axis = getattr(config.patch, "axis", None)
    planes = shape[axis] if isinstance(axis, int) and len(shape) > len(size) else 1
    inner = [n for number, n in enumerate(shape) if len(shape) == len(size) or number != axis]
    stride = [max(1.0, n * (1 - config.inference.overlap)) for n in size]
    along = [1 + math.ceil(max(0, n - w) / s) for n, w, s in zip(inner, size, stride, strict=True)]
    return planes * math.prod(along)
