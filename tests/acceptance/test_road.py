"""The whole road: check, train, predict, evaluate; and what happens to bad files on it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import densepred as dp
from densepred.inference.predictor import Predictor
from tests.acceptance.helpers import cases_done, densepred, kill_when, snapshot


def images(dataset: Path) -> list[Path]:
    return sorted((dataset / "imagesTr").glob("*.nii.gz"))


def copy_run(trained: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.yaml", "plan.json", "model.safetensors"):
        shutil.copy(trained / name, folder)
    return folder


def test_training_leaves_what_people_look_at(trained: Path):
    assert {"config.yaml", "plan.json", "model.safetensors", "metrics.csv", "curves.png"} <= set(os.listdir(trained))
    rows = (trained / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5
    assert "dice_mean" in rows[0]
    assert not list(trained.glob(".*.part.*"))


def test_predict_and_evaluate(dataset: Path, trained: Path, tmp_path: Path):
    out, scores = tmp_path / "out", tmp_path / "scores"
    some = images(dataset)[:3]
    done = densepred("predict", trained, *some, "--out", out)
    assert done.returncode == 0, done.stderr
    for path in some:
        made, source = nib.load(out / path.name), nib.load(path)
        assert np.array_equal(made.affine, source.affine)
        assert made.shape == source.shape
        assert set(np.unique(np.asarray(made.dataobj))) <= {0, 1, 2}
    done = densepred("evaluate", out, dataset / "labelsTr", "--out", scores, "--images", dataset / "imagesTr")
    assert done.returncode == 0, done.stderr
    assert "5 labels have no prediction" in done.stdout
    assert json.loads((scores / "scores.json").read_text())
    assert list(scores.glob("*.png"))


def test_python_api_gives_the_same_labels(dataset: Path, trained: Path, tmp_path: Path):
    path = images(dataset)[0]
    assert densepred("predict", trained, path, "--out", tmp_path).returncode == 0
    predictor = dp.load(trained)
    assert isinstance(predictor, Predictor)
    from_path = predictor.predict(path)
    from_path.save(tmp_path / "api.nii.gz")
    expected = np.asarray(nib.load(tmp_path / path.name).dataobj)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "api.nii.gz").dataobj), expected)
    with dp.open_volume(path) as volume:
        from_array = predictor.predict(volume.numpy(), spacing=volume.spacing)
    assert np.array_equal(from_array.numpy()[0].T, expected)


def test_resampled_model_predicts_on_the_inputs_grid(dataset: Path, recipe: Path, tmp_path: Path):
    run = tmp_path / "resampled"
    changes = [f"data.root={dataset}", "data.spacing=[1.5, 1.5, 1.5]", "training.epochs=1"]
    done = densepred("train", recipe, *changes, "--run", run)
    assert done.returncode == 0, done.stderr
    path = images(dataset)[0]
    labels = dp.load(run).predict(path)
    assert labels.shape[1:] == dp.open_volume(path).shape[1:]


def test_a_batch_with_bad_cases(dataset: Path, trained: Path, tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = images(dataset)[:2]
    for path in good:
        shutil.copy(path, folder)
    whole = good[0].read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    (folder / "flipped.nii.gz").write_bytes(flipped)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    bomb = bytearray(header.binaryblock + b"\0" * 4)
    bomb[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], "<i2").tobytes()
    bomb[344:348] = b"n+1\0"
    (folder / "bomb.nii").write_bytes(bomb)
    (folder / "page.nii.gz").write_bytes(b"<html>please log in</html>")
    (folder / "empty.nii.gz").write_bytes(b"")
    done = densepred("predict", trained, folder, "--out", out)
    assert done.returncode == 3, done.stderr
    failures = (out / "failures.tsv").read_text().splitlines()
    assert {row.split("\t")[0] for row in failures[1:]} == {"truncated", "flipped", "bomb", "page", "empty"}
    assert "Traceback" not in done.stderr
    for path in good:
        assert (out / path.name).exists()
    assert not list(out.glob(".*.part.*"))
    assert sorted(p.name for p in out.glob("*.nii*")) == sorted(p.name for p in good)


def test_a_rerun_does_only_what_is_missing(dataset: Path, trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    some = images(dataset)[:3]
    assert densepred("predict", trained, *some, "--out", out).returncode == 0
    before = snapshot(out)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    (out / some[0].name).unlink()
    damaged = bytearray((out / some[1].name).read_bytes())
    damaged[-1] ^= 1
    (out / some[1].name).write_bytes(damaged)
    again = densepred("predict", trained, *some, "--out", out)
    assert again.returncode == 3
    assert "changed since it was written" in again.stderr
    assert (out / some[1].name).read_bytes() == bytes(damaged)
    again = densepred("predict", trained, *some, "--out", out, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert sorted(snapshot(out).pop("manifest.jsonl").splitlines()) == sorted(before["manifest.jsonl"].splitlines())
    assert snapshot(out) | {"manifest.jsonl": b""} == before | {"manifest.jsonl": b""}
    assert (out / some[2].name).stat().st_mtime_ns == stamps[some[2].name]


def test_files_of_others_are_not_replaced(dataset: Path, trained: Path, tmp_path: Path):
    out = tmp_path / "labels"
    shutil.copytree(dataset / "labelsTr", out)
    before = snapshot(out)
    done = densepred("predict", trained, dataset / "imagesTr", "--out", out)
    assert done.returncode == 5
    assert "8 outputs would replace files that were not predicted here" in done.stderr
    assert {name: data for name, data in snapshot(out).items() if name != ".lock"} == before


def test_killed_batch_ends_byte_for_byte_like_the_uninterrupted(dataset: Path, trained: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert densepred("predict", trained, dataset / "imagesTr", "--out", whole).returncode == 0
    command = ["predict", trained, dataset / "imagesTr", "--out", killed]
    for count in (1, 2, 4):
        assert kill_when(lambda count=count: cases_done(killed) >= count, *command) == -signal.SIGKILL
    assert densepred(*command).returncode == 0
    assert snapshot(killed) == snapshot(whole)


def test_stopping_a_batch(dataset: Path, trained: Path, tmp_path: Path):
    command = ["predict", trained, dataset / "imagesTr", "--out", tmp_path / "o"]
    assert kill_when(lambda: cases_done(tmp_path / "o") >= 1, *command, number=signal.SIGTERM) == 143
    assert not list((tmp_path / "o").glob(".*.part.*"))
    assert densepred(*command).returncode == 0
    assert cases_done(tmp_path / "o") == 8


def test_refusals(dataset: Path, trained: Path, tmp_path: Path):
    image = images(dataset)[0]
    (tmp_path / "none").mkdir()
    nothing = densepred("predict", trained, tmp_path / "none", "--out", tmp_path / "o1")
    assert (nothing.returncode, "no inputs matched" in nothing.stderr) == (4, True)
    in_place = densepred("predict", trained, image, "--out", image.parent)
    assert (in_place.returncode, "replace the input" in in_place.stderr) == (5, True)
    no_run = densepred("predict", tmp_path / "none", image, "--out", tmp_path / "o2")
    assert (no_run.returncode, "not a run directory" in no_run.stderr) == (2, True)
    for done in (nothing, in_place, no_run):
        assert done.stderr.count("ERROR") == 1
        assert "Traceback" not in done.stderr


class Sentinel:
    """Writes a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_pickle_named_safetensors_is_refused_and_never_run(dataset: Path, trained: Path, tmp_path: Path):
    run = copy_run(trained, tmp_path / "run")
    fired = tmp_path / "fired"
    (run / "model.safetensors").write_bytes(pickle.dumps(Sentinel(str(fired))))
    done = densepred("predict", run, images(dataset)[0], "--out", tmp_path / "out")
    assert done.returncode == 5
    assert "Python objects" in done.stderr
    assert not fired.exists()


