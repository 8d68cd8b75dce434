"""Filters other than linear, against SciPy, torch and nnU-Net's own resampler."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from densepred.cases import regrid
from densepred.cases.regrid import Kernel, Taps, kernels_for
from densepred.cases.resample import resample, resample_labels, resampled_shape
from densepred.inference.resample import Resampled

NEAREST, PLAIN, CUBIC, SPLINES = Kernel(0, False), Kernel(1, False), Kernel(3), Kernel(3, False)


def zoomed(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """SciPy's, of one channel, in float64."""
    factors = np.divide(shape, image.shape)
    return scipy.ndimage.zoom(image.astype(float), factors, order=order, mode="nearest", grid_mode=True)


@pytest.mark.parametrize("target", [(21, 31, 16), (13, 41, 61), (14, 15, 17)])
def test_cubic_equals_scipy_where_axes_grow(target: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(size=(1, 13, 15, 16)).astype(np.float32)
    np.testing.assert_allclose(resample(image, target, (CUBIC,) * 3)[0], zoomed(image[0], target, 3), atol=2e-5)


@pytest.mark.parametrize("target", [(9, 7, 5), (3, 20, 11), (1, 2, 40)])
@pytest.mark.parametrize(("kernel", "order"), [(SPLINES, 3), (PLAIN, 1)])
def test_without_antialiasing_it_equals_scipy_everywhere(target: tuple[int, ...], kernel: Kernel, order: int) -> None:
    image = np.random.default_rng(0).normal(size=(2, 13, 15, 16)).astype(np.float32)
    found = resample(image, target, (kernel,) * 3)
    for channel, values in zip(found, image, strict=True):
        np.testing.assert_allclose(channel, zoomed(values, target, order), atol=2e-5)


@pytest.mark.parametrize(("shape", "target"), [((40, 31), (13, 9)), ((17, 30), (16, 29)), ((5, 64), (1, 3))])
def test_cubic_equals_torch_where_axes_shrink(shape: tuple[int, int], target: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    tensor = torch.from_numpy(array)[None].double()
    expected = F.interpolate(tensor, target, mode="bicubic", align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(resample(array, target, (CUBIC,) * 2), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("target", [(5, 31), (29, 3), (1, 1), (7, 11)])
def test_nearest_takes_the_voxel_that_a_centre_lies_in(target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).normal(size=(1, 7, 11)).astype(np.float32)
    at = [np.floor((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip((7, 11), target, strict=True)]
    assert np.array_equal(resample(image, target, (NEAREST,) * 2)[0], image[0][np.ix_(*at)])


@pytest.mark.parametrize("kernel", [CUBIC, SPLINES, Kernel(1), PLAIN, NEAREST])
@pytest.mark.parametrize(("size", "target"), [(30, 17), (30, 71), (1, 4), (4, 1), (9, 9)])
def test_what_is_constant_stays_and_both_ends_are_alike(kernel: Kernel, size: int, target: int) -> None:
    taps = Taps.of(size, target, kernel=kernel)
    matrix = torch.zeros(target, size).scatter_add(1, taps.index, taps.share).numpy()
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    if kernel != NEAREST:  # which takes the later of two alike
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)
    if size == target:
        np.testing.assert_allclose(matrix, np.eye(size), atol=1e-6)


def test_stripes_finer_than_the_new_grid_do_not_alias() -> None:
    stripes = np.tile([0.0, 1.0], 40).astype(np.float32)[None, None] * np.ones((1, 4, 1), np.float32)
    there = resample(stripes, (4, 30), (CUBIC,) * 2)[0, :, 2:-2]
    aliased = resample(stripes, (4, 30), (SPLINES,) * 2)[0, :, 2:-2]
    assert there.std() < 0.03 < 0.3 < aliased.std()


@pytest.mark.parametrize("kernels", [(CUBIC,) * 3, (NEAREST, SPLINES, SPLINES), (Kernel(1), CUBIC, CUBIC)])
@pytest.mark.parametrize("target", [(20, 9, 31), (5, 22, 8), (11, 14, 19), (3, 14, 9)])
def test_read_plane_by_plane_it_is_the_same_bit_for_bit(
    kernels: tuple[Kernel, ...], target: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).normal(size=(2, 11, 14, 19)).astype(np.float32)
    whole = resample(image, target, kernels)
    monkeypatch.setattr(regrid, "PIECE_BYTES", 4 * 14 * 19)
    moved = Resampled(image, target, kernels=kernels)
    parts = [moved[:, z : min(z + 3, target[0])].numpy() for z in range(0, target[0], 3)]
    assert np.array_equal(np.concatenate(parts, 1), whole)
    assert np.array_equal(moved[:, 2:3].numpy(), whole[:, 2:3])


def test_labels_across_a_coarse_axis_come_from_the_nearest_plane() -> None:
    label = np.random.default_rng(0).integers(-1, 4, (5, 12, 13)).astype(np.int8)
    kernels = kernels_for("nnunet", (5.0, 1.0, 1.0), (1.7, 0.8, 1.3), labels=True)
    found = resample_labels(label, (15, 15, 10), kernels)
    planes = np.stack([resample_labels(plane, (15, 10), kernels[1:]) for plane in label])
    assert np.array_equal(found, planes.repeat(3, 0))
    assert found.dtype == np.int8


def test_labels_come_out_the_same_however_many_planes_go_in(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.random.default_rng(0).integers(-1, 4, (23, 12, 13)).astype(np.int16)
    for target in ((9, 15, 10), (40, 12, 6), (23, 7, 30), (2, 3, 4)):
        whole = resample_labels(label, target)
        with monkeypatch.context() as patched:
            patched.setattr("densepred.cases.relabel.PIECE_BYTES", 4 * 15 * 30)
            assert np.array_equal(resample_labels(label, target), whole)


def test_the_rule_for_coarse_axes() -> None:
    assert kernels_for("linear", (9, 1, 1), (1, 1, 1)) == (Kernel(),) * 3
    assert kernels_for("cubic", (3, 1, 1), (3, 1, 1)) == (CUBIC,) * 3
    assert kernels_for("cubic", (1, 1, 3.1), (1, 1, 1)) == (CUBIC, CUBIC, Kernel())
    assert kernels_for("nnunet", (1, 1, 1), (1, 4, 1)) == (SPLINES, NEAREST, SPLINES)
    assert kernels_for("nnunet", (1, 4, 4), (1, 1, 9)) == (SPLINES,) * 3
    assert kernels_for("nnunet", (1, 4, 1), (1, 1, 9), labels=True) == (PLAIN, NEAREST, PLAIN)
    assert kernels_for("nnunet", (5, 1), (1, 1)) == (SPLINES,) * 2


SPACINGS = [
    ((1.5, 0.7, 0.7), (1.0, 1.0, 1.0)),
    ((5.0, 0.7, 0.8), (4.0, 1.0, 1.0)),
    ((1.0, 4.0, 1.2), (1.0, 2.0, 1.0)),
    ((1.0, 1.0, 1.0), (0.9, 1.1, 3.6)),
]


@pytest.mark.parametrize(("spacing", "target"), SPACINGS)
@pytest.mark.parametrize("labels", [False, True])
def test_nnunet_is_nnunets_own(spacing: tuple[float, ...], target: tuple[float, ...], labels: bool) -> None:
    """Images to rounding, clipped as theirs are; labels but for ties."""
    pytest.importorskip("skimage")
    peer: Any = pytest.importorskip("nnunetv2.preprocessing.resampling.default_resampling")
    generator = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(generator.normal(size=(2, 12, 14, 17)), (0, 1, 1, 1)).astype(np.float32)
    shape = resampled_shape(smooth.shape[1:], spacing, target)
    kernels = kernels_for("nnunet", spacing, target, labels)
    settings = {"is_seg": labels, "order": 1 if labels else 3, "order_z": 0, "force_separate_z": None}
    if labels:
        label = np.digitize(smooth[0], np.quantile(smooth[0], [0.5, 0.8])).astype(np.int16)
        theirs = peer.resample_data_or_seg_to_shape(label[None], shape, spacing, target, **settings)[0]
        assert (resample_labels(label, shape, kernels) == theirs).mean() > 0.995
        return
    theirs = peer.resample_data_or_seg_to_shape(smooth, shape, spacing, target, **settings)
    ours = resample(smooth, shape, kernels)
    inside = np.abs(theirs - ours) < 1e-4
    apart = [axis for axis, kernel in enumerate(kernels) if kernel == NEAREST]
    axes = tuple(axis + 1 for axis in range(3) if axis not in apart)
    for channel, seen in enumerate(theirs):  # what is otherwise was clipped, in each plane or the whole
        ends = np.concatenate([edge(smooth[channel : channel + 1], axes).reshape(-1) for edge in (np.min, np.max)])
        assert np.isin(seen[~inside[channel]].astype(np.float32), ends).all()
    assert inside.mean() > 0.99


def test_nnunets_rule_for_every_pair_of_spacings() -> None:
    peer: Any = pytest.importorskip("nnunetv2.preprocessing.resampling.default_resampling")
    sizes = [np.array(one) for one in itertools.product((1.0, 2.5, 3.5, 9.0), repeat=3)]
    for spacing, target in itertools.product(sizes, sizes[::3]):
        apart, axis = peer.determine_do_sep_z_and_axis(None, spacing, target)
        kernels = kernels_for("nnunet", spacing.tolist(), target.tolist())
        assert [k == NEAREST for k in kernels] == [bool(apart and axis == number) for number in range(3)]
