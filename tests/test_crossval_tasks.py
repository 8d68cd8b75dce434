"""Cross-validation of maps of numbers, of columns of a table, and of several things learnt at once."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from sklearn.metrics import log_loss, mean_squared_error

from densepred import load, open_volume
from densepred.cases.plan import Plan
from densepred.config import Config
from densepred.crossval import Result, combine, cross_validate
from densepred.errors import InputError, NothingDoneError
from densepred.inference.batch import predict
from densepred.inference.folds import read_record
from tests import tasks_set

pytestmark = pytest.mark.usefixtures("forked_folds")
COLUMNS = {"targets": tasks_set.TONE | tasks_set.RADIUS, "folds": 2} | tasks_set.WITH_TABLE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks_set.write_set(tmp_path_factory.mktemp("set") / "set")


def recipe_of(root: Path, data: dict, steps: int = 80) -> Config:
    return tasks_set.recipe(root, data, training={"steps": steps}, inference={"mirror": (1,)})


@pytest.fixture(scope="module")
def of_maps(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    config = recipe_of(root, {"targets": tasks_set.DEPTH, "folds": 2})
    return cross_validate(config, tmp_path_factory.mktemp("maps") / "cv")


@pytest.fixture(scope="module")
def of_columns(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return cross_validate(recipe_of(root, COLUMNS), tmp_path_factory.mktemp("columns") / "cv")


def test_maps_are_judged_by_their_squared_error(of_maps: Result, root: Path) -> None:
    assert of_maps.exit_code == 0
    summary, errors = of_maps.verdict.summary, {}
    for number in range(tasks_set.COUNT):
        (path,) = (of_maps.out / "predictions" / "regression").glob(f"c{number}.fits*")
        with open_volume(path) as found:
            assert found.unit == "m"
            error = found.numpy()[0] - fits.getdata(root / f"c{number}.fits", "DEPTH")
        errors[f"c{number}"] = error[np.isfinite(error)] ** 2
    assert (summary["metric"], summary["names"]) == ("squared error", ["depth"])
    means = [each.mean() for each in errors.values()]
    assert summary["all"]["mean"]["value"] == pytest.approx(np.mean(means), rel=1e-5)
    assert np.mean(means) < fits.getdata(root / "c0.fits", "DEPTH")[5:].var()  # something was learnt
    pooled = np.concatenate(list(errors.values())).mean()
    assert summary["pooled"]["depth"]["value"] == pytest.approx(pooled, rel=1e-5)
    with (of_maps.out / "scores.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert {case: float(row["mse"]) for case, row in rows.items()} == pytest.approx(
        {case: each.mean() for case, each in errors.items()}, rel=1e-5
    )
    assert all(float(row["pearson"]) > 0.5 for row in rows.values())
    assert (of_maps.out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not (of_maps.out / "reliability.png").exists()


def test_every_map_is_that_of_the_fold_that_did_not_see_it(of_maps: Result, root: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in of_maps.verdict.settings.items()]
    for fold in read_record(of_maps.out / "crossval.json")["folds"]:
        predictor = load(of_maps.out / fold["runs"][0], settings)
        for case in fold["cases"]:
            (path,) = (of_maps.out / "predictions" / "regression").glob(f"{case}.fits*")
            with open_volume(path) as found:
                expected = predictor.predict(f"{root / case}.fits[IMAGE]").numpy()
                np.testing.assert_array_equal(found.numpy(), expected)


def test_views_are_taken_where_the_error_falls(of_maps: Result, root: Path) -> None:
    (decision,) = of_maps.verdict.decisions
    gained = decision.numbers["gain"]
    assert decision.used == (gained["low"] > 0)
    assert of_maps.verdict.settings["inference.mirror"] == ([1] if decision.used else [])
    plain, mirrored = (error_of(of_maps.out / "trials" / name, root) for name in ("plain", "mirrored"))
    assert gained["value"] == pytest.approx(plain - mirrored, rel=1e-4)
    assert f"mean squared error {mirrored - plain:+.2g}"[:-1] in decision.why


def error_of(folder: Path, root: Path) -> float:
    """The mean over the cases of their mean squared error."""
    found = []
    for number in range(tasks_set.COUNT):
        (path,) = (folder / "regression").glob(f"c{number}.fits*")
        with open_volume(path) as volume:
            error = volume.numpy()[0] - fits.getdata(root / f"c{number}.fits", "DEPTH")
        found.append(np.nanmean(error**2))
    return float(np.mean(found))


def test_folds_share_what_makes_numbers_standard(of_maps: Result, of_columns: Result, root: Path) -> None:
    """So their mean can be taken; a fold alone is what `densepred train` makes of the recipe."""
    for found in (of_maps, of_columns):
        plans = [Plan.load(found.out / f"fold-{n}" / "plan.json") for n in range(2)]
        assert plans[0].targets == plans[1].targets
        assert plans[0].covariates == plans[1].covariates
    depths = np.concatenate([fits.getdata(root / f"c{n}.fits", "DEPTH").ravel() for n in range(tasks_set.COUNT)])
    depth = Plan.load(of_maps.out / "fold-0" / "plan.json").targets["depth"]
    assert (depth.mean, depth.deviation) == pytest.approx((np.nanmean(depths), np.nanstd(depths)), rel=1e-6)
    ages = [10 * (4 + n % 4) + n for n in range(tasks_set.COUNT)]
    age = Plan.load(of_columns.out / "fold-0" / "plan.json").covariates[0]
    assert (age.mean, age.deviation) == pytest.approx((np.mean(ages), np.std(ages)))


def test_the_folder_predicts_the_mean_of_its_folds(of_maps: Result, root: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in of_maps.verdict.settings.items()]
    image = f"{root / 'c0.fits'}[IMAGE]"
    each = [load(of_maps.out / f"fold-{n}", settings).predict(image).numpy() for n in range(2)]
    np.testing.assert_allclose(load(of_maps.out).predict(image).numpy(), np.mean(each, 0), rtol=1e-4)


def test_columns_are_judged_by_log_loss_and_squared_error(of_columns: Result, root: Path) -> None:
    assert of_columns.exit_code == 0
    with (of_columns.out / "predictions" / "predictions.csv").open() as file:
        told = {row["id"]: row for row in csv.DictReader(file)}
    with (root / "table.csv").open() as file:
        truth = {row["id"]: row for row in csv.DictReader(file)}
    assert set(told) == set(truth)
    shares = np.array([[float(told[case][f"tone:{name}"]) for name in ("bright", "dark")] for case in truth])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    summary = of_columns.verdict.summary
    assert (summary["metric"], summary["names"]) == ("log loss", ["tone"])
    expected = log_loss(
        [row["tone"] for row in truth.values()], shares / shares.sum(1, keepdims=True), labels=["bright", "dark"]
    )
    assert summary["all"]["mean"]["value"] == pytest.approx(expected, rel=1e-4)
    radius = summary["beside"]["radius"]
    sides = ([float(rows[case]["radius"]) for case in truth] for rows in (truth, told))
    assert radius["metric"] == "squared error"
    assert radius["all"]["radius"]["value"] == pytest.approx(mean_squared_error(*sides))
    assert {row["case"] for row in csv.DictReader((of_columns.out / "scores_radius.csv").open())} == set(truth)
    assert len(of_columns.tables) == 2
    assert of_columns.lines == ["mirrored views: none, whole images are predicted as they are"]


def test_every_row_is_that_of_the_fold_that_did_not_see_it(of_columns: Result, root: Path, tmp_path: Path) -> None:
    with (of_columns.out / "predictions" / "predictions.csv").open() as file:
        told = {row["id"]: row for row in csv.DictReader(file)}
    for fold in read_record(of_columns.out / "crossval.json")["folds"]:
        images = [f"{root / case}.fits[IMAGE]" for case in fold["cases"]]
        out = tmp_path / f"{fold['fold']}"
        predict(of_columns.out / fold["runs"][0], images, out, [f"data.table={root / 'table.csv'}"])
        with (out / "predictions.csv").open() as file:
            assert list(csv.DictReader(file)) == [told[case] for case in fold["cases"]]


def test_what_is_learnt_beside_label_maps_is_scored_beside_them(root: Path, tmp_path: Path) -> None:
    data = {"targets": tasks_set.TONE, "folds": 2, "table": "table.csv"} | tasks_set.LABELS
    found = cross_validate(recipe_of(root, data), tmp_path / "cv")
    summary = found.verdict.summary
    assert (summary["metric"], summary["names"]) == ("Dice", ["rim", "core"])
    assert summary["beside"]["tone"]["cases"] == tasks_set.COUNT
    assert len(list((tmp_path / "cv" / "predictions").glob("c*.fits*"))) == tasks_set.COUNT
    before = {path: path.read_bytes() for path in (tmp_path / "cv" / "predictions").iterdir() if path.is_file()}
    cross_validate(recipe_of(root, data), tmp_path / "cv")
    assert {path: path.read_bytes() for path in before} == before


def test_two_of_maps_together(of_maps: Result, tmp_path: Path) -> None:
    import safetensors.torch

    other = Path(shutil.copytree(of_maps.out, tmp_path / "other"))
    for n in range(2):
        path = other / f"fold-{n}" / "model.safetensors"
        changed = {name: value * 1.001 for name, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(changed, path)
    found = combine([of_maps.out, other], tmp_path / "both")
    numbers = found.verdict.decisions[0].numbers
    assert set(numbers["squared error"]) == {"cv", "other", "cv+other"}
    singles = [numbers["squared error"][name]["value"] for name in ("cv", "other")]
    best = numbers["best"]
    assert "+" in best or numbers["squared error"][best]["value"] == min(singles)


def test_another_target_is_another_recipe(of_columns: Result, root: Path) -> None:
    data = COLUMNS | {"targets": tasks_set.TONE | {"radius": {"column": "age"}}}
    with pytest.raises(InputError, match=r"data\.targets\.radius\.column was radius, now age"):
        cross_validate(recipe_of(root, data), of_columns.out)


def test_only_what_predicts_the_same_goes_together(of_maps: Result, of_columns: Result, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no mean of them"):
        combine([of_maps.out, of_columns.out], tmp_path / "both")


def test_a_folder_of_an_earlier_version_is_told(of_columns: Result, root: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(of_columns.out, tmp_path / "cv"))
    (out / "given.yaml").unlink()
    with pytest.raises(InputError, match="an earlier version made this folder"):
        cross_validate(recipe_of(root, COLUMNS), out)


def test_without_any_prediction_the_reason_is_told(of_maps: Result, root: Path, tmp_path: Path) -> None:
    out, copied = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (of_maps.out, root))
    shutil.rmtree(out / "trials")
    config = recipe_of(copied, {"targets": tasks_set.DEPTH, "folds": 2})
    for path in copied.glob("*.fits"):
        path.write_bytes(path.read_bytes()[:2880])
    with pytest.raises(InputError, match="has learnt from has changed"):
        cross_validate(config, out)
    record = read_record(out / "crossval.json")
    for fold in record["folds"]:
        fold["data"] = ""  # as of earlier versions, which did not look
    (out / "crossval.json").write_text(json.dumps(record))
    with pytest.raises(NothingDoneError, match=r"no held-out case could be predicted: .+"):
        cross_validate(config, out)


def test_the_table_says_which_models_made_it(of_columns: Result) -> None:
    told = json.loads((of_columns.out / "predictions" / "predictions.json").read_text())
    folds = read_record(of_columns.out / "crossval.json")["folds"]
    assert told["weights_sha256_of_folds"] == {str(fold["fold"]): fold["weights"] for fold in folds}
    assert set(told["targets"]) == {"tone", "radius"}


@pytest.mark.parametrize("suffix", ["labels", "maps"])
def test_stores_in_folders(suffix: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    rng = np.random.default_rng(0)
    for number in range(4):
        disc = np.hypot(*(np.indices((24, 24)) - rng.uniform(9, 15, 2)[:, None, None])) < 6
        planes = {"images": (disc + rng.normal(0, 0.1, disc.shape)).astype(np.float32)}
        planes |= {"labels": disc.astype(np.uint8), "maps": 3 * disc.astype(np.float32)}
        for folder, plane in planes.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            zarr.save_array(str(tmp_path / folder / f"c{number}.zarr"), plane)
    data: dict[str, Any] = {"root": str(tmp_path), "images": "images/*.zarr", "folds": 2}
    if suffix == "labels":
        data |= {"labels": "labels/{id}.zarr", "classes": {0: "sky", 1: "disc"}}
    else:
        data |= {"targets": {"height": {"file": "maps/{id}.zarr"}}}
    for _ in range(2):
        found = cross_validate(recipe_of(tmp_path, data, 20), tmp_path / "cv")
        assert found.verdict.summary["cases"] == 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"mean": 3.0}, "given together"),
        ({"mean": 3.0, "deviation": 1.0, "standardize": False}, "make numbers standard"),
        ({"mean": 3.0, "deviation": 0.0}, "greater than 0"),
    ],
)
def test_means_that_make_no_sense(root: Path, target: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(root, COLUMNS | {"targets": {"radius": {"column": "radius"} | target}})
