"""Surface distances against MONAI's, brute force and boxes with a known answer; panoptic quality against MONAI's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_panoptic_quality,
    compute_surface_dice,
)
from scipy import ndimage

from densepred.metrics import Panoptic, components, panoptic, surface_distances


def blobs(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two smooth masks that overlap."""
    rng = np.random.default_rng(seed)
    ground = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    other = ground + 0.5 * ground.std() * ndimage.gaussian_filter(rng.normal(size=shape), 1) / 0.2
    return ground > ground.mean(), other > other.mean()


def hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask)[None, None].float()


@pytest.mark.parametrize(("shape", "spacing"), [((17, 20, 15), (2.5, 0.7, 1.1)), ((31, 28), (0.5, 3.0))])
def test_equal_to_monais(shape: tuple[int, ...], spacing: tuple[float, ...]):
    truth, prediction = blobs(0, shape)
    truth[0] = prediction[0] = True  # objects that touch the border of the image
    found = surface_distances(truth, prediction, spacing)
    pair, options = (hot(prediction), hot(truth)), {"include_background": True, "spacing": spacing}
    for percentile in (100.0, 95.0, 50.0):
        theirs = compute_hausdorff_distance(*pair, percentile=percentile, **options).item()
        assert found.hausdorff(percentile) == pytest.approx(theirs, rel=1e-5)
    theirs = compute_average_surface_distance(*pair, symmetric=True, **options).item()
    assert found.average() == pytest.approx(theirs, rel=1e-5)
    for tolerance in (0.0, 0.9, 2.1):
        theirs = compute_surface_dice(*pair, class_thresholds=[tolerance], **options).item()
        assert found.surface_dice(tolerance) == pytest.approx(theirs, rel=1e-6)


def surface(mask: np.ndarray, known: np.ndarray) -> list[tuple[int, ...]]:
    """The voxels with a known neighbour outside, one by one."""
    points = []
    for at in map(tuple, np.argwhere(mask & known)):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                beside = tuple(index + step * (other == axis) for other, index in enumerate(at))
                inside = all(0 <= index < size for index, size in zip(beside, mask.shape, strict=True))
                if not inside or (known[beside] and not mask[beside]):
                    points.append(at)
    return sorted(set(points))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_equal_to_every_pair_by_hand(share: float):
    truth, prediction = blobs(1, (9, 8, 7))
    known = np.random.default_rng(2).random(truth.shape) >= share
    spacing = np.array([1.0, 2.0, 0.5])
    points = [np.array(surface(mask, known)) * spacing for mask in (truth, prediction)]
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    found = surface_distances(truth, prediction, tuple(spacing), known)
    np.testing.assert_allclose(np.sort(found.to_prediction), np.sort(apart.min(1)))
    np.testing.assert_allclose(np.sort(found.to_truth), np.sort(apart.min(0)))
    assert found.average() == pytest.approx(np.concatenate([apart.min(0), apart.min(1)]).mean())


def test_a_moved_box_has_a_known_distance():
    """Of a box moved by 3 voxels of 0.7 along an axis, its two faces across that axis are off by 2.1."""
    truth = np.zeros((30, 40, 40), bool)
    truth[5:25, 10:30, 10:30] = True
    found = surface_distances(truth, np.roll(truth, 3, 0), (0.7, 1.0, 1.0))
    assert found.hausdorff() == pytest.approx(2.1)
    assert found.hausdorff(95) == pytest.approx(2.1)  # faces are a sixth of a cube's surface
    assert found.surface_dice(2.1) == 1
    assert found.surface_dice(2.09) < 1
    same = surface_distances(truth, truth)
    assert (same.hausdorff(), same.average(), same.surface_dice(0.0)) == (0, 0, 1)


def test_the_surface_against_what_is_not_known_is_none():
    """Half of a bar is not known: predictions may end anywhere there."""
    truth = np.zeros((5, 20), bool)
    truth[1:4, 3:] = True
    known = np.ones_like(truth)
    known[:, 12:] = False
    for end in (12, 15, 20):
        prediction = truth.copy()
        prediction[:, end:] = False
        assert surface_distances(truth, prediction, known=known).hausdorff() == 0
    assert surface_distances(truth, truth & (np.arange(20) < 12)).hausdorff() == 8


