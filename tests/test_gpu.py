"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig, LossConfig, ModelConfig, OptimizerConfig
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.losses import SegmentationLoss
from densepred.models.build import build, initialize
from densepred.training.engine import Engine
from densepred.training.optim import make_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SMALL = ModelConfig(channels=(8, 16, 32), deep_supervision=1)


def network() -> torch.nn.Module:
    return initialize(build(SMALL, 1, 3), 0)


def test_sliding_window_equals_the_cpus():
    image = torch.randn(1, 50, 40, 33, generator=torch.Generator().manual_seed(0))
    model = network()
    torch.backends.cudnn.allow_tf32 = False
    inferer = SlidingWindowInferer((24, 24, 24), batch=3)
    on_cpu = inferer(model, image)
    on_gpu = inferer(model.cuda(), image)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)
    half = SlidingWindowInferer((24, 24, 24), batch=3, precision="auto")(model, image)
    assert (half.argmax(0) == on_cpu.argmax(0)).float().mean() > 0.98


def test_augmentation_does_the_same_on_both():
    image = torch.randn(4, 1, 20, 24, 16, generator=torch.Generator().manual_seed(0))
    label = (image[:, 0] > 0.5).long()
    augment = Augmenter(AugmentConfig(), 2)
    on_cpu, on_gpu = augment(image, label, range(4)), augment(image.cuda(), label.cuda(), range(4))
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=1e-3, rtol=1e-3)
    assert (on_gpu[1].cpu() == on_cpu[1]).float().mean() > 0.999


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_two_trainings_give_the_same_bits_and_learn(precision: torch.dtype):
    ends, losses, criterion = [], [], SegmentationLoss(LossConfig())
    for _ in range(2):
        model = network()
        engine = Engine(model, make_optimizer(model, OptimizerConfig()), torch.device("cuda"), precision, False)
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(2, 1, 24, 24, 24, generator=generator).cuda()
        label = (image[:, 0] > 0.5).long() + (image[:, 0] > 1.5).long()
        course = []
        for _ in range(20):
            loss, _ = engine.gradient(image, lambda outputs, label=label: criterion(outputs, label), 12.0)
            engine.update(0.01)
            course.append(loss)
        losses.append(course)
        ends.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_memory_of_the_inferer_does_not_grow_with_depth(tmp_path: Path):
    model, peaks = network().cuda().eval(), []
    inferer = SlidingWindowInferer((24, 24, 24))
    for depth in (64, 256):
        torch.cuda.reset_peak_memory_stats()
        source = np.zeros((1, depth, 48, 48), np.float32)
        for _ in inferer.stream(model, source):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
