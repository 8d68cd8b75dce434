"""A training that is killed or stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.acceptance.helpers import densepred, kill_when, steps_done

SAME = ("model.safetensors", "best.safetensors", "config.yaml", "plan.json")


def test_killed_training_ends_bit_for_bit_like_the_uninterrupted(
    dataset: Path, recipe: Path, trained: Path, tmp_path: Path
):
    run, first = tmp_path / "killed", ["train", recipe, f"data.root={dataset}", "--run", tmp_path / "killed"]
    for step in (2, 8, 14):  # amid the first epoch, in the second, in the third
        command = first if step == 2 else ["train", "--resume", run]
        assert kill_when(lambda step=step: steps_done(run) >= step, *command) == -signal.SIGKILL
    done = densepred("train", "--resume", run)
    assert done.returncode == 0, done.stderr
    for name in SAME:
        assert (run / name).read_bytes() == (trained / name).read_bytes(), name
    for name in ("model", "average", "optimizer"):
        last = (trained / "checkpoints" / "last").read_text().strip()
        file = f"checkpoints/{last}/{name}.safetensors"
        assert (run / file).read_bytes() == (trained / file).read_bytes(), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_saves_the_state_and_says_so(dataset: Path, recipe: Path, tmp_path: Path, number: int, code: int):
    run = tmp_path / "stopped"
    arguments = ["train", recipe, f"data.root={dataset}", "training.epochs=2000", "--run", run]
    assert kill_when(lambda: steps_done(run) >= 8, *arguments, number=number) == code
    newest = max((run / "checkpoints").glob("step-*"))
    step = json.loads((newest / "state.json").read_text())["step"]
    assert step == int(newest.name.removeprefix("step-")) >= 8
    assert (run / "metrics.csv").exists()


def test_number_of_workers_does_not_matter(dataset: Path, recipe: Path, trained: Path, tmp_path: Path):
    for workers in (0, 3):
        run = tmp_path / str(workers)
        done = densepred("train", recipe, f"data.root={dataset}", f"training.workers={workers}", "--run", run)
        assert done.returncode == 0, done.stderr
        assert (run / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_damaged_checkpoint_is_passed_over(dataset: Path, recipe: Path, trained: Path, tmp_path: Path):
    run = tmp_path / "damaged"
    assert densepred("train", recipe, f"data.root={dataset}", "training.epochs=3", "--run", run).returncode == 0
    newest = max((run / "checkpoints").glob("step-*"))
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    done = densepred("train", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "does not match its manifest" in done.stderr
    assert (max((run / "checkpoints").glob("step-*")) / "state.json").exists()


def test_training_into_a_used_folder_and_resuming_nothing(dataset: Path, recipe: Path, trained: Path, tmp_path: Path):
    again = densepred("train", recipe, f"data.root={dataset}", "--run", trained)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    nothing = densepred("train", "--resume", tmp_path / "nothing")
    assert nothing.returncode == 2
    assert "no run to resume" in nothing.stderr
    other = densepred("train", "--resume", trained, "optimizer.lr=0.5")
    assert other.returncode == 2
    assert "cannot change" in other.stderr


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(dataset: Path, trained: Path, tmp_path: Path):
    """A run whose plan is of the first format, and whose cases were prepared otherwise."""
    run = tmp_path / "old"
    shutil.copytree(trained, run)
    plan = json.loads((run / "plan.json").read_text())
    plan |= {"format_version": 1, "normalize": "zscore", "axes": None, "densepred_version": "0.0.9"}
    del plan["reading"]
    (run / "plan.json").write_text(json.dumps(plan))
    newest = max((run / "checkpoints").glob("step-*"))
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    state = json.loads((newest / "state.json").read_text()) | {"data": "0" * 64}
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    done = densepred("train", "--resume", run, "training.epochs=6")
    assert done.returncode == 2
    assert "or how they are prepared, have changed since this run began (with densepred 0.0.9)" in done.stderr
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before
    image = next((dataset / "imagesTr").iterdir())
    assert densepred("predict", run, image, "--out", tmp_path / "out").returncode == 0
