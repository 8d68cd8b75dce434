"""The losses against torch's, MONAI's and closed forms, and what counts in them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from densepred import losses
from densepred.cases import labels as case_labels
from densepred.config import LossConfig
from densepred.losses import (
    LOSSES,
    HeadLoss,
    MultiTaskLoss,
    SegmentationLoss,
    cross_entropy,
    dice,
    gaussian_nll,
    huber,
    mean_absolute,
    mean_squared,
    region_cross_entropy,
    region_dice,
    resize_targets,
    suitable,
)
from densepred.metrics import confusion
from densepred.models.heads import Classification, Regression, Scalar, Segmentation, build_head

DIMS = [0, 2, 3]
"""0 stands for the outputs of global heads."""


BOTH = ("tversky", "focal", "lovasz", "boundary", "hausdorff", "cldice")
"""Losses of labels and of regions: regions here, labels in test_losses_terms.py."""
CASES = [(name, dims) for name in LOSSES for dims in DIMS if dims or name not in ("boundary", "hausdorff", "cldice")]


def example(name: str, dims: int = 3) -> tuple[Tensor, Tensor]:
    """Outputs (3, 4, *spatial) and targets that know everything."""
    torch.manual_seed(0)
    size = (7, 6, 5)[3 - dims :]
    outputs = torch.randn(3, 4, *size)
    if name in ("cross_entropy", "dice"):
        return outputs.requires_grad_(), torch.randint(0, 4, (3, *size))
    if name.startswith("region") or name in BOTH:
        return outputs.requires_grad_(), torch.randint(0, 2, (3, 4, *size))
    return outputs.requires_grad_(), torch.randn(3, 2 if name == "gaussian_nll" else 4, *size)


def unknown(targets: Tensor) -> float:
    return torch.nan if targets.is_floating_point() else -1


def by_channel(where: Tensor, like: Tensor) -> Tensor:
    """A mask (B, *spatial) for each channel of (B, C, *spatial)."""
    return where.unsqueeze(1).expand_as(like)


def some(targets: Tensor, dims: int, share: float = 0.4) -> Tensor:
    """Random voxels as a mask (B, *spatial), some of each kind."""
    where = torch.rand(3, *targets.shape[targets.ndim - dims :]) < share
    where.view(-1)[:2] = torch.tensor([True, False])
    return where


@pytest.mark.parametrize(("name", "dims"), CASES)
@pytest.mark.parametrize("by", ["targets", "valid"])
def test_nothing_known_gives_no_loss_and_no_gradient(name: str, dims: int, by: str):
    outputs, targets = example(name, dims)
    if by == "targets":
        loss = LOSSES[name](outputs, torch.full_like(targets, unknown(targets)))
    else:
        loss = LOSSES[name](outputs, targets, torch.zeros(3, *outputs.shape[2:], dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.shape == ()
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_what_is_unknown_does_not_count(name: str, dims: int):
    outputs, targets = example(name, dims)
    where = some(targets, dims)
    wide = where if targets.ndim < outputs.ndim else by_channel(where, targets)
    marked = targets.masked_fill(wide, unknown(targets))
    loss = LOSSES[name](outputs, marked)
    changed = outputs.detach().masked_fill(by_channel(where, outputs), 9.0)
    torch.testing.assert_close(LOSSES[name](changed, marked), loss)
    torch.testing.assert_close(LOSSES[name](outputs, targets, ~where), loss)
    assert not torch.isclose(LOSSES[name](outputs, targets), loss)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert (gradient[by_channel(where, outputs)] == 0).all()
    assert (gradient[by_channel(~where, outputs)] != 0).any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("cross_entropy", "dice")])
def test_channels_have_their_own_unknown_voxels(name: str):
    outputs, targets = example(name)
    where = torch.rand(targets.shape) < 0.4
    loss = LOSSES[name](outputs, targets.masked_fill(where, unknown(targets)))
    torch.testing.assert_close(LOSSES[name](outputs, targets, ~where), loss)
    if name in ("region_dice", "tversky", "lovasz", "cldice"):  # ratios; the others are means over what is known
        return
    count = targets.shape[1]
    single = [LOSSES[name](outputs[:, c::count], targets[:, c : c + 1], ~where[:, c : c + 1]) for c in range(count)]
    shares = (~where).float().mean((0, 2, 3, 4))
    torch.testing.assert_close((torch.stack(single) * shares).sum() / shares.sum(), loss)


@pytest.mark.parametrize("name", ["mean_squared", "mean_absolute", "huber", "gaussian_nll"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_stay_where_nothing_is_known(name: str, bad: float):
    outputs, targets = example(name)
    where = some(targets, 3)
    broken = outputs.detach().masked_fill(by_channel(where, outputs), bad).requires_grad_()
    targets = targets.masked_fill(by_channel(where, targets), -bad)
    loss = LOSSES[name](broken, targets)
    (gradient,) = torch.autograd.grad(loss, broken)
    torch.testing.assert_close(loss, LOSSES[name](outputs, targets))
    assert gradient.isfinite().all()
    assert (gradient[by_channel(where, outputs)] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str):
    outputs, targets = example(name, 2)
    where = some(targets, 2)
    outputs = outputs.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, targets, where), outputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_computed_in_float32_under_autocast(name: str, kind: torch.dtype):
    outputs, targets = example(name)
    low = outputs.detach().to(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](low, targets)
    torch.testing.assert_close(loss, LOSSES[name](low.float(), targets), rtol=1e-6, atol=1e-7)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_cross_entropy_equals_torchs(dims: int, ignored: float):
    logits, labels = example("cross_entropy", dims)
    labels[some(labels, dims, ignored)] = -1
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, ignore_index=-1))


@pytest.mark.parametrize("dims", DIMS)
def test_regression_equals_torchs(dims: int):
    means, targets = example("mean_squared", dims)
    targets = 2 * targets
    torch.testing.assert_close(mean_squared(means, targets), F.mse_loss(means, targets))
    torch.testing.assert_close(mean_absolute(means, targets), F.l1_loss(means, targets))
    for delta in (0.3, 1.0, 2.5):
        torch.testing.assert_close(huber(means, targets, delta=delta), F.huber_loss(means, targets, delta=delta))
    outputs, targets = example("gaussian_nll", dims)
    peer = F.gaussian_nll_loss(outputs[:, :2], targets, outputs[:, 2:].exp())
    torch.testing.assert_close(gaussian_nll(outputs, targets), peer)


@pytest.mark.parametrize("dims", DIMS)
def test_region_cross_entropy_equals_torchs(dims: int):
    logits, regions = example("region_cross_entropy", dims)
    where = torch.rand(regions.shape) < 0.3
    peer = F.binary_cross_entropy_with_logits(logits[~where], regions[~where].float())
    torch.testing.assert_close(region_cross_entropy(logits, regions.masked_fill(where, -1)), peer)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("over_batch", [True, False])
def test_dice_equals_monais(over_batch: bool, dims: int):
    smooth = {"batch": over_batch, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    logits, labels = example("dice", dims)
    peer = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, **smooth)
    torch.testing.assert_close(dice(logits, labels, over_batch=over_batch), peer(logits, labels.unsqueeze(1)))
    logits, regions = example("region_dice", dims)
    peer = DiceLoss(sigmoid=True, **smooth)
    torch.testing.assert_close(region_dice(logits, regions, over_batch=over_batch), peer(logits, regions))


def test_no_variance_overflows_and_it_can_rise_again():
    outputs = torch.tensor([[[5.0], [-1e30]]], requires_grad=True)
    loss = gaussian_nll(outputs, torch.zeros(1, 1, 1))
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0, 1] < 0  # downhill is towards more variance


def test_nothing_is_lost_beyond_two_to_the_24():
    """257 ** 3 voxels, an odd number above 2 ** 24, which float32 cannot hold; one of them is wrong."""
    side = 257
    count, shape = side**3, (1, side, side, side)
    labels = torch.ones(shape, dtype=torch.int8)
    labels[0, -1, -1, -1] = 0
    sure = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1, 1).expand(1, 2, *shape[1:])
    one_wrong = pytest.approx(1 / (2 * count - 1), rel=1e-6)  # overlap n - 1 of n + (n - 1); float32 has steps of 6e-8
    assert dice(sure, labels).item() == one_wrong
    assert region_dice(sure[:, 1:], labels.unsqueeze(1)).item() == one_wrong
    flat = torch.zeros(1, 2, 1, 1, 1).expand_as(sure)
    assert cross_entropy(flat, labels).item() == pytest.approx(math.log(2), rel=1e-7)
    del labels, sure, flat
    targets = torch.zeros(1, *shape, dtype=torch.float64)
    targets[..., -1] = count / side**2
    assert mean_absolute(torch.zeros(1, dtype=torch.float64).expand_as(targets), targets).item() == 1


def test_one_label_means_unknown_everywhere():
    assert losses.IGNORE == case_labels.IGNORE == inspect.signature(confusion).parameters["ignore"].default == -1


def test_shapes_that_do_not_fit_are_refused():
    logits, labels = example("cross_entropy")
    with pytest.raises(ValueError, match=r"labels must be \(3, 7, 6, 5\) for logits \(3, 4, 7, 6, 5\), got \(3, 1, 7"):
        cross_entropy(logits, labels.unsqueeze(1))
    with pytest.raises(ValueError, match=r"targets must be \(3, 4, 7, 6, 5\) like the outputs, got \(3, 7, 6, 5\)"):
        mean_squared(logits, labels)
    with pytest.raises(ValueError, match=r"a log-variance for each of the 4 targets, got 4 channels"):
        gaussian_nll(logits, logits)
    with pytest.raises(ValueError, match=r"valid must be of the targets' shape \(3, 7, 6, 5\), got \(7, 6, 5\)"):
        dice(logits, labels, labels[0] > 0)
    with pytest.raises(ValueError, match="at least 2 exclusive classes, got 1"):
        dice(logits[:, :1], labels)


SPECS = [
    Segmentation(4),
    Segmentation(4, regions=True),
    Regression(4),
    Regression(2, variance=True),
    Classification(4),
    Scalar(4),
    Scalar(2, variance=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_head_has_losses_that_fit_what_it_gives(spec):
    torch.manual_seed(0)
    dims = 2 if spec.dense else 0
    features = torch.randn(3, 5, 6, 5, requires_grad=True)
    outputs = build_head(2, 5, spec)(features)
    for name in suitable(spec):
        regions = isinstance(spec, Segmentation) and spec.regions
        targets = example(name if name not in BOTH or regions else "dice", dims)[1]
        loss = HeadLoss(spec, {name: 0.5})(outputs, targets)
        torch.testing.assert_close(loss, 0.5 * LOSSES[name](outputs, targets))
        assert (torch.autograd.grad(loss, features, retain_graph=True)[0] != 0).any()
    default = HeadLoss(spec)(outputs, targets)
    names = suitable(spec)[: 2 if isinstance(spec, Segmentation) else 1]
    torch.testing.assert_close(default, torch.stack([LOSSES[name](outputs, targets) for name in names]).sum())


def test_unfit_terms_are_refused():
    with pytest.raises(ValueError, match=r"must be among dice, cross_entropy, .*, got region_dice"):
        HeadLoss(Segmentation(3), {"region_dice": 1.0})
    with pytest.raises(ValueError, match=r"the term dice: weight: input should be greater than or equal to 0, got -1"):
        HeadLoss(Segmentation(3), {"dice": -1.0})
    with pytest.raises(ValueError, match=r"one above, got \{\}"):
        HeadLoss(Segmentation(3), {})


def test_perfect_prediction_has_no_loss_and_chance_is_as_stated():
    _, labels = example("dice")
    certain = F.one_hot(labels, 4).movedim(-1, 1).float() * 50
    loss = SegmentationLoss(LossConfig())
    assert loss(certain, labels).item() == pytest.approx(0, abs=1e-4)
    assert loss.at_chance(4) == pytest.approx(math.log(4) + 1)
    assert SegmentationLoss(LossConfig(dice=0)).at_chance(4) == pytest.approx(math.log(4))
    flat = SegmentationLoss(LossConfig(dice=0))(torch.zeros_like(certain), labels)
    assert flat.item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("over_batch", [True, False])
def test_the_recipes_loss_is_its_terms(over_batch: bool):
    logits, labels = example("dice")
    labels[some(labels, 3)] = -1
    config = LossConfig(dice=0.5, cross_entropy=2.0, batch_dice=over_batch)
    expected = 0.5 * dice(logits, labels, over_batch=over_batch) + 2 * cross_entropy(logits, labels)
    torch.testing.assert_close(SegmentationLoss(config)(logits, labels), expected)
    terms = {"dice": 0.5, "cross_entropy": 2.0}
    torch.testing.assert_close(HeadLoss(Segmentation(4), terms, over_batch)(logits, labels), expected)


def test_deep_supervision_weighs_scales_by_their_size():
    _, labels = example("dice")
    labels = labels.repeat(1, 2, 2, 2)[:, :8, :8, :8]
    fine, coarse = torch.randn(3, 4, 8, 8, 8), torch.randn(3, 4, 4, 4, 4)
    loss = SegmentationLoss(LossConfig())
    single = loss(fine, labels), loss(coarse, resize_targets(labels, (4, 4, 4)))
    both = loss({"segmentation": fine, "segmentation@2": coarse}, labels)
    torch.testing.assert_close(both, (single[0] + 0.5 * single[1]) / 1.5)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.float32, torch.float64, torch.bool])
def test_coarser_targets_are_the_nearest(kind: torch.dtype):
    targets = torch.arange(2 * 3 * 6 * 9).reshape(2, 3, 6, 9).remainder(100).to(kind)
    coarse = resize_targets(targets, (2, 3))  # every third voxel, the middle one of its three
    assert coarse.dtype == kind
    assert torch.equal(coarse, targets[:, :, 1::3, 1::3])
    assert torch.equal(resize_targets(targets[:, 0], (2, 3)), targets[:, 0, 1::3, 1::3])
    assert resize_targets(targets, (6, 9)) is targets


def test_deep_supervision_of_numbers_sees_unknown_voxels_at_every_scale():
    targets = torch.full((1, 2, 6, 6), torch.nan)
    targets[:, :, :3] = 3.0
    valid = torch.ones(1, 6, 6, dtype=torch.bool)
    valid[..., :3] = False
    fine, coarse = torch.zeros(1, 2, 6, 6, requires_grad=True), torch.ones(1, 2, 2, 2, requires_grad=True)
    loss = HeadLoss(Regression(2))({"depth": fine, "depth@3": coarse}, targets, valid)
    assert loss.item() == pytest.approx((9 + 4 / 3) / (1 + 1 / 3))
    loss.backward()
    assert torch.equal((fine.grad != 0)[0, 0], valid[0] & targets[0, 0].isfinite())
    assert torch.equal((coarse.grad != 0)[0, 0], torch.tensor([[False, True], [False, False]]))


def multi_task() -> tuple[MultiTaskLoss, dict[str, Tensor], dict[str, Tensor]]:
    heads = {"segmentation": (Segmentation(4), 1.0), "depth": (Regression(4), 0.25), "age": (Scalar(4), 2.0)}
    logits, labels = example("dice", 2)
    means, targets = example("mean_squared", 2)
    ages, truth = example("huber", 0)
    coarse = torch.randn(3, 4, 3, 3, requires_grad=True)
    outputs = {"segmentation": logits, "depth": means, "segmentation@2": coarse, "age": ages}
    loss = MultiTaskLoss(heads, terms={"age": {"huber": 1.0}})
    return loss, outputs, {"segmentation": labels, "depth": targets, "age": truth}


def test_several_heads_add_up_with_their_weights():
    loss, outputs, targets = multi_task()
    parts = loss.parts(outputs, targets)
    scales = {name: outputs[name] for name in ("segmentation", "segmentation@2")}
    torch.testing.assert_close(parts["segmentation"], HeadLoss(Segmentation(4))(scales, targets["segmentation"]))
    torch.testing.assert_close(parts["depth"], F.mse_loss(outputs["depth"], targets["depth"]))
    torch.testing.assert_close(parts["age"], F.huber_loss(outputs["age"], targets["age"]))
    total = parts["segmentation"] + 0.25 * parts["depth"] + 2 * parts["age"]
    torch.testing.assert_close(loss(outputs, targets), total)


def test_a_head_without_known_targets_leaves_the_others_alone():
    loss, outputs, targets = multi_task()
    valid = {"depth": torch.zeros(3, *outputs["depth"].shape[2:], dtype=torch.bool)}
    targets["age"] = torch.full_like(targets["age"], torch.nan)
    total = loss(outputs, targets, valid)
    torch.testing.assert_close(total, loss.parts(outputs, targets)["segmentation"])
    gradients = torch.autograd.grad(total, [outputs[name] for name in ("depth", "age", "segmentation@2")])
    assert [bool((gradient != 0).any()) for gradient in gradients] == [False, False, True]


def test_a_single_head_may_give_a_tensor_and_weight_zero_needs_no_targets():
    logits, labels = example("cross_entropy", 0)
    loss = MultiTaskLoss({"grade": (Classification(4), 3.0)})
    torch.testing.assert_close(loss(logits, {"grade": labels}), 3 * F.cross_entropy(logits, labels))
    loss = MultiTaskLoss({"grade": (Classification(4), 1.0), "age": (Scalar(4), 0.0)})
    torch.testing.assert_close(
        loss({"grade": logits, "age": logits}, {"grade": labels}), F.cross_entropy(logits, labels)
    )


def test_heads_and_targets_must_agree():
    loss, outputs, targets = multi_task()
    with pytest.raises(ValueError, match="outputs must be of the heads segmentation, depth, age, got segmentation"):
        loss(outputs["segmentation"], targets)
    with pytest.raises(ValueError, match="got segmentation, depth, age, sex"):
        loss({**outputs, "sex": outputs["age"]}, targets)
    with pytest.raises(ValueError, match="targets must hold segmentation, depth, age, got depth"):
        loss(outputs, {"depth": targets["depth"]})
    with pytest.raises(ValueError, match="terms must be for the heads age, got sex"):
        MultiTaskLoss({"age": (Scalar(), 1.0)}, terms={"sex": {"huber": 1.0}})
    with pytest.raises(ValueError, match="heads must have weights of at least 0 and one above"):
        MultiTaskLoss({"age": (Scalar(), 0.0)})