def test_without_a_surface_there_is_no_distance():
    some, none = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    some[1:3, 1:3] = True
    for pair in ((some, none), (none, some)):
        found = surface_distances(*pair)
        assert math.isnan(found.hausdorff())
        assert math.isnan(found.average())
        assert found.surface_dice(100.0) == 0
        assert found.within(1.0) == (0, 4)
    nothing = surface_distances(none, none)
    assert math.isnan(nothing.hausdorff())
    assert math.isnan(nothing.surface_dice(1.0))


def test_images_add_up_and_shapes_must_fit():
    pairs = [blobs(seed, (12, 11)) for seed in (3, 4)]
    one, other = (surface_distances(*pair) for pair in pairs)
    both = one + other
    near = [found.within(1.0) for found in (one, other)]
    assert both.within(1.0) == (near[0][0] + near[1][0], near[0][1] + near[1][1])
    assert both.hausdorff() == max(one.hausdorff(), other.hausdorff())
    with pytest.raises(ValueError, match=r"must fit, got \(12, 11\), \(11, 11\) and 2 spacings"):
        surface_distances(pairs[0][0], pairs[0][0][1:])
    with pytest.raises(ValueError, match="and 3 spacings"):
        surface_distances(*pairs[0], spacing=(1, 1, 1))
    with pytest.raises(ValueError, match=r"known must be \(12, 11\)"):
        surface_distances(*pairs[0], known=np.ones((2, 2), bool))


def test_panoptic_quality_equals_monais():
    truth = ndimage.label(np.random.default_rng(0).random((60, 60)) > 0.6)[0]
    prediction = ndimage.label(truth > 3)[0]
    prediction[20:30] = np.roll(prediction[20:30], 1, 1)
    prediction[prediction == 5] = 0
    found = panoptic(truth, prediction)
    assert min(found.matched, found.missed, found.invented) > 0
    pair = [torch.from_numpy(one.astype(np.int64)) for one in (prediction, truth)]
    for name, ours in (("pq", found.quality), ("sq", found.segmentation), ("rq", found.recognition)):
        theirs = compute_panoptic_quality(*pair, metric_name=name, match_iou_threshold=0.5, smooth_numerator=0)
        assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_panoptic_quality_by_hand():
    truth = np.array([1, 1, 1, 1, 0, 2, 2, 0, 3, 3])
    prediction = np.array([9, 9, 9, 0, 0, 4, 0, 4, 5, 5])
    assert panoptic(truth, prediction) == Panoptic(matched=2, missed=1, invented=1, overlap=0.75 + 1)
    assert panoptic(truth, truth) == Panoptic(3, 0, 0, 3.0)
    half = panoptic(np.array([1, 1]), np.array([1, 0]))  # an intersection over union of exactly 1/2 is no match
    assert half == Panoptic(0, 1, 1, 0.0)
    assert half.quality == half.recognition == 0
    assert math.isnan(half.segmentation)
    assert math.isnan(Panoptic().quality)


def test_predictions_mostly_where_nothing_is_known_are_not_held_against():
    truth = np.array([1, 1, 0, 0, 0, 0, 0, 0])
    prediction = np.array([1, 1, 0, 2, 2, 2, 0, 3])
    known = np.array([1, 1, 1, 1, 0, 0, 1, 1], bool)
    assert panoptic(truth, prediction, known) == Panoptic(1, 0, 1, 1.0)  # 3 is invented, 2 lies outside by two thirds
    assert panoptic(truth, prediction) == Panoptic(1, 0, 2, 1.0)
    with pytest.raises(ValueError, match="must have one shape"):
        panoptic(truth, prediction[1:])


def test_parts_are_connected_over_corners_or_faces():
    mask = np.eye(4, dtype=bool)
    assert components(mask).max() == 1
    assert components(mask, corners=False).max() == 4
