"""All folds with one command: killed and gone on with, in parallel, failing alone; and what is decided from them."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from densepred import config as configuration
from densepred import evaluate, load, open_volume
from densepred.cases.case import collect
from densepred.cases.plan import Plan
from densepred.children import environment, python
from densepred.crossval import combine, cross_validate, snapshots
from densepred.crossval.judging import _Written
from densepred.crossval.recipe import Shared, of_fold
from densepred.crossval.training import FoldState, _epochs, _seconds
from densepred.errors import InputError, NothingDoneError, UnsafeError
from densepred.inference.folds import read_record
from densepred.metrics.bootstrap import gain
from tests import tasks_set
from tests.acceptance.helpers import densepred, kill_when, snapshot, steps_done
from tests.crossval_set import write_set

pytestmark = pytest.mark.usefixtures("forked_folds")
CASES = {f"c{n}" for n in range(6)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def cv(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the middle of the first folds, then gone on with."""
    out = tmp_path_factory.mktemp("runs") / "cv"
    command = ("crossval", recipe, "--out", out, "--devices", "cpu*2")

    def begun() -> bool:
        return any(steps_done(out / f"fold-{n}") for n in range(3))

    assert kill_when(begun, *command) == -signal.SIGKILL
    states = {one["state"] for one in read_record(out / "crossval.json")["folds"]}
    assert "running" in states
    done = densepred(*command)
    assert done.returncode == 0, done.stderr
    assert "held-out cases" in done.stdout
    assert "mirrored views of axes [2]:" in done.stdout
    return out


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """As many as a process of `cpu*2` has: the last bits depend on their number."""
    import os

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def test_every_case_is_predicted_by_a_fold_that_did_not_see_it(cv: Path) -> None:
    folds = read_record(cv / "crossval.json")["folds"]
    assert [one["state"] for one in folds] == ["done"] * 3
    assert sorted(case for one in folds for case in one["cases"]) == sorted(CASES)
    settings = read_record(cv / "decisions.json")["settings"]
    texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    for one in folds:
        config = configuration.load(cv / one["runs"][0] / "config.yaml")
        assert config.data.fold == one["fold"]
        predictor = load(cv / one["runs"][0], texts)
        for case in one["cases"]:
            image = Path(config.data.root) / "images" / f"{case}.nii.gz"
            with open_volume(cv / "predictions" / f"{case}.nii.gz") as found:
                np.testing.assert_array_equal(found.numpy(), predictor.predict(image).numpy())


