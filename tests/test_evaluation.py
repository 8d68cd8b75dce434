"""Scores of folders of label files: numbers, pairing, faults, files, pictures."""

from __future__ import annotations

import csv
import itertools
import json
import math
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from densepred.cli import app
from densepred.errors import InputError, NothingDoneError
from densepred.evaluation import Scores, draw_cases, evaluate
from densepred.evaluation.counting import count_pairs
from densepred.evaluation.pairing import find_files
from densepred.evaluation.planes import Plane, _codes, _turned, read_planes
from densepred.figures import COLORS
from densepred.volumes import Volume

SHAPE = (6, 5, 4)
AFFINE = np.diag([1.0, 1.0, 2.5, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Save an array (Z, Y, X) as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, affine), path)
    return path


def labels_of(*counts: tuple[int, int]) -> np.ndarray:
    """An array of SHAPE that starts with runs of (value, length) and is 0 after them."""
    flat = np.repeat([value for value, _ in counts], [length for _, length in counts])
    return np.pad(flat, (0, math.prod(SHAPE) - len(flat))).reshape(SHAPE).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and labels of cases a (partly right), b (without class 2) and c (all wrong for 1)."""
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    pairs = {
        "a": (labels_of((1, 20), (2, 10)), labels_of((1, 10), (2, 20))),
        "b": (labels_of((1, 8)), labels_of((1, 8))),
        "c": (labels_of((2, 12)), labels_of((1, 6), (2, 6))),
    }
    for case, (prediction, truth) in pairs.items():
        write(predictions / f"{case}.nii.gz", prediction)
        write(labels / f"{case}.nii.gz", truth)
    return predictions, labels


def test_scores_by_hand(folders: tuple[Path, Path]) -> None:
    scores = evaluate(*folders)
    rows = {(row["case"], row["value"]): row for row in scores.cases}
    assert list(rows) == [(case, value) for case in "abc" for value in (1, 2)]
    assert rows["a", 1]["dice"] == pytest.approx(20 / 30)
    assert rows["a", 1]["iou"] == pytest.approx(10 / 20)
    assert rows["a", 2]["recall"] == pytest.approx(0.5)
    assert rows["a", 2]["precision"] == 1
    assert rows["a", 2]["truth_voxels"] == 20
    assert (rows["a", 2]["prediction_size"], rows["a", 2]["unit"]) == (pytest.approx(25), "mm3")
    assert math.isnan(rows["b", 2]["dice"])
    assert rows["c", 1]["dice"] == 0
    assert scores.mean["1"]["dice"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores.mean["2"]["dice"] == pytest.approx((2 / 3 + 12 / 18) / 2)
    assert scores.pooled["1"]["dice"] == pytest.approx(2 * 18 / (28 + 24))
    assert scores.mean_dice == pytest.approx((5 / 9 + 2 / 3) / 2)
    summary = scores.summary["2"]["dice"]
    assert (summary["n"], summary["n_nan"], summary["std"]) == (2, 1, pytest.approx(0))
    assert scores.summary["1"]["dice"]["median"] == pytest.approx(2 / 3)
    assert scores.summary["1"]["dice"]["std"] == pytest.approx(np.std([2 / 3, 1, 0], ddof=1))
    assert (scores.exit_code, scores.failures) == (0, [])
    assert [result.case for result in scores.ranked()] == ["c", "a", "b"]


def test_written_files_tell_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    (folders[0] / "c.nii.gz").unlink()
    (folders[0] / "failures.tsv").write_text("case\tfile\twhat\tfix\nc\tin/c.nii.gz\tchecksum\tcopy again\n")
    scores = evaluate(*folders, out=out, classes={1: "head", 2: "tail"})
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [("a", "head"), ("a", "tail"), ("b", "head"), ("b", "tail")]
    assert float(rows[0]["dice"]) == scores.cases[0]["dice"]
    assert rows[3]["dice"] == ""
    stored = json.loads((out / "scores.json").read_text())
    assert stored["mean_dice"] == scores.mean_dice
    assert stored["summary"]["tail"]["dice"]["pooled"] == pytest.approx(2 / 3)
    assert stored["cases"][3]["dice"] is None
    assert stored["classes"] == {"0": "background", "1": "head", "2": "tail"}
    with open(out / "failures.tsv", newline="") as file:
        failures = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["case"], row["what"]) for row in failures] == [("c", "its prediction failed: checksum")]
    assert {path.name for path in out.iterdir()} == {"scores.csv", "scores.json", "failures.tsv"}


def test_the_table_fits_a_terminal(folders: tuple[Path, Path]) -> None:
    (folders[0] / "c.nii.gz").unlink()
    write(folders[0] / "extra.nii.gz", labels_of())
    scores = evaluate(*folders, classes={1: "head[/]", 2: "tail"})
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(scores.table())
    text = console.export_text()
    assert "head[/]" in text
    assert "0.833" in text
    assert "…" not in text
    assert "lowest Dice of tail: 0.667 in a" in text
    assert "2 cases scored; 1 predictions have no label; 1 labels have no prediction" in text


def test_names_come_from_the_predictions(folders: tuple[Path, Path]) -> None:
    (folders[0] / "labels.json").write_text('{"classes": {"0": "background", "1": "head", "3": "never seen"}}')
    scores = evaluate(*folders)
    assert scores.classes == {0: "background", 1: "head", 2: "2", 3: "never seen"}
    assert math.isnan(scores.mean["never seen"]["dice"])
    assert scores.mean_dice == pytest.approx((5 / 9 + 2 / 3) / 2)
    (folders[0] / "labels.json").write_text('["head"]')
    with pytest.raises(InputError, match="does not say what the values mean"):
        evaluate(*folders)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_gaps_and_large_values(tmp_path: Path, dtype: type) -> None:
    truth = labels_of((1, 10), (2, 20)).astype(dtype)
    high = 200 if dtype is np.uint8 else 1_000_000
    truth[truth == 2] = high
    path = write(tmp_path / "labels" / "a.nii", truth)
    scores = evaluate([path], [path])
    assert list(scores.classes) == [0, 1, high]
    assert scores.mean[str(high)]["dice"] == 1
    assert scores.cases[1]["truth_voxels"] == 20


def test_nearly_integers_are_rounded_and_others_refused(tmp_path: Path) -> None:
    truth = write(tmp_path / "labels" / "a.nii", labels_of((1, 10)))
    almost = write(tmp_path / "almost" / "a.nii", labels_of((1, 10)) * np.float32(0.9999))
    assert evaluate([almost], [truth]).mean_dice == 1
    for value in (0.5, np.nan):
        array = np.where(labels_of((1, 10)) == 1, np.float32(value), np.float32(0))
        wrong = write(tmp_path / "wrong" / "a.nii", array)
        scores = evaluate([wrong], [truth])
        assert scores.exit_code == 4
        assert "not labels: 10 voxels" in scores.failures[0].what
        assert scores.failures[0].file == str(wrong)


def test_a_truth_that_is_nan_does_not_count(tmp_path: Path) -> None:
    """As in training; a prediction must not have any."""
    truth = np.zeros((2, 3, 4), np.float32)
    truth[0] = 1
    predicted = truth.copy()
    truth[1, 0], predicted[1] = np.nan, 1
    write(tmp_path / "l" / "a.nii", truth)
    write(tmp_path / "p" / "a.nii", predicted)
    scores = evaluate(tmp_path / "p", tmp_path / "l", metrics=["pq"])
    assert (scores.cases[0]["truth_voxels"], scores.cases[0]["prediction_voxels"]) == (12, 20)
    failed = evaluate(tmp_path / "l", tmp_path / "p").failures
    assert "no integers, e.g. nan" in failed[0].what


def test_ignored_values_are_left_out(tmp_path: Path) -> None:
    truth = write(tmp_path / "labels" / "a.nii", labels_of((1, 10), (255, 10)))
    prediction = write(tmp_path / "predictions" / "a.nii", labels_of((1, 5), (255, 5), (1, 10)))
    scores = evaluate([prediction], [truth], ignore=(255,))
    row = scores.cases[0]
    assert list(scores.classes) == [0, 1]
    assert (row["truth_voxels"], row["prediction_voxels"], row["recall"], row["precision"]) == (10, 5, 0.5, 1)


def test_values_outside_the_given_classes_fail_the_case(folders: tuple[Path, Path]) -> None:
    scores = evaluate(*folders, classes={1: "head"})
    assert scores.exit_code == 3
    assert [result.case for result in scores.results] == ["b"]
    assert "1 values are not among the classes [1]: 2" in scores.failures[0].what


def test_one_bad_case_does_not_stop_the_others(folders: tuple[Path, Path]) -> None:
    predictions, labels = folders
    for case in ("flat", "moved", "cut", "text", "instances", "colour", "later"):
        write(labels / f"{case}.nii.gz", labels_of((1, 9)))
    write(predictions / "flat.nii.gz", labels_of((1, 9))[:5])
    shifted = AFFINE.copy()
    shifted[0, 3] = 0.01
    write(predictions / "moved.nii.gz", labels_of((1, 9)), shifted)
    noise = np.random.default_rng(0).integers(0, 2, SHAPE).astype(np.uint8)
    whole = write(predictions / "cut.nii.gz", noise).read_bytes()
    (predictions / "cut.nii.gz").write_bytes(whole[:-20])
    (predictions / "text.nii.gz").write_text("<html>please log in</html>")
    many = np.arange(2000, dtype=np.int32).reshape(20, 10, 10)
    write(predictions / "instances.nii.gz", many)
    write(labels / "instances.nii.gz", many)
    nib.save(nib.Nifti1Image(np.zeros((*SHAPE[::-1], 3), np.uint8), AFFINE), predictions / "colour.nii.gz")
    scores = evaluate(predictions, labels)
    what = {failure.case: failure.what for failure in scores.failures}
    assert [result.case for result in scores.results] == ["a", "b", "c"]
    assert scores.exit_code == 3
    assert what.keys() == {"flat", "moved", "cut", "text", "instances", "colour"}
    assert scores.unpredicted == ["later"]
    assert what["flat"].startswith("the prediction is (5, 5, 4) and its label (6, 5, 4)")
    assert "0.01 voxels" in what["moved"]
    assert "2000 different label values" in what["instances"]
    assert all(failure.fix for failure in scores.failures)


def test_a_hair_of_difference_in_geometry_is_allowed(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 5e-4
    truth = write(tmp_path / "labels" / "a.nii", labels_of((1, 9)))
    prediction = write(tmp_path / "predictions" / "a.nii", labels_of((1, 9)), shifted)
    assert evaluate([prediction], [truth]).exit_code == 0


def test_pairing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    write(predictions / "v1.2_x.nii", labels_of())
    (predictions / ".7.ab.part.c.nii.gz").write_bytes(b"unfinished")
    (predictions / "notes.txt").write_text("")
    assert list(find_files(predictions, "predictions")) == ["a", "b", "c", "v1.2_x"]
    assert evaluate(predictions, labels).unlabelled == ["v1.2_x"]
    crossed = evaluate({"x": predictions / "a.nii.gz"}, {"x": labels / "b.nii.gz"})
    assert crossed.cases[0]["dice"] == pytest.approx(16 / 28)
    write(predictions / "a.nii", labels_of())
    with pytest.raises(InputError, match=r"two predictions of one case: .*a\.nii and .*a\.nii\.gz"):
        evaluate(predictions, labels)


def test_nothing_to_do(folders: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "scan.mgz").write_text("")
    with pytest.raises(NothingDoneError, match=r"no predictions.*1 \.mgz files"):
        evaluate(empty, folders[1])
    with pytest.raises(InputError, match="no such folder of labels"):
        evaluate(folders[0], tmp_path / "nowhere")
    write(tmp_path / "other" / "z.nii", labels_of())
    scores = evaluate(tmp_path / "other", folders[1])
    assert (scores.exit_code, len(scores.unpredicted), scores.unlabelled) == (4, 3, ["z"])
    assert math.isnan(scores.mean_dice)
    assert draw_cases(scores, tmp_path / "out") == []
    Console(file=open("/dev/null", "w")).print(scores.table())  # noqa: SIM115


def test_empty_labels_have_no_score(tmp_path: Path) -> None:
    path = write(tmp_path / "labels" / "a.nii", labels_of())
    scores = evaluate([path], [path], classes={1: "head"})
    assert math.isnan(scores.mean_dice)
    assert (scores.exit_code, scores.ranked(), scores.summary["head"]["dice"]["n_nan"]) == (0, [], 1)


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (128, 768):
        path = write(tmp_path / f"{depth}.nii", np.ones((depth, 128, 128), np.uint8))
        tracemalloc.start()
        pairs, _ = count_pairs(path, path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pairs == {(1, 1): depth * 128 * 128}
    assert peaks[1] < 1.05 * peaks[0]


def test_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index, case in enumerate(("one", "two", "three")):
        truth = np.zeros((12, 30, 28), np.uint8)
        truth[3:9, 8:20, 6:20], truth[5:7, 12:16, 10:15] = 1, 2
        write(tmp_path / "labels" / f"{case}.nii.gz", truth)
        write(tmp_path / "predictions" / f"{case}.nii.gz", np.roll(truth, index, 1))
        write(tmp_path / "images" / f"{case}.nii.gz", (truth + rng.normal(0, 0.3, truth.shape)).astype(np.float32))
    scores = evaluate(tmp_path / "predictions", tmp_path / "labels", classes={1: "wall", 2: "cavity"})
    drawn = draw_cases(scores, tmp_path / "out", tmp_path / "images")
    assert [path.name for path in drawn] == ["worst_three.png", "median_two.png"]
    picture = imread(drawn[0])[..., :3]
    for color in COLORS[:2]:
        assert (np.abs(picture - to_rgb(color)).max(-1) < 0.05).sum() > 100
    blank = draw_cases(scores, tmp_path / "blank")
    assert blank[0].read_bytes() != drawn[0].read_bytes()
    assert draw_cases(scores, tmp_path / "again", tmp_path / "images")[1].read_bytes() == drawn[1].read_bytes()


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_slices_are_turned_to_the_body(axes: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path) -> None:
    """A mark at the right, front, top of the body is at the top left of every slice, however the file is stored."""
    body = np.zeros((10, 12, 14), np.uint8)  # R, A, S
    body[2:8, 3:9, 4:10], body[7, 8, 9] = 1, 2
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    stored = body.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    columns = affine[:, [*axes, 3]] * [*signs, 1]
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(stored, columns), path)
    planes = {plane.title.split(",")[0]: plane for plane in read_planes(path, path, None, [2])}
    assert planes.keys() == {"axial", "coronal", "sagittal"}
    assert [planes[title].letters for title in ("axial", "coronal", "sagittal")] == ["AR", "SR", "SA"]
    assert {title: plane.pixel for title, plane in planes.items()} == {
        "axial": (2.0, 1.0),
        "coronal": (3.0, 1.0),
        "sagittal": (3.0, 2.0),
    }
    for plane in planes.values():
        row, column = np.argwhere(plane.truth == 2)[0]
        assert plane.truth[row, column + 1] == plane.truth[row + 1, column] == 1
        assert plane.truth[row - 1, column] == plane.truth[row, column - 1] == 0


def test_slices_go_through_the_largest_area(tmp_path: Path) -> None:
    truth = np.zeros((40, 40, 40), np.uint8)
    truth[10:14, 20:30, 20:30] = 1
    truth[12, 15:35, 15:35] = 1
    path = write(tmp_path / "a.nii", truth)
    image = write(tmp_path / "image.nii", np.indices(truth.shape)[0].astype(np.float32))
    axial = read_planes(path, path, image, [1])[0]
    assert axial.title == "axial, z = 12"
    assert (axial.image == 12).all()
    assert (axial.truth == 1).sum() == 400
    assert max(axial.truth.shape) < 40
    empty = write(tmp_path / "empty.nii", np.zeros_like(truth))
    assert read_planes(empty, path, image, [1])[0].title == "axial, z = 12"
    assert read_planes(empty, empty, tmp_path / "nowhere.nii", [1])[0].title == "axial, z = 20"


def test_real_labels_score_one_against_themselves(real_data: Path) -> None:
    folder = real_data / "hippocampus" / "labelsTr"
    paths = sorted(folder.glob("*.nii.gz"))[:4]
    scores: Scores = evaluate(paths, paths, classes={1: "anterior", 2: "posterior"})
    assert scores.exit_code == 0
    assert {row["dice"] for row in scores.cases} == {1.0}
    assert all(100 < row["truth_size"] < 5000 for row in scores.cases)


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "labels" / "a$_^$.nii", labels_of((1, 40)))
    scores = evaluate([path], [path], classes={1: r"$\nonsense$"})
    assert [picture.name for picture in draw_cases(scores, tmp_path)] == ["worst_a$_^$.png"]


def test_a_volume_without_orientation_is_drawn_as_stored(tmp_path: Path) -> None:
    volume = Volume(labels_of((1, 40))[np.newaxis], (2.0, 1.0, 1.0))
    assert _codes(volume) == ["", "", ""]
    array = np.arange(6).reshape(2, 3)
    plane = Plane("z = 0", array, array, array, (1.0, 1.0), "")
    assert _turned(plane, "") is plane


def test_missing_images_are_told_before_anything_is_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["evaluate", *map(str, folders), "--out", str(tmp_path / "s"), "--images", str(tmp_path / "typo")]
    assert isinstance(CliRunner().invoke(app, words).exception, InputError)
    assert not (tmp_path / "s" / "scores.csv").exists()
