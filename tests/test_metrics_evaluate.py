"""`evaluate` with distances between surfaces, objects and intervals: from files to tables."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import bootstrap
from typer.testing import CliRunner

from densepred.cli import app
from densepred.errors import InputError
from densepred.evaluation import MEASURES, draw_cases, evaluate
from densepred.evaluation.pictures import _objects
from densepred.metrics import components, panoptic, surface_distances

SPACING = (2.5, 1.0, 0.5)


def write(path: Path, array: np.ndarray) -> Path:
    """Save (Z, Y, X) with voxels of SPACING mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.astype(np.uint8).T, np.diag([*SPACING[::-1], 1.0]))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def boxes(shift: int = 0) -> np.ndarray:
    """A box of class 1, moved along x, and two of class 2."""
    array = np.zeros((8, 16, 20), np.uint8)
    array[2:6, 2:8, 3 + shift : 9 + shift] = 1
    array[2:4, 10:12, 2:5] = array[5:7, 10:12, 12:15] = 2
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and labels: a is moved, b lacks one object of class 2, c lacks all of class 2."""
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    less, none = boxes(), boxes()
    less[5:7, 10:12, 12:15] = 0
    none[none == 2] = 0
    for case, array in (("a", boxes(3)), ("b", less), ("c", none)):
        write(predictions / f"{case}.nii.gz", array)
        write(labels / f"{case}.nii.gz", boxes())
    return predictions, labels


def test_metrics_are_those_of_the_arrays_in_millimetres(folders: tuple[Path, Path]):
    scores = evaluate(*folders, metrics=list(MEASURES), tolerance=0.6)
    rows = {(row["case"], row["value"]): row for row in scores.cases}
    truth, prediction = boxes() == 1, boxes(3) == 1
    expected = surface_distances(truth, prediction, SPACING)
    assert rows["a", 1]["hd"] == pytest.approx(expected.hausdorff()) == pytest.approx(1.5)
    assert rows["a", 1]["hd95"] == pytest.approx(expected.hausdorff(95))
    assert rows["a", 1]["assd"] == pytest.approx(expected.average())
    assert rows["a", 1]["surface_dice"] == pytest.approx(expected.surface_dice(0.6))
    objects = panoptic(components(truth), components(prediction))
    assert rows["a", 1]["pq"] == objects.quality == 0  # moved by half its length: the overlap is a third
    assert (rows["b", 2]["pq"], rows["b", 2]["sq"]) == (pytest.approx(1 / 1.5), 1)
    assert (rows["c", 2]["pq"], rows["c", 2]["rq"], rows["c", 2]["surface_dice"]) == (0, 0, 0)
    assert math.isnan(rows["c", 2]["hd95"])
    assert math.isnan(rows["c", 2]["sq"])
    assert scores.distance_unit == "mm"


def test_pooled_values_are_ratios_of_sums_and_missing_ones_are_counted(folders: tuple[Path, Path]):
    scores = evaluate(*folders, metrics=["assd", "hd95", "surface_dice", "pq"], tolerance=1)
    two = scores.summary["2"]
    assert (two["hd95"]["n"], two["hd95"]["n_nan"], two["pq"]["n"]) == (2, 1, 3)
    assert two["pq"]["pooled"] == pytest.approx(3 / (3 + 3 / 2))  # 3 of 6 objects are found, exactly
    assert two["pq"]["mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert math.isnan(two["hd95"]["pooled"])
    found = [surface_distances(boxes() == 1, boxes(shift) == 1, SPACING) for shift in (3, 0, 0)]
    near, whole = np.sum([one.within(1) for one in found], 0)
    assert scores.pooled["1"]["surface_dice"] == pytest.approx(near / whole)
    total = sum(one.to_truth.sum() + one.to_prediction.sum() for one in found)
    assert scores.pooled["1"]["assd"] == pytest.approx(total / whole)


def test_files_and_tables_tell_the_same(folders: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "scores"
    scores = evaluate(*folders, out=out, metrics=["hd95", "surface_dice"], tolerance=0.5)
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["hd95"]) == scores.cases[0]["hd95"]
    assert rows[5]["hd95"] == ""
    stored = json.loads((out / "scores.json").read_text())
    assert (stored["tolerance"], stored["distance_unit"]) == (0.5, "mm")
    assert stored["summary"]["1"]["hd95"]["low"] == scores.summary["1"]["hd95"]["low"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*scores.tables())
    text = console.export_text()
    assert "hd95: 95th percentile of the Hausdorff distance, in mm" in text
    assert "tolerance: 0.5 mm" in text
    assert "…" not in text
    assert "surface_dice" in text
    assert len(evaluate(*folders).tables()) == 1


def test_the_interval_of_the_mean_is_scipys_and_always_the_same(tmp_path: Path):
    rng = np.random.default_rng(0)
    for case in range(25):
        truth = (rng.random((2, 6, 6)) < 0.5).astype(np.uint8)
        flips = rng.random(truth.shape) < rng.uniform(0, 0.4)
        write(tmp_path / "l" / f"{case:02}.nii", truth)
        write(tmp_path / "p" / f"{case:02}.nii", np.where(flips, 1 - truth, truth))
    scores = evaluate(tmp_path / "p", tmp_path / "l")
    values = np.array([row["dice"] for row in scores.cases])
    of = scores.summary["1"]["dice"]
    peer = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert (of["low"], of["high"]) == pytest.approx(tuple(peer), abs=0.004)
    assert of["low"] < of["mean"] < of["high"]
    assert evaluate(tmp_path / "p", tmp_path / "l").summary == scores.summary


def test_ignored_and_unpredicted_voxels_are_no_surface(tmp_path: Path):
    truth, prediction = boxes(), boxes()
    truth[:, :, 6:] = 9  # not known
    prediction[:, :, 12:] = 255  # nothing predicted
    prediction[:, :, 6:12] = 1
    write(tmp_path / "p" / "a.nii", prediction)
    (tmp_path / "p" / "labels.json").write_text('{"classes": {"1": "x", "2": "y"}, "invalid": 255, "ignore": [9]}')
    write(tmp_path / "l" / "a.nii", truth)
    row = evaluate(tmp_path / "p", tmp_path / "l", metrics=["hd", "pq"]).cases[0]
    assert (row["class"], row["hd"], row["pq"]) == ("x", 0, 1)


def test_merged_values_are_one_class(tmp_path: Path):
    write(tmp_path / "p" / "a.nii", boxes() > 0)
    (tmp_path / "p" / "labels.json").write_text('{"classes": {"1": "any"}, "merged": {"2": 1}}')
    write(tmp_path / "l" / "a.nii", boxes())
    rows = evaluate(tmp_path / "p", tmp_path / "l", metrics=["hd", "pq"]).cases
    assert [(row["class"], row["hd"], row["pq"]) for row in rows] == [("any", 0, 1)]


@pytest.fixture
def instances(tmp_path: Path) -> tuple[Path, Path]:
    """1500 of 3000 objects of 2 x 2 pixels, and predictions that join the touching ones of a row."""
    truth = np.arange(1, 3001, dtype=np.int32).reshape(100, 30).repeat(2, 0).repeat(2, 1)
    truth[::4] = truth[1::4] = 0
    joined = np.where(truth > 0, truth, 0)
    joined[10:12, 4:8] = truth[10, 4]
    for role, array in (("l", truth), ("p", joined)):
        (tmp_path / role).mkdir()
        Image.fromarray(array.astype(np.uint16)).save(tmp_path / role / "a.png")
    return tmp_path / "p", tmp_path / "l"


def test_values_may_be_numbers_of_objects(instances: tuple[Path, Path], tmp_path: Path):
    refused = evaluate(*instances, metrics=["pq"])
    assert "(--instances)" in refused.failures[0].fix
    scores = evaluate(*instances, metrics=["pq", "rq", "sq"], instances=True)
    (row,) = scores.cases
    count = 1500
    assert row["class"] == "objects"
    assert (row["dice"], row["truth_voxels"]) == (1, 4 * count)
    assert row["rq"] == pytest.approx((count - 2) / (count - 2 + (2 + 1) / 2))  # half of the union is no match
    assert row["sq"] == 1
    (picture,) = draw_cases(scores, tmp_path / "out")
    assert picture.exists()


def test_predicted_classes_have_objects_that_are_their_parts(instances: tuple[Path, Path]):
    """A model of `data.instances` writes 0 and 1, and says so."""
    predictions, truths = instances
    truth = np.asarray(Image.open(truths / "a.png"))
    Image.fromarray((truth % 2).astype(np.uint8)).save(predictions / "a.png")  # every second one of a row
    for said, found in ((False, 0), (True, 750 / (750 + 750 / 2))):
        if said:
            (predictions / "labels.json").write_text('{"classes": {"0": "background", "1": "nucleus"}}')
        (row,) = evaluate(predictions, truths, metrics=["pq"], instances=True).cases
        assert row["class"] == "objects"
        assert row["pq"] == pytest.approx(found)


def test_numbers_of_objects_are_no_values_to_ignore(instances: tuple[Path, Path]):
    """`ignore` is of the truth, `invalid` of the prediction: the other side's object of this number is an object."""
    predictions, truths = instances
    truth = np.asarray(Image.open(truths / "a.png"))
    object_31, object_91 = np.unique(truth)[[1, -1]]
    Image.fromarray(truth).save(predictions / "a.png")
    (predictions / "labels.json").write_text(f'{{"classes": {{}}, "invalid": {object_31}}}')
    first = np.where(truth == object_91, 1, truth)  # an object 1 that is ignored is not the class 1 of all
    Image.fromarray(first.astype(np.uint16)).save(truths / "a.png")
    (row,) = evaluate(predictions, truths, metrics=["rq"], ignore=[1], instances=True).cases
    assert (row["dice"], row["rq"]) == (1, 1)
    assert row["truth_voxels"] == 4 * (1500 - 2)
    assert row["unpredicted_voxels"] == 4


