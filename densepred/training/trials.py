"""Short trials before a training: which learning rate, and can the network learn a batch by heart at all?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from densepred.cases.case import collect
from densepred.cases.folds import split
from densepred.cases.plan import make_plan
from densepred.config import Config
from densepred.device import needing_memory
from densepred.figures import COLORS, INK, new_figure, save_png
from densepred.progress import progress
from densepred.training.finetune import rehearse
from densepred.training.learner import Learner
from densepred.training.loop import anchored, prepared
from densepred.training.run import Run
from densepred.training.trainer import Trainer

_LOWEST, _HIGHEST, _STEPS = 1e-6, 10.0, 120
_KEPT = 0.8
"""Of the smoothed loss, from step to step."""
_BOTTOM = 0.05
"""Share of the whole fall of the smoothed loss that counts as its bottom."""
_GONE = 4.0
"""A loss so many times the best one ends the search."""
_LEARNT = 0.5
"""Share of its first value below which the loss of one batch counts as learnt."""


@dataclass(frozen=True)
class RateSearch:
    """What a learning-rate range test found.

    Args:
        rates: tried, one a step.
        losses: of each step, before it is taken.
        smooth: these, smoothed, without what comes before.
        suggested: the rate to train with, or None where the loss never fell.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smooth: tuple[float, ...]
    suggested: float | None


def find_rate(config: Config, picture: str | Path) -> RateSearch:
    """Raise the learning rate from step to step until the loss explodes, and draw the loss over it.

    The suggested rate is a tenth of the one at which the smoothed loss comes to its bottom.

    Args:
        config: the recipe.
        picture: the PNG to write.

    Raises:
        DensepredError: as `densepred.train`.

    Source: Smith 2017 (arXiv:1506.01186), section 3.3, with an exponential rise.
    """
    rates, losses = [], []
    signed = any(head.variance for head in config.heads.values())
    with tempfile.TemporaryDirectory() as folder, progress(_STEPS, "finding the learning rate") as advance:
        trainer = _ready(config, Path(folder))
        for step in range(_STEPS):
            rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (_STEPS - 1))
            loss = _step(trainer.learner, trainer, step, step, rate)
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            if step > 10 and gone(losses, signed):
                break
            advance(1, rate=rate, loss=loss)
    found = judge_rates(rates, losses)
    _draw(found, picture)
    return found


def gone(losses: Sequence[float], signed: bool) -> bool:
    """Has the loss exploded? One that becomes negative, a logarithm of densities, is counted from its first.

    Example:
        >>> gone([1.0, 0.1, 0.5], False), gone([1.0, -2.0, 3.0], True), gone([1.0, -2.0, 20.0], True)
        (True, False, True)
    """
    first, best = losses[0], min(losses)
    risen = first + _GONE * max(first - best, abs(first))
    return losses[-1] > (risen if signed or best <= 0 else _GONE * best)


def judge_rates(rates: Sequence[float], losses: Sequence[float]) -> RateSearch:
    """Smooth the losses of a range test and read the rate to train with off them.

    Example:
        >>> found = judge_rates([0.001, 0.01, 0.1, 1.0], [1.0, 0.9, 0.1, 9.0])
        >>> round(found.suggested, 4)
        0.01
    """
    smooth, mean = [], 0.0
    for step, loss in enumerate(losses):
        mean = _KEPT * mean + (1 - _KEPT) * loss
        smooth.append(mean / (1 - _KEPT ** (step + 1)))
    if not smooth or min(smooth) >= smooth[0]:
        return RateSearch(tuple(rates), tuple(losses), tuple(smooth), None)
    bottom = min(smooth) + _BOTTOM * (smooth[0] - min(smooth))
    suggested = rates[next(step for step, loss in enumerate(smooth) if loss <= bottom)] / 10
    return RateSearch(tuple(rates), tuple(losses), tuple(smooth), suggested)


def overfit_one_batch(config: Config, steps: int) -> list[float]:
    """Train on the first batch alone, without schedule: its loss must fall towards nothing, or something is broken.

    Args:
        config: the recipe.
        steps: how many.

    Returns:
        The loss before each step and after the last.

    Raises:
        DensepredError: as `densepred.train`.
    """
    losses = []
    with tempfile.TemporaryDirectory() as folder, progress(steps + 1, "learning one batch") as advance:
        trainer = _ready(config, Path(folder))
        rate = trainer.course.rate(config.optimizer.model_copy(update={"warmup": 0, "schedule": "constant"}), 0)
        for step in range(steps + 1):
            losses.append(_step(trainer.learner, trainer, 0, step, rate))
            advance(1, loss=losses[-1])
    return losses


def verdict(losses: Sequence[float]) -> tuple[bool, str]:
    """Was the batch learnt: yes or no, and a line that says so.

    Example:
        >>> verdict([2.0, 1.0, 0.1])
        (True, 'PASSED: the loss of one batch fell from 2.000 to 0.100 in 2 steps')
        >>> verdict([-1.0, -0.6])[0]
        False
    """
    first, last = losses[0], losses[-1]
    learnt = math.isfinite(last) and first - last > (1 - _LEARNT) * abs(first)
    how = "fell" if last < first else "went"
    text = f"the loss of one batch {how} from {first:.3f} to {last:.3f} in {len(losses) - 1} steps"
    return learnt, f"{'PASSED' if learnt else 'FAILED'}: {text}"


def _ready(config: Config, folder: Path) -> Trainer:
    """A trainer in a temporary run directory."""
    config = anchored(config)
    rehearse(config)
    cases = collect(config.data)
    run = Run(folder, config, make_plan(config, split(cases, config.data)[0]))
    trainer = Trainer(run, *prepared(run, cases))
    trainer.learner.start()
    return trainer


def _step(learner: Learner, trainer: Trainer, batch: int, step: int, rate: float) -> float:
    """The loss of a batch, and the step that it asks for."""
    steps = trainer.config.training.steps
    drawn = trainer.objective.draw(*divmod(batch, steps))
    with needing_memory("lower patch.size or patch.batch, or raise training.accumulate"):
        loss, norm = learner.gradients(batch, drawn)
    if math.isfinite(loss) and math.isfinite(norm):
        learner.update(step, rate, averaging=True)
    else:
        learner.engine.discard()
    return loss


def _draw(found: RateSearch, picture: str | Path) -> None:
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="#BBBBBB", linewidth=1, label="loss of a step")
    axes.plot(found.rates, found.smooth, color=INK, linewidth=2, label="smoothed")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=INK)
    axes.set_ylabel("training loss", color=INK)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if found.suggested is not None:
        text = f"suggested: {found.suggested:.2g}"
        axes.axvline(found.suggested, color=COLORS[6], linestyle="--", linewidth=1.5, label=text)
    if found.smooth:
        low, high = min(found.losses), found.smooth[0]
        axes.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.25 * (high - low) + 0.05)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    save_png(figure, picture)
