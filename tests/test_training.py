"""The loop's checks: non-finite losses, a full disk, changed data; and that predictions carry what training fixed."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import densepred as dp
from densepred import config as configuration
from densepred.cases.cache import prepare
from densepred.cases.case import collect
from densepred.cases.patches import PatchSampler
from densepred.config import Config
from densepred.errors import InputError, ResourceError
from densepred.losses import SegmentationLoss
from densepred.training import checkpoint
from densepred.training.loop import resume, train
from densepred.training.objective import SegmentationObjective
from densepred.training.prefetch import prefetch
from tests.training_runs import volumes

RECIPE = """
data: {images: "images/*.nii.gz", labels: "labels/{id}.nii.gz", classes: {0: background, 7: cube}, folds: 3}
model: {channels: [4, 8]}
patch: {size: [12, 12, 12], batch: 2}
optimizer: {ema: 0.5}
training: {epochs: 2, steps: 4, tensorboard: false, device: cpu}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six volumes with a bright cube of value 7, and a recipe."""
    volumes(tmp_path, RECIPE)
    return tmp_path


def load(root: Path, *overrides: str) -> Config:
    return configuration.load(root / "recipe.yaml", [f"data.root={root}", *overrides])


def test_a_loss_that_stays_non_finite_stops_with_the_cases_named(root: Path):
    with pytest.raises(ResourceError, match="not finite") as caught:
        train(load(root, "optimizer.lr=1e30", "optimizer.clip=0", "training.steps=40"), root / "run")
    assert caught.value.exit_code == 6
    record = json.loads((root / "run" / "nonfinite.json").read_text())
    assert set(record["cases"]) <= {f"c{n}" for n in range(6)}
    assert len(record["seeds"]) == 2
    assert str(record["cases"][0]) in caught.value.what


def test_a_full_disk_at_a_checkpoint_warns_and_training_goes_on(root: Path, monkeypatch, caplog):
    write, attempts = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        if "step-00000002" in str(self):
            attempts.append(self)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        run = train(load(root, "training.checkpoint_every=2"), root / "run")
    assert attempts
    assert "no checkpoint at step 2" in caplog.text
    assert [p.name for p in sorted(run.checkpoints.glob("*step-*"))] == ["step-00000006", "step-00000008"]


def test_a_full_disk_at_the_end_is_an_error(root: Path, monkeypatch):
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "step-00000008" in str(self):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        train(load(root), root / "run")
    assert [p.name for p in (root / "run" / "checkpoints").glob("*step-*")] == ["step-00000004"]


def test_changed_cases_are_not_resumed(root: Path):
    train(load(root, "training.epochs=1"), root / "run")
    label = root / "labels" / "c0.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((14, 15, 16), np.uint8), np.eye(4)), label)
    for other in (root / "labels").glob("*.nii.gz"):  # whichever fold it is in
        nib.save(nib.Nifti1Image(np.asarray(nib.load(other).dataobj)[::-1].copy(), np.eye(4)), other)
    with pytest.raises(InputError, match="have changed"):
        resume(root / "run", ["training.epochs=2"])


def test_a_longer_training_may_be_resumed_and_a_done_one_is_done(root: Path):
    train(load(root, "training.epochs=1"), root / "run")
    assert len(resume(root / "run", ["training.epochs=3"]).rows) == 3
    weights = (root / "run" / "model.safetensors").read_bytes()
    assert len(resume(root / "run").rows) == 3
    assert (root / "run" / "model.safetensors").read_bytes() == weights


def test_every_case_may_be_trained_on(root: Path):
    run = train(load(root, "data.fold=all", "training.epochs=1"), root / "run")
    assert "dice_mean" not in run.rows[0]
    assert not (root / "run" / "best.safetensors").exists()


def test_first_loss_far_from_chance_is_noticed(root: Path, monkeypatch, caplog):
    monkeypatch.setattr("densepred.losses.SegmentationLoss.at_chance", lambda self, classes: 0.01)
    with caplog.at_level(logging.WARNING):
        train(load(root, "training.epochs=1"), root / "run")
    assert "chance gives" in caplog.text


def test_predictions_have_the_files_values_and_blank_invalid_voxels(root: Path, caplog):
    train(load(root, "optimizer.name=adamw", "optimizer.lr=0.01", "training.steps=30"), root / "run")
    predictor = dp.load(root / "run")
    path = root / "images" / "c0.nii.gz"
    whole = predictor.predict(path).numpy()[0]
    assert set(np.unique(whole)) == {0, 7}
    truth = np.asarray(nib.load(root / "labels" / "c0.nii.gz").dataobj).T
    assert (whole == truth).mean() > 0.9
    data = np.asarray(nib.load(path).dataobj).copy()
    data.T[truth == 7] = np.nan
    nib.save(nib.Nifti1Image(data, np.eye(4)), root / "holes.nii.gz")
    with caplog.at_level(logging.WARNING):
        holes = predictor.predict(root / "holes.nii.gz").numpy()[0]
    assert (holes[truth == 7] == 0).all()
    assert "216 pixels do not count" in caplog.text


def test_weights_of_the_best_epoch_can_be_asked_for(root: Path):
    train(load(root), root / "run")
    best = dp.load(root / "run", weights="best")
    assert isinstance(best, dp.Predictor)
    with pytest.raises(ValueError, match="last, best"):
        dp.load(root / "run", weights="first")


def test_prefetching_keeps_the_order_and_passes_faults_on():
    numbers = [(n,) for n in range(20)]
    for workers in (0, 1, 4):
        assert list(prefetch(lambda n: n * n, numbers, workers)) == [n * n for n in range(20)]
        with pytest.raises(ZeroDivisionError):
            list(prefetch(lambda n: 1 / (n - 7), numbers, workers))


def test_checkpoints_hold_the_optimizer(tmp_path: Path):
    for name in (torch.optim.AdamW, torch.optim.SGD):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = name([weight], lr=0.1, **({"momentum": 0.9} if name is torch.optim.SGD else {}))
        weight.sum().backward()
        optimizer.step()
        checkpoint.save(tmp_path, 1, {"optimizer": checkpoint.optimizer_tensors(optimizer)}, {"step": 1})
        found = checkpoint.newest(tmp_path)
        assert found is not None
        other = torch.nn.Parameter(weight.detach().clone())
        again = name([other], lr=0.1, **({"momentum": 0.9} if name is torch.optim.SGD else {}))
        checkpoint.load_optimizer(again, found[0]["optimizer"])
        for parameter, stepper in ((weight, optimizer), (other, again)):
            parameter.grad = torch.full((3,), 0.5)
            stepper.step()
        assert torch.equal(weight, other)


def test_a_skipped_step_leaves_no_trace_in_running_statistics(root: Path, monkeypatch):
    sample = PatchSampler.batch

    def poisoned(self, epoch: int, step: int):
        batch = sample(self, epoch, step)
        if (epoch, step) == (0, 1):
            batch.image[0, 0, 3, 3, 3] = np.inf
        return batch

    monkeypatch.setattr("densepred.cases.patches.PatchSampler.batch", poisoned)
    run = train(load(root, "model.norm=batch", "training.epochs=1"), root / "run")
    assert np.isfinite(run.rows[0]["dice_mean"])
    assert (root / "run" / "nonfinite.json").exists()


def test_labels_without_any_foreground_are_refused(root: Path):
    for path in (root / "labels").glob("*.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros((16, 15, 14), np.uint8), np.eye(4)), path)
        nib.save(nib.Nifti1Image(np.ones((16, 15, 14), np.float32), np.eye(4)), root / "images" / path.name)
    with pytest.raises(InputError, match="any class but the background"):
        train(load(root), root / "run")


def test_memory_running_out_is_said_so(root: Path, monkeypatch):
    def exhausted(self, parts, clip):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("densepred.training.engine.Engine.gradients", exhausted)
    with pytest.raises(ResourceError, match="memory is exhausted") as caught:
        train(load(root), root / "run")
    assert "patch.size" in caught.value.fix


def test_a_training_starts_from_weights_of_another_kind_and_keeps_where_they_came_from(root: Path, caplog):
    flat = dp.create_model("resnet18", dims=2, in_channels=3, width=4, seed=5)
    path = root / "flat.pth"
    torch.save(flat.encoder.state_dict(), path)
    recipe = RECIPE.replace("{channels: [4, 8]}", f"{{encoder: resnet18, width: 4, pretrained: {path}}}")
    (root / "recipe.yaml").write_text(recipe)
    with caplog.at_level(logging.INFO, "densepred"):
        train(load(root, "optimizer.lr=1e-9", "optimizer.weight_decay=0", "training.epochs=1"), root / "run")
    assert "inflated" in caplog.text
    predictor = dp.load(root / "run")
    assert predictor.model.encoder.pretraining.source == "flat.pth"
    found, given = (m.encoder.layer1[0].conv1.weight.detach() for m in (predictor.model, flat))
    torch.testing.assert_close(found, given.unsqueeze(2).expand_as(found) / 3, atol=1e-6, rtol=1e-4)
    path.unlink()  # what was started can be resumed without it
    assert resume(root / "run", ["training.epochs=2"]).rows[-1]["epoch"] == 2


@pytest.mark.parametrize("regions", ["", ", regions: {cube: [cube]}"])
def test_planes_of_volumes_are_learnt_and_whole_volumes_judged(root: Path, regions: str):
    recipe = RECIPE.replace(", folds: 3", f"{regions}, folds: 3").replace(
        "size: [12, 12, 12]", "size: [12, 12], axis: 0"
    )
    (root / "recipe.yaml").write_text(recipe.replace("{channels: [4, 8]}", "{dims: 2, channels: [4, 8]}"))
    (row,) = train(load(root, "training.epochs=1"), root / "run").rows
    assert 0 <= row["dice_cube"] <= 1


def test_distances_of_a_loss_are_in_the_images_unit(root: Path):
    for path in (root / "images").glob("*.nii.gz"):
        for folder in ("images", "labels"):
            one = nib.load(root / folder / path.name)
            nib.save(nib.Nifti1Image(np.asanyarray(one.dataobj), np.diag([1, 1, 3, 1])), root / folder / path.name)
    config = load(root, "loss.boundary=0.01", "training.epochs=1", "training.steps=1")
    run = train(config, root / "run")
    cases = prepare(collect(config.data), run.plan, root / "run" / "cache")
    objective = SegmentationObjective(config, run.plan, cases, torch.device("cpu"), torch.float32)
    outputs, label = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 8, 8, 8).long()
    label[:, 2:6, 2:6, 2:6] = 1
    wanted = SegmentationLoss(config.loss, spacing=(3.0, 1.0, 1.0))(outputs, label)
    assert objective.loss(outputs, label) == wanted != SegmentationLoss(config.loss)(outputs, label)