def test_cases_of_another_unit_are_told_and_not_averaged(folders: tuple[Path, Path]):
    predictions, labels = folders
    for folder in folders:
        path = next(iter(sorted(folder.glob("*.nii*"))))
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([*SPACING[::-1], 1.0]))
        image.header.set_xyzt_units("micron")
        nib.save(image, path)
    scores = evaluate(predictions, labels, metrics=["hd95"])
    assert scores.distance_unit == "mm"
    assert [failure.what for failure in scores.failures] == ["its distances are in um, those of most cases in mm"]


def test_outlines_part_objects_that_touch():
    numbers = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 0, 0]])
    assert _objects(numbers).tolist() == [[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("metrics", "tolerance", "words"),
    [
        (["hd59"], None, "a metric must be one of hd, hd95, .* did you mean 'hd95'"),
        (["pq", "pq"], None, "a metric stands twice in pq, pq"),
        (["surface_dice"], None, "surface_dice has no meaning without a tolerance"),
        (["surface_dice"], -1.0, "a distance of 0 or more, not -1"),
    ],
)
def test_what_is_wanted_must_make_sense(
    folders: tuple[Path, Path], metrics: list[str], tolerance: float | None, words: str
):
    with pytest.raises(InputError, match=words):
        evaluate(*folders, metrics=metrics, tolerance=tolerance)


def test_from_the_command_line(folders: tuple[Path, Path], tmp_path: Path):
    command = ["evaluate", *map(str, folders), "--out", str(tmp_path / "s"), "--metrics", "hd95, pq"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Surfaces and objects over cases" in result.output
    assert "panoptic quality" in result.output


def test_a_truth_without_voxel_sizes_is_measured_in_the_predictions(folders: tuple[Path, Path], tmp_path: Path):
    predictions, labels = folders
    for path in labels.iterdir():
        np.save(tmp_path / f"{path.name.removesuffix('.nii.gz')}.npy", np.asanyarray(nib.load(path).dataobj).T)
        path.unlink()
    for case in "abc":
        (tmp_path / f"{case}.npy").rename(labels / f"{case}.npy")
    scores = evaluate(predictions, labels, metrics=["hd95", "surface_dice"], tolerance=0.6)
    row = next(row for row in scores.cases if (row["case"], row["value"]) == ("a", 1))
    expected = surface_distances(boxes() == 1, boxes(3) == 1, SPACING)
    assert row["hd95"] == pytest.approx(expected.hausdorff(95))
    assert row["hd95"] == pytest.approx(1.5)  # three voxels of 0.5 mm
