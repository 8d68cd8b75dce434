"""Geometry against SciPy's, label by label, and what makes it a geometry at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
import torch

from densepred.augment.draws import numbers_of
from densepred.augment.geometry import Move, bspline, draw_move, rotation
from densepred.augment.resample import Warp, resample
from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig
from tests.test_augment import recipe, sample

WARPS = ("rotation", "scaling", "shear", "shift", "crop")


def move_of(augment: Augmenter, seed: int, image: torch.Tensor) -> Move:
    dims = image.ndim - 2
    numbers = numbers_of(seed, len(augment.transforms), image.shape[1])
    spacing = augment.spacing or (1.0,) * dims
    return draw_move(zip(augment.transforms, numbers, strict=True), image.shape[2:], spacing)


def expected_matrix(move: Move, spacing: tuple[float, ...]) -> np.ndarray:
    """The map of voxels from that of world coordinates, written down once more."""
    step = np.diag(spacing)
    return np.linalg.inv(step) @ move.matrix.numpy() @ step


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 0.5)])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("names", [[n] for n in WARPS] + [list(WARPS)])
def test_warps_equal_scipys_affine_transform(dims, spacing, names):
    image, label = sample(dims, 1)
    spacing = spacing[-dims:]
    augment = Augmenter(recipe(*names, {"scaling": {"per_axis": True}}), 3, spacing)
    move = move_of(augment, 4, image)
    warped, labels = augment(image, label, [4])
    matrix = expected_matrix(move, spacing)
    centre = (np.array(image.shape[2:]) - 1) / 2
    offset = centre - matrix @ centre + move.shift.numpy()

    def scipys(values: torch.Tensor) -> np.ndarray:
        return scipy.ndimage.affine_transform(values.double().numpy(), matrix, offset, order=1, mode="grid-constant")

    for channel in range(2):
        np.testing.assert_allclose(warped[0, channel].numpy(), scipys(image[0, channel]), atol=1e-4)
    shares = np.stack([scipys(label[0] == k) for k in range(3)])
    top = np.sort(shares, 0)
    known = shares.sum(0)
    clear = (np.abs(known - 0.5) > 1e-3) & ((top[-1] - top[-2] > 1e-3) | (known < 0.5))
    expected = np.where(shares.sum(0) < 0.5, -1, shares.argmax(0))
    assert clear.mean() > 0.9
    assert (labels[0].numpy() == expected)[clear].all()


@pytest.mark.parametrize("dims", [2, 3])
def test_bending_equals_scipys_map_coordinates_of_scipys_spline(dims):
    image, label = sample(dims, 1)
    spacing = (2.0, 1.0, 1.0)[-dims:]
    augment = Augmenter(recipe("rotation", {"elastic": {"nodes": 5, "range": [0.3, 0.3]}}), 3, spacing)
    move = move_of(augment, 8, image)
    assert move.nodes is not None
    shape, matrix = image.shape[2:], expected_matrix(move, spacing)
    bend = move.nodes.numpy()
    for axis, (size, apart) in enumerate(zip(shape, move.apart, strict=True)):
        count = bend.shape[axis + 1]
        knots = np.arange(-3.0, count + 1)  # node 1 is at 0
        basis = scipy.interpolate.BSpline(knots, np.eye(count), 3)
        at = basis(np.arange(size) / apart)
        np.testing.assert_allclose(bspline(size, apart).numpy(), at, atol=1e-6)
        bend = np.moveaxis(np.tensordot(at, np.moveaxis(bend, axis + 1, 0), 1), 0, axis + 1)
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij")).astype(float)
    centre = ((np.array(shape) - 1) / 2).reshape(-1, *[1] * dims)
    where = np.tensordot(matrix, grid + bend - centre, 1) + centre
    warped, _ = augment(image, label, [8])
    for channel in range(2):
        expected = scipy.ndimage.map_coordinates(
            image[0, channel].double().numpy(), where, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(warped[0, channel].numpy(), expected, atol=2e-4)


def test_bending_never_folds():
    for seed in range(20):
        augment = Augmenter(recipe({"elastic": {"nodes": 4, "range": [0.4, 0.4]}}), 2)
        image = torch.zeros(1, 1, 24, 24, 24)
        move = move_of(augment, seed, image)
        matrix, _ = move.voxels((24,) * 3, (1.0,) * 3)
        bend = move.bend(matrix, (24,) * 3, torch.device("cpu"))
        gradient = torch.stack(torch.gradient(bend.double(), dim=(1, 2, 3)))  # (by, of, ...)
        jacobian = torch.linalg.det(gradient.permute(2, 3, 4, 0, 1) + torch.eye(3))
        assert jacobian.min() > 0
        assert jacobian.std() > 0.1


def test_rotations_are_rigid_and_shears_keep_volumes():
    matrix = rotation((0.3, -0.5, 1.1), 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(matrix).item() == pytest.approx(1)
    image, _ = sample(3, 1)
    assert torch.linalg.det(move_of(Augmenter(recipe("shear"), 2), 3, image).matrix).item() == pytest.approx(1)


def test_each_transform_does_what_its_name_says():
    image = torch.zeros(1, 1, 41, 41)
    image[0, 0, 20, 28] = 1  # 8 to the right of the centre
    label = image[:, 0].long()

    def peak(**entry: dict) -> tuple[int, int]:
        out, _ = Augmenter(recipe(entry), 2)(image, label, [1])
        return divmod(int(out[0, 0].argmax()), 41)

    assert peak(rotation={"range": [90, 90]}) in [(12, 20), (28, 20)]
    assert peak(scaling={"range": [1.5, 1.5]}) == (20, 32)
    assert peak(shift={"range": [0.1, 0.1]}) in [(24, 32)]
    row, column = peak(crop={"range": [0.999, 1]})
    assert (row, column) == (20, 28)


def test_a_crop_enlarges_and_lies_within_the_patch():
    image, label = torch.ones(8, 1, 16, 16), torch.ones(8, 16, 16).long()
    out, out_label = Augmenter(recipe({"crop": {"range": [0.5, 0.7]}}), 2)(image, label, range(8))
    assert torch.equal(out_label, label), "nothing comes from outside"
    torch.testing.assert_close(out, image)


def test_flips_move_image_and_label_together():
    image, label = sample(3, 64)
    marked = torch.cat([image, label.unsqueeze(1).float()], 1)
    out, out_label = Augmenter(AugmentConfig.model_validate([{"flip": [0, 2]}]), 3)(marked, label, range(64))
    assert torch.equal(out[:, 2].long(), out_label)
    kinds = {
        flips
        for i in range(64)
        for flips in [(), (0,), (2,), (0, 2), (1,)]
        if torch.equal(out[i], marked[i].flip([f + 1 for f in flips]))
    }
    assert kinds == {(), (0,), (2,), (0, 2)}


def test_a_flip_within_a_warp_is_the_flip_before_it():
    image, label = sample(3, 6)
    both = Augmenter(recipe("flip", "rotation", "elastic"), 3, (2.0, 1.0, 1.0))
    warp = Augmenter(recipe({"flip": {"axes": []}}, "rotation", "elastic"), 3, (2.0, 1.0, 1.0))
    got = both(image, label, range(6))
    expected = warp(image.flip(2, 3, 4), label.flip(1, 2, 3), range(6))
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=0)
    assert (got[1] == expected[1]).float().mean() > 0.998


def test_quarter_turns_are_exact_and_leave_unlike_axes_in_place():
    image, label = sample(2, 40)
    out, out_label = Augmenter(recipe("quarter_turns"), 3)(image, label, range(40))
    turns = [[k for k in range(4) if torch.equal(out[i], image[i].rot90(k, (1, 2)))] for i in range(40)]
    assert {k for found in turns for k in found} == {1, 2, 3}
    assert all(torch.equal(out_label[i], label[i].rot90(turns[i][0])) for i in range(40))
    out, _ = Augmenter(recipe("quarter_turns"), 3, (2.0, 1.0))(image, label, range(40))
    assert torch.equal(out, image.rot90(2, (2, 3)))


def test_thin_patches_keep_to_their_planes():
    image = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 1, 6, 30, 30).contiguous()
    label = image[:, 0].long()
    names = ("rotation", "scaling", "shear", "elastic", "low_resolution")
    entries = [{"rotation": {"range": "auto"}}, *names[1:]]
    out, _ = Augmenter(recipe("dummy_2d", *entries), 6)(image, label, [2])
    inner = out[0, 0, :, 12:18, 12:18]
    torch.testing.assert_close(inner, torch.arange(6.0).view(6, 1, 1).expand(6, 6, 6))
    free, _ = Augmenter(recipe(*entries), 6)(image, label, [2])
    assert not torch.allclose(free[0, 0, :, 12:18, 12:18], inner, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "thin", "furthest"),
    [
        ((8, 8, 8), True, 30),
        ((4, 16, 16), True, 180),
        ((4, 16, 16), False, 30),
        ((16, 16), False, 180),
        ((8, 16), True, 15),
    ],
)
def test_automatic_angles_are_nnunets(shape, thin, furthest):
    entries = (["dummy_2d"] if thin else []) + [{"rotation": {"range": "auto"}}]
    transforms = recipe(*entries).transforms
    angles = []
    for seed in range(300):
        numbers = numbers_of(seed, len(transforms), 1)
        matrix = draw_move(zip(transforms, numbers, strict=True), shape, (1.0,) * len(shape)).matrix
        about_0 = math.atan2(matrix[-1, -2], matrix[-1, -1])
        angles.append(abs(math.degrees(about_0 if furthest != 30 else math.asin(matrix[0, 2]))))
    assert 0.95 * furthest < max(angles) <= furthest + 1e-6


@pytest.mark.parametrize("classes", [2, 4, 5, 40, 300])
@pytest.mark.parametrize("dims", [2, 3])
def test_labels_are_of_the_largest_share_however_many_there_are(classes, dims):
    generator = torch.Generator().manual_seed(classes)
    label = torch.randint(-1, classes, (2, *(7, 8, 9)[-dims:]), generator=generator)
    matrix = (torch.eye(dims) + 0.2 * torch.randn(2, dims, dims, generator=generator)).double()
    offset = torch.randn(2, dims, generator=generator).double()
    image = torch.zeros(2, 1, *label.shape[1:])
    _, got = resample(image, label, Warp(matrix, offset, [None, None]), classes)
    for i in range(2):
        shares = np.stack(
            [
                scipy.ndimage.affine_transform(
                    (label[i] == k).double().numpy(), matrix[i], offset[i].numpy(), order=1, mode="grid-constant"
                )
                for k in range(classes)
            ]
        )
        top = np.sort(shares, 0)
        known = shares.sum(0)
        clear = (np.abs(known - 0.5) > 1e-4) & ((top[-1] - top[-2] > 1e-4) | (known < 0.5))
        expected = np.where(shares.sum(0) < 0.5, -1, shares.argmax(0))
        assert (got[i].numpy() == expected)[clear].all()
        assert clear.mean() > 0.5


def test_maps_are_interpolated_and_unknown_outside():
    image, label = sample(3, 2)
    augment = Augmenter(recipe({"rotation": {"range": [20, 30]}}), 3)
    moved, _ = augment(image, label, [1, 2])
    _, maps = augment(image, image, [1, 2])
    known = maps.isfinite()
    assert 0.3 < known.float().mean() < 0.95
    torch.testing.assert_close(maps[known], moved[known])


def test_a_shift_moves_what_was_turned_before():
    """A quarter turn, then a tenth of each side; a point beside the middle shows both."""
    image = torch.zeros(1, 1, 41, 61)
    image[0, 0, 20, 40] = 1  # ten voxels from the middle along the longer side
    turns = recipe({"rotation": {"range": [90, 90]}}, {"shift": {"range": [0.1, 0.1]}})
    turned, _ = Augmenter(recipe({"rotation": {"range": [90, 90]}}), 2)(image, image[:, 0].long(), [1])
    both, _ = Augmenter(turns, 2)(image, image[:, 0].long(), [1])
    before, after = (np.unravel_index(int(one.argmax()), (41, 61)) for one in (turned, both))
    assert np.subtract(after, before).tolist() == [4, 6]
