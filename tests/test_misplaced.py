"""Labels that are moved by whole voxels are found by predictions that are not."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from densepred.crossval import cross_validate
from densepred.crossval.misplaced import FURTHEST, displacement
from densepred.inference.folds import read_record
from tests.crossval_set import write_set


def blob(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Two classes that share a smooth outline."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(6, -6) for _ in shape)] = True
    found = ((noise > 0) & inside).astype(np.int64)
    found[found > 0] += np.indices(shape)[0][found > 0] > shape[0] // 2
    return found


def mean_dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    pairs = [(truth == value, predicted == value) for value in (1, 2)]
    return float(np.mean([2 * (one & other).sum() / (one.sum() + other.sum()) for one, other in pairs]))


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 0, -1), (-3, 2, 0), (0, 0, 4)])
def test_the_displacement_is_found(shift: tuple[int, ...]) -> None:
    label = blob(0, (28, 30, 26))
    truth = np.roll(label, shift, (0, 1, 2))
    voxels, before, after = displacement(truth, label, 3)
    assert (voxels, after) == (shift, 1.0)
    expected = np.mean(
        [2 * ((truth == k) & (label == k)).sum() / ((truth == k).sum() + (label == k).sum()) for k in (1, 2)]
    )
    assert before == pytest.approx(expected)


def test_it_is_the_best_of_all_near_ones() -> None:
    truth = blob(1, (30, 32))
    predicted = np.roll(blob(1, (30, 32)), (2, -1), (0, 1))
    predicted[np.random.default_rng(0).random(predicted.shape) < 0.1] = 0
    every = {}
    for shift in itertools.product(range(-FURTHEST, FURTHEST + 1), repeat=2):
        every[shift] = mean_dice(truth, np.roll(predicted, shift, (0, 1)))
    voxels, before, after = displacement(truth, predicted, 3)
    assert voxels == max(every, key=every.__getitem__)
    assert (before, after) == pytest.approx((every[0, 0], max(every.values())))


def test_unknown_and_empty_labels() -> None:
    label = blob(2, (26, 26))
    unknown = np.where(np.random.default_rng(0).random(label.shape) < 0.2, -1, np.roll(label, 1, 0))
    voxels, _, after = displacement(unknown, label, 3)
    assert (voxels, after) == ((1, 0), 1.0)
    voxels, before, after = displacement(np.zeros((5, 5), int), np.zeros((5, 5), int), 2)
    assert voxels == (0, 0)
    assert np.isnan([before, after]).all()


@pytest.mark.usefixtures("forked_folds")
def test_cross_validation_tells_of_them(tmp_path: Path) -> None:
    recipe = write_set(tmp_path, 6)
    path = tmp_path / "labels" / "c3.nii.gz"
    label = np.asarray(nibabel.load(path).dataobj)
    nibabel.save(nibabel.Nifti1Image(np.roll(label, (2, 0, -1), (0, 1, 2)), np.eye(4)), path)
    found = cross_validate(recipe, tmp_path / "cv", ["training.epochs=6"])
    (one,) = found.verdict.misplaced
    assert (one.case, one.moved > 0.9) == ("c3", True)
    with_axes = {tuple(entry["voxels"]) for entry in read_record(tmp_path / "cv" / "summary.json")["misplaced"]}
    assert with_axes == {one.voxels}
    assert sorted(map(abs, one.voxels)) == [0, 1, 2]
    assert found.lines[-1].startswith("c3: its label seems to be moved by")
    assert [path.name for path in (tmp_path / "cv").glob("misplaced_*")] == ["misplaced_c3.png"]
