"""Recipes with several heads: what is read, learnt, kept in the plan, predicted in its unit, and refused."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astropy.io import fits

from densepred import load, open_volume
from densepred.cases.case import collect
from densepred.cases.check import check
from densepred.cases.folds import split
from densepred.cases.plan import Plan, make_plan
from densepred.cases.preprocess import preprocess
from densepred.errors import InputError, UnsafeError
from densepred.evaluation import evaluate_table
from densepred.files import sha256
from densepred.inference import tabular
from densepred.inference.batch import predict
from densepred.inference.shards import Shard
from densepred.training.loop import resume, train
from densepred.training.run import Run
from densepred.training.trainer import Trainer
from tests.tasks_set import DEPTH, LABELS, RADIUS, REGIONS, SIZE, TONE, WITH_TABLE, recipe, write_set

AUTO = {"classes": "auto"}
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


@pytest.fixture(scope="module")
def joint(root: Path) -> Run:
    """Overlapping regions, a map, a class and a number, all learnt at once, with covariates."""
    heads = {"radius": {"weight": 0.3, "loss": {"huber": 1}, "positive": True}}
    return train(recipe(root, ALL | REGIONS, heads, training={"steps": 110}), root.parent / "joint")


@pytest.fixture(scope="module")
def alone(root: Path) -> Run:
    """A class alone: a network without a decoder."""
    return train(recipe(root, {"table": "table.csv", "targets": TONE}, training={"steps": 40}), root.parent / "alone")


@pytest.fixture(scope="module")
def noisy(root: Path) -> Run:
    """A map and its variance alone."""
    data, heads = {"targets": DEPTH}, {"depth": {"variance": True}}
    return train(recipe(root, data, heads, training={"steps": 4}), root.parent / "noisy")


def test_every_kind_is_scored(joint: Run, alone: Run, noisy: Run) -> None:
    scores = {name: value for run in (joint, alone) for name, value in run.rows[-1].items()}
    assert scores["dice_disc"] > 0.9
    assert scores["dice_core"] > 0.5
    assert scores["dice_mean"] == pytest.approx((scores["dice_disc"] + scores["dice_core"]) / 2)
    assert scores["accuracy_tone"] == 1
    assert scores["explained_depth"] > 0.9
    assert scores["r_depth"] > 0.95
    assert scores["mse_depth"] < 250, "of values from 20 to 180"
    assert scores["mae_radius"] < 3
    assert noisy.rows[-1]["mse_depth"] > 0


def test_the_noise_of_a_map_is_written_beside_it(noisy: Run, root: Path, tmp_path: Path) -> None:
    predict(noisy.path, [root / "c0.fits"], tmp_path, ["inference.outputs=[regression,noise]"])
    with open_volume(next((tmp_path / "noise").glob("c0.*"))) as found, open_volume(root / "c0.fits[DEPTH]") as truth:
        assert (found.shape, found.unit) == (truth.shape, "m")
        assert (found.numpy() > 0).all()


def test_the_same_bits_after_a_pause(root: Path, tmp_path: Path) -> None:
    config = recipe(root, ALL, training={"epochs": 2, "steps": 2}, optimizer={"schedule": "constant"})
    whole = train(config, tmp_path / "whole")
    train(config.model_copy(update={"training": config.training.model_copy(update={"epochs": 1})}), tmp_path / "part")
    part = resume(tmp_path / "part", ["training.epochs=2"])
    assert part.rows[-1]["loss"] == whole.rows[-1]["loss"]
    assert sha256(part.path / "model.safetensors") == sha256(whole.path / "model.safetensors")


def test_what_trains_in_bfloat16_is_validated_by_its_parts(root: Path, tmp_path: Path) -> None:
    """The networks of maps know no covariates."""
    run = train(recipe(root, ALL, training={"precision": "bfloat16", "steps": 2}), tmp_path / "half")
    assert {"dice_mean", "mse_depth", "accuracy_tone", "mae_radius"} <= run.rows[-1].keys()


def test_maps_are_written_in_their_unit(joint: Run, noisy: Run, root: Path, tmp_path: Path) -> None:
    assert predict(joint.path, [root], tmp_path / "out", ["inference.head=depth"]).exit_code == 0
    errors = []
    for path in sorted(root.glob("*.fits")):
        with fits.open(tmp_path / "out" / "regression" / f"{path.name}.fz") as opened:
            unit = next(hdu for hdu in opened if hdu.data is not None)
            assert unit.header["BUNIT"] == "m"
            errors.append(unit.data.squeeze() - fits.getdata(path, "DEPTH"))
    assert np.sqrt(np.nanmean(np.square(errors))) < 15, "of values from 20 to 180"
    volume = load(noisy.path).predict(root / "c0.fits[IMAGE]")
    assert (volume.unit, volume.shape) == ("m", (1, SIZE, SIZE)), "means by themselves"
    predict(noisy.path, [root / "c0.fits"], tmp_path / "noisy")
    assert not (tmp_path / "noisy" / "labels.json").exists()


def test_a_joint_model_writes_label_maps_and_a_table(
    joint: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = predict(joint.path, [root], tmp_path / "out")
    assert (result.exit_code, len(result.done)) == (0, 8)
    assert len(list((tmp_path / "out").glob("c*.fits.fz"))) == 8
    found, truth = rows_of(tmp_path / "out" / "predictions.csv"), rows_of(root / "table.csv")
    assert list(found["c0"]) == ["id", "tone", "tone:dark", "tone:bright", "radius"]
    learnt, _ = split(collect(joint.config.data), joint.config.data)
    assert all(found[case.id]["tone"] == truth[case.id]["tone"] for case in learnt)
    shares = [float(row["tone:dark"]) + float(row["tone:bright"]) for row in found.values()]
    assert shares == pytest.approx([1] * 8, abs=2e-6)
    assert all(1 < float(row["radius"]) < 12 for row in found.values()), "in pixels, of 4 to 7"
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["targets"]["radius"]["unit"] == "pix"
    few = tmp_path / "few.csv"
    few.write_text("id,age,site\nc0,50,1\nc1,,1\n")
    files = [root / f"c{number}.fits" for number in (0, 1)]
    monkeypatch.chdir(tmp_path)
    partly = predict(joint.path, files, tmp_path / "few", ["data.table=few.csv"])
    assert partly.exit_code == 3
    assert "no age" in partly.failed["c1"].what
    assert "not of this run" not in partly.failed["c1"].what, "its map is"
    lines = (tmp_path / "few" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line).get("failed") for line in lines] == [None, None]


def test_a_table_is_replaced_where_it_was_written_here(alone: Run, root: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert predict(alone.path, [root], tmp_path / "out").exit_code == 0
    (tmp_path / "mine").mkdir()
    for name in ("predictions.csv", "predictions.jsonl"):
        (tmp_path / "mine" / name).write_text("precious")
        with pytest.raises(UnsafeError, match="not predicted here"):
            predict(alone.path, [root], tmp_path / "mine")
        assert (tmp_path / "mine" / name).read_text() == "precious"
        (tmp_path / "mine" / name).unlink()
    with pytest.raises(InputError, match="predicts nothing for each voxel"):
        load(alone.path).predict(root / "c0.fits[IMAGE]")


def test_a_table_goes_on_where_it_ended(
    alone: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict(alone.path, [root], whole)
    predicted, count = tabular.predict_whole, itertools.count()

    def killed(*arguments: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return predicted(*arguments)

    monkeypatch.setattr(tabular, "predict_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        predict(alone.path, [root], out)
    monkeypatch.undo()
    with (out / "predictions.jsonl").open("a") as file:
        file.write('{"id": "c7", "torn')
    result = predict(alone.path, [root], out)
    assert (result.skipped, len(result.done)) == (["c0", "c1", "c2"], 5)
    for name in ("predictions.csv", "predictions.json", "predictions.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_rows_are_made_anew_where_something_changed(joint: Run, root: Path, tmp_path: Path) -> None:
    copied, out = Path(shutil.copytree(root, tmp_path / "set")), tmp_path / "out"
    table = f"data.table={copied / 'table.csv'}"
    few = [copied / f"c{number}.fits" for number in range(3)]
    predict(joint.path, few, out, [table])
    before = rows_of(out / "predictions.csv")
    text = (copied / "table.csv").read_text()
    (copied / "table.csv").write_text(text.replace("c0,bright,4,40,0", "c0,bright,4,47,0"))
    (copied / "c1.fits").write_bytes(b"damaged")
    assert predict(joint.path, few[:2], out, [table]).exit_code == 3
    after = rows_of(out / "predictions.csv")
    assert set(after) == {"c0", "c2"}, "that of a case that failed is gone, that of a case not asked for stays"
    assert after["c0"] != before["c0"]
    assert after["c2"] == before["c2"]


def test_tables_are_scored(alone: Run, root: Path, tmp_path: Path) -> None:
    predict(alone.path, [root], tmp_path / "out")
    scores = evaluate_table(tmp_path / "out" / "predictions.csv", root / "table.csv", tmp_path / "scores")
    assert scores.found["tone"]["accuracy"] == scores.found["tone"]["auc_dark"] == 1
    assert np.array_equal(scores.classes["tone"].confusion, [[4, 0], [0, 4]])
    assert (tmp_path / "scores" / "roc_tone.png").stat().st_size > 5000
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["targets"]["tone"]["confusion"][0] == [4, 0]
    lines = (tmp_path / "out" / "predictions.csv").read_text().replace("c0,bright", "c0,dark")
    (tmp_path / "out" / "predictions.csv").write_text(lines)
    less = evaluate_table(tmp_path / "out" / "predictions.csv", root / "table.csv").found["tone"]
    assert less["accuracy"] == pytest.approx(7 / 8)
    assert less["log_loss"] == scores.found["tone"]["log_loss"], "which knows probabilities alone"


def test_tables_of_shards_become_one(alone: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(alone.path, [root], tmp_path / "whole")
    predict(alone.path, [root], tmp_path / "out", [f"data.table={root / 'table.csv'}", "inference.temperature=2"])
    for number in (1, 2):
        predict(alone.path, [root], tmp_path / "out", shard=Shard(number, 2))
    (tmp_path / "out" / "predictions-best-of-both.csv").write_text("mine")
    monkeypatch.setattr(tabular, "predict_whole", lambda *_: pytest.fail("predicted again"))
    assert len(predict(alone.path, [root], tmp_path / "out").skipped) == 8
    assert {path.name for path in (tmp_path / "out").glob("predictions*")} == {
        tabular.TABLE,
        tabular.MEANING,
        tabular.JOURNAL,
        "predictions-best-of-both.csv",
    }
    for name in (tabular.TABLE, tabular.JOURNAL):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tables_with_odd_names(tmp_path: Path) -> None:
    target = {"t": {"kind": "classification", "column": "t", "classes": ["a, b", "007"]}}
    (tmp_path / "predictions.json").write_text(json.dumps({"targets": target}))
    head = 'id,t,"t:a, b",t:007\n'
    (tmp_path / "p.csv").write_text(head + '1,"a, b",0.9,0.1\nNaN_2,007,0.1,0.9\n')
    (tmp_path / "t.csv").write_text('id,t\n1,"a, b"\n3,007\n')
    evaluate_table(tmp_path / "p.csv", tmp_path / "t.csv", tmp_path / "s")
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["unlabelled"] == ["NaN_2"]
    assert all(len(row) == 3 for row in csv.reader((tmp_path / "s" / "scores.csv").open()))
    (tmp_path / "p.csv").write_text(head + "1,7,0.1,0.9\n")
    with pytest.raises(InputError, match="which is none of the classes"):
        evaluate_table(tmp_path / "p.csv", tmp_path / "t.csv")


def test_the_bias_of_numbers_is_prediction_less_truth(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("id,age\na,12\nb,14\n")
    meaning = {"targets": {"age": {"kind": "scalar", "column": "age"}}}
    (tmp_path / "predictions.json").write_text(json.dumps(meaning))
    (tmp_path / "truth.csv").write_text("id,age\na,10\nb,11\n")
    found = evaluate_table(tmp_path / "predictions.csv", tmp_path / "truth.csv").found["age"]
    assert (found["bias"], found["mae"], found["mse"]) == (2.5, 2.5, 6.5)


def test_regions_become_the_likeliest_class(joint: Run, root: Path) -> None:
    found = load(joint.path).predict(root / "c2.fits[IMAGE]", outputs=["labels", "probabilities", "logits"])
    shares, labels = found["probabilities"].numpy(), found["labels"].numpy()[0]
    torch.testing.assert_close(torch.from_numpy(found["logits"].numpy()).sigmoid(), torch.from_numpy(shares))
    inside, core = shares
    each = np.stack([(1 - inside) * (1 - core), inside * (1 - core), inside * core])
    chosen = np.take_along_axis(each, labels[None].astype(int), 0)[0]
    np.testing.assert_allclose(chosen, each.max(0), rtol=1e-4)
    with pytest.raises(InputError, match="regions that may overlap"):
        load(joint.path).predict(root / "c2.fits[IMAGE]", outputs="entropy")
    for kind in ("labels", "probabilities"):
        with pytest.raises(InputError, match=f"{kind} of blocks of pixels cannot be made of regions"):
            load(joint.path, ["inference.bin=2"]).predict(root / "c2.fits[IMAGE]", outputs=kind)
    cool = load(joint.path, ["inference.temperature=2"]).predict(root / "c2.fits[IMAGE]", outputs="probabilities")
    torch.testing.assert_close(torch.from_numpy(cool.numpy()), torch.from_numpy(found["logits"].numpy() / 2).sigmoid())


def test_numbers_of_objects_are_one_class(tmp_path: Path) -> None:
    write_set(tmp_path, 4)
    instances = {"labels": LABELS["labels"], "classes": {0: "sky", 1: "object"}, "instances": True}
    config = recipe(tmp_path, instances | {"fold": "all"})
    cases = collect(config.data)
    _, label = preprocess(cases[0], make_plan(config, cases))
    assert label is not None
    assert np.array_equal(label, fits.getdata(tmp_path / "c0.fits", "LABEL") > 0)
    assert check(config.data, 2).ok
    assert not check(config.data.model_copy(update={"instances": False}), 2).ok


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
        ({"targets": DEPTH, "normalize": "ct_window"}, {}, "from the foreground of labels"),
    ],
)
def test_contradictions_are_told(data: dict[str, Any], heads: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, data, heads)


def test_planes_have_no_columns(tmp_path: Path) -> None:
    patch = {"size": [SIZE, SIZE], "batch": 4, "axis": 0}
    with pytest.raises(InputError, match="columns are of whole images, which a model of planes does not see"):
        recipe(tmp_path, {"table": "table.csv", "targets": TONE}, patch=patch)


def test_the_check_looks_at_maps_and_table(root: Path, tmp_path: Path) -> None:
    assert check(recipe(root, ALL).data, 2).ok
    write_set(tmp_path / "set", 3)
    fits.PrimaryHDU(np.zeros((5, 5), np.float32)).writeto(tmp_path / "set" / "c1_flat.fits")
    for number in (0, 2):
        fits.PrimaryHDU(np.zeros((SIZE, SIZE), np.float32)).writeto(tmp_path / "set" / f"c{number}_flat.fits")
    (tmp_path / "set" / "table.csv").write_text("id,tone,age,site\nc0,dark,1,1\nc1,dark,,1\n")
    flat = {"flat": {"file": "{id}_flat.fits"}}
    config = recipe(tmp_path / "set", WITH_TABLE | {"targets": flat | TONE, "folds": 2})
    rows = {(row.case, row.what) for row in check(config.data, 2).rows if row.severity == "error"}
    assert {case for case, _ in rows} == {"c1", "c2"}
    assert any(what.startswith("shape (5, 5), but the image has") for _, what in rows)
    assert any(what.startswith("no age") for _, what in rows)
    assert ("c2", "no row of this id") in rows


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


def test_faults_of_validation_cases_are_told_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(root / "table.csv")
    config = recipe(root, {"table": str(tmp_path / "table.csv"), "targets": {"tone": {"column": "tone"} | AUTO}})
    held_out = split(collect(config.data), config.data)[1][0].id
    text = "".join(f"{case},{'grey' if case == held_out else row['tone']}\n" for case, row in rows.items())
    (tmp_path / "table.csv").write_text("id,tone\n" + text)
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match="none of the classes bright, dark"):
        train(config, tmp_path / "run")
