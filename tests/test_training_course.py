"""How a training goes: parts of batches, averages, snapshots, ends before its time, exact resume with all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import densepred as dp
from densepred import config as configuration
from densepred.config import Config
from densepred.errors import UnsafeError
from densepred.training import trainer as training
from densepred.training.loop import resume, train
from densepred.training.objective import SegmentationObjective
from tests.training_runs import losses, newest, volumes

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 8]}
patch: {size: [8, 8, 8], batch: 4}
optimizer: {ema: 0.5}
training: {epochs: 3, steps: 2, tensorboard: false, device: cpu, precision: float32}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set with a cache that all runs share."""
    folder = tmp_path_factory.mktemp("course")
    volumes(folder, RECIPE)
    return folder


def load(root: Path, *overrides: str) -> Config:
    shared = [f"data.root={root}", f"data.cache={root / 'cache'}"]
    return configuration.load(root / "recipe.yaml", [*shared, *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


class _Killed(BaseException):
    """As final as a signal."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next training die just before a step."""
    original = training.Trainer._step

    def dying(self, now, drawn):
        if now == step:
            monkeypatch.setattr(training.Trainer, "_step", original)
            raise _Killed
        original(self, now, drawn)

    monkeypatch.setattr(training.Trainer, "_step", dying)


def test_parts_of_a_batch_give_the_loss_of_the_whole(root: Path, tmp_path: Path):
    """Where all voxels are known, cross-entropy and Dice per sample are means over the samples."""
    still = ("augment.rotation.probability=0", "augment.scaling.probability=0")
    fixed = ("loss.batch_dice=false", "training.epochs=2", *still)
    for parts in (1, 4):
        train(load(root, *fixed, f"training.accumulate={parts}"), tmp_path / str(parts))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-6)


def test_samples_are_mixed_with_others_of_the_whole_batch(root: Path, tmp_path: Path):
    """However it is split."""
    mixed = (
        "loss.batch_dice=false",
        "training.epochs=2",
        "augment=[{mixup: {probability: 1}}, {cutmix: {probability: 1}}]",
    )
    for parts in (1, 2, 4):
        train(load(root, *mixed, f"training.accumulate={parts}"), tmp_path / str(parts))
        assert losses(tmp_path / str(parts)) == pytest.approx(losses(tmp_path / "1"), abs=1e-6)
    train(load(root, *mixed[:2], "augment=none"), tmp_path / "plain")
    assert abs(losses(tmp_path / "plain")[-1] - losses(tmp_path / "1")[-1]) > 1e-3


SETTINGS = {
    "accumulation": ("training.accumulate=2",),
    "averaging": ("optimizer.swa=0.5", "training.epochs=4"),
    "cycles": ("optimizer.schedule=cosine", "optimizer.cycles=2", "training.epochs=4"),
    "plateau": ("optimizer.schedule=plateau", "optimizer.plateau=1"),
    "unfreezing": ("training.transfer.freeze=encoder", "training.transfer.unfreeze=1"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_training_ends_bit_for_bit_with_any_number_of_workers(name, root, tmp_path, monkeypatch):
    chosen = (*SETTINGS[name], "training.checkpoint_every=1")
    train(load(root, *chosen, "training.workers=2"), tmp_path / "whole")
    killed_at(monkeypatch, 3)
    with pytest.raises(_Killed):
        train(load(root, *chosen, "training.workers=5"), tmp_path / "killed")
    resume(tmp_path / "killed", ["training.workers=0"])
    for file in ("model", "average", "optimizer"):
        ours, theirs = ((newest(tmp_path / run) / f"{file}.safetensors").read_bytes() for run in ("killed", "whole"))
        assert ours == theirs, file
    snapshots = list((tmp_path / "whole").glob("snapshots/*/model.safetensors"))
    assert bool(snapshots) == (name == "cycles")
    for snapshot in snapshots:
        assert (tmp_path / "killed" / snapshot.relative_to(tmp_path / "whole")).read_bytes() == snapshot.read_bytes()


def test_even_averages_are_the_mean_of_the_epochs_weights(root: Path, tmp_path: Path, monkeypatch):
    ends = []
    take = training.Learner.take

    def noting(self):
        ends.append({name: value.clone() for name, value in self.model.state_dict().items()})
        take(self)

    monkeypatch.setattr(training.Learner, "take", noting)
    run = train(load(root, "optimizer.swa=0.5", "training.epochs=4"), tmp_path / "run")
    assert len(ends) == 3  # the ends of the second, third and fourth epoch are in the last half or at its edge
    for name, value in weights(run.path).items():
        torch.testing.assert_close(value, sum(end[name] for end in ends) / 3, atol=1e-6, rtol=1e-5)


def test_a_longer_training_averages_anew(root: Path, tmp_path: Path, monkeypatch):
    run = train(load(root, "optimizer.swa=0.5", "training.epochs=4"), tmp_path / "run")
    ends, take = [], training.Learner.take

    def noting(self):
        ends.append({name: value.clone() for name, value in self.model.state_dict().items()})
        take(self)

    monkeypatch.setattr(training.Learner, "take", noting)
    resume(run.path, ["training.epochs=12"])
    assert len(ends) == 7
    for name, value in weights(run.path).items():
        torch.testing.assert_close(value, sum(end[name] for end in ends) / 7, atol=1e-6, rtol=1e-5)


def test_snapshots_are_runs_to_predict_with(root: Path, tmp_path: Path):
    train(load(root, "optimizer.schedule=cosine", "optimizer.cycles=3"), tmp_path / "run")
    snapshots = sorted((tmp_path / "run" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["cycle-1", "cycle-2"]
    ensemble = dp.load([tmp_path / "run", *snapshots])
    assert ensemble.predict(root / "images" / "c0.nii.gz").numpy().shape == (1, 16, 15, 14)


def scoring(monkeypatch: pytest.MonkeyPatch, *merits: float) -> None:
    """Let validations have these results, one after the other."""
    left = list(merits)
    monkeypatch.setattr(SegmentationObjective, "merit", lambda self, scores: left.pop(0) if scores else float("nan"))


def test_patience_ends_a_training_that_no_longer_improves(root: Path, tmp_path: Path, monkeypatch):
    scoring(monkeypatch, 0.5, 0.4, 0.6, 0.6, 0.5)
    run = train(load(root, "training.patience=2", "training.epochs=9"), tmp_path / "run")
    assert len(run.rows) == 5
    assert len(resume(tmp_path / "run").rows) == 5


def test_plateaus_drop_the_rate_and_it_is_remembered(root: Path, tmp_path: Path, monkeypatch):
    scoring(monkeypatch, 0.5, 0.4, 0.3, 0.6, 0.2, 0.1, 0.0)
    chosen = ("optimizer.schedule=plateau", "optimizer.plateau=2", "optimizer.lr=0.01")
    train(load(root, *chosen, "training.epochs=4"), tmp_path / "run")
    rows = resume(tmp_path / "run", ["training.epochs=7"]).rows
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.01, 0.01, 1e-3, 1e-3, 1e-3, 1e-4])


def test_a_budget_is_kept_and_the_rate_has_fallen_by_then(root: Path, tmp_path: Path, monkeypatch):
    """With a clock that goes on by a twentieth of a second each time it is looked at."""
    clock = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock) / 20))
    run = train(load(root, "training.budget=6s", "training.epochs=1", "optimizer.lr=0.01"), tmp_path / "run")
    state = json.loads((newest(run.path) / "state.json").read_text())
    assert 5 < state["elapsed"] < 6.5
    assert len(run.rows) > 1
    assert run.rows[-1]["lr"] < 0.001
    assert "dice_mean" in run.rows[-1]
    assert len(resume(run.path).rows) == len(run.rows)  # nothing is left of it


