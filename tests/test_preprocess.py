"""Statistics, normalisation, labels, and whole cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.case import Case, collect
from densepred.cases.labels import map_labels
from densepred.cases.plan import Plan, make_plan
from densepred.cases.preprocess import NormalizedVolume, normalized, preprocess
from densepred.cases.resample import resample
from densepred.config import Config
from densepred.errors import InputError
from densepred.volumes import Volume
from tests.case_files import blob, by_patterns, case_of, make_set, plan, save

SPACING = (1.0, 1.0, 1.0)
CASE = Case("c", (Path("c.nii"),), Path("c_label.nii"))


def volume_of(array: np.ndarray) -> Volume:
    return Volume.from_array(array, SPACING)


# normalised views; the methods themselves are tested in test_normalize.py


def view_of(array: np.ndarray, *methods: str, **validity: object) -> NormalizedVolume:
    """What a model sees of an array, each channel normalised by zscore or as named."""
    channels = (*(f"c{number}" for number in range(len(array))), *(["validity"] if validity.get("channel") else []))
    chosen = methods or ("zscore",) * len(array)
    made = plan(channels=channels, normalize=chosen, reading={"validity": validity})
    return normalized(volume_of(array), made)


def test_integers_of_any_type_are_normalised() -> None:
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float64):
        array = np.arange(60).reshape(1, 3, 4, 5).astype(dtype)
        out = view_of(array)[:, :]
        assert out.dtype == np.float32
        assert out.mean() == pytest.approx(0, abs=1e-7)
        assert out.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -5e8])
def test_constant_images_give_zeros(value: float) -> None:
    assert not view_of(np.full((1, 4, 5, 6), value))[:, :].any()


def test_invalid_voxels_become_zero_and_move_nothing_else() -> None:
    array = np.random.default_rng(1).normal(50, 4, (1, 4, 5, 6))
    array[0, 1, 2, 3], array[0, 3, 0, 0] = np.inf, np.nan
    out = view_of(array)[:, :]
    valid = np.isfinite(array)
    assert np.array_equal(out[~valid], [0, 0])
    values = array[valid]
    np.testing.assert_allclose(out[valid], (values - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)


def test_invalid_voxels_become_the_median_or_their_neighbour() -> None:
    array = np.array([[[[1.0, 2.0, 9.0], [np.nan, 4.0, np.nan]]]])
    assert view_of(array, "none", fill="median")[:, :][0, 0, 1].tolist() == [3.0, 4.0, 3.0]
    assert view_of(array, "none", fill="nearest")[:, :][0, 0, 1].tolist() == [4.0, 4.0, 4.0]


def test_validity_is_the_last_channel() -> None:
    array = np.ones((2, 2, 3, 4))
    array[0, 1, 2, 3], array[1, 0, 0, 0] = np.nan, np.inf
    view = view_of(array, "none", "none", channel=True)
    assert view.shape == (3, 2, 3, 4)
    assert np.array_equal(view[:, :][2], np.isfinite(array).all(0))
    assert np.array_equal(view[2, 1, 2], [1, 1, 1, 0])


@pytest.mark.parametrize(
    "key", [np.s_[:, 1:3], np.s_[1, 2], np.s_[..., 0], np.s_[1:, ::2, 1], np.s_[:, 1, 2, 3], np.s_[0]]
)
@pytest.mark.parametrize("method", ["zscore", "background"])
def test_the_view_indexes_like_the_array(key: tuple[int | slice, ...], method: str) -> None:
    array = np.random.default_rng(2).normal(10, 2, (2, 4, 8, 9)).astype(np.float32)
    array[1] += 100
    view = view_of(array, method, method)
    whole = view[:, :]
    assert abs(whole[0].mean()) < 0.1
    assert abs(whole[1].mean()) < 0.1
    assert np.array_equal(view[key], whole[key])


@pytest.mark.parametrize("fill", ["zero", "median", "nearest"])
@pytest.mark.parametrize("key", [np.s_[:, :], np.s_[:, 1:3], np.s_[0, 1, 2], np.s_[:, :, ::2, ::-2], np.s_[..., 1]])
def test_a_cutout_is_that_part_of_the_whole(key: tuple[int | slice, ...], fill: str) -> None:
    array = np.random.default_rng(3).normal(10, 2, (1, 5, 6, 9)).astype(np.float32)
    array[0, :, :, 2:5] = np.nan  # the cut-out begins within a hole, whose neighbour is outside of it
    view = view_of(array, fill=fill, channel=True)
    part = view.cutout(((1, 5), (0, 4), (3, 8)))
    assert part.shape == (2, 4, 4, 5)
    assert np.array_equal(part[key], view[:, :][:, 1:5, 0:4, 3:8][key])


def test_none_leaves_values_alone() -> None:
    array = np.arange(24.0).reshape(1, 2, 3, 4)
    array[0, 0, 0, 0] = np.nan
    assert np.array_equal(view_of(array, "none")[:, :], np.nan_to_num(array).astype(np.float32))


def test_images_with_too_few_valid_voxels_are_refused() -> None:
    array = np.ones((1, 2, 3, 4))
    array.reshape(-1)[:13] = np.nan
    with pytest.raises(InputError, match="13 of 24 voxels of channel 0 are invalid"):
        view_of(array)
    assert view_of(array, least=0.4).fitted.valid == (11,)


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


def test_a_window_of_ct_is_that_of_the_training_foreground(tmp_path: Path) -> None:
    """nnU-Net's CTNormalization: clip to the foreground's percentiles, then its mean and standard deviation."""
    make_set(tmp_path, 4)
    data = by_patterns(tmp_path, normalize={"name": "ct_window"})
    cases = collect(data)
    made = make_plan(Config(data=data), cases[:3])
    pooled = np.concatenate([blob(seed=n)[0][blob(seed=n)[1] > 0] for n in range(3)]).astype(np.float64)
    low, high = np.percentile(pooled, [0.5, 99.5])
    image, _ = preprocess(cases[3], made)
    expected = (np.clip(blob(seed=3)[0], low, high) - pooled.mean()) / pooled.std()
    np.testing.assert_allclose(image[0], expected, atol=1e-5)
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_plans_of_the_first_format_are_read(tmp_path: Path) -> None:
    old = {"format_version": 1, "dims": 3, "channels": ["t1", "t2"], "classes": ["a", "b"], "values": [0, 1]}
    (tmp_path / "plan.json").write_text(json.dumps(old | {"label_map": {"0": 0, "1": 1}, "axes": "xyzc"}))
    read = Plan.load(tmp_path / "plan.json")
    assert (read.reading.axes, [one.name for one in read.normalize]) == ("xyzc", ["zscore", "zscore"])
