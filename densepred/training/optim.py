"""The optimiser and the averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from densepred.config import OptimizerConfig, TransferConfig
from densepred.models.surgery import is_decayed, parameter_groups
from densepred.training.schedules import DEFAULT_LR


def make_optimizer(model: nn.Module, config: OptimizerConfig, transfer: TransferConfig | None = None) -> Optimizer:
    """The optimiser named in the configuration; biases, normalisation and layer scales are not decayed.

    Args:
        model: what of it learns now is what the optimiser knows.
        config: name, rate, momentum and decay.
        transfer: rates of pretrained layers relative to those of new ones; all equal if None.
    """
    transfer = transfer or TransferConfig()
    lr = config.lr or DEFAULT_LR[config.name]
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]]
    if transfer.lr < 1 or transfer.layer_decay < 1:
        found = parameter_groups(model, lr, transfer.lr, config.weight_decay, transfer.layer_decay)
        groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in found]
    else:
        kernels = [p for name, p in learning.items() if is_decayed(name, p)]
        others = [p for name, p in learning.items() if not is_decayed(name, p)]
        groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return AdamW(groups, lr=lr)
    return SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)


class MovingAverage:
    """An average of a model's weights and running statistics; counters are copied.

    Args:
        model: whose weights are followed.
        decay: share of the old average kept at each step; less in the first steps, min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` (from 0), exponentially."""
        self._blend(model.state_dict(), min(self.decay, (1 + step) / (10 + step)))

    def take(self, model: nn.Module, taken: int) -> None:
        """Take in the weights so that they and the `taken` ones before have equal shares; 0 starts anew."""
        self._blend(model.state_dict(), taken / (taken + 1))

    @torch.no_grad()
    def _blend(self, current: Mapping[str, Tensor], keep: float) -> None:
        averaged = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[n] for n in averaged], [current[n] for n in averaged], 1 - keep)
        for name in current.keys() - set(averaged):
            self.state[name].copy_(current[name])
