"""Heads: shapes, closed forms, covariates, and what is read off their outputs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.losses import gaussian_nll
from densepred.models.heads import (
    HEADS,
    Classification,
    DenseHead,
    GlobalHead,
    HeadSpec,
    Regression,
    Scalar,
    Segmentation,
    build_head,
    predictions,
)

SPECS: list[HeadSpec] = [
    Segmentation(3),
    Segmentation(3, regions=True),
    Regression(2),
    Regression(2, positive=True, variance=True),
    Classification(3),
    Classification(3, covariates=4),
    Scalar(2, variance=True),
    Scalar(2, positive=True, covariates=4, hidden=5),
]
SIZES = {2: (5, 6), 3: (4, 5, 6)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def given(spec: HeadSpec, features: Tensor) -> tuple[Tensor, ...]:
    """The arguments of a head's forward."""
    covariates = getattr(spec, "covariates", 0)
    return (features, torch.randn(features.shape[0], covariates)) if covariates else (features,)


def test_every_kind_has_a_name():
    assert {type(spec) for spec in SPECS} == set(HEADS.values())
    assert HEADS["scalar"](outputs=2) == Scalar(2)
    assert hash(Segmentation(3)) == hash(Segmentation(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPECS[0].classes = 4  # type: ignore[misc, union-attr]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_and_gradients(spec: HeadSpec, dims: int):
    head = build_head(dims, 7, spec)
    features = torch.randn(2, 7, *SIZES[dims], requires_grad=True)
    out = head(*given(spec, features))
    assert isinstance(head, DenseHead) == spec.dense
    assert out.shape == (2, spec.channels, *(SIZES[dims] if spec.dense else ()))
    out.square().sum().backward()
    assert (features.grad != 0).any(1).all()
    assert all((parameter.grad != 0).any() for parameter in head.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parameters_are_counted_by_hand(spec: HeadSpec):
    with torch.device("meta"):
        head = build_head(3, 16, spec)
    count, covariates = 17 * spec.channels, getattr(spec, "covariates", 0)
    if covariates:
        hidden = spec.hidden  # type: ignore[union-attr]
        count += (covariates + 1) * hidden + (hidden + 1) * hidden + (hidden + covariates) * spec.channels
    assert sum(p.numel() for p in head.parameters()) == count


def test_channels_follow_from_what_is_predicted():
    assert Segmentation(4).channels == Classification(4).channels == 4
    assert Regression(3).channels == Scalar(3).channels == 3
    assert Regression(3, variance=True).channels == Scalar(3, variance=True).channels == 6


def test_a_dense_head_is_a_linear_map_of_each_voxel():
    head, x = DenseHead(3, 7, Segmentation(3)), torch.randn(2, 7, 4, 5, 6)
    assert {name: tuple(w.shape) for name, w in head.state_dict().items()} == {
        "conv.weight": (3, 7, 1, 1, 1),
        "conv.bias": (3,),
    }
    expected = torch.einsum("kc,bczyx->bkzyx", head.conv.weight[:, :, 0, 0, 0], x) + head.conv.bias.view(3, 1, 1, 1)
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("spec", [Regression(2, positive=True, variance=True), Scalar(2, positive=True, variance=True)])
def test_only_the_mean_is_made_positive(spec: HeadSpec):
    bare = dataclasses.replace(spec, positive=False)
    x = 5 * torch.randn(2, 7, 5, 6)
    head, plain = build_head(2, 7, spec), build_head(2, 7, bare)
    plain.load_state_dict(head.state_dict())
    raw, out = plain(x).double(), head(x)
    assert raw[:, :2].min() < 0 < out[:, :2].min()
    torch.testing.assert_close(out[:, :2].double(), raw[:, :2].exp().log1p(), rtol=1e-5, atol=1e-6)
    assert torch.equal(out[:, 2:].double(), raw[:, 2:])


def test_scores_that_are_there_already_pass_through():
    scores = torch.randn(2, 3, 5, 6)
    head = DenseHead(2, None, Segmentation(3))
    assert not head.state_dict()
    assert torch.equal(head(scores), scores)
    assert torch.equal(build_head(2, None, Regression(3, positive=True))(scores), F.softplus(scores))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_global_head_is_the_classifier_of_image_networks(dims: int):
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
    peer = nn.Sequential(pool, nn.Flatten(), nn.Linear(7, 10))
    head, x = GlobalHead(7, Classification(10)), torch.randn(3, 7, *SIZES[dims])
    head.linear.load_state_dict(peer[2].state_dict())
    torch.testing.assert_close(head(x), peer(x))


def test_covariates_join_wide_and_deep():
    """Cheng et al. 2016, equation 3: the wide and the deep logits add up, with one bias."""
    head = GlobalHead(7, Classification(3, covariates=4, hidden=5))
    x, covariates = torch.randn(6, 7, 4, 5), torch.randn(6, 4)
    w = {name: value.numpy() for name, value in head.state_dict().items()}
    mlp = covariates.numpy()
    for layer in ("deep.0", "deep.2"):
        mlp = np.maximum(mlp @ w[f"{layer}.weight"].T + w[f"{layer}.bias"], 0)
    deep = np.concatenate([x.numpy().mean((2, 3)), mlp], 1) @ w["linear.weight"].T + w["linear.bias"]
    expected = deep + covariates.numpy() @ w["wide.weight"].T
    np.testing.assert_allclose(head(x, covariates).detach(), expected, rtol=1e-5, atol=1e-6)


def test_covariates_may_come_as_integers_or_doubles():
    head, x = GlobalHead(7, Scalar(covariates=2)), torch.randn(3, 7, 4, 5)
    whole = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert torch.equal(head(x, whole), head(x, whole.float()))
    assert torch.equal(head(x, whole.double()), head(x, whole.float()))


def test_covariates_that_do_not_fit_are_refused():
    x = torch.zeros(2, 7, 4, 5)
    head = GlobalHead(7, Classification(3, covariates=4))
    with pytest.raises(ValueError, match=r"^model expects 4 covariates, got 3$"):
        head(x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^model expects 4 covariates, got none$"):
        head(x)
    with pytest.raises(ValueError, match=r"^covariates must be \(batch, 4\), got \(4,\)$"):
        head(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"^model expects no covariates, got 2$"):
        GlobalHead(7, Classification(3))(x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^model expects 1 covariate, got 2$"):
        GlobalHead(7, Scalar(covariates=1))(x, torch.zeros(2, 2))


def test_impossible_specs_are_refused():
    with pytest.raises(ValueError, match="classes must be an int of at least 1, got 0"):
        Segmentation(0)
    with pytest.raises(ValueError, match=r"classes must be an int of at least 1, got 2\.5"):
        Classification(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outputs must be an int of at least 1, got 0"):
        Regression(0)
    with pytest.raises(ValueError, match="covariates must be an int of at least 0, got -1"):
        Scalar(covariates=-1)
    with pytest.raises(ValueError, match="hidden must be an int of at least 1, got 0"):
        Classification(2, covariates=1, hidden=0)
    with pytest.raises(ValueError, match="spec must be Segmentation or Regression for a dense head, got Scalar"):
        DenseHead(2, 7, Scalar())
    with pytest.raises(ValueError, match="spec must be Classification or Scalar for a global head, got Segmentation"):
        GlobalHead(7, Segmentation(2))
    with pytest.raises(ValueError, match="in_channels must be an int for the global Scalar"):
        build_head(2, None, Scalar())


@pytest.mark.parametrize(("spec", "size"), [(Segmentation(3), (4, 5)), (Classification(3), ())])
def test_predictions_of_classes(spec: HeadSpec, size: tuple[int, ...]):
    odds = torch.tensor([1.0, 4.0, 3.0]).view(1, 3, *[1] * len(size)).expand(2, 3, *size)
    found = predictions(spec, odds.log())
    torch.testing.assert_close(found["probabilities"], odds / 8)
    assert torch.equal(found["labels"], torch.ones(2, *size, dtype=torch.int64))


def test_predictions_of_regions():
    odds = torch.tensor([0.25, 3.0]).log().view(1, 2, 1, 1).expand(2, 2, 4, 5)
    found = predictions(Segmentation(2, regions=True), odds)
    torch.testing.assert_close(found["probabilities"][0, :, 0, 0], torch.tensor([0.2, 0.75]))
    assert torch.equal(found["labels"], torch.tensor([False, True]).view(1, 2, 1, 1).expand(2, 2, 4, 5))


@pytest.mark.parametrize(("spec", "size"), [(Regression(2, variance=True), (4, 5)), (Scalar(2, variance=True), ())])
def test_predictions_of_numbers(spec: HeadSpec, size: tuple[int, ...]):
    mean, variance = torch.randn(3, 2, *size), torch.rand(3, 2, *size) + 0.1
    found = predictions(spec, torch.cat([mean, variance.log()], 1))
    assert torch.equal(found["mean"], mean)
    torch.testing.assert_close(found["variance"], variance)
    assert set(predictions(dataclasses.replace(spec, variance=False), mean)) == {"mean"}


def test_a_predicted_variance_is_the_losss_and_never_zero():
    outputs = torch.tensor([[1.0, -1e4]])
    variance = predictions(Scalar(variance=True), outputs)["variance"]
    torch.testing.assert_close(variance, torch.tensor([[math.exp(-20)]]))
    loss = gaussian_nll(outputs, torch.tensor([[1.0 + 1e-3]]))
    torch.testing.assert_close(loss, 0.5 * (variance.log() + 1e-6 / variance).squeeze(), rtol=1e-3, atol=0)


def test_predictions_are_made_in_float32_and_check_their_input():
    found = predictions(Segmentation(2), torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16))
    assert found["probabilities"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"outputs must have 4 channels for Regression\(.*got \(1, 2, 4, 4\)"):
        predictions(Regression(2, variance=True), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_heads_work_under_autocast(spec: HeadSpec):
    head, features = build_head(2, 7, spec), torch.randn(2, 7, 5, 6)
    inputs = given(spec, features)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(*inputs)
    torch.testing.assert_close(low.float(), head(*inputs), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("spec", [SPECS[3], SPECS[7]], ids=str)
def test_heads_export_with_any_batch_and_size(spec: HeadSpec):
    head = build_head(2, 7, spec).eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})
    inputs = given(spec, torch.randn(2, 7, 5, 6))
    program = torch.export.export(head, inputs, dynamic_shapes=shapes[: len(inputs)])
    other = given(spec, torch.randn(3, 7, 9, 4))
    torch.testing.assert_close(program.module()(*other), head(*other))
