"""Weighted, smoothed and top-k cross-entropy, generalised Dice, Tversky, focal and Lovász losses against peers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from torch import Tensor

from densepred.losses import LOSSES, cross_entropy, dice, focal, lovasz, region_cross_entropy, region_dice, tversky
from densepred.losses.overlap import _steps
from densepred.models.adapters import imports

SIZE = (7, 6, 5)
WEIGHTS = (0.2, 1.0, 3.0, 0.5)
OF_LABELS = ("tversky", "focal", "lovasz", "boundary", "hausdorff", "cldice")


def example(dims: int = 3, classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    size = SIZE[3 - dims :]
    return torch.randn(3, classes, *size, requires_grad=True), torch.randint(0, classes, (3, *size))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_that_are_unknown_do_not_count(name: str, dims: int):
    logits, labels = example(dims)
    where = torch.rand(labels.shape) < 0.3
    marked = labels.masked_fill(where, -1)
    loss = LOSSES[name](logits, marked)
    torch.testing.assert_close(LOSSES[name](logits, labels, ~where), loss)
    torch.testing.assert_close(LOSSES[name](logits.detach().masked_fill(where.unsqueeze(1), 9.0), marked), loss)
    assert not torch.isclose(LOSSES[name](logits, labels), loss)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.movedim(1, -1)[where] == 0).all()
    assert (gradient.movedim(1, -1)[~where] != 0).any()
    nothing = LOSSES[name](logits, torch.full_like(labels, -1))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", OF_LABELS)
def test_two_classes_are_a_region(name: str):
    """Where the background has no term of its own, two exclusive classes are one region of the difference of logits."""
    logits, labels = example(3, 2)
    one = LOSSES[name](logits[:, 1:] - logits[:, :1], labels.unsqueeze(1))
    if name == "lovasz":  # its background is a class, and loses as much where both occur
        back = LOSSES[name](logits[:, :1] - logits[:, 1:], 1 - labels.unsqueeze(1))
        one = (one + back) / 2
    torch.testing.assert_close(LOSSES[name](logits, labels), one)


@pytest.mark.parametrize("name", ["tversky", "focal", "lovasz"])
def test_gradients_of_labels_are_those_of_finite_differences(name: str):
    logits, labels = example(2)
    logits = logits.detach().double().requires_grad_()
    labels.view(-1)[::3] = -1
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_weighted_and_smoothed_cross_entropy_equals_torchs(weights: tuple[float, ...] | None, smoothing: float):
    logits, labels = example()
    labels[torch.rand(labels.shape) < 0.3] = -1
    factors = None if weights is None else torch.tensor(weights)
    peer = F.cross_entropy(logits, labels, factors, ignore_index=-1, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, labels, None, weights, smoothing), peer)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_hardest_voxels_alone(weights: tuple[float, ...] | None):
    logits, labels = example()
    labels[torch.rand(labels.shape) < 0.3] = -1
    factors = None if weights is None else torch.tensor(weights)
    each = F.cross_entropy(logits, labels, factors, ignore_index=-1, reduction="none")[labels >= 0]
    hardest = each.sort(descending=True).indices[: round(0.2 * len(each))]
    counted = torch.ones(len(hardest)) if factors is None else factors[labels[labels >= 0][hardest]]
    loss = cross_entropy(logits, labels, None, weights, top=0.2)
    torch.testing.assert_close(loss, each[hardest].sum() / counted.sum())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert int((gradient != 0).any(1).sum()) == len(hardest)


def test_weighted_smoothed_and_hardest_regions():
    logits, labels = example()
    regions = F.one_hot(labels, 4).movedim(-1, 1)
    each = F.binary_cross_entropy_with_logits(logits, 0.9 * regions + 0.05, reduction="none")
    factors = torch.tensor(WEIGHTS).view(4, 1, 1, 1).expand_as(each)
    loss = region_cross_entropy(logits, regions, None, WEIGHTS, 0.1)
    torch.testing.assert_close(loss, (each * factors).sum() / factors.sum())
    hard = region_cross_entropy(logits, regions, smoothing=0.1, top=0.25)
    torch.testing.assert_close(hard, each.flatten().sort(descending=True).values[: each.numel() // 4].mean())
    with pytest.raises(ValueError, match="class_weights must be 4, one for each class, got 2"):
        cross_entropy(logits, labels, class_weights=(1, 2))


@pytest.mark.parametrize("over_batch", [True, False])
def test_generalised_dice_equals_monais(over_batch: bool):
    logits, labels = example()
    peer = GeneralizedDiceLoss(to_onehot_y=True, softmax=True, batch=over_batch, smooth_nr=0, smooth_dr=0)
    ours = dice(logits, labels, over_batch=over_batch, generalised=True)
    torch.testing.assert_close(ours, peer(logits, labels.unsqueeze(1)), rtol=1e-5, atol=1e-6)
    regions = (torch.rand(logits.shape) < 0.3).long()
    peer = GeneralizedDiceLoss(sigmoid=True, batch=over_batch, smooth_nr=0, smooth_dr=0)
    ours = region_dice(logits, regions, over_batch=over_batch, generalised=True)
    torch.testing.assert_close(ours, peer(logits, regions), rtol=1e-5, atol=1e-6)


def test_a_small_class_counts_as_much_as_a_large_one_in_the_generalised_dice():
    """The small one is missed: 1 of 1 + 999 / 999^2 weighted voxels, where by plain sums it is 1 of 1000."""
    labels = torch.zeros(1, 10, 10, 10, dtype=torch.long)
    labels[0, 0, 0, 0] = 1
    logits = torch.zeros(1, 2, 10, 10, 10)
    logits[:, 0] = 50
    weight = 1 / 999**2
    expected = 1 - 2 * weight * 999 / (weight * (999 + 1000) + 1)
    assert dice(logits, labels, generalised=True).item() == pytest.approx(expected, abs=1e-4)


def test_an_absent_class_leaves_the_generalised_dice_finite():
    logits, labels = example()
    loss = dice(logits, labels.clamp(max=2), generalised=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 < loss.item() < 1
    assert gradient.isfinite().all()


@pytest.mark.parametrize("over_batch", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_tversky_equals_monais(over_batch: bool, dims: int):
    logits, labels = example(dims)
    settings = {"alpha": 0.2, "beta": 0.9, "batch": over_batch, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    peer = TverskyLoss(include_background=False, to_onehot_y=True, softmax=True, **settings)
    ours = tversky(logits, labels, None, 0.2, 0.9, over_batch=over_batch)
    torch.testing.assert_close(ours, peer(logits, labels.unsqueeze(1)))


def test_dice_and_tversky_of_partly_unknown_labels_equal_monais():
    logits, labels = example()
    labels[torch.rand(labels.shape) < 0.3] = -1
    settings = {"batch": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5, "ignore_index": -1}
    settings |= {"include_background": False, "to_onehot_y": True, "softmax": True}
    torch.testing.assert_close(dice(logits, labels), DiceLoss(**settings)(logits, labels.unsqueeze(1)))
    peer = TverskyLoss(alpha=0.3, beta=0.7, **settings)
    torch.testing.assert_close(tversky(logits, labels), peer(logits, labels.unsqueeze(1)))


def test_tversky_of_halves_is_dice_and_the_exponent_is_one():
    logits, labels = example()
    # the smoothing stands beside half the sizes, so that half as much gives the same
    torch.testing.assert_close(tversky(logits, labels, None, 0.5, 0.5, smooth=5e-6), dice(logits, labels))
    plain = tversky(logits[:, :2], labels.clamp(max=1), None, 0.3, 0.7)
    torch.testing.assert_close(tversky(logits[:, :2], labels.clamp(max=1), None, 0.3, 0.7, 0.75), plain**0.75)
    right = (F.one_hot(labels, 4).movedim(-1, 1) * 1e4).float().requires_grad_()
    (gradient,) = torch.autograd.grad(tversky(right, labels, gamma=0.5), right)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_monais_and_torchvisions(gamma: float):
    logits, labels = example()
    peer = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)  # a mean over the classes too
    torch.testing.assert_close(focal(logits, labels, None, gamma), 4 * peer(logits, labels.unsqueeze(1)))
    regions = F.one_hot(labels, 4).movedim(-1, 1).float()
    peer = imports.torchvision().ops.sigmoid_focal_loss(logits, regions, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(focal(logits, regions, None, gamma), peer)


def test_focal_without_focus_is_the_cross_entropy_and_has_slopes_at_certainty():
    logits, labels = example()
    torch.testing.assert_close(focal(logits, labels, None, 0.0), cross_entropy(logits, labels))
    weighted = F.cross_entropy(logits, labels, torch.tensor(WEIGHTS), reduction="none").mean()
    torch.testing.assert_close(focal(logits, labels, None, 0.0, WEIGHTS), weighted)
    right = (F.one_hot(labels, 4).movedim(-1, 1) * 1e4).float().requires_grad_()
    (gradient,) = torch.autograd.grad(focal(right, labels, gamma=0.5), right)
    assert gradient.isfinite().all()


def test_lovasz_equals_smps():
    peer = imports.smp().losses.LovaszLoss
    logits, labels = example(2)
    torch.testing.assert_close(lovasz(logits, labels), peer("multiclass")(logits, labels))
    labels[0].clamp_(max=2)
    peers = peer("multiclass", per_image=True)(logits, labels)
    torch.testing.assert_close(lovasz(logits, labels, over_batch=False), peers)
    absent = labels.clamp(max=2)  # a class that does not occur has no term
    torch.testing.assert_close(lovasz(logits, absent), peer("multiclass")(logits, absent))
    marked = labels.masked_fill(torch.rand(labels.shape) < 0.3, -1)
    torch.testing.assert_close(lovasz(logits, marked), peer("multiclass", ignore_index=-1)(logits, marked))


def test_lovasz_of_certain_predictions_is_the_jaccard_loss():
    """At the corners of the cube the extension has the value of what it extends (Berman et al., section 2)."""
    _, labels = example()
    guess = labels.roll(1, -1)
    logits = F.one_hot(guess, 4).movedim(-1, 1).float() * 100
    overlaps = [((labels == c) & (guess == c)).sum() / ((labels == c) | (guess == c)).sum() for c in range(4)]
    assert lovasz(logits, labels).item() == pytest.approx(1 - torch.stack(overlaps).mean().item(), abs=1e-6)


def test_lovasz_loses_no_count_beyond_two_to_the_24():
    count = 2**24 + 4  # float32 counts in steps of 2 there
    steps = _steps(torch.ones(1, 1, count, dtype=torch.bool))
    assert steps[..., 1:].min().item() == pytest.approx(1 / count, rel=1e-6)
    assert steps.sum().item() == pytest.approx(1, rel=1e-12)


def test_losses_of_a_single_exclusive_class_are_refused():
    logits, labels = example()
    with pytest.raises(ValueError, match=r"at least 2 exclusive classes, got 1; a single region has targets \(B, 1"):
        tversky(logits[:, :1], labels)
    with pytest.raises(ValueError, match=r"labels must be \(3, 7, 6, 5\)"):
        lovasz(logits, labels[..., :-1])
    assert math.isfinite(tversky(logits[:, :1], (labels > 1).unsqueeze(1)).item())
