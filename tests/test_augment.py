"""Augmentation: independence of the batch, what each change of intensities does, labels and flags."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F

from densepred.augment.draws import numbers_of
from densepred.augment.geometry import draw_move
from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig
from densepred.config.transforms import RECIPES, TRANSFORMS

ALONE = [name for name in TRANSFORMS if name not in ("cutmix", "mixup", "albumentations", "dummy_2d")]
"""Transforms of which each looks at one sample only."""


def recipe(*entries: dict | str) -> AugmentConfig:
    """A list of transforms that always happen."""
    named = [{entry: {}} if isinstance(entry, str) else entry for entry in entries]
    always = [{name: {"probability": 1.0} | settings} for entry in named for name, settings in entry.items()]
    return AugmentConfig.model_validate(always)


def sample(dims: int, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (11, 13, 13)[-dims:]
    image = torch.randn(batch, 2, *shape, generator=generator)
    return image, (image[:, 0] > 0.3).long() + (image[:, 1] > 1).long()


@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_happens_where_nothing_is_asked(dims):
    image, label = sample(dims)
    out = Augmenter(AugmentConfig.model_validate("none"), 3)(image, label, range(4))
    assert torch.equal(out[0], image)
    assert torch.equal(out[1], label)
    assert out[0].data_ptr() != image.data_ptr()


@pytest.mark.parametrize("name", [*ALONE, *RECIPES])
@pytest.mark.parametrize("dims", [2, 3])
def test_batched_equals_one_by_one_and_input_is_untouched(name, dims):
    image, label = sample(dims)
    kept = image.clone(), label.clone()
    augment = Augmenter(
        recipe(name) if name in ALONE else AugmentConfig.model_validate(name), 3, (2.0, 1.0, 1.0)[-dims:]
    )
    seeds = [5, 6, 7, 8]
    together = augment(image, label, seeds)
    for order in ([0], [1], [2], [3], [3, 1]):
        alone = augment(image[order], label[order], [seeds[i] for i in order])
        assert torch.equal(together[0][order], alone[0])
        assert torch.equal(together[1][order], alone[1])
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
    assert name in ("none",) or not torch.equal(together[0], image)


@pytest.mark.parametrize("name", [*ALONE, "nnunet", "microscopy"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_batch_at_once_as_on_a_gpu_gives_the_same(name, dims, monkeypatch):
    image, label = sample(dims)
    config = recipe(name) if name in ALONE else AugmentConfig.model_validate(name)
    augment = Augmenter(config, 3, (2.0, 1.0, 1.0)[-dims:], flags=[1])
    in_pieces = augment(image, label, range(4))
    for module in ("resample", "intensity"):
        monkeypatch.setattr(f"densepred.augment.{module}.at_once", lambda device: True)
    whole = augment(image, label, range(4))
    torch.testing.assert_close(whole[0], in_pieces[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(whole[1], in_pieces[1])


@pytest.mark.parametrize("name", [name for name in ALONE if name != "quarter_turns"])
def test_every_transform_changes_2d_and_3d_as_it_should(name):
    for dims in (2, 3):
        image, label = sample(dims)
        out, out_label = Augmenter(recipe(name), 3)(image, label, range(4))
        assert out.isfinite().all()
        moves = name in ("flip", "rotation", "scaling", "shear", "shift", "crop", "elastic")
        assert torch.equal(out_label, label) != moves
        assert out_label.dtype == label.dtype
        assert all(not torch.equal(out[i], image[i]) for i in range(4) if name != "flip")


def test_what_one_transform_draws_does_not_move_the_others():
    image, label = sample(3)
    both = Augmenter(recipe({"brightness": {"range": [0.9, 0.9]}}, {"noise": {"range": [0.2, 0.2]}}), 3)
    one = Augmenter(recipe({"brightness": {"range": [1, 1]}}, {"noise": {"range": [0.2, 0.2]}}), 3)
    added = both(image, label, range(4))[0] - 0.9 * image
    torch.testing.assert_close(added, one(image, label, range(4))[0] - image, atol=1e-5, rtol=0)


def test_noise_has_the_stated_deviation_or_variance():
    image = torch.zeros(1, 1, 40, 40, 40)
    for settings, deviation in (({"range": [0.2, 0.2]}, 0.2), ({"range": [0.09, 0.09], "of": "variance"}, 0.3)):
        out, _ = Augmenter(recipe({"noise": settings}), 2)(image, image[:, 0].long(), [1])
        assert out.std().item() == pytest.approx(deviation, rel=0.02)
        assert out.mean().item() == pytest.approx(0, abs=0.005)


def test_rician_noise_has_the_moments_of_rices_distribution():
    image = torch.full((1, 1, 60, 60, 60), 1.5)
    image[0, 0, 0, 0, 0] = 0  # where the signal is nothing
    out, _ = Augmenter(recipe({"rician_noise": {"range": [0.8, 0.8]}}), 2)(image, image[:, 0].long(), [1])
    expected = scipy.stats.rice(1.5 / 0.8, scale=0.8)
    assert out.mean().item() == pytest.approx(expected.mean(), rel=3e-3)
    assert out.std().item() == pytest.approx(expected.std(), rel=1e-2)


def test_poisson_noise_keeps_the_mean_and_has_the_variance_of_counts():
    image = torch.full((1, 1, 60, 60, 60), 1.0)
    image[..., :30], image[..., 0, 0, 0], image[..., 0, 0, 1] = 0.5, 0.0, 2.0
    out, _ = Augmenter(recipe({"poisson_noise": {"range": [50, 50]}}), 2)(image, image[:, 0].long(), [1])
    for part, value in ((out[..., 1:, :30], 0.5), (out[..., 1:, 30:], 1.0)):  # counts of value / 2 * 50
        assert part.mean().item() == pytest.approx(value, rel=5e-3)
        assert part.var().item() == pytest.approx(value * 2 / 50, rel=2e-2)


@pytest.mark.parametrize("sigma", [0.7, 2.3])
@pytest.mark.parametrize("dims", [2, 3])
def test_blur_equals_scipys(sigma, dims):
    image, label = sample(dims)
    out, _ = Augmenter(recipe({"blur": {"range": [sigma, sigma]}}), 3)(image, label, range(4))
    for i in range(4):
        for c in range(2):
            expected = scipy.ndimage.gaussian_filter(image[i, c].double().numpy(), sigma, mode="nearest")
            np.testing.assert_allclose(out[i, c], expected, atol=2e-6)


@pytest.mark.parametrize("share", [0.5, 0.62, 1.0])
@pytest.mark.parametrize("dims", [2, 3])
def test_low_resolution_equals_torchs_interpolation(share, dims):
    image, label = sample(dims)
    out, _ = Augmenter(recipe({"low_resolution": {"range": [share, share]}}), 3)(image, label, range(4))
    shape = tuple(image.shape[2:])
    small = F.interpolate(image, [round(s * share) for s in shape], mode="nearest-exact")
    expected = F.interpolate(small, shape, mode="trilinear" if dims == 3 else "bilinear", align_corners=False)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma"])
def test_gamma_is_a_power_that_keeps_mean_and_deviation(name):
    image, label = sample(3, 1)
    out, _ = Augmenter(recipe({name: {"range": [1.4, 1.4]}}), 3)(image, label, [1])
    sign = -1 if name == "inverted_gamma" else 1
    for channel in range(2):
        x, y = sign * image[0, channel].double(), sign * out[0, channel].double()
        power = ((x - x.min()) / (x.max() - x.min())) ** 1.4
        expected = (power - power.mean()) / power.std() * x.std() + x.mean()
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_contrast_stays_within_the_range():
    image, label = sample(3)
    out, _ = Augmenter(recipe({"contrast": {"range": [1.5, 1.5]}}), 3)(image, label, range(4))
    for i in range(4):
        for c in range(2):
            x = image[i, c]
            expected = ((x - x.mean()) * 1.5 + x.mean()).clamp(x.min(), x.max())
            torch.testing.assert_close(out[i, c], expected, atol=1e-6, rtol=0)


def test_a_bias_field_is_smooth_and_multiplies_the_signal():
    image = torch.full((1, 1, 24, 24, 24), 3.0)
    image[0, 0, 0, 0, 0] = 1.0
    out, _ = Augmenter(recipe({"bias_field": {"range": [0.4, 0.4], "order": 2}}), 2)(image, image[:, 0].long(), [4])
    field = ((out[0, 0] - 1) / 2).log()[4:, 4:, 4:]
    assert out[0, 0, 0, 0, 0] == 1
    third = field.diff(dim=0).diff(dim=0).diff(dim=0)
    assert third.abs().max() < 1e-5, "a polynomial of degree 2 has no third differences"
    assert field.std() > 0.02


@pytest.mark.parametrize("per_channel", [False, True])
def test_channels_share_a_strength_or_have_their_own(per_channel):
    image = torch.ones(30, 3, 4, 4)
    settings = {"range": [0.5, 1.5], "per_channel": per_channel, "channels": 0.5}
    out, _ = Augmenter(recipe({"brightness": settings}), 2)(image, image[:, 0].long(), range(30))
    values = out[:, :, 0, 0]
    changed = values != 1
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.15)
    several = [row[row != 1].unique().numel() for row in values if (row != 1).sum() > 1]
    assert all((count > 1) == per_channel for count in several)


def test_how_often_and_how_far():
    transforms = AugmentConfig.model_validate([{"scaling": {"probability": 0.2, "range": [0.7, 1.4]}}]).transforms
    moves = [
        draw_move(zip(transforms, numbers_of(seed, 1, 1), strict=True), (8, 8, 8), (1.0, 1.0, 1.0))
        for seed in range(4000)
    ]
    zooms = np.array([1 / move.matrix[0, 0].item() for move in moves if move.warped])
    assert len(zooms) / 4000 == pytest.approx(0.2, abs=0.03)
    assert 0.7 <= min(zooms) < 0.75
    assert 1.35 < max(zooms) <= 1.4
    assert np.mean(zooms < 1) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("dims", [2, 3])
def test_brightness_shift_adds_a_number(dims: int):
    image, label = sample(dims)
    out, _ = Augmenter(recipe({"brightness_shift": {"range": [0.7, 0.7]}}), dims)(image, label, range(4))
    torch.testing.assert_close(out, image + 0.7)


def test_cutout_puts_the_mean_into_a_box():
    image, label = sample(3)
    for ignore in (False, True):
        augment = Augmenter(recipe({"cutout": {"range": [0.3, 0.5], "ignore": ignore}}), 3)
        out, out_label = augment(image, label, range(4))
        changed = (out != image).all(1)
        assert torch.equal(out_label, torch.where(changed, -1, label) if ignore else label)
        for i in range(4):
            places = changed[i].nonzero()
            sides = places.amax(0) - places.amin(0) + 1
            assert sides.prod() == len(places), "a box"
            for side, whole in zip(sides.tolist(), image.shape[2:], strict=True):
                assert round(0.3 * whole) <= side <= round(0.5 * whole)
            expected = image[i].mean((1, 2, 3)).unsqueeze(1)
            torch.testing.assert_close(out[i][:, changed[i]], expected.expand(-1, len(places)), atol=1e-6, rtol=0)


def test_cutmix_takes_image_and_label_from_the_same_place():
    image, label = sample(3, 6)
    marked = torch.cat([image, label.unsqueeze(1).float()], 1)
    out, out_label = Augmenter(recipe("cutmix"), 3)(marked, label, range(6))
    assert torch.equal(out[:, 2].long(), out_label)
    for i in range(6):
        sources = [j for j in range(6) if j != i and (out[i] == marked[j]).any()]
        changed = (out[i] != marked[i]).any(0)
        donors = [j for j in sources if torch.equal(out[i][:, changed], marked[j][:, changed])]
        assert len(donors) == 1
        assert 0 < changed.float().mean() < 0.4
    alone = Augmenter(recipe("cutmix"), 3)(marked[:1], label[:1], [0])
    assert torch.equal(alone[0], marked[:1]), "with no other sample nothing happens"


def test_mixup_blends_intensities_and_float_labels_and_keeps_classes_and_flags():
    image, label = sample(2, 3)
    augment = Augmenter(recipe({"mixup": {"alpha": 0.5}}), 3, flags=[1])
    out, out_label = augment(image, label, range(3))
    assert torch.equal(out_label, label)
    assert torch.equal(out[:, 1], image[:, 1])
    maps = augment(image, image[:, :1], range(3))[1]
    assert torch.equal(maps[:, 0], out[:, 0]), "maps are blended by the same share"
    for i in range(3):
        fits = []
        for j in range(3):
            direction, step = (image[j, 0] - image[i, 0]), (out[i, 0] - image[i, 0])
            part = (step * direction).sum() / direction.square().sum() if i != j else torch.tensor(0.0)
            fits.append(torch.allclose(step, part * direction, atol=1e-5))
        assert sum(fits) == 1


def test_mixup_with_own_labels_is_mixup_in_the_mean():
    """E[l f(x1, x2, l) y1 + (1 - l) ... y2] over Beta(a, a) equals E[f y1] over Beta(1 + a, a) for symmetric pairs."""
    a, rng = 0.4, np.random.default_rng(0)
    x, y = np.array([0.0, 1.0]), np.array([2.0, -1.0])

    def loss(mixed: np.ndarray, target: np.ndarray) -> np.ndarray:  # linear in the target
        return np.exp(mixed) * target

    black_and_white = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    mix, label = Augmenter(recipe({"mixup": {"alpha": a}}), 2), torch.zeros(2, 4, 4, dtype=torch.int64)
    shares = [1 - mix(black_and_white, label, [2 * seed, 2 * seed + 1])[0][0, 0, 0, 0].item() for seed in range(1000)]
    assert scipy.stats.kstest(shares, scipy.stats.beta(1 + a, a).cdf).pvalue > 1e-3
    first, second = rng.integers(0, 2, (2, 400_000))
    share = rng.beta(a, a, 400_000)
    usual = loss(share * x[first] + (1 - share) * x[second], share * y[first] + (1 - share) * y[second]).mean()
    share = rng.beta(1 + a, a, 400_000)
    ours = loss(share * x[first] + (1 - share) * x[second], y[first]).mean()
    assert ours == pytest.approx(usual, abs=0.02)
    assert not math.isclose(usual, loss(x[first], y[first]).mean(), abs_tol=0.1)


def test_ignored_stays_ignored_through_a_warp():
    image, label = sample(3, 1)
    label[:] = -1
    _, out = Augmenter(recipe({"rotation": {"range": [10, 20]}}, "elastic"), 3)(image, label, [1])
    assert (out == -1).all()


def test_flags_are_moved_and_keep_their_values():
    flags = (torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    image = torch.cat([torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(1)), flags], 1)
    entries = ["noise", "brightness", "contrast", "gamma", "blur", "bias_field", "cutout", "flip", "rotation"]
    out, label = Augmenter(recipe(*entries), 2, flags=[1])(image, flags[:, 0].long(), range(8))
    assert set(out[:, 1].unique().tolist()) == {0.0, 1.0}
    inside = label >= 0
    assert (out[:, 1].long() == label)[inside].float().mean() > 0.8, "they go where the labels go"
    assert not torch.equal(out[:, 1], flags[:, 0])
    plain, _ = Augmenter(recipe(*entries), 2)(image, flags[:, 0].long(), range(8))
    assert len(plain[:, 1].unique()) > 2, "without being named they would change"


def test_classes_of_whole_images_stay():
    image, _ = sample(2)
    out, label = Augmenter(recipe("rotation", "flip", "noise"), 5)(image, torch.tensor([4, 0, 1, 2]), range(4))
    assert label.tolist() == [4, 0, 1, 2]
    assert not torch.equal(out, image)


def test_cutmix_leaves_classes_of_whole_images():
    image, _ = sample(2)
    found, label = Augmenter(recipe("cutmix"), 5)(image, torch.tensor([4, 0, 1, 2]), range(4))
    assert label.tolist() == [4, 0, 1, 2]
    assert not torch.equal(found, image)
