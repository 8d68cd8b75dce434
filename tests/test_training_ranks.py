"""Two processes that train one network together end where one process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import ROOT, losses, volumes

RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 8], deep_supervision: 0}
patch: {size: [12, 12, 12], batch: 4}
optimizer: {ema: 0.5, lr: 0.01, momentum: 0.9}
training: {epochs: 2, steps: 3, checkpoint_every: 1, tensorboard: false, device: cpu, precision: float32}
"""
ALONE = [sys.executable, "-m", "densepred"]
TOGETHER = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "--", "densepred"]
BY_ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    volumes(folder, RECIPE)
    return folder


def trained(root: Path, name: str, command: list[str], *overrides: str) -> Path:
    """The run directory of a training by a command line."""
    run = root / name
    words = [*command, "train", "recipe.yaml", "data.cache=cache", *overrides, "--run", str(run)]
    done = subprocess.run(words, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run of one process."""
    return trained(root, "alone", ALONE)


@pytest.fixture(scope="module")
def together(root: Path, alone: Path) -> Path:
    """The run of two."""
    return trained(root, "together", [sys.executable, *TOGETHER])


def test_two_processes_give_the_losses_and_the_model_of_one(alone: Path, together: Path):
    """Batch Dice, cross-entropy over different numbers of known voxels: all are those of the whole batch."""
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    ours, theirs = load_file(together / "model.safetensors"), load_file(alone / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
    rows = [[row["dice_mean"] for row in state(run)["rows"]] for run in (alone, together)]
    assert rows[1] == pytest.approx(rows[0], abs=1e-3)


def state(run: Path) -> dict[str, object]:
    return json.loads((max((run / "checkpoints").glob("step-*")) / "state.json").read_text())