def test_scores_are_those_of_evaluate(cv: Path, recipe: Path) -> None:
    scores = evaluate(cv / "predictions", recipe.parent / "labels")
    summary = read_record(cv / "summary.json")
    assert summary["cases"] == summary["groups"] == 6
    assert summary["all"]["mean"]["value"] == pytest.approx(scores.mean_dice)
    assert summary["pooled"]["cube"]["value"] == pytest.approx(scores.pooled["cube"]["dice"])
    whole = summary["all"]["cube"]
    assert whole["low"] < whole["value"] < whole["high"]
    with (cv / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"]: float(row["dice"]) for row in rows} == pytest.approx(scores.case_dice)
    folds = {case: one["fold"] for one in read_record(cv / "crossval.json")["folds"] for case in one["cases"]}
    assert {row["case"]: int(row["fold"]) for row in rows} == folds
    for picture in ("scores.png", "reliability.png"):
        assert (cv / picture).read_bytes().startswith(b"\x89PNG")


def test_intensities_are_fitted_once_for_all_folds(cv: Path) -> None:
    plans = [Plan.load(cv / f"fold-{n}" / "plan.json") for n in range(3)]
    assert plans[0].normalize == plans[1].normalize == plans[2].normalize
    assert plans[0].normalize[0].complete  # type: ignore[union-attr]
    assert len(load(cv).models) == 3
    assert len([path for path in (cv / "cache").iterdir() if path.is_dir()]) == 6  # prepared once for all


def test_run_again_it_changes_nothing(cv: Path, recipe: Path) -> None:
    before = snapshot(cv)
    done = densepred("crossval", recipe, "--out", cv)
    assert done.returncode == 0, done.stderr
    after = snapshot(cv)
    changed = [name for name, content in after.items() if before.get(name) != content and not name.endswith(".lock")]
    assert changed == []


def test_a_fold_is_that_of_densepred_train(cv: Path, tmp_path: Path) -> None:
    """Killed and resumed beside another fold, its weights are those of a training by itself, to the bit."""
    config = configuration.dump(of_fold(configuration.load(cv / "config.yaml"), 1, None))
    (tmp_path / "fold.yaml").write_text(config)
    done = densepred("train", tmp_path / "fold.yaml", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run", cv / "fold-1")]
    assert weights[0] == weights[1]


def test_another_recipe_is_refused(cv: Path, recipe: Path) -> None:
    with pytest.raises(InputError, match=r"optimizer.lr was 0.02, now 0.5") as caught:
        cross_validate(recipe, cv, ["optimizer.lr=0.5"])
    assert "choose another --out folder" in caught.value.fix
    with pytest.raises(InputError, match="fold 7 of 3"):
        cross_validate(recipe, cv, folds=[7])


def test_decisions_are_made_again_from_what_is_there(cv: Path, recipe: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cv, tmp_path / "cv"))
    wanted = (copied / "decisions.json").read_bytes()
    for name in ("decisions.json", "summary.json", "scores.csv"):
        (copied / name).unlink()
    shutil.rmtree(copied / "trials")
    found = cross_validate(recipe, copied)
    assert found.exit_code == 0
    assert (copied / "decisions.json").read_bytes() == wanted
    assert (copied / "summary.json").read_bytes() == (cv / "summary.json").read_bytes()
    assert len(found.lines) == 3


def test_a_fold_that_fails_leaves_the_others(recipe: Path, cv: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cv, tmp_path / "cv"))
    for path in (copied / "fold-2" / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"damaged")
    (copied / "fold-2" / "model.safetensors").write_bytes(b"damaged")
    done = densepred("crossval", recipe, "--out", copied)
    assert done.returncode == 3, done.stderr
    assert "ERROR fold 2: failed:" in done.stderr
    assert "every checkpoint is damaged" in done.stderr
    summary = read_record(copied / "summary.json")
    assert set(summary["folds"]) == {"0", "1"}
    assert summary["cases"] == 4
    assert len(load(copied).models) == 2


