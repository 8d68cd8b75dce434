"""Trials before a training, and faults that a training meets: planted in files, in numbers, in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from densepred import config as configuration
from densepred.cli import app
from densepred.config import Config
from densepred.errors import InputError
from densepred.models.build import create_model
from densepred.training.loop import train
from densepred.training.small_maps import guard_small_maps
from densepred.training.trials import gone, judge_rates, overfit_one_batch, verdict
from densepred.training.watch import dead_shares, stage_names
from tests.training_runs import volumes

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 8]}
patch: {size: [8, 8, 8], batch: 2}
optimizer: {name: adamw, lr: 0.02}
training: {epochs: 2, steps: 2, tensorboard: false, device: cpu, precision: float32}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small set and a recipe."""
    volumes(tmp_path, RECIPE)
    return tmp_path


def load(root: Path, *overrides: str) -> Config:
    return configuration.load(root / "recipe.yaml", [f"data.root={root}", f"data.cache={root / 'cache'}", *overrides])


def test_the_rate_is_read_off_a_curve_of_known_shape():
    """Flat, then a fall that ends at 0.1, a flat bottom, and an explosion."""
    rates = np.geomspace(1e-6, 10, 141)
    losses = np.interp(np.log10(rates), [-6, -4, -1, 0.5, 1], [2, 2, 0.5, 0.5, 9])
    found = judge_rates(rates.tolist(), losses.tolist())
    assert found.suggested == pytest.approx(0.01, rel=0.5)
    assert judge_rates([1e-3, 1e-2, 1e-1], [1.0, 1.1, 1.2]).suggested is None


def test_losses_below_zero_are_judged_by_how_far_they_fell():
    assert [gone(losses, False) for losses in ([2.0, 0.1, 0.5], [0.5, -1.0, -0.9], [0.5, -1.0, 7.0])] == [
        True,
        False,
        True,
    ]
    assert [verdict(losses)[0] for losses in ([-1.0, -0.6], [-1.0, -1.4], [-1.0, -1.6], [1.0, -0.2])] == [
        False,
        False,
        True,
        True,
    ]


def test_commands_try_rates_and_one_batch(root: Path):
    words = ["train", str(root / "recipe.yaml"), f"data.root={root}", f"data.cache={root / 'cache'}"]
    tried = CliRunner().invoke(app, [*words, "--find-lr", str(root / "rates.png")], catch_exceptions=False)
    assert "Suggested: optimizer.lr=" in tried.output
    assert Image.open(root / "rates.png").size > (500, 300)
    learnt = CliRunner().invoke(app, [*words, "--overfit-one-batch", "40"], catch_exceptions=False)
    assert "PASSED: the loss of one batch fell from" in learnt.output
    assert not list(root.glob("*/checkpoints"))
    with pytest.raises(InputError, match="needs one of"):
        CliRunner().invoke(app, [*words, "--find-lr", "a.png", "--run", "b"], catch_exceptions=False)


def test_a_batch_that_is_not_learnt_fails(root: Path):
    learnt, text = verdict(overfit_one_batch(load(root, "optimizer.lr=1e-9"), 3))
    assert not learnt
    assert text.startswith("FAILED: the loss of one batch")


def test_a_nan_planted_in_one_image_counts_nowhere(root: Path, caplog: pytest.LogCaptureFixture):
    path = root / "images" / "c1.nii.gz"
    data = np.asarray(nib.load(path).dataobj).copy()
    data[3:5, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    with caplog.at_level(logging.WARNING):
        run = train(load(root, "data.fold=all"), root / "run")
    assert "skipped" not in caplog.text
    assert all(np.isfinite(row["loss"]) for row in run.rows)
    assert not (root / "run" / "nonfinite.json").exists()


def test_a_label_out_of_range_is_refused_before_any_step(root: Path):
    path = root / "labels" / "c2.nii.gz"
    data = np.asarray(nib.load(path).dataobj).copy()
    data[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    with pytest.raises(InputError, match="9") as caught:
        train(load(root), root / "run")
    assert "c2" in str(caught.value)
    assert not list((root / "run").glob("checkpoints/*"))


def test_small_maps_have_the_gradients_of_full_precision():
    """oneDNN's bfloat16 kernels read memory that is nobody's there; it is filled with NaN so that this shows."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv3d(16, 16, 3, padding=1)
    guard_small_maps(layer)
    for shape in ((2, 2, 2), (2, 4, 6), (1, 1, 1)):
        for _ in range(5):
            x = torch.randn(2, 16, *shape, generator=generator)
            for size in (256, 4096, 65536):
                del [torch.full((size,), torch.nan) for _ in range(30)][:]
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                layer(x).square().sum().backward()
            found = layer.weight.grad.clone()
            layer.zero_grad()
            layer(x).square().sum().backward()
            torch.testing.assert_close(found, layer.weight.grad, atol=0.1, rtol=0.05)


def test_dead_channels_are_counted_where_they_are():
    model = create_model(dims=2, channels=(4, 8), classes=2, seed=0)
    names = stage_names(model)
    image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert dead_shares(model, [image], names) == dict.fromkeys(("encoder.0", "encoder.1", "decoder.0"), 0.0)
    norm = model.encoder.stages[1][0].norm
    with torch.no_grad():
        norm.weight[:4], norm.bias[:4] = 0.0, -1.0
    assert dead_shares(model, [image], names)["encoder.1"] == 4 / 16
