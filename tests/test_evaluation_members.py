"""Label maps that say themselves what is invalid, that hold several images, or whose checksum is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits
from typer.testing import CliRunner

from densepred.catalogue import catalogue
from densepred.cli import app
from densepred.convert import convert
from densepred.errors import InputError
from densepred.evaluation import draw_cases, evaluate
from densepred.evaluation.planes import fullest
from densepred.evaluation.records import Meaning, meaning_of
from densepred.info import info
from densepred.volumes import Record, Volume, open_members, open_members_writer, open_writer
from tests.fits_files import image, patched, save, save_many

NAMES = {0: "sky", 1: "source", 255: "invalid"}


def square(value: int = 1) -> np.ndarray:
    """16 pixels of one value in a field of 0."""
    labels = np.zeros((20, 20), np.uint8)
    labels[5:9, 5:9] = value
    return labels


def predicted(path: Path, values: np.ndarray, names: dict[int, str] | None = None) -> Path:
    """A label map as predictions are written, far from any labels.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    like = Volume.from_array(values, (1.0, 1.0))
    with open_writer(path, like, values.dtype, labels=True, record=Record(names=names or NAMES)) as writer:
        writer.write(values[None])
    return path


@pytest.mark.parametrize(("invalid", "dtype"), [(255, np.uint8), (65535, np.uint16)])  # CLASS65535 is no keyword
def test_a_copy_of_a_prediction_says_itself_what_is_invalid(tmp_path: Path, invalid: int, dtype: type) -> None:
    values = square().astype(dtype)
    values[:, 15:] = invalid
    names = {0: "sky", 1: "source", invalid: "invalid"}
    path = predicted(tmp_path / "p" / "a.fits.fz", values, names)
    (tmp_path / "t").mkdir()
    save(tmp_path / "t" / "a.fits", square())
    assert meaning_of([path]) == Meaning({0: "sky", 1: "source"}, invalid=invalid)
    scores = evaluate(tmp_path / "p", tmp_path / "t")
    assert dict(scores.classes) == {0: "sky", 1: "source"}
    assert (scores.mean["source"]["dice"], scores.results[0].unpredicted) == (1, 100)
    found = catalogue(path)
    assert (found["class"].tolist(), found["name"].tolist()) == ([1], ["source"])
    (tmp_path / "p" / "labels.json").write_text(json.dumps({"classes": {"1": "star"}, "invalid": 7}))
    assert meaning_of([path]) == Meaning({1: "star"}, invalid=7)  # what stands beside it comes first


def test_whose_legend_counts(tmp_path: Path) -> None:
    first = predicted(tmp_path / "a.fits", square())
    damaged, foreign = tmp_path / "cut.fits", save(tmp_path / "b.fits", square(), CLASS255="invalid", CLASS0="sky")
    damaged.write_bytes(first.read_bytes()[:3000])
    assert meaning_of([foreign]) == Meaning()  # another program's: nothing is taken for invalid
    assert meaning_of([first, damaged, foreign]).invalid == 255
    elsewhere = tmp_path / "far" / "deep"
    elsewhere.mkdir(parents=True)
    shutil.copy(damaged, elsewhere)
    assert meaning_of([first, elsewhere / "cut.fits"]).invalid == 255
    other = predicted(tmp_path / "c.fits", square(), {0: "sky", 1: "galaxy", 255: "invalid"})
    with pytest.raises(InputError, match=r"do not mean the same in .*a\.fits and .*c\.fits"):
        meaning_of([first, other])


