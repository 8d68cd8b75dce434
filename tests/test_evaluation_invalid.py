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
from densepred.evaluation.records import folder_of, meaning_of
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
    failures = {failure.case: failure.what for failure in evaluate(predictions, labels).failures}
    assert failures == dict.fromkeys("ab", "its prediction failed: damaged")


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