def test_stopped_by_a_signal_it_says_how_far_it_is(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "cv"
    command = ("crossval", recipe, "training.steps=4000", "training.checkpoint_every=10", "--out", out, "--folds", "1")
    assert kill_when(lambda: steps_done(out / "fold-1") > 0, *command, number=signal.SIGTERM) == 143
    (fold,) = read_record(out / "crossval.json")["folds"]
    assert (fold["fold"], fold["state"]) == (1, "stopped")
    assert "the state after step" in fold["why"]


def test_how_far_a_fold_is(tmp_path: Path) -> None:
    fold = FoldState(0, ["fold-0"], ["c0"])
    assert (_epochs(tmp_path, 5, fold), _seconds(tmp_path, 60, fold)) == (0, 0)
    (tmp_path / "fold-0").mkdir()
    (tmp_path / "fold-0" / "metrics.csv").write_text("epoch,seconds,loss\n1,10.5,0.9\n2,21.7,0.8\n3,3")
    assert (_epochs(tmp_path, 5, fold), _seconds(tmp_path, 60, fold)) == (2, 21), "a torn row does not count"
    fold.state = "done"
    assert (_epochs(tmp_path, 5, fold), _seconds(tmp_path, 60, fold)) == (5, 60)


def test_no_fold_at_all(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingDoneError, match=r"fold 0: failed: .*loss is not finite") as caught:
        cross_validate(recipe, tmp_path / "cv", ["optimizer.lr=1e30", "optimizer.clip=0"], folds=[0])
    assert caught.value.exit_code == 4


def test_what_people_did_in_predictions_stays(cv: Path, recipe: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(cv, tmp_path / "cv"))
    predictions = out / "predictions"
    shutil.copy(predictions / "c0.nii.gz", predictions / "c0_mine.nii.gz")
    assert cross_validate(recipe, out).exit_code == 0
    assert (predictions / "c0_mine.nii.gz").exists()
    shutil.copy(predictions / "c1.nii.gz", predictions / "c0.nii.gz")
    before = (predictions / "c0.nii.gz").read_bytes()
    with pytest.raises(UnsafeError, match="was changed since it was written"):
        cross_validate(recipe, out)
    assert (predictions / "c0.nii.gz").read_bytes() == before
    (predictions / "written.json").write_text("[")
    with pytest.raises(InputError, match="damaged"):
        cross_validate(recipe, out)


def test_predictions_that_were_being_written_are_no_ones_else(tmp_path: Path) -> None:
    """After a kill in the second file of three, of which the first was corrected since."""
    names = [tmp_path / f"{name}.nii" for name in "abc"]
    for path in names:
        path.write_text("old")
    folder = _Written(tmp_path)
    folder.begin(names)
    with folder.writing(names[0]):
        names[0].write_text("new")
    killed = folder.writing(names[1])
    killed.__enter__()
    names[1].write_text("new")
    again = _Written(tmp_path)
    assert [again.is_ours(path) for path in names] == [True, True, True]
    names[0].write_text("corrected")
    (tmp_path / "mine.nii").write_text("drawn by hand")
    with pytest.raises(UnsafeError, match="was changed since it was written"):
        again.begin(names)
    again.begin(names[1:])
    (tmp_path / "source").write_text("new")
    again.copy(tmp_path / "source", names[1])
    with again.writing(names[2]):
        names[2].write_text("new")
    again.end()
    assert {path.name for path in tmp_path.glob("*.nii")} == {"a.nii", "b.nii", "c.nii", "mine.nii"}
    names[1].write_text("corrected")
    for path in (names[1], tmp_path / "mine.nii"):
        with pytest.raises(UnsafeError, match="was changed since it was written"):
            _Written(tmp_path).begin([path])


def test_what_a_fold_has_learnt_from_is_all_that_cases_tell(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("id,tone,other\na,1,1\nb,2,1\nc,3,1\n")
    for name in "abc":
        (tmp_path / f"{name}.npy").write_bytes(b"image")
        (tmp_path / f"{name}.mhd").write_text(f"NDims = 2\nDimSize = 2 2\nElementDataFile = {name}.raw\n")
        (tmp_path / f"{name}.raw").write_bytes(b"1234")
    data = {"images": "{id}.npy", "labels": "{id}.mhd", "targets": {"tone": {"column": "tone"}}, "table": "table.csv"}
    config = configuration.check({"data": data | {"root": str(tmp_path), "classes": {0: "a", 1: "b"}}}, {}, "test")
    cases = {case.id: case for case in collect(config.data)}

    def told() -> str:
        return Shared(config, cases, [], {}).told_of(["a", "b"])

    before = told()
    (tmp_path / "table.csv").write_text("id,other,tone\nc,1,9\na,7,1\nb,1,2\n")  # of the two the same
    (tmp_path / "c.raw").write_bytes(b"4321")
    assert told() == before
    (tmp_path / "a.raw").write_bytes(b"4321")
    after = told()
    assert after != before
    (tmp_path / "table.csv").write_text("id,tone\na,1\nb,3\nc,3\n")
    assert told() != after


def test_finished_folds_of_other_labels_are_told(cv: Path, recipe: Path, tmp_path: Path) -> None:
    root, out = Path(shutil.copytree(recipe.parent, tmp_path / "set")), Path(shutil.copytree(cv, tmp_path / "cv"))
    here = [f"data.root={root}", f"data.cache={tmp_path / 'cache'}"]
    assert cross_validate(recipe, out, here).exit_code == 0
    shutil.copy(root / "labels" / "c1.nii.gz", root / "labels" / "c0.nii.gz")
    with pytest.raises(InputError, match="what fold 0 has learnt from has changed"):
        cross_validate(recipe, out, here)


def test_files_of_the_working_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "yaml", "json", "statistics"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    shown = subprocess.run(python("-c", "import json, yaml, numpy, statistics"), env=environment())
    assert shown.returncode == 0
    assert not (tmp_path / "ran").exists()


def scaled(cv: Path, other: Path) -> Path:
    """A cross-validation whose networks are a little different."""
    import safetensors.torch

    shutil.copytree(cv, other)
    for path in other.rglob("model.safetensors"):
        weights = {name: value * 1.01 for name, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(weights, path)
    return other


def test_two_cross_validations_together(cv: Path, tmp_path: Path) -> None:
    other = scaled(cv, tmp_path / "other")
    found = combine([cv, other], tmp_path / "both")
    decision = read_record(tmp_path / "both" / "decisions.json")["decisions"][0]
    assert set(decision["numbers"]["Dice"]) == {"cv", "other", "cv+other"}
    assert decision["numbers"]["best"] in ("cv", "other", "cv+other")
    assert decision["why"] == found.lines[0]
    single = read_record(cv / "summary.json")["all"]["mean"]["value"]
    assert decision["numbers"]["Dice"]["cv"]["value"] == pytest.approx(single, abs=0.02)
    assert len(load(tmp_path / "both").models) == 3 * (1 + ("+" in decision["numbers"]["best"]))
    same = Path(shutil.copytree(other, tmp_path / "there" / "cv"))
    best = combine([cv, same], tmp_path / "alike").verdict.decisions[0].numbers
    assert list(best["Dice"]) == ["cv-1", "cv-2", "cv-1+cv-2"]
    assert [one["value"] for one in best["Dice"].values()] == [
        one["value"] for one in decision["numbers"]["Dice"].values()
    ]
    record = read_record(other / "crossval.json")
    record["folds"].pop()
    (other / "crossval.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="finished folds or their cases are not those of"):
        combine([cv, other], tmp_path / "both")


def test_regions_are_judged_by_the_classes_of_their_label_maps(tmp_path: Path) -> None:
    data = tasks_set.LABELS | tasks_set.REGIONS | {"folds": 2}
    root = tasks_set.write_set(tmp_path / "set")
    recipe = tasks_set.recipe(root, data, training={"steps": 80}, inference={"mirror": (1,)})
    found = cross_validate(recipe, tmp_path / "cv")
    assert found.exit_code == 0
    assert found.verdict.settings["inference.temperature"] == 1
    assert found.verdict.summary["names"] == ["rim", "core"]
    truth = {path.stem: f"{path}[LABEL]" for path in sorted(root.glob("*.fits"))}
    predicted = {case: next((tmp_path / "cv" / "predictions").glob(f"{case}.fits*")) for case in truth}
    scores = evaluate(predicted, truth)
    assert found.verdict.summary["all"]["mean"]["value"] == pytest.approx(scores.mean_dice)
    assert scores.mean_dice > 0.7
    again = load(tmp_path / "cv").predict(root / "c0.fits[IMAGE]")
    assert set(np.unique(again.numpy())) <= {0, 1, 2}


def test_snapshots_are_taken_in_where_they_help(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "cv", ["optimizer.schedule=cosine", "optimizer.cycles=2", "training.epochs=1"]
    for helps, runs in ((True, ["fold-0", "fold-0/snapshots/cycle-1"]), (False, ["fold-0"])):
        monkeypatch.setattr(snapshots, "more_than_noise", lambda a, b, groups, it=helps: (it, gain(a, b, groups)))
        found = cross_validate(recipe, out, settings)
        decision = found.verdict.decisions[0]
        assert (decision.what, decision.used, decision.numbers["models"]) == ("snapshots", helps, 6)
        assert len(load(out).models) == 3 * len(runs)
        case = read_record(out / "crossval.json")["folds"][0]["cases"][0]
        texts = [f"{key}={json.dumps(value)}" for key, value in found.verdict.settings.items()]
        expected = load([out / run for run in runs], texts).predict(recipe.parent / "images" / f"{case}.nii.gz")
        with open_volume(out / "predictions" / f"{case}.nii.gz") as volume:
            np.testing.assert_array_equal(volume.numpy(), expected.numpy())
        other = scaled(out, tmp_path / f"other-{helps}")
        best = combine([out, other], tmp_path / f"both-{helps}").verdict.decisions[0].numbers["best"]
        assert len(load(tmp_path / f"both-{helps}").models) == 3 * len(runs) * (1 + ("+" in best))
    before = snapshot(out)
    cross_validate(recipe, out, settings)
    assert snapshot(out) == before