@pytest.fixture
def chips(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of predictions and truths of two chips, of which the prediction's stand in the other order."""
    for folder in ("p", "t"):
        (tmp_path / folder).mkdir()
    half = square()
    half[5:7] = 0
    sizes = {1: (square(), square()), 2: (np.pad(square(), ((0, 5), (0, 0))), np.pad(half, ((0, 5), (0, 0))))}
    truth = [image(sizes[version][0], "MASK", version) for version in (1, 2)]
    save_many(tmp_path / "t" / "a.fits", *truth, image(np.zeros((3, 3), "f4"), "ERR"))
    save_many(tmp_path / "src.fits", *(image(sizes[version][1], "SCI", version) for version in (2, 1)))
    with open_members_writer(tmp_path / "p" / "a.fits.fz", 2, np.uint8, labels=True, record=Record(names=NAMES)) as out:
        for volume in open_members(tmp_path / "src.fits[SCI,all]"):
            out.member(volume).write(volume[:])
    return tmp_path / "p", tmp_path / "t"


def test_the_images_of_a_case_are_counted_together(chips: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truths = chips
    patterns = (f"{predictions}/{{id}}.fits.fz[SCI,all]", f"{truths}/{{id}}.fits[MASK,all]")
    scores = evaluate(*patterns)
    assert scores.failures == []
    assert dict(scores.classes) == {0: "sky", 1: "source"}
    assert scores.results[0].confusion.tolist() == [[400 + 500 - 32, 0], [8, 24]]
    assert scores.mean["source"]["dice"] == 2 * 24 / (32 + 24)
    done = CliRunner().invoke(app, ["evaluate", *patterns, "--out", str(tmp_path / "s"), "--images", patterns[1]])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "s" / "worst_a.png").is_file()
    file = evaluate(f"{predictions}/a.fits.fz[SCI,2]", f"{truths}/a.fits[MASK,2]")
    assert file.mean["source"]["dice"] == 2 * 8 / (16 + 8)


def test_the_image_with_most_of_the_truth_is_shown(tmp_path: Path) -> None:
    few = np.zeros((20, 20), np.uint8)
    few[0, 0] = 1
    truth = save_many(tmp_path / "t.fits", image(few, "M", 1), image(square(), "M", 2))
    pixels = save_many(tmp_path / "i.fits", image(few, "SCI", 2), image(few, "SCI", 1))
    shown = fullest(Path(f"{truth}[M,all]"), Path(f"{truth}[M,all]"), Path(f"{pixels}[SCI,all]"), [1])
    assert shown == (f"{truth}[M,2]", f"{truth}[M,2]", f"{pixels}[SCI,2]")
    assert fullest(Path(f"{truth}[M,all]"), Path(f"{truth}[M,all]"), tmp_path / "none.fits", [1])[2] is None


@pytest.mark.parametrize(
    ("prediction", "truth", "what"),
    [
        ("a.fits.fz[SCI,1]", "a.fits[MASK,all]", "stands for one image, and .* for 2"),
        ("a.fits.fz[SCI,all]", "a.fits[MASK,1]", "stands for one image, and .* for 2"),
        ("a.fits.fz[SCI,all]", "a.fits[all]", "stands for [23] images, and .* for [23]"),
        ("a.fits.fz[SCI,all]", "a.fits[ERR,all]", "stands for [12] images, and .* for [12]"),
    ],
)
def test_other_numbers_of_images_are_a_failure(
    chips: tuple[Path, Path], prediction: str, truth: str, what: str
) -> None:
    scores = evaluate({"a": chips[0] / prediction}, {"a": chips[1] / truth})
    (failure,) = scores.failures
    assert re.search(what, failure.what)
    assert "choose as many of each" in failure.fix
    assert scores.results == []


def test_a_folder_of_files_with_several_images_asks_for_a_pattern(chips: tuple[Path, Path]) -> None:
    (failure,) = evaluate(*chips).failures
    assert "images, and none is chosen" in failure.what
    assert failure.fix == f"give a pattern that says which, such as '{chips[1]}/{{id}}.fits[MASK,all]'"
    (failure,) = evaluate(chips[0], f"{chips[1]}/{{id}}.fits[MASK,all]").failures
    assert failure.fix == f"give a pattern that says which, such as '{chips[0]}/{{id}}.fits.fz[SCI,all]'"


def test_the_frames_of_a_series_are_counted_together(tmp_path: Path) -> None:
    series = np.stack([np.broadcast_to(square(), (3, 20, 20))] * 4)
    wrong = series.copy()
    wrong[2] = 0
    for name, values in (("t", series), ("p", wrong), ("one", series[0])):
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(values.T, np.diag([2, 2, 2, 1])), tmp_path / name / "a.nii.gz")
    scores = evaluate(tmp_path / "p", tmp_path / "t", axes="xyzt")
    assert scores.results[0].confusion.tolist() == [[4 * 3 * 384, 0], [48, 144]]
    assert scores.results[0].voxel == (8, "mm3")
    assert draw_cases(scores, tmp_path / "s")
    assert "stands for one image, and" in evaluate(tmp_path / "one", tmp_path / "t", axes="xyzt").failures[0].what


def test_a_wrong_checksum_may_be_ignored(tmp_path: Path) -> None:
    """A header card that was edited by a program that leaves CHECKSUM as it was."""
    path = tmp_path / "p" / "a.fits"
    path.parent.mkdir()
    fits.PrimaryHDU(square(), fits.Header({"OBJECT": "M 31"})).writeto(path, checksum=True)
    patched(path, OBJECT="M 33")
    truth = save(tmp_path / "a.fits", square())
    out, table, scores = tmp_path / "c.tif", tmp_path / "x.csv", tmp_path / "s"
    calls = [
        (["info", path], lambda how: info(path, checksum=how)),
        (["convert", path, out, "--overwrite"], lambda how: convert(path, out, None, True, how)),
        (["catalogue", path, path, "--out", table], lambda how: catalogue(path, path, checksum=how)),
    ]
    for words, call in calls:
        with pytest.raises(InputError, match="CHECKSUM does not match") as caught:
            call("verify")
        assert "say checksum=ignore (data.checksum=ignore in recipes and predict, --checksum" in caught.value.fix
        call("ignore")
        ignored = CliRunner().invoke(app, [*map(str, words), "--checksum", "ignore"])
        assert ignored.exit_code == 0, ignored.output
    (failure,) = evaluate(path, truth).failures
    assert "CHECKSUM does not match" in failure.what
    words = ["evaluate", path.parent, truth, "--out", scores, "--checksum", "ignore"]  # the pictures read it again
    ignored = CliRunner().invoke(app, list(map(str, words)))
    assert ignored.exit_code == 0, ignored.output
    assert json.loads((scores / "scores.json").read_text())["mean_dice"] == 1
    (failure,) = evaluate(truth, truth, checksum="require").failures
    assert "has neither CHECKSUM nor DATASUM" in failure.what
