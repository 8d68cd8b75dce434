"""Schedules against their closed forms; the moving average against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from densepred.config import OptimizerConfig
from densepred.models.encoders.convnext import ConvNeXtEncoder
from densepred.training.engine import Engine
from densepred.training.optim import MovingAverage, make_optimizer
from densepred.training.schedules import learning_rate


def test_polynomial_schedule_is_nnunets():
    config = OptimizerConfig(lr=0.01)
    for step in (0, 1, 500, 999):
        assert learning_rate(config, step, 1000) == pytest.approx(0.01 * (1 - step / 1000) ** 0.9)


def test_cosine_schedule_with_warmup_meets_torchs():
    config = OptimizerConfig(name="adamw", lr=0.1, warmup=10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    assert learning_rate(config, 0, 100) == pytest.approx(0.01)
    for step in range(10, 100):
        assert learning_rate(config, step, 100) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


def test_moving_average_is_the_weighted_sum_of_the_past():
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.5)
    start = model.weight.item()
    values, expected = [1.0, 2.0, 5.0, -3.0], start
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        average.update(model, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    assert average.state["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_moving_average_copies_counters():
    model = nn.BatchNorm1d(2)
    average = MovingAverage(model, 0.9)
    model(torch.randn(4, 2))
    average.update(model, 0)
    assert average.state["num_batches_tracked"].item() == 1


def test_sgd_has_nesterovs_momentum():
    """Two steps by hand (Sutskever et al. 2013, as torch writes it): v = m v + g, w -= lr (g + m v)."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.5))
    weight, velocity = 2.0, 0.0
    for slope in (1.0, -3.0):
        model.weight.grad = torch.full((1, 1), slope)
        optimizer.step()
        gradient = slope + 0.5 * weight
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity)
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("clip", [0.5, 100.0, 0.0])
def test_gradients_are_clipped_to_their_norm(clip: float):
    model = nn.Conv1d(2, 1, 1, bias=False)
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), torch.device("cpu"), torch.float32, "plain")
    x = torch.tensor([[[3.0], [4.0]]])
    loss, norm = engine.gradient(x, lambda out: out.sum(), clip)
    assert (loss, norm) == (pytest.approx(float(model(x).detach())), pytest.approx(5.0))
    assert model.weight.grad is not None
    expected = x.flatten() * (0.5 / 5 if clip == 0.5 else 1)
    torch.testing.assert_close(model.weight.grad.flatten(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_are_not_decayed(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    groups = make_optimizer(model, OptimizerConfig(name=name, weight_decay=0.1)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]
    assert math.isclose(groups[0]["lr"], {"sgd": 0.01, "adamw": 0.001}[name])


def test_layer_scales_are_not_decayed_either():
    model = ConvNeXtEncoder(2, 1, "convnext_tiny", width=4)
    scales = {p for name, p in model.named_parameters() if name.endswith("layer_scale")}
    kernels, others = (set(g["params"]) for g in make_optimizer(model, OptimizerConfig()).param_groups)
    assert len(scales) == 3 + 3 + 9 + 3
    assert scales <= others
    assert not scales & kernels
