"""The ResNet family, plain and residual encoders: as torchvision, timm and dynamic_network_architectures have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.blocks import ConvBlock, Style, conv_blocks
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.residual import MeanPool, ResidualBlock, ResidualEncoder
from densepred.models.encoders.resnet import VARIANTS, BasicBlock, Bottleneck, ResNetEncoder
from densepred.models.layers import DropPath
from densepred.models.upsampling import unpool

MADE: dict[str, Callable[[int, int], Encoder]] = {
    "resnet18": lambda dims, channels: ResNetEncoder(dims, channels, "resnet18", 4),
    "resnext50_32x4d": lambda dims, channels: ResNetEncoder(dims, channels, "resnext50_32x4d", 16),
    "se_resnet50": lambda dims, channels: ResNetEncoder(dims, channels, "se_resnet50", 4, output_stride=8),
    "plain max": lambda dims, channels: PlainEncoder(dims, channels, (4, (5, 6), 8), pool="max"),
    "residual": lambda dims, channels: ResidualEncoder(dims, channels, (4, 6, 8), ((1, 2, 2)[-dims:], 3, 2)),
}


def theirs_of(variant: str, **options: Any) -> Any:
    """torchvision's network, or timm's where torchvision has none."""
    if variant.startswith("se_") or "output_stride" in options:
        return imports.timm().create_model(variant.replace("se_", "se"), **options)
    return getattr(imports.torchvision().models, variant)(**options)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: w for name, w in network.state_dict().items() if not name.startswith("fc.")}


def randomize(network: nn.Module) -> nn.Module:
    """Norms that do something."""
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else tensor.normal_(std=0.1)
    return network.eval()


def stages_of(network: Any, x: Tensor) -> list[Tensor]:
    """The five maps of torchvision's or timm's network."""
    act = network.relu if hasattr(network, "relu") else network.act1
    maps = [act(network.bn1(network.conv1(x)))]
    x = network.maxpool(maps[0])
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_have_the_published_names_and_shapes(variant: str) -> None:
    with torch.device("meta"):
        ours, theirs = ResNetEncoder(2, 3, variant), theirs_of(variant)
    shapes = {name: w.shape for name, w in weights(theirs).items()}
    assert {name: w.shape for name, w in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "variant", ["resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "se_resnet18", "se_resnet50"]
)
def test_features_and_logits_are_torchvisions_and_timms(variant: str) -> None:
    torch.manual_seed(0)
    theirs = randomize(theirs_of(variant))
    ours = ResNetEncoder(2, 3, variant).eval()
    ours.load_state_dict(weights(theirs))
    x = torch.randn(2, 3, 65, 70)
    with torch.no_grad():
        maps = ours(x)
        for mine, other in zip(maps, stages_of(theirs, x), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.fc(maps[-1].mean((2, 3))), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "output_stride", "options"),
    [
        ("resnet50", 16, {"replace_stride_with_dilation": (False, False, True)}),
        ("resnet50", 8, {"replace_stride_with_dilation": (False, True, True)}),
        ("resnet50", 4, {"replace_stride_with_dilation": (True, True, True)}),
        ("resnet18", 8, {"output_stride": 8}),
        ("se_resnet18", 16, {"output_stride": 16}),
    ],
)
def test_dilated_features_are_torchvisions_and_timms(variant: str, output_stride: int, options: Any) -> None:
    torch.manual_seed(0)
    theirs = randomize(theirs_of(variant, **options))
    ours = ResNetEncoder(2, 3, variant, output_stride=output_stride).eval()
    ours.load_state_dict(weights(theirs))
    x = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        for mine, other in zip(ours(x), stages_of(theirs, x), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert ours.strides == tuple((min(s, output_stride),) * 2 for s in (2, 4, 8, 16, 32))


@pytest.mark.parametrize("variant", ["se_resnet18", "resnext50_32x4d"])
def test_a_volume_constant_along_z_gives_the_features_of_its_slices(variant: str) -> None:
    torch.manual_seed(0)
    flat = randomize(ResNetEncoder(2, 2, variant, 16, output_stride=16))
    deep = ResNetEncoder(3, 2, variant, 16, output_stride=16).eval()
    state = deep.state_dict()
    for name, w in flat.state_dict().items():
        if state[name].ndim == 5:  # the kernels see the middle slice alone, so that no border is felt
            state[name].zero_()[:, :, state[name].shape[2] // 2] = w
        else:
            state[name].copy_(w)
    image = torch.randn(1, 2, 33, 36)
    volume = image.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    for mine, expected in zip(deep(volume), flat(image), strict=True):
        torch.testing.assert_close(mine, expected.unsqueeze(2).expand_as(mine), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_keeps_the_finest_maps_and_builds_nothing_else(depth: int) -> None:
    torch.manual_seed(0)
    full = randomize(ResNetEncoder(2, 1, "resnet18", 4))
    short = ResNetEncoder(2, 1, "resnet18", 4, depth=depth).eval()
    assert not [name for name in short.state_dict() if name.startswith(tuple(f"layer{i}" for i in range(depth, 5)))]
    short.load_state_dict({name: w for name, w in full.state_dict().items() if name in short.state_dict()})
    x = torch.randn(1, 1, 40, 33)
    assert (short.channels, short.strides) == (full.channels[:depth], full.strides[:depth])
    for mine, expected in zip(short(x), full(x)[:depth], strict=True):
        assert torch.equal(mine, expected)


def sizes_are_true(encoder: Encoder, x: Tensor) -> list[Tensor]:
    maps = encoder(x)
    assert [m.shape[1] for m in maps] == list(encoder.channels)
    grids = [[-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)] for stride in encoder.strides]
    assert [list(m.shape[2:]) for m in maps] == grids
    return maps


@pytest.mark.parametrize("size", [(65, 70), (1, 1), (2, 3), (33, 30, 37), (1, 1, 1), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_channels_strides_and_sizes_are_true_and_gradients_finite(name: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = 1 + sum(size) % 4
    encoder = MADE[name](len(size), channels)
    maps = sizes_are_true(encoder, torch.randn(1, channels, *size))
    sum(m.square().mean() for m in maps).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_are_true_in_3d(variant: str) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(3, 4, variant, 16)
        maps = sizes_are_true(encoder, torch.empty(1, 4, 33, 70, 37))
    assert [tuple(m.shape[2:]) for m in maps][-1] == (2, 3, 2)  # a 32nd, rounded up


def test_stochastic_depth_grows_linearly_to_the_last_block() -> None:
    def rates(network: nn.Module) -> list[float]:
        return [layer.probability for layer in network.modules() if isinstance(layer, DropPath)]

    expected = pytest.approx([0.05 * i for i in range(1, 9)])  # Huang et al. 2016: l / L times that of the last
    assert rates(ResNetEncoder(2, 1, "resnet18", 4, stochastic_depth=0.4)) == expected
    assert rates(ResidualEncoder(2, 1, (4, 4, 4), stochastic_depth=0.4)) == expected
    assert not rates(ResNetEncoder(2, 1, "resnet18", 4))


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "squeezed", "residual"])
def test_a_dropped_branch_leaves_the_shortcut(kind: str) -> None:
    torch.manual_seed(0)
    style, drop = Style("none", "none"), DropPath(0.5)
    blocks: dict[str, Callable[[], nn.Module]] = {
        "basic": lambda: BasicBlock(2, 4, 4, 1, (1, 1), VARIANTS["resnet18"], style, drop),
        "bottleneck": lambda: Bottleneck(2, 16, 4, 1, (1, 1), VARIANTS["resnet50"], style, drop),
        "squeezed": lambda: Bottleneck(2, 16, 4, 1, (1, 1), VARIANTS["se_resnet50"], style, drop),
        "residual": lambda: ResidualBlock(2, 4, 4, 3, 1, style, drop),
    }
    block = blocks[kind]()
    x = torch.randn(32, 16 if kind in ("bottleneck", "squeezed") else 4, 6, 7)
    with torch.no_grad():
        branch, out = block.eval()(x) - x, block.train()(x)
    dropped = (out == x).flatten(1).all(1)  # where the shape stays and nothing is activated, the shortcut is x
    assert 4 < int(dropped.sum()) < 28
    torch.testing.assert_close(out[~dropped], (x + 2 * branch)[~dropped], atol=1e-5, rtol=1e-5)


def test_groups_need_a_channel_each() -> None:
    with pytest.raises(ValueError, match=r"width must be at least 16, .* 32 groups .* width \* 4 // 64 .*, got 4"):
        ResNetEncoder(2, 1, "resnext50_32x4d", 4)
    with pytest.raises(ValueError, match=r"width must be at least 8, .* 32 groups .*, got 7"):
        ResNetEncoder(3, 1, "resnext101_32x8d", 7)
    assert ResNetEncoder(2, 1, "resnext101_32x8d", 8, depth=2).layer1[0].conv2.weight.shape == (32, 1, 3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetEncoder(2, 1, "resnet51"), "variant must be one of resnet18, .*; did you mean 'resnet50'?"),
        (lambda: ResNetEncoder(2, 1, depth=6), "depth must be 1 to 5 maps, got 6"),
        (lambda: ResNetEncoder(2, 1, output_stride=12), "output_stride must be 4, 8, 16 or 32, got 12"),
        (lambda: ResNetEncoder(2, 1, width=0), "in_channels and width must be positive, got 1 and 0"),
        (lambda: ResNetEncoder(2, 1, stochastic_depth=1), "stochastic_depth must be at least 0 and below 1, got 1"),
        (lambda: PlainEncoder(2, 1, ((4, 8), 8), convs_per_stage=3), r"each of the 3 convolutions, got \(4, 8\)"),
        (lambda: PlainEncoder(2, 1, (4, ())), r"channels and in_channels must be positive, got \(4, \(\)\) and 1"),
        (lambda: PlainEncoder(2, 1, (4, 8), convs_per_stage=(2,)), "number or one for each of the 2 stages, got 1"),
        (lambda: PlainEncoder(2, 1, (4,), convs_per_stage=0), "convs_per_stage must be at least 1, got 0"),
        (lambda: PlainEncoder(2, 1, (4,), padding="full"), "padding must be 'same' or 'valid', got 'full'"),  # type: ignore[arg-type]
        (lambda: ResidualEncoder(2, 0, (4,)), r"channels and in_channels must be positive, got \(4,\) and 0"),
        (lambda: ResidualEncoder(2, 1, (4, 8), blocks_per_stage=(1, 0)), r"blocks_per_stage must .* 1, got \(1, 0\)"),
    ],
)
def test_wrong_options_name_what_is_allowed_and_what_came(make: Callable[[], Encoder], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_valid_padding_gives_the_sizes_of_the_published_unets() -> None:
    with torch.device("meta"):
        unet = PlainEncoder(2, 1, (64, 128, 256, 512, 1024), style=Style("none"), pool="max", padding="valid")
        sizes = [tuple(m.shape[2:]) for m in unet(torch.empty(1, 1, 572, 572))]
    assert sizes == [(n, n) for n in (568, 280, 136, 64, 28)]  # Ronneberger et al. 2015, figure 1
    with torch.device("meta"):
        channels = ((32, 64), (64, 128), (128, 256), (256, 512))
        cube = PlainEncoder(3, 3, channels, style=Style("batch", "relu"), pool="max", padding="valid", bias=True)
        sizes = [tuple(m.shape[2:]) for m in cube(torch.empty(1, 3, 116, 132, 132))]
    assert sizes == [
        (112, 128, 128),
        (52, 60, 60),
        (22, 26, 26),
        (7, 9, 9),
    ]  # Cicek et al. 2016, 132 x 132 x 116 voxels
    assert cube.channels == (64, 128, 256, 512)
    flat = (3, 32, 64, 64, 128, 128, 256, 256, 512)
    convolutions = sum(27 * a * b + b for a, b in pairwise(flat))
    assert sum(p.numel() for p in cube.parameters()) == convolutions + 2 * sum(flat[1:])


def test_valid_padding_is_the_middle_of_same_padding() -> None:
    torch.manual_seed(0)
    same = PlainEncoder(3, 2, (4,), kernels=((1, 3, 5),), convs_per_stage=3, style=Style("batch"))
    valid = PlainEncoder(3, 2, (4,), kernels=((1, 3, 5),), convs_per_stage=3, style=Style("batch"), padding="valid")
    valid.load_state_dict(same.state_dict())
    x = torch.randn(1, 2, 4, 9, 15)
    expected = same.eval()(x)[0][:, :, :, 3:-3, 6:-6]
    torch.testing.assert_close(valid.eval()(x)[0], expected, atol=1e-6, rtol=1e-6)


def test_bias_follows_the_norm_unless_it_is_said() -> None:
    found = {
        (norm, bias): ConvBlock(2, 1, 2, style=Style(norm), bias=bias).conv.bias is not None
        for norm in ("batch", "none")
        for bias in (None, True, False)
    }
    assert found == {(norm, bias): norm == "none" if bias is None else bias for norm, bias in found}
    assert [block.conv.bias is None for block in conv_blocks(2, 1, 2, 3, 1, 2, Style(), bias=True)] == [False, False]


def test_convolutions_per_stage_are_counted() -> None:
    encoder = PlainEncoder(2, 1, (4, 6, 8), convs_per_stage=(1, 3, 2))
    assert [sum(isinstance(layer, ConvBlock) for layer in stage) for stage in encoder.stages] == [1, 3, 2]
    residual = ResidualEncoder(2, 1, (2,) * 6)
    counts = [sum(isinstance(layer, ResidualBlock) for layer in stage) for stage in residual.stages]
    assert counts == [1, 3, 4, 6, 6, 6]  # nnU-Net's residual encoder presets


@pytest.mark.parametrize("size", [(13, 18), (5, 9, 14)])
def test_switches_lead_back_to_the_maxima(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dims = len(size)
    strides: Sequence[Any] = (1, (1, 2, 2)[-dims:], 1, (2, 3, 2)[-dims:])
    encoder = PlainEncoder(dims, 2, (3, 4, 5, 6), strides, style=Style("batch", "relu"), pool="max")
    encoder.train(False)
    x = torch.randn(2, 2, *size)
    maps, switches = encoder.forward_with_switches(x)
    for mine, expected in zip(maps, encoder(x), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-6)
    assert encoder.switch_channels == (None, 3, None, 5)
    assert [s if s is None else s.shape[1] for s in switches] == list(encoder.switch_channels)
    for i, window in ((1, strides[1]), (3, strides[3])):
        pool: Any = (nn.functional.max_pool2d, nn.functional.max_pool3d)[dims - 2]
        pooled, flat = pool(maps[i - 1], window, ceil_mode=True, return_indices=True)
        places = torch.zeros_like(maps[i - 1]).flatten(2).scatter(2, flat.flatten(2), 1.0).view_as(maps[i - 1])
        switch = switches[i]
        assert switch is not None
        assert torch.equal(unpool(pooled, switch, window, maps[i - 1].shape[2:]), maps[i - 1] * places)


def test_an_encoder_that_strides_has_no_switches() -> None:
    assert PlainEncoder(2, 1, (4, 8)).switch_channels == ()
    with pytest.raises(TypeError, match="PlainEncoder has no pooling to take switches from"):
        PlainEncoder(2, 1, (4, 8)).forward_with_switches(torch.zeros(1, 1, 4, 4))


def nnunet(kind: str, dims: int, **options: Any) -> Any:
    """A network of dynamic_network_architectures in nnU-Net's style; it imports torchvision."""
    imports.torchvision()
    pytest.importorskip("dynamic_network_architectures")
    from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder as ResEnc

    return {"plain": PlainConvEncoder, "residual": ResEnc}[kind](
        input_channels=2,
        n_stages=len(options["strides"]),
        conv_op=(nn.Conv2d, nn.Conv3d)[dims - 2],
        conv_bias=True,
        norm_op=(nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
        **options,
    )


def nnunet_weights(network: nn.Module) -> dict[str, Tensor]:
    """By our names: less the copies in `all_modules`, and the biases that the instance norms take away."""
    found = {}
    for name, weight in network.state_dict().items():
        if not re.search(r"all_modules|conv\.bias", name):
            found[name.replace(".0.convs.", ".").replace("stem.convs.0.", "stem.").replace(".blocks.", ".")] = weight
    return found


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_features_are_those_of_nnunet(kind: str, dims: int) -> None:
    torch.manual_seed(0)
    kernels = [k[-dims:] for k in ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 1))]
    strides = [s[-dims:] for s in ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2))]
    features, counts = [8, 16, 24, 24], [1, 3, 2, 2]
    name = "n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"
    theirs = nnunet(kind, dims, features_per_stage=features, kernel_sizes=kernels, strides=strides, **{name: counts})
    randomize(theirs).double()
    ours = {"plain": PlainEncoder, "residual": ResidualEncoder}[kind](dims, 2, features, strides, kernels, counts)
    ours.double().eval().load_state_dict(nnunet_weights(theirs))
    x = torch.randn(2, 2, *(12, 24, 16)[-dims:], dtype=torch.double)
    for mine, other in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [(5, 9, 14), (1, 1, 1), (4, 6, 4), (1, 7, 2)])
