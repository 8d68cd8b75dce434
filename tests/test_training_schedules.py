"""Learning rates against torch's schedulers and closed forms; budgets against a clock of our own."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from densepred.config import Config, OptimizerConfig, TrainingConfig, parse_duration
from densepred.config.contradictions import contradictions
from densepred.training.schedules import Course, learning_rate, scheduled


def test_one_cycle_meets_torchs():
    """torch counts its two phases in steps less one; ours is the same curve over shares."""
    config, total = OptimizerConfig(lr=0.1, schedule="one_cycle"), 100
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total, pct_start=0.3)
    top, end = 0.3 * total - 1, total - 1
    for step in range(total):
        done = 0.3 * step / top if step <= top else 0.3 + 0.7 * (step - top) / (end - top)
        assert scheduled(config, step, done) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        if step + 1 < total:
            peer.step()


def test_steps_meet_torchs():
    config = OptimizerConfig(lr=0.1, schedule="step", drops=(0.3, 0.9), drop=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    peer = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 90], 0.5)
    for step in range(100):
        assert learning_rate(config, step, 100) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


def test_restarts_meet_torchs():
    config = OptimizerConfig(lr=0.1, schedule="cosine", cycles=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    peer = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    course = Course(21)
    for step in range(21):
        assert learning_rate(config, step, 21) == pytest.approx(peer.get_last_lr()[0])
        assert course.cycle(config, step) == step // 7
        optimizer.step()
        peer.step()
    assert course.cycle(config, 21) == 2  # the last cycle's end is the training's


def test_the_rate_is_held_while_weights_are_averaged():
    config = OptimizerConfig(lr=0.1, schedule="polynomial", swa=0.25)
    held = 0.1 * 0.25**0.9
    assert [learning_rate(config, step, 100) for step in (80, 99)] == pytest.approx([held, held])
    assert learning_rate(config, 50, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert learning_rate(config.model_copy(update={"swa_lr": 0.03}), 80, 100) == 0.03


def test_a_budget_ends_the_schedule_with_the_time():
    config = OptimizerConfig(lr=1.0, schedule="cosine")
    course = Course(total=1000, budget=100.0)
    course.tick(47.5)  # of 95: five are kept until a validation has been timed
    assert course.share(3) == pytest.approx(0.5)
    assert course.rate(config, 3) == pytest.approx(0.5)
    course.keep(15.0)  # 18 are kept
    course.tick(41.0)
    assert course.share(3) == pytest.approx(0.5)
    assert not course.over(10**6)
    course.tick(82.0)
    assert course.over(3)
    assert course.rate(config, 3) == pytest.approx(0.0)


def test_warm_up_counts_steps_with_a_budget_too():
    config = OptimizerConfig(lr=1.0, warmup=10)
    assert Course(total=10, budget=100.0).rate(config, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30min", 1800), ("2h", 7200), ("1h 30min", 5400), ("90s", 90), ("0.5h", 1800), ("1d", 86400)]
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "min", "3 weeks", "0s", "-1h", ""])
def test_what_is_no_duration(text: str):
    with pytest.raises(ValidationError, match=r"duration|unit|no time"):
        TrainingConfig(budget=text)


@pytest.mark.parametrize(
    ("optimizer", "training", "path"),
    [
        ({"cycles": 3}, {}, "optimizer.cycles"),
        ({"schedule": "cosine", "cycles": 3, "swa": 0.2}, {}, "optimizer.swa"),
        ({}, {"accumulate": 3}, "training.accumulate"),
        ({}, {"patience": 3}, "training.patience"),
        ({"schedule": "plateau"}, {}, "optimizer.schedule"),
        ({}, {"transfer": {"unfreeze": 2}}, "training.transfer.unfreeze"),
    ],
)
def test_settings_that_do_not_go_together(optimizer: dict, training: dict, path: str):
    data = {"images": "a/*.nii.gz", "labels": "b/{id}.nii.gz", "classes": {0: "background", 1: "x"}, "fold": "all"}
    config = Config.model_validate({"data": data, "optimizer": optimizer, "training": training})
    assert path in [".".join(where) for where, _ in contradictions(config)]
    assert math.isfinite(learning_rate(config.optimizer, 0, 10))
