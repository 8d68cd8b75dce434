"""What is not scored, and whose scores they are: pixels and cases without a prediction, the sky, records, units."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import tifffile
from rich.console import Console

from densepred.cases.names import ignored_values
from densepred.config import DataConfig
from densepred.errors import InputError, UnsafeError
from densepred.evaluation import Scores, draw_cases, evaluate
from densepred.evaluation.planes import read_planes
from densepred.evaluation.records import folders_of, meaning_of
from tests.fits_files import TAN, save

MEANING = {"classes": {"0": "sky", "1": "source"}, "ignore": [255], "invalid": 255}


def square(shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    """16 pixels of 1 in a field of 0."""
    labels = np.zeros(shape, np.uint8)
    labels[5:9, 5:9] = 1
    return labels


def folder(path: Path, meaning: object = None, **arrays: np.ndarray) -> Path:
    """A folder of FITS label maps."""
    path.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        save(path / f"{name}.fits", array)
    if meaning is not None:
        (path / "labels.json").write_text(json.dumps(meaning))
    return path


def shown(scores: Scores) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(scores.table())
    return " ".join(console.export_text().split())


def test_a_class_where_nothing_was_predicted_is_told_from_an_absent_one(tmp_path: Path) -> None:
    hidden, half = square(), square()
    hidden[hidden == 1] = 255
    half[5:7] = np.where(half[5:7] == 1, 255, 0)
    nothing = np.zeros_like(half)
    predictions = folder(tmp_path / "p", MEANING, good=square(), hidden=hidden, half=half, empty=nothing)
    labels = folder(tmp_path / "t", good=square(), hidden=square(), half=square(), empty=nothing)
    scores = evaluate(predictions, labels, tmp_path / "s")
    with open(tmp_path / "s" / "scores.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    columns = ("dice", "truth_voxels", "unpredicted_voxels")
    assert {case: tuple(row[column] for column in columns) for case, row in rows.items()} == {
        "empty": ("", "0", "0"),
        "good": ("1.0", "16", "0"),
        "half": ("1.0", "8", "8"),
        "hidden": ("", "0", "16"),
    }
    assert scores.left_out == {"source": {"voxels": 24, "share": 0.5, "cases": 1}}
    stored = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert stored["left_out"] == scores.left_out
    assert stored["unpredicted_voxels"] == {"empty": 0, "good": 0, "half": 8, "hidden": 16}
    text = shown(scores)
    assert "not predicted, so not scored: 50.0% of source" in text
    assert "1 times all of a class lay where nothing was predicted: no score" in text
    assert "1 times a class was in neither truth nor prediction: no score" in text


def test_a_class_that_was_never_predicted_still_has_its_row(tmp_path: Path) -> None:
    hidden = np.full((20, 20), 255, np.uint8)
    meaning = {"classes": {"0": "sky"}, "invalid": 255, "merged": {"2": 1}}
    truth = square()
    truth[5, 5] = 2
    scores = evaluate(folder(tmp_path / "p", meaning, a=hidden), folder(tmp_path / "t", a=truth))
    assert [(row["class"], row["unpredicted_voxels"]) for row in scores.cases] == [("1", 16)]
    assert scores.results[0].unpredicted == 400
    strict = evaluate(tmp_path / "p", tmp_path / "t", classes={3: "other"})
    assert "1 values are not among the classes [3]: 1" in strict.failures[0].what


def test_a_few_pixels_left_out_are_not_worth_a_line(tmp_path: Path) -> None:
    whole = np.ones((20, 20), np.uint8)
    pitted = whole.copy()
    pitted[0, :3] = 255
    scores = evaluate(folder(tmp_path / "p", MEANING, a=pitted), folder(tmp_path / "t", a=whole))
    assert scores.left_out["source"]["share"] == 3 / 400
    assert "so not scored" not in shown(scores)
    assert "3 voxels marked as invalid were not scored" in shown(scores)


def test_an_old_prediction_of_a_failed_case_is_not_scored(tmp_path: Path) -> None:
    predictions = folder(tmp_path / "p", MEANING, a=square(), b=square())
    labels = folder(tmp_path / "t", a=square(), b=square(), c=square())
    rows = "".join(f"{case}\tin/{case}.fits\tdamaged\tcopy again\n" for case in "bcd")
    (predictions / "failures.tsv").write_text(f"case\tfile\twhat\tfix\n{rows}")
    for given in (predictions, str(predictions / "{id}.fits"), sorted(predictions.glob("*.fits"))):
        scores = evaluate(given, labels)
        assert [result.case for result in scores.results] == ["a"]
        assert {failure.case: failure.what for failure in scores.failures} == dict.fromkeys(
            "bc", "its prediction failed: damaged"
        )
        assert (scores.exit_code, scores.unpredicted) == (3, [])


def test_failures_of_shards_are_those_of_the_predictions(tmp_path: Path) -> None:
    predictions = folder(tmp_path / "p", MEANING, a=square(), c=square())
    labels = folder(tmp_path / "t", a=square(), b=square(), c=square())
    for number, case in ((1, "a"), (2, "b")):
        (predictions / f"failures-{number}-of-2.tsv").write_text(f"case\tfile\twhat\tfix\n{case}\tx\tdamaged\tcopy\n")
    failures = {failure.case: failure.what for failure in evaluate(predictions, labels).failures}
    assert failures == dict.fromkeys("ab", "its prediction failed: damaged")


def test_a_failed_case_is_known_by_the_source_that_bids_names(tmp_path: Path) -> None:
    for subject in ("01", "02"):
        anat = tmp_path / "derivatives" / f"sub-{subject}" / "anat"
        for path in (anat / f"sub-{subject}_seg-m_dseg.nii.gz", tmp_path / "truth" / f"sub-{subject}.nii.gz"):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(square(), np.eye(4)), path)
        source = f"bids:source:sub-{subject}/anat/sub-{subject}_T1w.nii.gz"
        (anat / f"sub-{subject}_seg-m_dseg.json").write_text(json.dumps({"Sources": [source]}))
    folder(tmp_path / "derivatives", MEANING)
    (tmp_path / "derivatives" / "failures.tsv").write_text("case\tfile\twhat\tfix\nsub-02_T1w\tx\tdamaged\tcopy\n")
    scores = evaluate(str(tmp_path / "derivatives/sub-*/anat/{id}_seg-m_dseg.nii.gz"), tmp_path / "truth")
    assert [result.case for result in scores.results] == ["sub-01"]
    assert [failure.case for failure in scores.failures] == ["sub-02"]
    assert scores.classes == {0: "sky", 1: "source"}  # of labels.json at the root


def test_a_pattern_and_a_list_of_files_find_labels_json(tmp_path: Path) -> None:
    edge = square()
    edge[15:] = 255
    predictions, labels = folder(tmp_path / "p", MEANING, a=edge), folder(tmp_path / "t", a=edge)
    files = sorted(predictions.glob("*.fits"))
    for given in (predictions, str(predictions / "{id}.fits"), files, {"a": files[0]}):
        scores = evaluate(given, labels)
        assert scores.mean == {"source": {"dice": 1, "iou": 1, "precision": 1, "recall": 1}}


def test_predictions_of_two_meanings_are_not_scored_together(tmp_path: Path) -> None:
    other = MEANING | {"classes": {"0": "sky", "1": "trail"}}
    one, two = folder(tmp_path / "p", MEANING, a=square()), folder(tmp_path / "q", other, b=square())
    labels = folder(tmp_path / "t", a=square(), b=square())
    with pytest.raises(InputError, match=r"do not mean the same in .*p and .*q"):
        evaluate([one / "a.fits", two / "b.fits"], labels)
    (two / "labels.json").write_text(json.dumps(MEANING, indent=2))
    assert evaluate([one / "a.fits", two / "b.fits"], labels).mean_dice == 1


def test_the_folder_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "set" / "sub-01" / "ses-a" / "anat"
    deep.mkdir(parents=True)

    def folder_of(file: Path | str) -> Path:
        return folders_of([file])[file]

    assert folder_of(deep / "x.nii.gz") == deep
    (tmp_path / "labels.json").write_text(json.dumps(MEANING))
    assert folder_of(deep / "x.nii.gz") == deep  # four folders up
    (tmp_path / "set" / "labels.json").write_text(json.dumps(MEANING))
    assert folder_of(deep / "x.fits[SCI]") == tmp_path / "set"
    (deep.parent / "labels.json").write_text('{"info": {}, "categories": []}')  # of another program
    assert folder_of(deep / "x.nii.gz") == tmp_path / "set"
    monkeypatch.chdir(deep)
    assert folder_of("x.nii.gz") == tmp_path / "set"
    (deep.parent / "labels.json").write_text('{"classes": ')
    with pytest.raises(InputError, match="does not say what the values mean"):
        meaning_of(["x.nii.gz"])


def test_scores_do_not_go_where_the_predictions_are(tmp_path: Path) -> None:
    predictions, labels = folder(tmp_path / "p", MEANING, a=square()), folder(tmp_path / "t", a=square())
    (predictions / "failures.tsv").write_text("case\tfile\twhat\tfix\na\tx\tdamaged\tcopy again\n")
    before = sorted(predictions.iterdir())
    with pytest.raises(UnsafeError, match=r"would pass for that of the predictions"):
        evaluate(predictions, labels, predictions)
    assert sorted(predictions.iterdir()) == before
    assert "damaged" in (predictions / "failures.tsv").read_text()


def test_labels_elsewhere_on_the_sky_are_not_scored(tmp_path: Path) -> None:
    for where, shift in (("p", 0), ("far", 2000), ("near", 0.05)):
        (tmp_path / where).mkdir()
        save(tmp_path / where / "a.fits", square(), **TAN | {"CRPIX1": TAN["CRPIX1"] + shift})
    failed = evaluate(tmp_path / "p", tmp_path / "far")
    assert (failed.results, failed.exit_code) == ([], 4)
    assert "differ in world coordinates" in failed.failures[0].what
    assert "2e+03 pixels apart" in failed.failures[0].what
    assert evaluate(tmp_path / "p", tmp_path / "near").mean_dice == 1
    assert evaluate(tmp_path / "p", folder(tmp_path / "bare", a=square())).mean_dice == 1  # no WCS to compare


def test_sizes_have_the_unit_of_the_file_or_none(tmp_path: Path) -> None:
    block = np.zeros((6, 20, 20), np.uint8)
    block[2:4, 5:9, 5:9] = 1
    nib.save(nib.Nifti1Image(block.T, np.diag([0.5, 0.5, 3, 1])), tmp_path / "ct.nii.gz")
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(tmp_path / "cell.ome.tif", block, ome=True, metadata={"axes": "ZYX", **sizes})
    tifffile.imwrite(tmp_path / "slice.ome.tif", block[2], ome=True, metadata={"axes": "YX", **sizes})
    with h5py.File(tmp_path / "em.h5", "w") as file:
        file["label"] = block
        file["label"].attrs["element_size_um"] = [0.04, 0.01, 0.01]
    save(tmp_path / "field.fits", square(), **TAN)
    np.save(tmp_path / "bare.npy", square())
    names = ("ct.nii.gz", "cell.ome.tif", "slice.ome.tif", "em.h5", "field.fits", "bare.npy")
    files = {name: tmp_path / name for name in names}
    scores = evaluate(files, files, tmp_path / "s", axes=None)
    with open(tmp_path / "s" / "scores.csv", newline="") as table:
        rows = {row["case"]: (row["truth_size"], row["unit"]) for row in csv.DictReader(table)}
    found = {case: (float(size) if size else math.nan, unit) for case, (size, unit) in rows.items()}
    assert scores.failures == []
    assert found["ct.nii.gz"] == (pytest.approx(32 * 0.75), "mm3")
    assert found["cell.ome.tif"] == (pytest.approx(32 * 0.125), "um3")
    assert found["slice.ome.tif"] == (pytest.approx(16 * 0.0625), "um2")
    assert found["em.h5"] == (pytest.approx(32 * 4e-6), "um3")
    assert rows["field.fits"] == rows["bare.npy"] == ("", "")
    stored = json.loads((tmp_path / "s" / "scores.json").read_text())["cases"]
    assert {row["truth_size"] for row in stored if row["case"] in ("field.fits", "bare.npy")} == {None}


def test_the_first_row_of_fits_is_at_the_bottom(tmp_path: Path) -> None:
    labels = np.zeros((40, 30), np.uint8)
    labels[2:6, 3:8], labels[3:5, 3:5] = 1, 2
    image = np.arange(1200, dtype=np.float32).reshape(40, 30)
    truth, picture = save(tmp_path / "a.fits", labels), save(tmp_path / "image.fits", image)
    (plane,) = read_planes(truth, truth, picture, [1, 2])
    assert plane.image[-1, 0] == 0  # the first pixel of the file
    assert plane.image[-1, 1] == 1
    assert plane.image[-2, 0] == 30
    at_bottom = np.argwhere(plane.truth[::-1] == 2)
    assert at_bottom.tolist() == np.argwhere(labels == 2).tolist()
    np.testing.assert_array_equal(plane.prediction, plane.truth)
    np.save(tmp_path / "a.npy", labels)  # others keep their first row at the top
    (plane,) = read_planes(tmp_path / "a.npy", tmp_path / "a.npy", None, [1, 2])
    assert np.argwhere(plane.truth == 2).tolist() == np.argwhere(labels == 2).tolist()
    cube = np.zeros((30, 40, 35), np.uint8)
    cube[3, 2:6, 4:9] = 1
    save(tmp_path / "cube.fits", cube)
    planes = read_planes(tmp_path / "cube.fits", tmp_path / "cube.fits", None, [1], "zyx")
    assert [int(np.flatnonzero(plane.truth[::-1].any(1))[0]) for plane in planes] == [2, 3, 3]
    assert draw_cases(evaluate(tmp_path / "cube.fits", tmp_path / "cube.fits", axes="zyx"), tmp_path)


def test_ignored_values_keep_their_order(tmp_path: Path) -> None:
    listed = {"labels": {"background": 0, "box": 1, "ignore": 3}, "channel_names": {"0": "a"}}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    data = DataConfig(root=str(tmp_path), dataset="dataset.json", ignore=(255, 7))
    assert ignored_values(data) == (255, 7, 3)
    assert ignored_values(data.model_copy(update={"ignore": (255, 3, 7)})) == (255, 3, 7)