def test_broken_and_foreign_weights(dataset: Path, trained: Path, tmp_path: Path):
    run = copy_run(trained, tmp_path / "run")
    (run / "model.safetensors").write_bytes(b"\xff" * 100)
    assert densepred("predict", run, images(dataset)[0], "--out", tmp_path / "out").returncode == 5
    other = copy_run(trained, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("channels: [4, 8]", "channels: [4, 9]"))
    done = densepred("predict", other, images(dataset)[0], "--out", tmp_path / "out")
    assert (done.returncode, "do not fit" in done.stderr) == (2, True)


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a folder that refuses writing"
)
def test_unwritable_output_folder(dataset: Path, trained: Path, tmp_path: Path):
    done = densepred("predict", trained, images(dataset)[0], "--out", "/proc/densepred")
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


def test_label_of_another_shape_stops_the_training_and_is_named(dataset: Path, recipe: Path, tmp_path: Path):
    root = tmp_path / "set"
    shutil.copytree(dataset, root)
    label = sorted((root / "labelsTr").glob("*.nii.gz"))[2]
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.eye(4)), label)
    other = sorted((root / "imagesTr").glob("*.nii.gz"))[4]
    other.write_bytes(gzip.compress(b"nonsense"))
    for command in (
        ["check", recipe, f"data.root={root}"],
        ["train", recipe, f"data.root={root}", "--run", tmp_path / "r"],
    ):
        done = densepred(*command)
        assert done.returncode == 2, done.stdout
        text = done.stdout + done.stderr
        for name in (label, other):
            assert name.name.removesuffix(".nii.gz") in text.replace("\n", "")
