"""Two processes that train one network together end where one process ends, and where two end that were stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Forked
from tests.training_runs import ROOT, losses, newest, volumes

pytestmark = pytest.mark.slow
RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 6, 8], deep_supervision: 1}
patch: {size: [12, 12, 12], batch: 4}
optimizer: {ema: 0.5, lr: 0.01, momentum: 0.9}
training: {epochs: 3, steps: 4, accumulate: 2, checkpoint_every: 1, tensorboard: false, device: cpu, precision: float32}
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, and a recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    volumes(folder, RECIPE)
    return folder


def start(root: Path, *words: object) -> subprocess.Popen[str]:
    """A command of two processes that torchrun starts."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [*TORCHRUN, "densepred", *map(str, words)]
    return subprocess.Popen(command, cwd=root, env=env, text=True, **pipes)


def train(root: Path, *words: object, processes: int = 2) -> None:
    """Train to the end, in processes that have the variables which torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    with (root / "said.txt").open("w+") as said:
        for rank in range(processes):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            env = os.environ | place | {name: str(value) for name, value in numbers.items()}
            env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            ranks.append(Forked("densepred", ["train", *words], env, (said.fileno(), said.fileno()), cwd=root))
        codes = [one.wait() for one in ranks]
        said.seek(0)
        assert codes == [0] * processes, said.read()


def begin(root: Path, name: str, *overrides: str) -> list[object]:
    """The words of a training that begins."""
    return ["recipe.yaml", "data.cache=cache", *overrides, "--run", root / name]


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The run of one process."""
    train(root, *begin(root, "alone"), processes=1)
    return root / "alone"


@pytest.fixture(scope="module")
def together(root: Path) -> Path:
    """The run of two, started by torchrun."""
    with start(root, "train", *begin(root, "together", "training.workers=2")) as process:
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, said
    return root / "together"


def test_layers_that_nothing_looks_at_do_not_stop_two_processes(root: Path):
    pytest.importorskip("monai")
    other = "model: {network: monai.BasicUNetPlusPlus, options: {features: [4, 4, 4, 4, 4, 4]}}"
    text = RECIPE.replace("model: {channels: [4, 6, 8], deep_supervision: 1}", other).replace(
        "[12, 12, 12]", "[16, 16, 16]"
    )
    (root / "unused.yaml").write_text(text)
    train(root, "unused.yaml", "data.cache=cache", "training.epochs=1", "--run", root / "unused")


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
    run = root / "sharded"
    train(root, *begin(root, "sharded", "training.shard=true"))
    check_same(run, alone)
    before = {path.name: path.read_bytes() for path in newest(run).glob("*.safetensors")}
    shutil.rmtree(newest(run))  # what was done since the checkpoint before is done again
    train(root, "--resume", run)
    assert {path.name: path.read_bytes() for path in newest(run).glob("*.safetensors")} == before


def stopped(root: Path, name: str) -> Path | None:
    """The run of two that a signal to the launcher stopped midway; None if it was at its end before."""
    run = root / name
    process = start(root, "train", *begin(root, name, "training.workers=5"))
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
    run = next((found for turn in range(5) if (found := stopped(root, f"stopped-{turn}"))), None)
    assert run is not None, "each was at its end before the signal"
    train(root, "--resume", run, "training.workers=0")
    for name in ("model", "average", "optimizer"):
        ours, theirs = ((newest(path) / f"{name}.safetensors").read_bytes() for path in (run, together))
        assert ours == theirs, name
