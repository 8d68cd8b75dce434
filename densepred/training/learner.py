"""A network that learns: its optimiser, its averages, what of it is frozen, and their state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densepred.config import Config
from densepred.training import checkpoint, ranks
from densepred.training.engine import Engine, seeded, synchronised
from densepred.training.finetune import Freezer
from densepred.training.objective import Drawn, Objective
from densepred.training.optim import MovingAverage, make_optimizer

Tensors = dict[str, dict[str, Tensor]]


def learns_partly(config: Config) -> bool:
    """May some parameters get no gradient: frozen ones, of heads without weight, of foreign networks' unused layers?"""
    foreign = bool(config.model.network) or config.model.decoder.startswith("smp.")
    return foreign or bool(config.training.transfer.freeze) or any(not one.weight for one in config.heads.values())


class Learner:
    """Takes the steps of a training; every step is a function of (seed, step) and the weights before it.

    Args:
        config: the recipe.
        objective: what to learn.
        model: the network, trained in place.
        device, precision: where to compute, and in which numbers.
    """

    def __init__(
        self, config: Config, objective: Objective, model: nn.Module, device: torch.device, precision: torch.dtype
    ) -> None:
        self.config, self.objective, self.model = config, objective, model
        self.device, self.precision = device, precision
        self.freezer = Freezer(model, config.training.transfer)
        self.samples = ranks.samples(config.patch.batch, config.training.accumulate)
        self.averaged = 0
        self.sharded = config.training.shard and ranks.count() > 1
        self.optimizer: Optimizer
        self.average: MovingAverage
        self.engine: Engine

    def start(self, tensors: Tensors | None = None) -> None:
        """Make ready for steps, from the state that `tensors()` gave if there is one."""
        training = self.config.training
        if tensors is not None:
            self.model.load_state_dict(tensors["model"])
        if self.sharded:
            ranks.shard(synchronised(self.model.to(self.device), self.device), self.device)
        self.optimizer = make_optimizer(self.model, self.config.optimizer, training.transfer)
        form, partly = training.form, learns_partly(self.config)
        self.engine = Engine(self.model, self.optimizer, self.device, self.precision, form, partly)
        self.average = MovingAverage(self.model, self.config.optimizer.ema)
        if tensors is not None:
            checkpoint.load_optimizer(self.optimizer, tensors["optimizer"], ranks.like)
            for name, value in tensors["average"].items():
                self.average.state[name].copy_(ranks.like(value, self.average.state[name]))

    def gradients(self, step: int, drawn: Drawn) -> tuple[float, float]:
        """Loss and gradient norm of a batch; the gradients, clipped, stay in the parameters."""
        self.freezer.at(step // self.config.training.steps)
        parts = []
        for samples in self.samples:
            image, targets = self.objective.tensors(drawn, samples, self.device)
            parts.append((image, self._loss_of(ranks.whole(targets))))
        torch.manual_seed(seeded(self.config.training.seed, step, *([ranks.rank()] if ranks.rank() else [])))
        return self.engine.gradients(parts, self.config.optimizer.clip)

    def _loss_of(self, targets: Any) -> Any:
        return lambda outputs: self.objective.loss(outputs, targets)

    def update(self, step: int, rate: float, averaging: bool) -> None:
        """Take the step at a learning rate, and follow it by the moving average unless `averaging` evenly.

        A training that was made longer may follow once more what it averaged evenly before.
        """
        self.engine.update(rate)
        if not averaging:
            self.averaged = 0
            self.average.update(self.model, step)

    def take(self) -> None:
        """Take the weights into the even average, which starts anew with the first."""
        self.average.take(self.model, self.averaged)
        self.averaged += 1

    def weights(self) -> dict[str, Tensor]:
        """What to validate and keep: the average if there is one."""
        averages = self.config.optimizer.ema > 0 or self.averaged > 0
        return ranks.full(self.average.state if averages else self.model.state_dict())

    def judged(self) -> nn.Module:
        """A copy of the network with these weights."""
        model = self.objective.network().to(self.device) if self.sharded else copy.deepcopy(self.model)
        model.load_state_dict(self.weights())
        return model

    def tensors(self) -> Tensors:
        """All that a checkpoint must hold."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "average": self.average.state,
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
        }
        return {name: ranks.full(group) for name, group in groups.items()}
