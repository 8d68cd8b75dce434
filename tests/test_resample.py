"""Resampling images and labels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.cases.regrid import Taps
from densepred.cases.resample import resample, resample_labels, resampled_shape


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=2, max_size=3), st.integers(0, 100))
def test_upsampling_equals_torch(axes: list[tuple[int, int]], seed: int) -> None:
    shape, target = [n for n, _ in axes], [n * k + (k - 1) for n, k in axes]
    array = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    tensor = torch.from_numpy(array)[None].double()
    expected = F.interpolate(tensor, target, mode=mode, align_corners=False)[0]
    np.testing.assert_allclose(resample(array, target), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(("shape", "target"), [((40, 31), (13, 9)), ((17, 30), (16, 45)), ((5, 64), (1, 3))])
def test_downsampling_equals_torch_with_antialiasing(shape: tuple[int, int], target: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    tensor = torch.from_numpy(array)[None].double()
    expected = F.interpolate(tensor, target, mode="bilinear", align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(resample(array, target), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("target", [(12, 14, 16), (7, 23, 9), (6, 7, 8), (13, 7, 31)])
def test_upsampling_equals_scipy(target: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    factors = np.divide(target, array.shape[1:])
    expected = scipy.ndimage.zoom(array[0].astype(float), factors, order=1, grid_mode=True, mode="nearest")
    np.testing.assert_allclose(resample(array, target)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("kernel", "factor"), [([1, 3, 3, 1], 2), ([1, 2, 3, 2, 1], 3)])
def test_downsampling_equals_scipy_with_a_triangle_of_twice_the_factor(kernel: list[int], factor: int) -> None:
    array = np.random.default_rng(0).normal(size=(1, 12 * factor, 5, 10 * factor)).astype(np.float32)
    smooth = array[0].astype(float)
    for axis in (0, 2):
        smooth = scipy.ndimage.correlate1d(smooth, np.divide(kernel, sum(kernel)), axis)
    inner = (slice(1, -1), slice(None), slice(1, -1))  # the ends go on otherwise
    expected = smooth[factor // 2 :: factor, :, factor // 2 :: factor][inner]
    np.testing.assert_allclose(resample(array, (12, 5, 10))[0][inner], expected, atol=1e-6)


def test_fine_detail_averages_out_when_it_cannot_be_kept() -> None:
    stripes = np.tile([0.0, 1.0], 32).astype(np.float32)[None, None] * np.ones((1, 4, 1), np.float32)
    out = resample(stripes, (4, 8))
    np.testing.assert_allclose(out[0, :, 1:-1], 0.5, atol=0.02)


def test_weights_sum_to_one_and_keep_the_centre_of_mass() -> None:
    for size, target in ((7, 3), (3, 7), (50, 49), (1, 5), (5, 1)):
        taps = Taps.of(size, target)
        matrix = torch.zeros(target, size).scatter_add(1, taps.index, taps.share).numpy()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)


def test_an_invalid_voxel_reaches_only_what_it_is_part_of() -> None:
    for shape, target in (((9, 11), (7, 17)), ((9, 11), (17, 7)), ((9, 11), (4, 4))):
        array = np.zeros((1, *shape), np.float32)
        array[0, 4, 5] = np.nan
        part = np.where(np.isnan(array), np.float32(1), array)
        assert np.array_equal(np.isnan(resample(array, target)), resample(part, target) > 0)


@pytest.mark.parametrize("dtype", [">f4", "i2", "u1", "?", "f8"])
def test_any_type_gives_float32(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 2, (2, 5, 6)).astype(dtype)
    array.flags.writeable = False
    found = resample(array[:, ::-1], (7, 4))
    assert found.dtype == np.float32
    assert np.array_equal(found, resample(np.ascontiguousarray(array[:, ::-1], np.float32), (7, 4)))


def test_resampled_shape_keeps_the_extent() -> None:
    assert resampled_shape((10, 20, 3), (3.0, 1.0, 1.0), (1.0, 2.0, 100.0)) == (30, 10, 1)
    with pytest.raises(ValueError, match="shape must be 2 positive numbers"):
        resample(np.zeros((1, 4, 4), np.float32), (2, 0))


def test_labels_resample_to_labels() -> None:
    label = np.zeros((8, 9, 10), np.int16)
    label[2:6], label[6:] = 5, -1
    doubled = resample_labels(label, (16, 18, 20))
    assert doubled.dtype == np.int16
    assert np.array_equal(doubled, label.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert np.array_equal(resample_labels(doubled, label.shape), label)
    assert resample_labels(label, label.shape) is not label


def test_labels_go_by_the_largest_share() -> None:
    label = np.random.default_rng(0).integers(-1, 3, (6, 7, 8)).astype(np.int16)
    shares = np.stack([label == value for value in range(-1, 3)]).astype(np.float64)
    linear = F.interpolate(torch.from_numpy(shares)[None], (11, 9, 13), mode="trilinear", align_corners=False)[0]
    top = linear.topk(2, 0).values
    clear = (top[0] - top[1] > 1e-5).numpy()
    assert clear.mean() > 0.95
    found = resample_labels(label, (11, 9, 13))
    assert np.array_equal(found[clear], (linear.argmax(0).numpy() - 1)[clear])


def test_labels_between_two_classes_never_give_a_third() -> None:
    label = np.repeat([0, 2], 5).astype(np.int16)[None] * np.ones((4, 1), np.int16)
    assert set(np.unique(resample_labels(label, (4, 37)))) == {0, 2}
