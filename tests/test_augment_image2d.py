"""Transforms of albumentations: named safely, seeded, labels and flags along."""

from __future__ import annotations

import os

import pytest
import torch

from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig
from densepred.errors import InputError
from tests.test_augment import sample

pytest.importorskip("albumentations", reason="needs the extra image2d")


def augmenter(name: str, flags: tuple[int, ...] = (), **arguments: object) -> Augmenter:
    entry = {"albumentations": {"name": name, "probability": 1.0, "arguments": arguments}}
    return Augmenter(AugmentConfig.model_validate([entry]), 3, flags=flags)


@pytest.mark.parametrize("name", ["RandomGridShuffle", "GaussNoise", "Rotate", "ElasticTransform", "Sharpen"])
def test_batched_equals_one_by_one_and_follows_the_seed(name):
    image, label = sample(2)
    augment = augmenter(name)
    together = augment(image, label, [5, 6, 7, 8])
    alone = augment(image[2:3], label[2:3], [7])
    assert torch.equal(together[0][2:3], alone[0])
    assert torch.equal(together[1][2:3], alone[1])
    assert not torch.equal(together[0], image)
    assert not torch.equal(augment(image[2:3], label[2:3], [9])[0], alone[0])


def test_a_transposed_sample_is_just_that():
    image, label = sample(2)
    marked = torch.cat([image, (label > 0).unsqueeze(1).float()], 1)
    out, out_label = augmenter("Transpose", flags=(2,))(marked, label - 1, range(4))
    torch.testing.assert_close(out, marked.transpose(2, 3), atol=1e-5, rtol=0)
    assert torch.equal(out[:, 2], marked[:, 2].transpose(1, 2))
    assert torch.equal(out_label, (label - 1).transpose(1, 2)), "with labels of -1 too"
    maps = augmenter("Transpose")(image, image, range(4))[1]
    torch.testing.assert_close(maps, image.transpose(2, 3))


def test_what_comes_from_outside_has_no_truth():
    image, label = torch.randn(1, 1, 20, 20), torch.ones(1, 20, 20).long()
    _, out = augmenter("Rotate", limit=[45, 45])(image, label, [1])
    assert (out[0, 0, 0], out[0, 10, 10]) == (-1, 1)
    maps = torch.full((1, 2, 20, 20), 5.0)
    maps[0, 1, 10, 10] = torch.nan
    moved = augmenter("Rotate", limit=[45, 45])(image, maps, [1])[1][0]
    assert moved[:, 0, 0].isnan().all()
    assert torch.equal(moved[0].isnan(), out[0] == -1)
    assert moved[0, 10, 10] == 5
    assert moved[1].isnan().sum() > moved[0].isnan().sum(), "what was unknown is unknown where it went"
    assert (moved[moved.isfinite()] == 5).all()


def test_probability_and_intensities():
    image = torch.randn(60, 3, 8, 8)
    entry = {"albumentations": {"name": "InvertImg", "probability": 0.3}}
    out, _ = Augmenter(AugmentConfig.model_validate([entry]), 3)(image, torch.zeros(60).long(), range(60))
    changed = (out != image).flatten(1).any(1)
    assert 0.1 < changed.float().mean() < 0.5
    for before, after in zip(image[changed], out[changed], strict=True):
        torch.testing.assert_close(after, before.max() + before.min() - before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("Rotat", {}, "did you mean 'Rotate'?"),
        ("Lambda", {}, "no transform"),
        ("Compose", {}, "no transform"),
        ("os", {}, "no transform"),
        ("Rotate", {"foo": 1}, "does not take"),
        ("Rotate", {"limit": "x"}, "does not take"),
    ],
)
def test_what_is_no_transform_or_argument_is_said(name, arguments, says):
    with pytest.raises(InputError, match="augment: albumentations") as error:
        augmenter(name, **arguments)
    assert says.strip("?") in error.value.what


def test_a_change_of_shape_is_refused():
    image, label = sample(2)
    with pytest.raises(InputError, match="changes the shape"):
        augmenter("RandomCrop", height=4, width=4)(image, label, range(4))


def test_what_the_library_cannot_do_is_named():
    with pytest.raises(InputError, match=r"albumentations.MedianBlur failed on \(13, 13, 2\)"):
        augmenter("MedianBlur")(*sample(2), range(4))


def test_the_library_does_not_ask_the_internet():
    augmenter("Transpose")
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
