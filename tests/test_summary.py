"""The summary: numbers known from papers and arithmetic, and receptive fields as gradients measure them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.build import DensePredictor, create_model
from densepred.models.decoders.unet import UNetDecoder
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.heads import Classification, Regression, Scalar, Segmentation
from densepred.models.receptive import Tracer
from densepred.models.summary import Row, summarize

LINEAR = Style("none", "none")


def joined(encoder: Encoder, dims: int, in_channels: int = 1) -> DensePredictor:
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, convs_per_stage=1, style=encoder.style)
    return DensePredictor(encoder, decoder, dims, in_channels, 1)


def measured(model: nn.Module, size: tuple[int, ...], period: int) -> tuple[int, ...]:
    """The widest support, along each axis, of the gradient of one output voxel near the middle with all weights one."""
    for name, p in model.named_parameters():
        nn.init.constant_(p, float(name.endswith("weight")))
    model = model.double()
    widths = []
    for offset in range(period):
        x = torch.zeros(1, 1, *size, dtype=torch.double, requires_grad=True)
        out: Tensor = model(x)
        out[(0, 0, *(n // 2 + offset for n in size))].backward()
        assert x.grad is not None
        seen = x.grad[0, 0].nonzero()
        assert all(seen.amin(0) > 0)
        assert all(seen.amax(0) < torch.tensor(size) - 1)
        widths.append(seen.amax(0) - seen.amin(0) + 1)
    return tuple(torch.stack(widths).amax(0).tolist())


@pytest.mark.parametrize(
    ("dims", "strides", "kernels", "size"),
    [
        (2, (1, 2, 2), (3, 3, 3), (72, 72)),
        (2, (1, 2, 2), (3, 3, 3), (71, 73)),
        (2, (1, (1, 2), (3, 1)), ((1, 3), 3, 3), (64, 64)),
        (3, (1, 2), (3, 3), (27, 28, 29)),
        (3, (1, (1, 2, 2)), ((1, 3, 3), 3), (28, 28, 28)),
        (2, (2, 2), (5, 3), (60, 60)),
    ],
)
def test_receptive_field_is_what_gradients_reach(
    dims: int, strides: tuple[int, ...], kernels: tuple[int, ...], size: tuple[int, ...]
) -> None:
    encoder = PlainEncoder(dims, 1, (1,) * len(strides), strides, kernels, 1, LINEAR)
    model = joined(encoder, dims)
    period = max(max(s) for s in encoder.strides)
    assert summarize(model, size).receptive_field == measured(model, size, period)


def test_receptive_field_through_shortcuts_is_what_gradients_reach() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ResNetEncoder(2, 1, "resnet18", 1, style=LINEAR)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder.layer2(self.encoder.layer1(self.encoder.conv1(x)))

    model = Stem()
    x = torch.zeros(1, 1, 160, 160)
    with torch.no_grad(), Tracer(x) as tracer:
        out = model(x)
    assert tracer.stride(out) == (4, 4)
    x = torch.zeros(1, 1, 160, 160, requires_grad=True, dtype=torch.double)
    for p in model.parameters():
        nn.init.ones_(p)
    model.double()(x)[0, 0, 20, 20].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].sum(1).nonzero().flatten()
    assert tracer.receptive_field(out) == (int(rows[-1] - rows[0]) + 1,) * 2


def test_unet_2015_sees_140_pixels_at_its_bottom() -> None:
    style = Style("none", "relu")
    encoder = PlainEncoder(2, 1, (2, 2, 2, 2, 2), style=style, pool="max")
    rows = {row.name: row for row in summarize(joined(encoder, 2), (64, 64)).rows}
    names = [f"encoder.stages.{i}.{1 if i == 0 else 2}.conv" for i in range(5)]
    # r <- r + (k - 1) * j, j <- j * s over 3x3 convolutions and 2x2 pools: 5, 14, 32, 68, 140
    assert [rows[name].receptive_field for name in names] == [(n, n) for n in (5, 14, 32, 68, 140)]
    assert [rows[name].stride for name in names] == [(n, n) for n in (1, 2, 4, 8, 16)]


def test_numbers_of_the_plain_3d_network() -> None:
    with torch.device("meta"):
        model = create_model()
    summary = summarize(model, (96, 96, 96))
    assert summary.flops == pytest.approx(399e9, rel=2e-3)  # measured elsewhere for this shape
    assert summary.parameters == sum(p.numel() for p in model.parameters()) == summary.trainable
    assert sum(row.parameters for row in summary.rows) == summary.parameters
    assert sum(row.flops for row in summary.rows) == summary.flops
    first, last = summary.rows[0], summary.rows[-1]
    flops = 2 * 32 * 27 * 96**3
    assert first == Row("encoder.stages.0.0.conv", "Conv3d", (32, 96, 96, 96), 864, flops, (1, 1, 1), (3, 3, 3))
    assert (last.name, last.shape, last.parameters) == ("heads.segmentation.conv", (3, 96, 96, 96), 99)
    assert summary.receptive_field == last.receptive_field


@pytest.mark.parametrize("training", [True, False])
def test_summary_leaves_the_model_as_it_was(training: bool) -> None:
    model = create_model("resnet18", dims=2, in_channels=3, deep_supervision=1).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary = summarize(model, (65, 70))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training is training
    assert not any(layer._forward_hooks for layer in model.modules())
    assert {row.name for row in summary.rows} >= {"encoder.layer1.0.conv1", "heads.segmentation@2.conv"}
    assert all(not p.is_meta for p in model.parameters())


def test_shapes_are_those_of_a_real_pass() -> None:
    model = create_model(channels=(2, 3, 4), convs_per_stage=1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _m, _x, out, name=name: shapes.update({name: out}))
    model(torch.zeros(1, 1, 9, 10, 11))
    for row in summarize(model, (9, 10, 11)).rows:
        assert row.shape == tuple(shapes[row.name].shape[1:])


def test_table_lists_every_layer_and_the_totals() -> None:
    model = create_model(dims=2, channels=(8, 16))
    for p in itertools.islice(model.parameters(), 1):
        p.requires_grad_(False)
    summary = summarize(model, (32, 48))
    lines = summary.table().splitlines()
    assert len(lines) == 1 + len(summary.rows) + 1 + 3
    assert lines[1].split() == ["encoder.stages.0.0.conv", "Conv2d", "8", "x", "32x48", "72", "0.000", "1x1", "3x3"]
    assert f"{summary.parameters:,} ({summary.parameters - 72:,} trainable)" in lines[-3]
    assert "32x48" in lines[-2]
    assert "15x15" in lines[-1]  # 5 before the stride, 11 below, and 2 coarse voxels more by the convolutions after


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be 3 positive numbers for a 3D model, got \(32, 32\)"):
        summarize(create_model(channels=(2, 3)), (32, 32))


@pytest.mark.parametrize(("name", "classifier"), [("resnet50", 2048 * 1000), ("convnext_tiny", 768 * 1000)])
def test_flops_are_those_torchvision_publishes(name: str, classifier: int) -> None:
    """In billions of multiply-adds for an image of 224 x 224, the classifier's among them, to two or three digits."""
    published = imports.torchvision().models.get_model_weights(name).DEFAULT.meta["_ops"]
    with torch.device("meta"):
        model = create_model(name, dims=2, in_channels=3, heads={"kind": Classification(1000)})
    assert summarize(model, (224, 224)).flops / 2e9 == pytest.approx(published, abs=6e-3)
    assert summarize(model, (224, 224)).rows[-1].flops == 2 * classifier


