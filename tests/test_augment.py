"""Augmentation: geometry against SciPy, independence of the batch, and sane statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from densepred.augment.volume import Augmenter, Draw, rotation
from densepred.config import AugmentConfig, RandomConfig

NEVER = RandomConfig(probability=0.0, range=(1.0, 1.0))
NOTHING = AugmentConfig(
    flip=(), rotation=NEVER, scaling=NEVER, noise=NEVER, brightness=NEVER, contrast=NEVER, gamma=NEVER
)


def always(low: float, high: float) -> RandomConfig:
    return RandomConfig(probability=1.0, range=(low, high))


def sample(dims: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (11, 9, 14)[:dims]
    image = torch.randn(batch, 2, *shape, generator=generator)
    return image, (image[:, 0] > 0.3).long() + (image[:, 1] > 1).long()


@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_happens_where_nothing_is_asked(dims):
    image, label = sample(dims)
    out = Augmenter(NOTHING, 3)(image, label, range(4))
    assert torch.equal(out[0], image)
    assert torch.equal(out[1], label)


@pytest.mark.parametrize("dims", [2, 3])
def test_batched_equals_one_by_one_and_input_is_untouched(dims):
    image, label = sample(dims)
    kept = image.clone(), label.clone()
    augment = Augmenter(AugmentConfig(rotation=always(-30, 30), noise=always(0.1, 0.2), gamma=always(0.7, 1.5)), 3)
    seeds = [5, 6, 7, 8]
    together = augment(image, label, seeds)
    for i in range(4):
        alone = augment(image[i : i + 1], label[i : i + 1], seeds[i : i + 1])
        torch.testing.assert_close(together[0][i], alone[0][0], rtol=0, atol=1e-5)
        assert (together[1][i] == alone[1][0]).float().mean() > 0.999
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
    assert not torch.equal(together[0], image)


@pytest.mark.parametrize("spacing", [None, (2.0, 1.0, 0.5)])
@pytest.mark.parametrize("dims", [2, 3])
def test_rotation_and_zoom_equal_scipys_affine_transform(dims, spacing):
    image, label = sample(dims, 1)
    shape = image.shape[2:]
    spacing = spacing and spacing[:dims]
    augment = Augmenter(AugmentConfig(), 3, spacing)
    draw = Draw((), tuple(math.radians(a) for a in (20, -35, 12)), 1.2, None, None, None, None)
    warped, labels = augment._warp(image, label, [draw])
    step = np.array(spacing or (1.0,) * dims)
    matrix = np.diag(1 / step) @ rotation(draw.angles, dims).numpy() / draw.zoom @ np.diag(step)
    centre = (np.array(shape) - 1) / 2
    for channel in range(2):
        expected = scipy.ndimage.affine_transform(
            image[0, channel].double().numpy(), matrix, centre - matrix @ centre, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(warped[0, channel].numpy(), expected, atol=1e-4)
    shares = np.stack(
        [
            scipy.ndimage.affine_transform(
                (label[0] == k).double().numpy(), matrix, centre - matrix @ centre, order=1, mode="grid-constant"
            )
            for k in range(3)
        ]
    )
    clear = np.abs(shares.sum(0) - 0.5) > 1e-3
    top = np.sort(shares, 0)
    clear &= (top[-1] - top[-2]) > 1e-3
    expected_labels = np.where(shares.sum(0) < 0.5, -1, shares.argmax(0))
    assert (labels[0].numpy() == expected_labels)[clear].all()
    assert (expected_labels == -1).any()


def test_rotations_are_rigid():
    matrix = rotation((0.3, -0.5, 1.1), 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.det(matrix).item() == pytest.approx(1)


def test_flips_move_image_and_label_together():
    image, label = sample(3, 64)
    marked = torch.cat([image, label.unsqueeze(1).float()], 1)
    config = NOTHING.model_copy(update={"flip": (0, 2)})
    out, out_label = Augmenter(config, 3)(marked, label, range(64))
    assert torch.equal(out[:, 2].long(), out_label)
    kinds = {
        flips
        for i in range(64)
        for flips in [(), (0,), (2,), (0, 2), (1,)]
        if torch.equal(out[i], marked[i].flip([f + 1 for f in flips]))
    }
    assert kinds == {(), (0,), (2,), (0, 2)}


def test_noise_has_the_stated_deviation():
    image = torch.zeros(1, 1, 40, 40, 40)
    out, _ = Augmenter(NOTHING.model_copy(update={"noise": always(0.2, 0.2)}), 2)(image, image[:, 0].long(), [1])
    assert out.std().item() == pytest.approx(0.2, rel=0.02)
    assert out.mean().item() == pytest.approx(0, abs=0.005)


def test_gamma_keeps_mean_and_deviation_and_order():
    image, label = sample(3, 1)
    out, _ = Augmenter(NOTHING.model_copy(update={"gamma": always(1.4, 1.4)}), 3)(image, label, [1])
    for channel in range(2):
        torch.testing.assert_close(out[0, channel].mean(), image[0, channel].mean(), atol=1e-4, rtol=0)
        torch.testing.assert_close(out[0, channel].std(), image[0, channel].std(), atol=1e-4, rtol=0)
        assert torch.equal(out[0, channel].flatten().argsort(), image[0, channel].flatten().argsort())
    assert not torch.allclose(out, image, atol=1e-2)


def test_how_often_and_how_far():
    config = AugmentConfig(scaling=RandomConfig(probability=0.2, range=(0.7, 1.4)))
    augment = Augmenter(config, 2)
    draws = [augment.draw(torch.Generator().manual_seed(seed), 3) for seed in range(4000)]
    zooms = [draw.zoom for draw in draws if draw.zoom is not None]
    assert len(zooms) / 4000 == pytest.approx(0.2, abs=0.03)
    assert 0.7 <= min(zooms) < 0.75
    assert 1.35 < max(zooms) <= 1.4
    assert np.mean(np.array(zooms) < 1) == pytest.approx(0.5, abs=0.06)


def test_ignored_stays_ignored_through_a_warp():
    image, label = sample(3, 1)
    label[:] = -1
    _, out = Augmenter(NOTHING.model_copy(update={"rotation": always(10, 20)}), 3)(image, label, [1])
    assert (out == -1).all()


def test_flags_are_moved_and_keep_their_values():
    flags = (torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    image = torch.cat([torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(1)), flags], 1)
    strong = {"noise": always(0.5, 0.6), "brightness": always(1.2, 1.3), "contrast": always(1.2, 1.3)}
    config = NOTHING.model_copy(update={**strong, "gamma": always(1.4, 1.5), "flip": (0, 1)})
    out, _ = Augmenter(config, 2, flags=[1])(image, image[:, 0].long(), range(8))
    plain, _ = Augmenter(config.model_copy(update={"flip": ()}), 2)(image, image[:, 0].long(), range(8))
    assert set(out[:, 1].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(out[:, 1].sum((1, 2)), flags[:, 0].sum((1, 2)))
    assert not torch.equal(out[:, 1], flags[:, 0])
    assert len(plain[:, 1].unique()) > 2, "without being named they would change"
