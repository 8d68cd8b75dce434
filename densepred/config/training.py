"""The optimizer and training sections: how, how long and on what a network is trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from densepred.config.base import Device, Positive, Section, Share

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of "30min", "2h", "1h 30min", "90s" or "1d".

    Raises:
        ValueError: anything else, or no time at all.

    Example:
        >>> parse_duration("1h 30min")
        5400.0
    """
    if not re.fullmatch(r"(\s*[0-9]*\.?[0-9]+\s*[a-z]+)+\s*", text):
        raise ValueError(f"{text!r} is no duration: write it as 30min, 2h, 1h 30min or 90s")
    seconds = 0.0
    for number, unit in re.findall(r"([0-9]*\.?[0-9]+)\s*([a-z]+)", text):
        if unit not in _UNITS:
            raise ValueError(f"{text!r} has the unknown unit {unit!r}; there are s, min, h and d")
        seconds += float(number) * _UNITS[unit]
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time at all")
    return seconds


def _duration(text: str) -> str:
    parse_duration(text)
    return text


Duration = Annotated[str, AfterValidator(_duration)]
"""A length of time, such as 30min."""


class OptimizerConfig(Section):
    """The optimiser, its schedule and the averages of the weights."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Initial (of one_cycle: largest) learning rate; by default 0.01 for sgd, 0.001 for adamw."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    """Weight decay (decoupled in adamw)."""
    schedule: Literal["polynomial", "cosine", "one_cycle", "step", "plateau", "constant"] | None = None
    """Course of the learning rate over the training; by default polynomial (power 0.9) for sgd, cosine for adamw."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    cycles: Positive = 1
    """Times that the cosine schedule starts anew; the weights at the end of each cycle are kept in `snapshots`."""
    drops: Annotated[tuple[Share, ...], Field(strict=False)] = (0.5, 0.75)
    """Of the step schedule: shares of the training at which the learning rate drops."""
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of a drop of the step and plateau schedules."""
    plateau: Positive = 10
    """Of the plateau schedule: validations without a better score before a drop."""
    clip: Annotated[float, Field(ge=0)] = 12.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights, which is what is validated and kept; 0 switches it off."""
    swa: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training, at its end, over which the epochs' weights are averaged evenly at a constant rate."""
    swa_lr: Annotated[float, Field(gt=0)] | None = None
    """That rate; by default what the schedule has come to when the averaging starts."""


class TransferConfig(Section):
    """How pretrained layers learn (see `model.pretrained`)."""

    freeze: Annotated[int, Field(ge=0)] | Literal["encoder"] = 0
    """Stages of the encoder, from the image on, that do not learn; or `encoder` for all."""
    unfreeze: Positive | None = None
    """Epochs after which the last frozen stage begins to learn, and so on; without it they stay frozen."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of pretrained layers, relative to that of new ones."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor for each stage of the encoder before the last, towards the image."""


class TrainingConfig(Section):
    """Length, seed, device and what is written."""

    epochs: Positive = 100
    """Number of epochs; with a budget they are as many as there is time for."""
    steps: Positive = 250
    """Steps of an epoch."""
    budget: Duration | None = None
    """Time for the whole training, such as 30min: the schedule, the last validation and the weights end with it."""
    patience: Positive | None = None
    """Validations without a better score after which training ends early; by default it never does."""
    seed: int = 0
    """Seed of weights, sampling and augmentation; every random number is a function of (seed, epoch, sample)."""
    validate_every: Positive = 1
    """Epochs between validations on whole volumes; the last epoch is always validated."""
    checkpoint_every: Positive = 250
    """Steps between checkpoints; a killed run loses at most so many."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware computes in it."""
    form: Literal["auto", "plain", "fast", "lean"] = "auto"
    """fast: channels-last and compiled (needs a C++ compiler). lean: less memory by gradient checkpointing. plain."""
    accumulate: Positive = 1
    """Parts that a batch is computed in, one after the other, in so much less memory; their losses are averaged."""
    shard: bool = False
    """With several processes: share out weights, gradients and the optimiser's state (FSDP), not only the batch."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that prepare batches ahead; the result does not depend on their number."""
    transfer: TransferConfig = TransferConfig()
    """How pretrained layers learn."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Field(strict=False)] = ()
    """Where else to log: wandb, mlflow (the extra `trackers`)."""
