"""Optimiser, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from densepred.config import OptimizerConfig
from densepred.models.surgery import is_decayed

DEFAULT_LR = {"sgd": 1e-2, "adamw": 1e-3}
DEFAULT_SCHEDULE = {"sgd": "polynomial", "adamw": "cosine"}


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser named in the configuration; biases, normalisation and layer scales are not decayed."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kernels = [p for name, p in learning if is_decayed(name, p)]
    others = [p for name, p in learning if not is_decayed(name, p)]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    lr = config.lr or DEFAULT_LR[config.name]
    if config.name == "adamw":
        return AdamW(groups, lr=lr)
    return SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of one step: a function of the step alone, so there is no state to lose.

    Args:
        config: name, initial rate, schedule and warm-up.
        step: from 0.
        total: steps of the whole training.

    Source: polynomial with power 0.9 as in nnU-Net; cosine as in Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    lr = config.lr or DEFAULT_LR[config.name]
    if step < config.warmup:
        return lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(total - config.warmup, 1)
    match config.schedule or DEFAULT_SCHEDULE[config.name]:
        case "polynomial":
            return lr * (1 - done) ** 0.9
        case "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * done))
        case _:
            return lr


class MovingAverage:
    """An exponential moving average of a model's weights and running statistics; counters are copied.

    Args:
        model: whose weights are followed.
        decay: share of the old average kept at each step; less in the first steps, min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        averaged = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[n] for n in averaged], [current[n] for n in averaged], 1 - keep)
        for name in current.keys() - set(averaged):
            self.state[name].copy_(current[name])
