"""Recipes with several heads: what is read, learnt, kept in the plan, predicted in its unit, and refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astropy.io import fits

from densepred import load
from densepred.cases.case import collect
from densepred.cases.plan import Plan, make_plan
from densepred.cases.preprocess import preprocess
from densepred.errors import InputError, UnsafeError
from densepred.inference.batch import predict
from densepred.training.loop import resume, train
from tests.tasks_set import DEPTH, LABELS, RADIUS, REGIONS, SIZE, TONE, WITH_TABLE, recipe, write_set

ALL = LABELS | WITH_TABLE | {"targets": DEPTH | TONE | RADIUS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("tasks") / "set")


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_the_plan_keeps_what_prediction_needs(root: Path, tmp_path: Path) -> None:
    config = recipe(root, ALL | {"fold": "all"})
    plan = make_plan(config, collect(config.data))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    maps = [fits.getdata(path, "DEPTH").astype(float) for path in sorted(root.glob("*.fits"))]
    depth, tone, radius = plan.targets["depth"], plan.targets["tone"], plan.targets["radius"]
    assert (depth.kind, tone.kind, radius.kind) == ("regression", "classification", "scalar")
    assert depth.mean == pytest.approx(np.nanmean(maps))
    assert depth.deviation == pytest.approx(np.nanstd(maps))
    assert (depth.unit, radius.unit, tone.classes) == ("m", "pix", ("dark", "bright"))
    table = rows_of(root / "table.csv").values()
    for column, found in zip(("age", "site"), plan.covariates, strict=True):
        values = [float(row[column]) for row in table]
        assert (found.name, found.mean, found.deviation) == (column, np.mean(values), pytest.approx(np.std(values)))


def test_maps_follow_the_image_and_say_where_they_are_known(root: Path) -> None:
    config = recipe(root, {"targets": DEPTH, "fold": "all"})
    cases = collect(config.data)
    plan = make_plan(config, cases)
    image, label = preprocess(cases[0], plan)
    assert image.shape == (3, SIZE, SIZE)
    truth, target = fits.getdata(root / "c0.fits", "DEPTH"), plan.targets["depth"]
    known = np.isfinite(truth)
    assert np.array_equal(image[2], known)
    np.testing.assert_allclose(image[1][known] * target.deviation + target.mean, truth[known], rtol=1e-5)
    assert (image[1][~known] == 0).all()
    assert label is not None
    assert not label.any(), "nothing is told apart, and every pixel is valid"


def test_resampled_maps_mix_only_what_is_known(root: Path) -> None:
    config = recipe(root, {"targets": DEPTH, "fold": "all", "spacing": [0.5, 0.5]})
    cases = collect(config.data)
    plan = make_plan(config, cases)
    image, _ = preprocess(cases[1], plan)
    assert image.shape == (3, 2 * SIZE, 2 * SIZE)
    truth, target = fits.getdata(root / "c1.fits", "DEPTH"), plan.targets["depth"]
    known = image[2] == 1
    assert known.mean() == pytest.approx(np.isfinite(truth).mean(), abs=0.02)
    found = (image[1] * target.deviation + target.mean)[known]
    assert found.min() >= np.nanmin(truth) - 1e-3
    assert found.max() <= np.nanmax(truth) + 1e-3


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "regression": ({"targets": DEPTH}, {}, {"mse_depth", "mae_depth", "r_depth"}),
    "variance": ({"targets": DEPTH}, {"depth": {"variance": True}}, {"mse_depth"}),
    "classification": (WITH_TABLE | {"targets": TONE}, {}, {"accuracy_tone", "auc_tone", "log_loss_tone"}),
    "scalar": ({"table": "table.csv", "targets": RADIUS}, {"radius": {"positive": True}}, {"mae_radius"}),
    "regions": (LABELS | REGIONS, {}, {"dice_disc", "dice_core", "dice_mean"}),
    "joint": (ALL | REGIONS, {"radius": {"weight": 0.1, "loss": {"huber": 1}}}, {"dice_core", "mse_depth", "r_radius"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_is_scored(kind: str, root: Path, tmp_path: Path) -> None:
    data, heads, scores = KINDS[kind]
    run = train(recipe(root, data, heads), tmp_path / "run")
    row = run.rows[-1]
    assert scores <= row.keys()
    assert 0 < row["loss"] < 20
    assert all(math.isfinite(row[name]) for name in scores if not name.startswith(("r_", "dice", "auc")))


def test_a_joint_run_goes_on_bit_for_bit(root: Path, tmp_path: Path) -> None:
    config = recipe(root, ALL, training={"epochs": 2, "steps": 3})
    whole = train(config, tmp_path / "whole")
    train(config.model_copy(update={"training": config.training.model_copy(update={"epochs": 1})}), tmp_path / "part")
    parts = resume(tmp_path / "part", ["training.epochs=2"])
    assert parts.rows[-1]["loss"] == pytest.approx(whole.rows[-1]["loss"], rel=0.2), "another schedule, the same course"
    again = train(config, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert again.rows[-1]["mse_depth"] == whole.rows[-1]["mse_depth"]


def test_maps_are_learnt_and_written_in_their_unit(root: Path, tmp_path: Path) -> None:
    train(recipe(root, {"targets": DEPTH}, training={"steps": 120}), tmp_path / "run")
    result = predict(tmp_path / "run", [root], tmp_path / "out")
    assert result.exit_code == 0
    assert not (tmp_path / "out" / "labels.json").exists()
    errors = []
    for path in sorted(root.glob("*.fits")):
        with fits.open(tmp_path / "out" / "regression" / f"{path.name}.fz") as opened:
            unit = next(hdu for hdu in opened if hdu.data is not None)
            assert unit.header["BUNIT"] == "m"
            errors.append(unit.data.squeeze() - fits.getdata(path, "DEPTH"))
    assert np.sqrt(np.nanmean(np.square(errors))) < 12, "of values from 20 to 180"
    volume = load(tmp_path / "run").predict(root / "c0.fits[IMAGE]")
    assert volume.unit == "m"


def test_images_are_told_apart_in_a_table(root: Path, tmp_path: Path) -> None:
    data = {"table": "table.csv", "targets": TONE | RADIUS}
    train(recipe(root, data, training={"steps": 150}), tmp_path / "run")
    assert predict(tmp_path / "run", [root], tmp_path / "out").exit_code == 0
    found, truth = rows_of(tmp_path / "out" / "predictions.csv"), rows_of(root / "table.csv")
    assert list(next(iter(found.values()))) == ["id", "tone", "tone:dark", "tone:bright", "radius"]
    assert all(found[case]["tone"] == truth[case]["tone"] for case in truth)
    assert all(
        float(row["tone:dark"]) + float(row["tone:bright"]) == pytest.approx(1, abs=2e-6) for row in found.values()
    )
    assert all(2 < float(row["radius"]) < 9 for row in found.values()), "in pixels, of 4 to 7"
    meaning = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert meaning["targets"]["radius"]["unit"] == "pix"
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    assert predict(tmp_path / "run", [root], tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.csv").write_text("precious")
    with pytest.raises(UnsafeError, match="not predicted here"):
        predict(tmp_path / "run", [root], tmp_path / "mine")


def test_a_joint_model_writes_label_maps_and_a_table(root: Path, tmp_path: Path) -> None:
    train(recipe(root, ALL), tmp_path / "run")
    result = predict(tmp_path / "run", [root], tmp_path / "out")
    assert (result.exit_code, len(result.done)) == (0, 8)
    assert len(list((tmp_path / "out").glob("c*.fits.fz"))) == 8
    assert rows_of(tmp_path / "out" / "predictions.csv").keys() == {f"c{n}" for n in range(8)}
    depth = predict(tmp_path / "run", [root], tmp_path / "depth", ["inference.head=depth"])
    assert depth.exit_code == 0
    assert len(list((tmp_path / "depth" / "regression").glob("*.fits.fz"))) == 8
    (tmp_path / "few.csv").write_text("id,age,site\nc0,50,1\nc1,,1\n")
    few = predict(
        tmp_path / "run",
        [root / f"c{n}.fits" for n in (0, 1)],
        tmp_path / "few",
        [f"data.table={tmp_path / 'few.csv'}"],
    )
    assert few.exit_code == 3
    assert "no age" in few.failed["c1"].what


def test_regions_become_the_likeliest_class(root: Path, tmp_path: Path) -> None:
    train(recipe(root, LABELS | REGIONS, training={"steps": 120}), tmp_path / "run")
    found = load(tmp_path / "run").predict(root / "c2.fits[IMAGE]", outputs=["labels", "probabilities", "logits"])
    shares, labels = found["probabilities"].numpy(), found["labels"].numpy()[0]
    torch.testing.assert_close(torch.from_numpy(found["logits"].numpy()).sigmoid(), torch.from_numpy(shares))
    inside, core = shares
    each = np.stack([(1 - inside) * (1 - core), inside * (1 - core), inside * core])
    assert np.array_equal(labels, each.argmax(0))
    truth = fits.getdata(root / "c2.fits", "LABEL")
    assert 2 * ((labels > 0) & (truth > 0)).sum() / ((labels > 0).sum() + (truth > 0).sum()) > 0.9
    with pytest.raises(InputError, match="regions that may overlap"):
        load(tmp_path / "run").predict(root / "c2.fits[IMAGE]", outputs="entropy")


@pytest.mark.parametrize(
    ("data", "heads", "message"),
    [
        ({"targets": {"x": {"column": "a"}}}, {}, "columns need a table"),
        ({"targets": {"x": {}}}, {}, "give either file"),
        ({"targets": {"x": {"file": "maps/*.fits"}}}, {}, "the pattern needs {id}"),
        ({"targets": {"x": {"file": "{id}.fits", "classes": ["a", "b"]}}}, {}, "maps of classes are labels"),
        ({"targets": DEPTH}, {"dept": {}}, "nothing of this name is to be predicted .did you mean 'depth'"),
        ({"targets": DEPTH}, {"depth": {"loss": {"cross_entropy": 1}}}, "cannot be its loss; it may have mean_squared"),
        ({"targets": DEPTH}, {"depth": {"loss": {"gaussian_nll": 1}}}, "gaussian_nll goes with variance: true"),
        ({"targets": DEPTH}, {"depth": {"weight": 0}}, "every head has weight 0"),
        ({"targets": DEPTH, "covariates": ["age"]}, {}, "only targets that are columns use covariates"),
        (LABELS | {"regions": {"x": ["rimm"]}}, {}, "are no classes of data.classes"),
        (LABELS | {"instances": True}, {}, "give two classes, 0 and 1"),
        ({"targets": {"segmentation": {"file": "{id}.fits"}}}, {}, "and not segmentation"),
    ],
)
def test_contradictions_are_told(data: dict[str, Any], heads: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, data, heads)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,tone\nc0,dark\n", "no row of this id"),
        ("id,tone\n" + "".join(f"c{n},grey\n" for n in range(8)), "none of the classes dark, bright"),
        ("tone\ndark\n", "no column id"),
        ("id,colour\n" + "".join(f"c{n},dark\n" for n in range(8)), "no column tone among id, colour"),
        ("id,tone\nc0,dark\nc0,dark\n", "an id that was there: c0"),
    ],
)
def test_faults_of_the_table_are_told(text: str, message: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    config = recipe(root, {"table": str(tmp_path / "table.csv"), "targets": TONE, "fold": "all"})
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
