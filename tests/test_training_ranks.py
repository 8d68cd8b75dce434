"""Two processes that train one network together end where one process ends, and where two end that were stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import ROOT, losses, newest, volumes

pytestmark = pytest.mark.slow
RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 6, 8], deep_supervision: 1}
patch: {size: [12, 12, 12], batch: 4}
optimizer: {ema: 0.5, lr: 0.01, momentum: 0.9}
training: {epochs: 3, steps: 4, accumulate: 2, checkpoint_every: 1, tensorboard: false, device: cpu, precision: float32}
"""
ALONE = [sys.executable, "-m", "densepred"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
TOGETHER = [*TORCHRUN, "densepred"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    volumes(folder, RECIPE)
    return folder


def start(root: Path, *words: object) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, words)), cwd=root, env=env, text=True, **pipes)


def trained(root: Path, name: str, command: list[str], *overrides: str) -> Path:
    """The run directory of a training by a command line."""
    process = start(root, *command, "train", "recipe.yaml", "data.cache=cache", *overrides, "--run", root / name)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return root / name


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run of one process."""
    return trained(root, "alone", ALONE)


@pytest.fixture(scope="module")
def together(root: Path) -> Path:
    """The run of two."""
    return trained(root, "together", TOGETHER, "training.workers=2")


def test_layers_that_nothing_looks_at_do_not_stop_two_processes(root: Path):
    pytest.importorskip("monai")
    other = "model: {network: monai.BasicUNetPlusPlus, options: {features: [4, 4, 4, 4, 4, 4]}}"
    text = RECIPE.replace("model: {channels: [4, 6, 8], deep_supervision: 1}", other).replace(
        "[12, 12, 12]", "[16, 16, 16]"
    )
    (root / "unused.yaml").write_text(text)
    words = ("train", "unused.yaml", "data.cache=cache", "training.epochs=1", "--run", root / "unused")
    said, _ = (process := start(root, *TOGETHER, *words)).communicate(timeout=300)
    assert process.returncode == 0, said


def check_same(ours: Path, theirs: Path) -> None:
    """The losses and the model of another run, to rounding."""
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    weights, others = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)


def scores(run: Path) -> list[float]:
    return [row["dice_mean"] for row in json.loads((newest(run) / "state.json").read_text())["rows"]]


def test_two_processes_give_the_losses_and_the_model_of_one(alone: Path, together: Path):
    """Batch Dice, cross-entropy over different numbers of known voxels: all are those of the whole batch."""
    check_same(together, alone)
    assert scores(together) == pytest.approx(scores(alone), abs=1e-3)


def test_sharing_out_the_weights_changes_nothing(root: Path, alone: Path):
    run = trained(root, "sharded", TOGETHER, "training.shard=true")
    check_same(run, alone)
    before = {path.name: path.read_bytes() for path in newest(run).glob("*.safetensors")}
    shutil.rmtree(newest(run))  # what was done since the checkpoint before is done again
    process = start(root, *TOGETHER, "train", "--resume", run)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert {path.name: path.read_bytes() for path in newest(run).glob("*.safetensors")} == before


def stopped(root: Path, name: str) -> Path | None:
    """The run of two that a signal to the launcher stopped midway; None if it was at its end before."""
    run = root / name
    overrides = ("data.cache=cache", "training.workers=5")
    process = start(root, *TOGETHER, "train", "recipe.yaml", *overrides, "--run", run)
    until = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < until and not list(run.glob("checkpoints/step-*[2-9]")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    step = int(newest(run).name.removeprefix("step-"))
    if step == 12:
        return None
    assert "stopped by a signal; the state after step" in said
    assert step >= 2
    return run


def test_all_stop_together_and_what_is_gone_on_with_ends_bit_for_bit(root: Path, together: Path):
    """Stopped by a signal to the launcher, and with other numbers of workers."""
    run = next(found for turn in range(5) if (found := stopped(root, f"stopped-{turn}")))
    process = start(root, *TOGETHER, "train", "--resume", run, "training.workers=0")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for name in ("model", "average", "optimizer"):
        ours, theirs = ((newest(path) / f"{name}.safetensors").read_bytes() for path in (run, together))
        assert ours == theirs, name
