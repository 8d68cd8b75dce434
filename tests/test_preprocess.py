"""Statistics, normalisation, labels, and whole cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densepred.cases import preprocess as module
from densepred.cases.case import Case
from densepred.cases.labels import map_labels
from densepred.cases.preprocess import NormalizedVolume, preprocess, statistics
from densepred.cases.resample import resample
from densepred.errors import InputError
from densepred.volumes import Volume
from tests.case_files import blob, case_of, plan, save

SPACING = (1.0, 1.0, 1.0)
CASE = Case("c", (Path("c.nii"),), Path("c_label.nii"))


def volume_of(array: np.ndarray) -> Volume:
    return Volume.from_array(array, SPACING)


# statistics


def test_statistics_equal_numpy_on_the_finite_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_VOXELS", 100)
    array = np.random.default_rng(0).normal(1000, 5, (2, 9, 6, 7)).astype(np.float32)
    array[1] = array[1] * 3 - 7
    array[0, 2:4] = np.nan
    array[1, 0, 0, :3] = (np.inf, -np.inf, np.nan)
    found = statistics(volume_of(array))
    for channel in range(2):
        values = array[channel][np.isfinite(array[channel])].astype(np.float64)
        assert found.valid[channel] == values.size
        assert found.mean[channel] == pytest.approx(values.mean(), rel=1e-13)
        assert found.std[channel] == pytest.approx(values.std(), rel=1e-12)


def test_statistics_are_sound_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The textbook sum of squares would lose every digit here."""
    monkeypatch.setattr(module, "_SLAB_VOXELS", 1)
    array = np.tile([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16], (1, 30, 1, 1))
    found = statistics(volume_of(array))
    assert found.mean[0] == 1e9 + 10
    assert found.std[0] ** 2 == pytest.approx(22.5, rel=1e-9)


def test_integers_of_any_type_are_normalised() -> None:
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float64):
        array = np.arange(60).reshape(1, 3, 4, 5).astype(dtype)
        volume = volume_of(array)
        out = NormalizedVolume(volume, statistics(volume))[:, :]
        assert out.dtype == np.float32
        assert out.mean() == pytest.approx(0, abs=1e-7)
        assert out.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -5e8])
def test_constant_images_give_zeros(value: float) -> None:
    volume = volume_of(np.full((1, 4, 5, 6), value))
    found = statistics(volume)
    assert found.std == (0.0,)
    assert not NormalizedVolume(volume, found)[:, :].any()


def test_invalid_voxels_become_zero_and_move_nothing_else() -> None:
    array = np.random.default_rng(1).normal(50, 4, (1, 4, 5, 6))
    array[0, 1, 2, 3], array[0, 3, 0, 0] = np.inf, np.nan
    volume = volume_of(array)
    out = NormalizedVolume(volume, statistics(volume))[:, :]
    valid = np.isfinite(array)
    assert np.array_equal(out[~valid], [0, 0])
    values = array[valid]
    np.testing.assert_allclose(out[valid], (values - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "key", [np.s_[:, 1:3], np.s_[1, 2], np.s_[..., 0], np.s_[1:, ::2, 1], np.s_[:, 1, 2, 3], np.s_[0]]
)
def test_the_view_indexes_like_the_array(key: tuple[int | slice, ...]) -> None:
    array = np.random.default_rng(2).normal(10, 2, (2, 4, 5, 6)).astype(np.float32)
    array[1] += 100
    volume = volume_of(array)
    view = NormalizedVolume(volume, statistics(volume))
    whole = view[:, :]
    assert abs(whole[0].mean()) < 1e-4
    assert abs(whole[1].mean()) < 1e-4
    assert np.array_equal(view[key], whole[key])


def test_none_leaves_values_alone() -> None:
    array = np.arange(24.0).reshape(1, 2, 3, 4)
    array[0, 0, 0, 0] = np.nan
    volume = volume_of(array)
    out = NormalizedVolume(volume, statistics(volume, "none"))[:, :]
    assert np.array_equal(out, np.nan_to_num(array).astype(np.float32))


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "13 of 24 voxels of channel 0 are NaN"), (1e200, "too large")])
def test_images_without_usable_values_are_refused(bad: float, what: str) -> None:
    array = np.ones((1, 2, 3, 4))
    array.reshape(-1)[:13] = bad
    with pytest.raises(InputError, match=what):
        statistics(volume_of(array))


# labels