def test_a_longer_budget_goes_on_at_the_rate_of_its_time(root: Path, tmp_path: Path, monkeypatch):
    clock, rates, update = itertools.count(), [], training.Learner.update
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock) / 20))
    run = train(load(root, "training.budget=6s", "optimizer.lr=0.01"), tmp_path / "run")

    def noting(self, step, rate, averaging):
        rates.append(rate)
        update(self, step, rate, averaging)

    monkeypatch.setattr(training.Learner, "update", noting)
    resume(run.path, ["training.budget=12s"])
    assert 0.004 < rates[0] < 0.007  # half of it is over: 0.01 x 0.5^0.9 = 0.0054
    assert rates == sorted(rates, reverse=True)


def test_the_last_epoch_of_a_budget_is_validated(root: Path, tmp_path: Path, monkeypatch):
    """Though the time runs out while an epoch without a validation is closed."""
    now, publish = [0.0], training.Keeper.publish

    def monotonic():
        now[0] += 0.01
        return now[0]

    def slow(self):
        publish(self)
        now[0] += 1000 if len(self.run.rows) == 2 else 0

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(training.Keeper, "publish", slow)
    run = train(load(root, "training.budget=100s", "training.validate_every=5"), tmp_path / "run")
    assert len(run.rows) == 3
    assert "dice_mean" in run.rows[-1]


def test_frozen_stages_stay_and_join_in(root: Path, tmp_path: Path):
    start = SegmentationObjective.network
    chosen = ("training.transfer.freeze=1", "optimizer.weight_decay=0.1", "optimizer.ema=0")
    run = train(load(root, *chosen), tmp_path / "frozen")
    fresh = dict(start(type("Seen", (), {"plan": run.plan, "config": run.config})()).named_parameters())
    moved = {name for name, value in weights(run.path).items() if not torch.equal(value, fresh[name])}
    assert "encoder.stages.1.0.conv.weight" in moved
    assert not any(name.startswith("encoder.stages.0.") for name in moved)
    run = train(load(root, *chosen, "training.transfer.unfreeze=2"), tmp_path / "joining")
    assert not torch.equal(weights(run.path)["encoder.stages.0.0.conv.weight"], fresh["encoder.stages.0.0.conv.weight"])


def test_more_stages_than_there_are_cannot_be_frozen(root: Path, tmp_path: Path):
    with pytest.raises(dp.errors.NetworkError, match="the encoder has 2 stages"):
        train(load(root, "training.transfer.freeze=3"), tmp_path / "run")


def test_what_is_watched_is_written(root: Path, tmp_path: Path):
    row = train(load(root, "training.epochs=1"), tmp_path / "run").rows[0]
    stages = ("encoder.0", "encoder.1", "decoder.0", "heads")
    total = sum(row[f"grad_norm_{stage}"] ** 2 for stage in stages) ** 0.5
    assert 0 < total < 10 * row["grad_norm"]
    assert all(0 <= row[f"dead_{stage}"] <= 1 for stage in stages[:3])
    assert 0 <= row["waiting"] <= 1


def test_checkpoints_behind_a_link_are_refused_before_any_step(root: Path, tmp_path: Path):
    train(load(root), tmp_path / "a")
    before = (tmp_path / "a" / "metrics.csv").read_bytes()
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "scratch")
    (tmp_path / "a" / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UnsafeError, match="symbolic link") as caught:
        resume(tmp_path / "a", ["training.epochs=4"])
    assert "put the folder that it points to in its place" in caught.value.fix
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == before
    (tmp_path / "a" / "checkpoints").unlink()
    (tmp_path / "scratch").rename(tmp_path / "a" / "checkpoints")
    assert len(resume(tmp_path / "a", ["training.epochs=4"]).rows) == 4
