"""The table of real files: every image is as the library of its format gives it, and the page says so."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from densepred.volumes import Volume, open_volume

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "files.md"
REFUSED = {
    ("fits/images/unsolved.fits", ""): "DATASUM says 4087826492",
    ("fits/labelled/2d1.fits", "3"): r"no image of two axes or more: its shape is (345,)",
    ("fits/labelled/3d1.fits", "3"): r"no image of two axes or more: its shape is (365,)",
    ("nifti_odd/nifti1.hdr", ""): "a pair of files",
}
"""All that may be refused, and the words that say why."""


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_file_table", ROOT / "scripts" / "file_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


table = _script()


@pytest.fixture(scope="module")
def rows(real_data: Path) -> list:
    return table.compare(real_data)


def test_every_file_is_equal_or_rightly_refused(rows: list, real_data: Path) -> None:
    assert [row.cells for row in rows if not row.ok] == []
    assert {row.cells[0] for row in rows} == {path.relative_to(real_data).as_posix() for path in table.files(real_data)}
    assert len(rows) >= 81
    refused = {row.cells[:2]: row.cells[-1] for row in rows if not row.cells[-1].startswith("equal")}
    assert refused.keys() == {*REFUSED}
    for name, words in REFUSED.items():
        assert words in refused[name]
        assert str(real_data) not in refused[name]


def test_the_page_is_what_the_script_makes(rows: list) -> None:
    """Versions of the libraries aside."""
    written = [line for line in PAGE.read_text().splitlines() if not line.startswith("Made by")]
    assert written == [line for line in table.page(rows).splitlines() if line != table.made_with()]


def test_a_difference_would_be_seen() -> None:
    values = np.array([[[1, np.nan], [3, 4.0]]])
    volume = Volume(values, (1.0, 1.0), np.diag([1.0, 1, 1, 1]))
    truth = table.Witness("peer", values, ("affine", np.eye(4)))
    assert table.faults(volume, values, truth) == []
    assert table.faults(volume, values.astype(np.float32), truth) == []
    for wrong, words in (
        (np.where(values == 3, 3.5, values), "1 of 4 values differ"),
        (np.nan_to_num(values), "1 of 4 values differ"),
        (np.where(values == 3, np.nan, values), "1 of 4 values differ"),
        (values[:, :1], "shape (1, 1, 2) instead of (1, 2, 2)"),
        (np.nan_to_num(values).astype(np.int32), "type int32 instead of float64"),
    ):
        assert words in table.faults(volume, wrong, truth)
    shifted = Volume(values, (1.0, 1.0), np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 1e-6)
    assert table.faults(shifted, values, truth) == ["the geometry (affine) differs"]
    assert table.faults(Volume(values, (1.0, 1.0)), values, truth) == ["the geometry (affine) differs"]


def test_a_wrong_refusal_or_reading_would_be_seen(real_data: Path, tmp_path: Path) -> None:
    path = shutil.copy(real_data / "spinal_cord/t2.nii.gz", tmp_path)
    (witness,) = table.witnesses(Path(path))
    assert table.row_of(Path(path), witness, tmp_path).ok
    damaged = bytearray(Path(path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path(path).write_bytes(damaged)
    row = table.row_of(Path(path), witness, tmp_path)
    assert not row.ok
    assert "refused" in row.cells[-1]
    fine = real_data / "spinal_cord/t2_seg-manual.nii.gz"
    assert not table.row_of(fine, table.Witness("nibabel", fault="broken"), real_data).ok
    other = next(table.witnesses(real_data / "spinal_cord/t2_seg-manual.nii.gz"))
    row = table.row_of(real_data / "spinal_cord/t2_seg-manual_labeled.nii.gz", other, real_data)
    assert "type float64 instead of uint8" in row.cells[-1]
    assert not row.ok


def test_world_coordinates_are_compared(real_data: Path) -> None:
    """A reference point moved by a ten-thousandth of a pixel is noticed."""
    path = real_data / "fits/labelled/testcase12/c4d_170916_045042_ooi_r_ls9.N15.fits"
    (witness,) = table.witnesses(path)
    for moved, words in ((0, []), (1e-4, ["the geometry (WCS) differs"])):
        with open_volume(path) as volume:
            volume.header.header["CRPIX1"] += moved  # type: ignore[union-attr]
            assert table.faults(volume, volume.numpy(), witness) == words
