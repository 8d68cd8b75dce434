"""The losses against MONAI's and torch's own, and their behaviour at the edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss

from densepred.config import LossConfig
from densepred.losses import SegmentationLoss, cross_entropy, resize_labels, soft_dice


def example(dims: int = 3, classes: int = 4, ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (3, *(7, 6, 5)[:dims])
    labels = torch.randint(0, classes, shape)
    labels[torch.rand(shape) < ignored] = -1
    return torch.randn(shape[0], classes, *shape[1:], requires_grad=True), labels


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_cross_entropy_equals_torchs(dims, ignored):
    logits, labels = example(dims, ignored=ignored)
    ours = cross_entropy(logits.log_softmax(1), labels)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, ignore_index=-1))


@pytest.mark.parametrize("over_batch", [True, False])
def test_dice_equals_monais(over_batch):
    logits, labels = example()
    peer = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=over_batch, smooth_nr=1e-5, smooth_dr=1e-5
    )
    torch.testing.assert_close(soft_dice(logits.softmax(1), labels, over_batch), peer(logits, labels.unsqueeze(1)))


def test_ignored_voxels_do_not_count():
    logits, labels = example(ignored=0.4)
    loss = SegmentationLoss(LossConfig())
    changed = torch.where((labels == -1).unsqueeze(1), torch.full_like(logits, 9.0), logits)
    torch.testing.assert_close(loss(logits, labels), loss(changed, labels))
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    assert (gradient[(labels == -1).unsqueeze(1).expand_as(gradient)] == 0).all()
    assert (gradient != 0).any()


@pytest.mark.parametrize("over_batch", [True, False])
def test_all_ignored_batch_gives_a_finite_loss_and_zero_gradient(over_batch):
    logits, labels = example()
    loss = SegmentationLoss(LossConfig(batch_dice=over_batch))(logits, torch.full_like(labels, -1))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert math.isfinite(loss.item())
    assert (gradient == 0).all()


def test_perfect_prediction_has_no_loss_and_chance_is_as_stated():
    _, labels = example()
    certain = F.one_hot(labels, 4).movedim(-1, 1).float() * 50
    loss = SegmentationLoss(LossConfig())
    assert loss(certain, labels).item() == pytest.approx(0, abs=1e-4)
    assert loss.at_chance(4) == pytest.approx(math.log(4) + 1)
    flat = SegmentationLoss(LossConfig(dice=0))(torch.zeros_like(certain), labels)
    assert flat.item() == pytest.approx(math.log(4), abs=1e-6)


def test_deep_supervision_weighs_scales_by_their_size():
    _, labels = example()
    labels = labels.repeat(1, 2, 2, 2)[:, :8, :8, :8]
    fine, coarse = torch.randn(3, 4, 8, 8, 8), torch.randn(3, 4, 4, 4, 4)
    loss = SegmentationLoss(LossConfig())
    single = loss(fine, labels), loss(coarse, resize_labels(labels, (4, 4, 4)))
    both = loss({"segmentation": fine, "segmentation@2": coarse}, labels)
    torch.testing.assert_close(both, (single[0] + 0.5 * single[1]) / 1.5)
