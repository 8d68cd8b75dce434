"""Boundary, Hausdorff and centre-line losses against distances by hand, MONAI's, and shapes with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import HausdorffDTLoss, SoftclDiceLoss
from torch import Tensor

from densepred.config import LossConfig
from densepred.config.loss import Term
from densepred.losses import HeadLoss, SegmentationLoss, boundary, cldice, hausdorff, resize_targets
from densepred.models.heads import Segmentation


def example(dims: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    size = (8, 7, 6)[3 - dims :]
    return torch.randn(2, classes, *size, requires_grad=True), torch.randint(0, classes, (2, *size))


def distances(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Signed, to the nearest voxel of the other side, by trying all."""
    points = np.argwhere(np.ones_like(mask)) * np.asarray(spacing)
    flat = mask.ravel()
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    nearest = np.where(flat[:, None] != flat[None], apart, np.inf).min(1)
    return np.where(flat, -nearest, nearest).reshape(mask.shape)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.5, 0.7)])
def test_boundary_is_probability_times_distance(spacing: tuple[float, float]):
    logits, labels = example(2)
    signed = torch.stack(
        [torch.stack([torch.from_numpy(distances((one == c).numpy(), spacing)) for c in (1, 2)]) for one in labels]
    )
    expected = (logits.softmax(1)[:, 1:] * signed).mean()
    torch.testing.assert_close(boundary(logits, labels, spacing=spacing), expected.float())


def test_the_boundary_loss_is_least_for_the_truth():
    labels = torch.zeros(1, 9, 9, dtype=torch.long)
    labels[:, 2:6, 3:8] = 1
    sure = F.one_hot(labels, 2).movedim(-1, 1).float() * 100
    best = boundary(sure, labels)
    assert best < 0
    for shift in ((1, 0), (0, -2), (3, 3)):
        moved = boundary(sure.roll(shift, (2, 3)), labels)
        assert moved > best
    (gradient,) = torch.autograd.grad(boundary(logits := sure.clone().zero_().requires_grad_(), labels), logits)
    assert torch.equal(gradient[:, 1] < 0, labels == 1)  # every voxel is drawn to its own side


@pytest.mark.parametrize("dims", [2, 3])
def test_hausdorff_equals_monais(dims: int):
    logits, labels = example(dims)
    for alpha in (1.0, 2.0):
        peer = HausdorffDTLoss(alpha, include_background=False, to_onehot_y=True, softmax=True)
        torch.testing.assert_close(hausdorff(logits, labels, alpha=alpha), peer(logits, labels.unsqueeze(1)))
    regions, peer = F.one_hot(labels, 3).movedim(-1, 1), HausdorffDTLoss(include_background=True, sigmoid=True)
    torch.testing.assert_close(hausdorff(logits, regions), peer(logits, regions.float()))  # of ints it drops fractions


def test_hausdorff_one_sided_and_in_physical_units():
    logits, labels = example(2)
    logits, labels = logits[:1], labels[:1].clamp(max=1)
    signed = torch.from_numpy(distances((labels[0] == 1).numpy(), (3.0, 0.5)))
    two = torch.cat([logits[:, :2], torch.full_like(logits[:, :1], -1e4)], 1)
    error = two.softmax(1)[0, 1] - (labels[0] == 1).float()
    expected = (error**2 * signed.float() ** 2).mean() / 2  # the third class is absent and not predicted: no loss
    torch.testing.assert_close(hausdorff(two, labels, one_sided=True, spacing=(3.0, 0.5)), expected)


def test_what_is_not_known_is_no_boundary():
    """The left half of an object is unlabelled; distances are those to the right edge alone."""
    truth = torch.zeros(1, 1, 5, 12, dtype=torch.long)
    truth[..., :8] = 1
    truth[..., :4] = -1
    logits = torch.zeros(1, 1, 5, 12)
    columns = torch.tensor([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0])
    assert boundary(logits, truth).item() == pytest.approx(0.5 * columns.mean().item())
    assert hausdorff(logits, truth, one_sided=True).item() == pytest.approx(0.25 * columns.square().mean().item())


@pytest.mark.parametrize("dims", [2, 3])
def test_cldice_equals_monais(dims: int):
    logits, labels = example(dims, 2)
    peer = SoftclDiceLoss(iter_=3, smooth=1e-12, include_background=False, to_onehot_y=True, softmax=True)
    ours = cldice(logits, labels, iterations=3, over_batch=False)
    torch.testing.assert_close(ours, peer(logits, labels.unsqueeze(1)))


def test_cldice_sees_a_gap_and_not_the_thickness():
    line = torch.zeros(1, 1, 15, 30)
    line[..., 6:9, :] = 1
    thick, cut = line.clone(), line.clone()
    thick[..., 5:10, :] = 1
    cut[..., 10:16] = 0
    whole, thicker, broken = (cldice(200 * x - 100, line).item() for x in (line, thick, cut))
    assert whole == pytest.approx(0, abs=1e-6)
    assert thicker < 0.02
    assert broken > 0.08  # 6 of 30 are missed: the recall is 0.8, the Dice of the lines 0.89


def test_losses_of_shape_need_space():
    with pytest.raises(ValueError, match=r"needs spatial axes, got logits \(2, 3\)"):
        boundary(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"2 or 3 spatial axes, got logits \(2, 3, 4\)"):
        cldice(torch.zeros(2, 3, 4), torch.zeros(2, 4))


def test_a_recipes_distances_are_in_the_unit_of_the_spacing_at_every_scale():
    logits, labels = example(3)
    coarse = torch.randn(2, 3, 4, 7, 3)
    config = LossConfig.model_validate({"dice": 0, "cross_entropy": 0, "boundary": 0.5})
    loss = SegmentationLoss(config, spacing=(2.0, 1.0, 1.0))({"x": logits, "x@2": coarse}, labels)
    fine = boundary(logits, labels, spacing=(2, 1, 1))
    less = boundary(coarse, resize_targets(labels, (4, 7, 3)), spacing=(4, 1, 2))
    torch.testing.assert_close(loss, 0.5 * (fine + 0.5 * less) / 1.5)
    head = HeadLoss(Segmentation(3), {"boundary": Term(weight=0.5)}, spacing=(2.0, 1.0, 1.0))
    torch.testing.assert_close(head({"x": logits, "x@2": coarse}, labels), loss)