def test_labels_map_to_classes_and_ignore() -> None:
    made = plan(classes=("bg", "a", "b"), values=(0, 2, 7), label_map={0: 0, 2: 1, 7: 2, 9: 2}, ignore=(255, -3))
    stored = np.array([[0, 2, 7], [9, 255, -3]], np.int16)
    out = map_labels(stored, made, CASE)
    assert out.dtype == np.int16
    assert np.array_equal(out, [[0, 1, 2], [2, -1, -1]])
    near = stored.astype(np.float32) + np.float32(5e-4)
    near[0, 0] = np.nan
    assert np.array_equal(map_labels(near, made, CASE), [[-1, 1, 2], [2, -1, -1]])


@pytest.mark.parametrize(
    ("values", "listed"),
    [
        (np.array([[0, 1, 2, 7, 7, -1]]), "-1 (1 voxels), 7 (2 voxels)"),
        (np.array([[0, 1.5, 1.5, np.inf]]), "1.5 (2 voxels), inf (1 voxels)"),
        (np.array([[1.01, 1]]), "1.01 (1 voxels)"),
        (np.arange(40)[None], "3 (1 voxels), 4 (1 voxels)"),
    ],
)
def test_unknown_labels_are_listed(values: np.ndarray, listed: str) -> None:
    with pytest.raises(InputError) as caught:
        map_labels(values, plan(), CASE)
    assert f"ERROR c: c_label.nii: label values without a class: {listed}" in str(caught.value)


def test_the_fix_can_be_pasted() -> None:
    with pytest.raises(InputError, match=r"classes: \{0: background, 1: head, 2: body, 7: class_7\}$"):
        map_labels(np.array([[0, 7]]), plan(), CASE)


# cases


def test_preprocess_normalises_maps_and_resamples(tmp_path: Path) -> None:
    image, label = blob()
    image[0, 0, 0] = np.nan
    spacing = (2.0, 1.0, 1.0)
    case = Case("a", (save(tmp_path / "a.nii", image, spacing),), save(tmp_path / "l.nii", label, spacing))
    plain, truth = preprocess(case, plan())
    assert truth is not None
    assert plain.shape == (1, 6, 7, 8)
    expected = label.astype(np.int16)
    expected[0, 0, 0] = -1
    assert np.array_equal(truth, expected)
    fine, fine_truth = preprocess(case, plan(spacing=(1.0, 1.0, 2.0)))
    assert fine_truth is not None
    assert fine.shape == (1, 12, 7, 4)
    assert fine_truth.shape == (12, 7, 4)
    np.testing.assert_allclose(fine, resample(plain, (12, 7, 4)), atol=1e-6)
    alone, nothing = preprocess(Case("a", case.images), plan())
    assert nothing is None
    assert np.array_equal(alone, plain)


def test_channels_are_stacked_and_counted(tmp_path: Path) -> None:
    first, second = blob(seed=1)[0], blob(seed=2)[0] * 9
    case = Case("a", (save(tmp_path / "1.nii", first), save(tmp_path / "2.nii", second)))
    image, _ = preprocess(case, plan(channels=("t1", "t2")))
    np.testing.assert_allclose(image[1], (second - second.mean()) / second.std(), atol=1e-4)
    with pytest.raises(InputError, match=r"ERROR a: .*the model expects 3 channels \[t1, t2, flair\], here are 2"):
        preprocess(case, plan(channels=("t1", "t2", "flair")))


def test_a_2d_image_for_a_2d_model_only(tmp_path: Path) -> None:
    image, label = blob()
    image2d, truth = preprocess(case_of(tmp_path, image[2], label[2]), plan(dims=2))
    assert truth is not None
    assert (image2d.shape, truth.shape) == ((1, 7, 8), (7, 8))
    with pytest.raises(InputError, match="3 spatial axes, the model has 2"):
        preprocess(case_of(tmp_path, image, label), plan(dims=2))


def test_label_of_another_grid_is_refused(tmp_path: Path) -> None:
    image, label = blob()
    with pytest.raises(InputError, match=r"ERROR a: .*_label.nii.gz: shape \(6, 7, 7\), but the image has \(6, 7, 8\)"):
        preprocess(case_of(tmp_path, image, label[..., 1:]), plan())
    moved = Case("a", (tmp_path / "a.nii.gz",), save(tmp_path / "moved.nii.gz", label, shift=0.01))
    with pytest.raises(InputError, match=r"lie 0.01 voxels apart"):
        preprocess(moved, plan())
