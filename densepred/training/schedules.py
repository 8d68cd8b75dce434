"""Learning rates over a training, and how far a training is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from densepred.config import OptimizerConfig

DEFAULT_LR = {"sgd": 1e-2, "adamw": 1e-3}
DEFAULT_SCHEDULE = {"sgd": "polynomial", "adamw": "cosine"}
_RISE, _FROM, _TO = 0.3, 25.0, 1e4
_UNKNOWN = 0.05
"""Share of a time budget kept for the last validation before one has been timed."""


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of one step: a function of the step alone, so there is no state to lose.

    Args:
        config: name, initial rate, schedule and warm-up.
        step: from 0.
        total: steps of the whole training.

    Example:
        >>> from densepred.config import OptimizerConfig
        >>> learning_rate(OptimizerConfig(schedule="step", lr=0.1, drops=(0.5,)), 6, 10)
        0.01
    """
    return scheduled(config, step, (step - config.warmup) / max(total - config.warmup, 1))


def scheduled(config: OptimizerConfig, step: int, done: float) -> float:
    """The rate of a step, from 0, when a share `done` of what follows the warm-up is over; `plateau` starts from it.

    Source: polynomial with power 0.9 as in nnU-Net; cosine, with restarts, as in Loshchilov and Hutter 2017
    (arXiv:1608.03983); one cycle as in Smith and Topin 2018 (arXiv:1708.07120), with torch's constants; the constant
    rate while weights are averaged as in Izmailov et al. 2018 (arXiv:1803.05407).
    """
    lr = config.lr or DEFAULT_LR[config.name]
    if step < config.warmup:
        return lr * (step + 1) / config.warmup
    done = max(done, 0.0)
    if config.swa and done > 1 - config.swa:
        if config.swa_lr is not None:
            return config.swa_lr
        done = 1 - config.swa
    match config.schedule or DEFAULT_SCHEDULE[config.name]:
        case "polynomial":
            return lr * (1 - done) ** 0.9
        case "cosine":
            place = done * config.cycles - _begun(done, config.cycles)
            return lr * 0.5 * (1 + math.cos(math.pi * max(place, 0.0)))
        case "one_cycle":
            if done < _RISE:
                return _eased(lr / _FROM, lr, done / _RISE)
            return _eased(lr, lr / _FROM / _TO, (done - _RISE) / (1 - _RISE))
        case "step":
            return lr * config.drop ** sum(done >= place for place in config.drops)
        case _:
            return lr


def _begun(done: float, cycles: int) -> int:
    """How many cycles are over; of the last none begins anew."""
    return min(math.floor(done * cycles + 1e-9), cycles - 1)


def _eased(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Course:
    """How far a training is: by its steps, or by its time where it has a budget.

    Args:
        total: steps of the whole training; with a budget they do not end it.
        warmup: steps of the warm-up.
        budget: seconds for all of it, or None.
        elapsed: seconds that it has taken.
        reserve: seconds kept for the last validation and for writing the results.
        reached: the largest share there was, so that it never falls.
    """

    total: int
    warmup: int = 0
    budget: float | None = None
    elapsed: float = 0.0
    reserve: float = 0.0
    reached: float = 0.0

    def tick(self, elapsed: float) -> None:
        """So many seconds are over."""
        self.elapsed = elapsed
        if self.budget is not None:
            reserve = self.reserve or _UNKNOWN * self.budget
            share = elapsed / (self.budget - reserve) if reserve < self.budget else 1.0
            self.reached = min(max(self.reached, share), 1.0)

    def keep(self, seconds: float) -> None:
        """The end of an epoch took so long, validation included: as much, and a little more, is kept for the last."""
        self.reserve = max(self.reserve, 1.2 * seconds)

    def share(self, step: int) -> float:
        """How much of the training is over, 0 to 1, before `step`."""
        return step / self.total if self.budget is None else self.reached

    def over(self, step: int) -> bool:
        """Is that all of it?"""
        return self.share(step) >= 1

    def rate(self, config: OptimizerConfig, step: int) -> float:
        """The learning rate of a step."""
        if self.budget is None:
            return learning_rate(config, step, self.total)
        return scheduled(config, step, self.reached)

    def cycle(self, config: OptimizerConfig, step: int) -> int:
        """How many of the cycles of a cosine, but for the last, are over before `step`."""
        done = self.reached if self.budget is not None else (step - self.warmup) / max(self.total - self.warmup, 1)
        return _begun(max(done, 0.0), config.cycles)