def test_windows_are_averaged_over_the_voxels_there_are(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    slices = [part.mean((2, 3, 4)) for z in x.split(2, 2) for y in z.split(3, 3) for part in y.split(2, 4)]
    expected = torch.stack(slices, 2).view(2, 3, -(-size[0] // 2), -(-size[1] // 3), -(-size[2] // 2))
    torch.testing.assert_close(MeanPool(3, (2, 3, 2))(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["residual", "se_resnet50"])
def test_encoders_export_with_free_sizes(name: str) -> None:
    encoder = MADE[name](3, 1).eval()
    free = dict.fromkeys(range(2, 5), torch.export.Dim.DYNAMIC) | {0: torch.export.Dim.AUTO}
    example = torch.randn(2, 1, 33, 30, 37)
    program = torch.export.export(encoder, (example,), dynamic_shapes={"x": free}).module()
    for size in ((20, 19, 25), (40, 33, 18)):
        x = torch.randn(1, 1, *size)
        for mine, expected in zip(program(x), encoder(x), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_memory_format_and_bfloat16_pass_through(name: str) -> None:
    torch.manual_seed(0)
    encoder = MADE[name](3, 2).eval()
    x = torch.randn(1, 2, 9, 10, 11)
    expected = encoder(x)
    last = encoder.to(memory_format=torch.channels_last_3d)(x.to(memory_format=torch.channels_last_3d))
    for mine, other in zip(last, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    if encoder.style.norm == "batch":  # instance norm in float32 is exact on contiguous tensors alone
        assert last[0].is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(m.isfinite().all() for m in encoder(x))