def test_several_heads_and_no_decoder() -> None:
    heads = {"age": Scalar(covariates=2), "mask": Segmentation(2), "distance": Regression()}
    model = create_model(dims=2, channels=(4, 8), heads=heads)
    summary = summarize(model, (20, 24))
    shapes = {row.name: (row.shape, row.stride, row.receptive_field) for row in summary.rows}
    assert shapes["heads.mask.conv"] == ((2, 20, 24), (1, 1), (15, 15))
    assert shapes["heads.distance.conv"] == ((1, 20, 24), (1, 1), (15, 15))
    assert shapes["heads.age.linear"] == ((1,), (None, None), (None, None))
    assert shapes["heads.age.wide"] == ((1,), (None, None), (0, 0))  # sees covariates only
    assert summary.receptive_field == (15, 15)
    alone = summarize(create_model("resnet18", dims=3, width=4, heads={"age": Scalar()}), (20, 24, 28))
    assert alone.receptive_field == (None, None, None)
    assert "the whole image" in alone.table().splitlines()[-1]
    assert alone.table().splitlines()[-5].split()[-2:] == ["-", "whole"]


def test_matrix_products_between_layers_are_counted_where_they_are() -> None:
    model = create_model("torchvision.swin_t", dims=2, in_channels=3)
    summary = summarize(model, (224, 224))
    assert sum(row.flops for row in summary.rows) == summary.flops
    assert sum(row.parameters for row in summary.rows) == summary.parameters
    first = next(row for row in summary.rows if row.kind == "ShiftedWindowAttention")
    windows, tokens, channels = (56 // 7) ** 2, 49, 96
    # queries with keys, and the result with values
    products = 2 * windows * tokens**2 * channels * 2
    linear = 2 * windows * tokens * channels * (3 + 1) * channels  # functional, though its weights are layers'
    assert first.flops == products + linear


def test_weights_used_twice_are_counted_once() -> None:
    model = joined(PlainEncoder(2, 1, (2, 3), style=LINEAR), 2)
    model.encoder.stages[1].append(model.encoder.stages[1][-2])
    summary = summarize(model, (16, 16))
    again = [row for row in summary.rows if row.name == "encoder.stages.1.1.conv"]
    assert [row.parameters for row in again] == [84, 0]
    assert again[0].flops == again[1].flops
    assert sum(row.parameters for row in summary.rows) == summary.parameters


@pytest.mark.parametrize(
    ("options", "size", "whole"),
    [
        ({"network": "unet2015"}, (65, 70), False),
        ({"network": "unet3d2016"}, (33, 30, 37), False),
        ({"network": "nnunet_residual"}, (33, 30, 37), False),
        ({"network": "monai.SegResNet"}, (65, 70), False),
        ({"network": "monai.SwinUNETR"}, (33, 30, 37), True),
        ({"encoder": "convnextv2_atto", "decoder": "deeplabv3plus"}, (33, 30, 37), True),
        ({"encoder": "se_resnet18", "decoder": "unetplusplus"}, (65, 70), True),
        ({"encoder": "vgg11_bn", "decoder": "deconvnet"}, (33, 30, 37), False),
        ({"encoder": "timm.pvt_v2_b0", "decoder": "smp.Segformer"}, (65, 70), True),
    ],
)
def test_any_network_can_be_summarized(options: dict[str, str], size: tuple[int, ...], whole: bool) -> None:
    with torch.device("meta"):
        model = create_model(dims=len(size), **options)
    summary = summarize(model, size)
    assert summary.parameters == sum(row.parameters for row in summary.rows)
    maps = [row for row in summary.rows if len(row.shape) > len(size) and min(row.shape[1:]) > 1]
    assert all(None not in row.stride for row in maps if any(n != 0 for n in row.receptive_field))
    assert all((n is None) == whole for n in summary.receptive_field)
    assert len(summary.table().splitlines()) == len(summary.rows) + 5
