"""The optimizer and training sections: how, how long and on what a network is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from densepred.config.base import Device, Positive, Section


class OptimizerConfig(Section):
    """The optimiser, its schedule and the moving average of the weights."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Initial learning rate; by default 0.01 for sgd, 0.001 for adamw."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    """Weight decay (decoupled in adamw)."""
    schedule: Literal["polynomial", "cosine", "constant"] | None = None
    """Course of the learning rate over all steps; by default polynomial (power 0.9) for sgd, cosine for adamw."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    clip: Annotated[float, Field(ge=0)] = 12.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights, which is what is validated and kept; 0 switches it off."""


class TrainingConfig(Section):
    """Length, seed, device and what is written."""

    epochs: Positive = 100
    """Number of epochs."""
    steps: Positive = 250
    """Steps of an epoch."""
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
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that prepare batches ahead; the result does not depend on their number."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""
