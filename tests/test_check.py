"""Checking a data set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.check import check
from densepred.config import DataConfig
from tests.case_files import blob, by_patterns, make_set, save, save_json


def rows_of(data: DataConfig, dims: int = 3) -> dict[str, list[str]]:
    """Case -> `severity what` of each row."""
    out: dict[str, list[str]] = {}
    for row in check(data, dims).rows:
        out.setdefault(row.case, []).append(f"{row.severity} {row.what}")
    return out


def test_a_sound_set_gives_an_empty_report_and_its_numbers(tmp_path: Path) -> None:
    make_set(tmp_path, 6, (6, 7, 8))
    report = check(by_patterns(tmp_path), 3)
    assert report.ok
    assert report.rows == []
    summary = report.summary
    assert summary.cases == 6
    assert summary.shapes is not None
    assert summary.shapes.median == (6, 7, 8)
    assert summary.shares == pytest.approx({"background": 240 / 336, "head": 48 / 336, "body": 48 / 336})
    assert "shape     6 x 7 x 8 to 6 x 7 x 8" in str(summary)


def test_all_problems_of_all_cases_are_found(tmp_path: Path) -> None:
    make_set(tmp_path, 6)
    image, label = blob(seed=99)
    nan = image.copy()
    nan[0, 0, :3] = np.nan
    nan[0, 1, 0] = np.inf
    broken = {
        "shape": (image, label[:, :, 1:], 0.0),
        "moved": (image + 1, label, 0.5),
        "few_nan": (nan, label, 0.0),
        "most_nan": (np.where(np.arange(8) < 5, np.nan, image).astype(np.float32), label, 0.0),
        "constant": (np.full_like(image, 7), label, 0.0),
        "empty": (image + 2, label * 0, 0.0),
        "values": (image + 3, np.where(label == 2, 7, label).astype(np.uint8), 0.0),
        "half": (image + 4, label * np.float32(0.5), 0.0),
        "near": (image + 5, label * np.float32(0.9999), 0.0),
    }
    for case, (picture, truth, shift) in broken.items():
        save(tmp_path / f"imagesTr/{case}.nii.gz", picture)
        save(tmp_path / f"labelsTr/{case}.nii.gz", truth, shift=shift)
    cut = (tmp_path / "imagesTr/case_00.nii.gz").read_bytes()
    (tmp_path / "imagesTr/cut.nii.gz").write_bytes(cut[: len(cut) // 2])
    shutil.copy(tmp_path / "labelsTr/case_00.nii.gz", tmp_path / "labelsTr/cut.nii.gz")
    save(tmp_path / "labelsTr/alone.nii.gz", label)
    found = rows_of(by_patterns(tmp_path, fold="all"))
    assert {case for case in found if case.startswith("case_")} == set()
    expected = {
        "shape": "error shape (6, 7, 7), but the image has (6, 7, 8)",
        "moved": "error the corners of label and image lie 0.5 voxels apart (allowed: 0.001)",
        "few_nan": "note 3 NaN or masked and 1 infinite of 336 voxels of channel 0",
        "most_nan": "error 210 NaN or masked and 0 infinite of 336 voxels of channel 0",
        "constant": "note constant: every voxel of channel 0 is 7",
        "empty": "note empty: no foreground among 336 voxels",
        "values": "error label values without a class: 7 (48 voxels)",
        "half": "error label values without a class: 0.5 (48 voxels)",
        "near": "note values are up to 0.001 from integers, and are rounded",
        "alone": "error a label without an image",
    }
    for case, row in expected.items():
        assert row in found[case]
    assert found["cut"][0].startswith("error truncated")


def test_one_plane_that_needs_rounding_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepred.cases.quantiles._SLAB_VOXELS", 1)
    image, label = blob()
    near = label.astype(np.float32)
    near[2] *= np.float32(0.9999)
    near[3, 0, 0] = np.nan
    save(tmp_path / "imagesTr/a.nii.gz", image)
    save(tmp_path / "labelsTr/a.nii.gz", near)
    found = rows_of(by_patterns(tmp_path, fold="all"))
    assert found == {"a": ["note values are up to 0.001 from integers, and are rounded", "note 1 voxels are NaN"]}


def test_values_without_a_class_come_with_a_mapping_to_paste(tmp_path: Path) -> None:
    image, label = blob()
    save(tmp_path / "imagesTr/a.nii.gz", image)
    save(tmp_path / "labelsTr/a.nii.gz", np.where(label == 2, 7, label).astype(np.int16))
    rows = check(by_patterns(tmp_path, fold="all"), 3).rows
    assert rows[0].fix.endswith("classes: {0: background, 1: head, 2: body, 7: class_7}")
    rows = check(by_patterns(tmp_path, fold="all", classes={}), 3).rows
    assert [row.what for row in rows] == [
        "the classes are not named; the labels hold 0 (240 voxels), 1 (48 voxels), 7 (48 voxels)"
    ]
    assert rows[0].fix.endswith("classes: {0: background, 1: class_1, 7: class_7}")
    assert check(by_patterns(tmp_path, fold="all", ignore=(7,)), 3).ok


def test_equal_images_are_a_leak_only_where_a_fold_tears_them(tmp_path: Path) -> None:
    ids = make_set(tmp_path, 6)
    image, label = blob(seed=1)
    save(tmp_path / "imagesTr/twin.nii.gz", image)
    save(tmp_path / "labelsTr/twin.nii.gz", label)
    save_json(tmp_path, [{"train": ids, "val": ["twin"]}], "splits.json")
    found = rows_of(by_patterns(tmp_path, splits="splits.json"))
    first = tmp_path / "imagesTr/case_01.nii.gz"
    leak = f"error the same image as case_01 ({first}), and a fold trains on one and validates on the other"
    assert found == {"twin": [leak]}
    assert rows_of(by_patterns(tmp_path, fold="all")) == {"twin": [f"note the same image as case_01 ({first})"]}


def test_sets_whose_cases_differ(tmp_path: Path) -> None:
    make_set(tmp_path, 5)
    image, label = blob((6, 30, 8))
    save(tmp_path / "imagesTr/wide.nii.gz", image, (1.0, 1.0, 0.2))
    save(tmp_path / "labelsTr/wide.nii.gz", label, (1.0, 1.0, 0.2))
    assert rows_of(by_patterns(tmp_path)) == {
        "wide": [
            "note shape 6 x 30 x 8 is far from the median 6 x 7 x 8",
            "note spacing 1 x 1 x 0.2 is far from the median 1 x 1 x 1",
        ]
    }
    four = np.stack([*blob((6, 7, 8))] * 2)
    save(tmp_path / "imagesTr/four.nii.gz", four, (1.0, 1.0, 1.0))
    save(tmp_path / "labelsTr/four.nii.gz", label[:, :7])
    found = rows_of(by_patterns(tmp_path, axes="xyzc"))
    assert found["four"] == ["error 4 channels, but most cases have 1"]
    found = rows_of(by_patterns(tmp_path), 2)
    assert all("error 3 spatial axes, but the model has 2" in found[f"case_0{number}"] for number in range(5))


def test_folds_that_fail_and_sets_without_foreground_are_reported(tmp_path: Path) -> None:
    for case in "ab":
        save(tmp_path / f"imagesTr/{case}.nii.gz", blob(seed=ord(case))[0])
        save(tmp_path / f"labelsTr/{case}.nii.gz", np.zeros((6, 7, 8), np.uint8))
    report = check(by_patterns(tmp_path), 3)
    assert not report.ok
    assert [row.what for row in report.rows if row.severity == "error"] == [
        "no label of 2 holds foreground: there is nothing to learn",
        "2 groups of cases cannot make 5 folds",
    ]


def test_hippocampus_subset_is_sound_and_its_extras_are_named(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "hippocampus"
    names = sorted(path.name for path in (source / "imagesTr").iterdir())[:6]
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(source / folder / name, tmp_path / folder)
    assert check(by_patterns(tmp_path), 3).rows == []
    shutil.copy(source / "extras/hippocampus_118.nii.gz", tmp_path / "imagesTr")
    shutil.copy(source / "extras/hippocampus_010.nii.gz", tmp_path / "labelsTr")
    outlier = source / "extras/outlier_281_not_hippocampus.nii.gz"
    shutil.copy(outlier, tmp_path / "labelsTr/hippocampus_281.nii.gz")
    shutil.copy(source / "imagesTr" / names[0], tmp_path / "imagesTr/hippocampus_281.nii.gz")
    found = rows_of(by_patterns(tmp_path, fold="all"))
    assert set(found) == {"hippocampus_010", "hippocampus_118", "hippocampus_281"}
    assert found["hippocampus_010"] == ["error a label without an image"]
    assert found["hippocampus_118"] == ["error no label: nothing matches 'labelsTr/hippocampus_118.nii.gz'"]
    assert any("shape (94, 512, 512), but the image has" in row for row in found["hippocampus_281"])


def test_checking_imports_no_torch() -> None:
    code = "import sys; from densepred.cases import cache, check, patches; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
