"""What the folder of a cross-validation predicts with: its folds, their mean, and the settings that were decided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from astropy.io import fits

from densepred import load, open_volume
from densepred.crossval.combining import _decided
from densepred.crossval.training import FoldState
from densepred.errors import InputError
from densepred.inference.batch import predict
from densepred.inference.components import keep_largest
from densepred.inference.engines.local import Local
from densepred.inference.folds import DECISIONS, RECORD, UNDECIDED, write_record
from tests.acceptance.helpers import densepred
from tests.untrained_runs import noise, run_of

CLASSES = {0: "sky", 2: "star", 7: "trail"}


def folder_of(root: Path, suffix: str, count: int) -> Path:
    """A cross-validation of untrained folds."""
    out = root / "cv"
    out.mkdir()
    made = run_of(root, suffix, CLASSES, "fold-0")
    for number in range(count):
        fold = Path(shutil.copytree(made, out / f"fold-{number}"))
        path, drawn = fold / "model.safetensors", torch.Generator().manual_seed(45 + number)
        weights = safetensors.torch.load_file(path)
        changed = {name: value + 0.2 * torch.randn(value.shape, generator=drawn) for name, value in weights.items()}
        safetensors.torch.save_file(changed, path)
    rows = [{"fold": n, "runs": [f"fold-{n}"], "cases": [f"c{n}"], "state": "done"} for n in range(count)]
    write_record(out / RECORD, {"folds": rows})
    return out


@pytest.fixture
def cv(tmp_path: Path) -> Path:
    return folder_of(tmp_path, ".nii.gz", 3)


def decide(cv: Path, runs: list[str] | None = None, **settings: Any) -> None:
    named = {f"inference.{key}": value for key, value in settings.items()}
    why = [{"what": key, "used": True, "why": f"{key} helped by 0.01"} for key in settings]
    write_record(cv / DECISIONS, {"settings": named, "decisions": why} | ({"runs": runs} if runs else {}))


def test_one_fold_gives_the_bytes_of_its_run(tmp_path: Path) -> None:
    cv = folder_of(tmp_path, ".nii.gz", 1)
    decide(cv, mirror=[1], temperature=1.5, keep_largest=["star"])
    settings = ["inference.mirror=[1]", "inference.temperature=1.5", "inference.keep_largest=[star]"]
    kinds = ["inference.outputs=[labels, probabilities]"]
    images = sorted((tmp_path / "set").glob("c?.nii.gz"))
    shutil.copytree(cv / "fold-0", tmp_path / "alone" / "cv")  # the name of a model stands in its files
    assert predict(cv, images, tmp_path / "joint", kinds).exit_code == 0
    assert predict(tmp_path / "alone" / "cv", images, tmp_path / "single", [*settings, *kinds]).exit_code == 0
    for path in images:
        for name in (path.name, f"probabilities/{path.name}"):
            assert (tmp_path / "joint" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    assert load(cv).weights_hash == load(cv / "fold-0").weights_hash
    assert load(cv).config_hash == load(cv / "fold-0", settings).config_hash


def test_the_mean_of_all_folds_with_what_was_decided(cv: Path) -> None:
    decide(cv, mirror=[0], keep_largest=["*"], temperature=2.0)
    predictor = load(cv)
    assert predictor.origin.why[-1] == "cv: temperature helped by 0.01"
    picture = noise(4, 40)
    folds = [cv / f"fold-{n}" for n in range(3)]
    peer = load(folds, ["inference.mirror=[0]"])
    found = predictor.predict(picture, outputs=["labels", "logits", "probabilities"])
    expected = peer.predict(picture, outputs=["labels", "logits"])
    np.testing.assert_array_equal(found["logits"].numpy(), expected["logits"].numpy())
    labels = expected["labels"].numpy().copy()
    assert keep_largest(labels[0], [2, 7], 0) > 0
    np.testing.assert_array_equal(found["labels"].numpy(), labels)
    logits = torch.from_numpy(expected["logits"].numpy())
    np.testing.assert_allclose(found["probabilities"].numpy(), torch.softmax(logits / 2, 0).numpy(), atol=1e-6)


def test_without_decisions_the_recipe_holds(cv: Path) -> None:
    predictor = load(cv)
    assert predictor.origin.why == ("cv: " + UNDECIDED,)
    assert predictor.config_hash == load([cv / f"fold-{n}" for n in range(3)]).config_hash
    decide(cv)
    assert load(cv).origin.why == ()


def test_what_the_user_says_wins(cv: Path) -> None:
    decide(cv, mirror=[0], keep_largest=["star"])
    settings = load(cv, ["inference.mirror=[]", "inference.keep_largest=[]"]).config.inference
    assert settings.mirror == ()
    assert settings.keep_largest == ()


def test_unfinished_folds_are_left_out_and_that_is_said(cv: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = json.loads((cv / RECORD).read_text())
    record["folds"][1]["state"] = "failed"
    write_record(cv / RECORD, record)
    predictor = load(cv)
    assert "2 of 3 folds are finished and used" in caplog.text
    assert predictor.weights_hash == load([cv / "fold-0", cv / "fold-2"]).weights_hash
    for fold in record["folds"]:
        fold["state"] = "stopped"
    write_record(cv / RECORD, record)
    with pytest.raises(InputError, match="no fold of this cross-validation is finished"):
        load(cv)


def test_with_other_models_decisions_are_left_out(cv: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    decide(cv, mirror=[0])
    other = Path(shutil.copytree(tmp_path / "fold-0", tmp_path / "other"))
    predictor = load([cv, other])
    assert len(predictor.models) == 4
    assert predictor.config.inference.mirror == ()
    assert "were measured without the other models and are not used" in caplog.text


def test_chosen_runs_stand_for_the_folder(cv: Path) -> None:
    decide(cv, ["../cv/fold-2"], mirror=[])
    assert load(cv).weights_hash == load(cv / "fold-2").weights_hash


def test_records_tell_how_a_result_came_about(tmp_path: Path) -> None:
    cv = folder_of(tmp_path, ".fits", 2)
    decide(cv, mirror=[0], keep_largest=["*"])
    picture = tmp_path / "set" / "c0.fits"
    done = densepred("predict", cv, picture, "--out", tmp_path / "out", "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cv: mirror helped by 0.01") == 1
    with fits.open(tmp_path / "out" / "c0.fits.fz") as file:
        header = next(hdu.header for hdu in file if hdu.is_image and hdu.data is not None)
    assert header["DPMODEL"] == "cv"
    told = "".join(header["HISTORY"]).replace("\n", "")
    assert "inference.mirror=[0]" in told
    assert "inference.keep_largest=" in told
    again = predict(cv, [picture], tmp_path / "out", engine=Local())
    assert again.skipped == ["c0"]
    with open_volume(tmp_path / "out" / "c0.fits.fz") as found:
        np.testing.assert_array_equal(found.numpy(), load(cv).predict(picture).numpy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ('{"format_version": 9, "folds": []}', "is in format 9"),
        ('{"format_version": 1, "folds": [{"fold": 0}]}', "damaged .*state"),
    ],
)
def test_damaged_records_are_named(cv: Path, text: str, message: str) -> None:
    (cv / RECORD).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load(cv)
    assert caught.value.file == cv / RECORD


def test_decisions_may_set_nothing_else(cv: Path) -> None:
    decide(cv, outputs=["logits"])
    with pytest.raises(InputError, match=r"decides on inference\.outputs"):
        load(cv)


def test_folds_finished_after_snapshots_were_decided_on_are_told(cv: Path) -> None:
    decide(cv, runs=["fold-0/snapshots/1", "fold-0", "fold-1"])
    folds = [FoldState(n, [f"fold-{n}"], [f"c{n}"]) for n in range(2)]
    assert [one.runs for one in _decided(cv, folds)] == [["fold-0/snapshots/1", "fold-0"], ["fold-1"]]
    with pytest.raises(InputError, match="fold 2 was finished after its snapshots were decided on"):
        _decided(cv, [*folds, FoldState(2, ["fold-2"], ["c2"])])
