"""What a 2D network knows of three colours, on any channels and in 3D: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.convnext import ConvNeXtEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.layers import conv, patch_conv, transposed_conv
from densepred.models.weights import (
    adapt_first_conv,
    depth_profile,
    inflate,
    load_weights,
)
from tests.random_weights import CLOSE, randomized


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def save(module: nn.Module) -> Path:
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return save


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 12])
def test_equal_channels_have_the_response_of_a_grey_image(channels: int) -> None:
    torch.manual_seed(0)
    weight, grey = torch.randn(8, 3, 7, 7), torch.rand(2, 1, 20, 21)
    adapted = adapt_first_conv(weight, channels)
    ours = torch.conv2d(grey.expand(-1, channels, -1, -1), adapted)
    torch.testing.assert_close(ours, torch.conv2d(grey.expand(-1, 3, -1, -1), weight), **CLOSE)
    torch.testing.assert_close(adapted.double().sum(1), weight.double().sum(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 6, 12])
def test_the_first_convolution_is_adapted_as_timm_does(channels: int) -> None:
    imports.timm()
    from timm.models import adapt_input_conv

    weight = torch.randn(8, 3, 7, 7)
    torch.testing.assert_close(adapt_first_conv(weight, channels), adapt_input_conv(channels, weight.clone()))


def test_no_other_weights_so_near_timms_keep_the_response() -> None:
    """Four channels: the least-squares correction is orthogonal to every change that keeps the sum."""
    imports.timm()
    from timm.models import adapt_input_conv

    weight = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    change = adapt_first_conv(weight, 4) - adapt_input_conv(4, weight.clone().float()).double()
    torch.testing.assert_close(change, change[:, :1].expand(-1, 4, -1, -1), atol=1e-6, rtol=0)
    assert change.abs().max() > 0.01


def test_an_image_needs_a_channel() -> None:
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        adapt_first_conv(torch.zeros(1, 3, 1, 1), 0)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "3x3": lambda dims: conv(dims, 4, 6, 3),
    "1x1": lambda dims: conv(dims, 4, 6, 1),
    "7x7 strided": lambda dims: conv(dims, 4, 6, 7, 2),
    "depthwise": lambda dims: conv(dims, 4, 4, 7, groups=4),
    "dilated": lambda dims: conv(dims, 4, 6, 3, dilation=2),
    "valid": lambda dims: conv(dims, 4, 6, 3, padding="valid"),
    "patches": lambda dims: patch_conv(dims, 4, 6, 4),
    "transposed": lambda dims: transposed_conv(dims, 4, 6, 2),
    "transposed, wide": lambda dims: transposed_conv(dims, 4, 6, 2, kernel=4),
    "transposed, of 3": lambda dims: transposed_conv(dims, 4, 6, 3, kernel=5),
    "transposed, same grid": lambda dims: transposed_conv(dims, 4, 6, 1, kernel=3),
}


@pytest.mark.parametrize("mode", ["mean", "centre"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_type_of_layer_gives_a_constant_volume_what_it_gives_the_image(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    flat, deep = LAYERS[kind](2), LAYERS[kind](3)
    deep.weight.data = inflate(flat.weight.data, deep.weight.shape, depth_profile(deep, mode))
    deep.bias.data = flat.bias.data
    image = torch.randn(1, 4, 13, 14)
    expected, found = flat(image), deep(image.unsqueeze(2).expand(-1, -1, 17, -1, -1))
    margin = 0 if mode == "centre" else found.shape[2] // 3
    inner = found[:, :, margin : found.shape[2] - margin]
    torch.testing.assert_close(inner, expected.unsqueeze(2).expand_as(inner), **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in ("1x1", "transposed", "valid")])
def test_only_the_mean_looks_beyond_the_border(kind: str) -> None:
    """Otherwise the two modes could be one and the test above not see it."""
    flat, deep = LAYERS[kind](2), LAYERS[kind](3)
    deep.weight.data = inflate(flat.weight.data, deep.weight.shape, depth_profile(deep, "mean"))
    found = deep(torch.randn(1, 4, 13, 14).unsqueeze(2).expand(-1, -1, 17, -1, -1))
    middle = found.shape[2] // 2
    assert not torch.allclose(found[:, :, -1], found[:, :, middle], atol=1e-3)


def test_transposed_kernels_of_their_stride_are_not_divided() -> None:
    weight = torch.randn(4, 6, 2, 2)
    layer = transposed_conv(3, 4, 6, 2)
    for mode in ("mean", "centre"):
        assert torch.equal(
            inflate(weight, layer.weight.shape, depth_profile(layer, mode)), torch.stack([weight] * 2, 2)
        )


def test_shapes_that_are_no_inflation() -> None:
    with pytest.raises(ValueError, match=r"shape must be \(4, 3, 7, 7\) with one more axis .* got \(4, 3, 7, 5, 5\)"):
        inflate(torch.zeros(4, 3, 7, 7), (4, 3, 7, 5, 5))
    with pytest.raises(ValueError, match=r"profile must have 3 numbers .* got \(2,\)"):
        inflate(torch.zeros(4, 3, 7, 7), (4, 3, 3, 7, 7), torch.ones(2))
    with pytest.raises(ValueError, match="inflation must be one of mean, centre, got 'max'"):
        depth_profile(conv(3, 1, 1, 3), "max")
    with pytest.raises(ValueError, match="layer must be a 3D convolution, got Linear"):
        depth_profile(nn.Linear(2, 2))


FAMILIES: dict[str, tuple[Callable[[int, int], Encoder], int]] = {
    # encoder, and more than its deepest receptive field: resnet18 435, vgg16 212 voxels, ...
    "vgg16_bn": (lambda dims, n: VGGEncoder(dims, n, "vgg16_bn", width=2), 220),
    "vgg11": (lambda dims, n: VGGEncoder(dims, n, "vgg11", width=2), 160),
    "resnet18": (lambda dims, n: ResNetEncoder(dims, n, "resnet18", width=4), 440),
    "resnet50": (lambda dims, n: ResNetEncoder(dims, n, "resnet50", width=4, depth=3), 110),
    "convnext_tiny": (lambda dims, n: ConvNeXtEncoder(dims, n, "convnext_tiny", width=4, depth=2), 230),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_volume_constant_along_z_has_the_features_of_the_image(family: str, saved: Callable) -> None:
    make, field = FAMILIES[family]
    flat, deep = randomized(make(2, 3)), make(3, 3).eval()
    report = load_weights(deep, saved(flat))
    assert report.complete
    assert not report.unexpected
    assert report.loaded.keys() >= report.inflated.keys() >= {k for k, v in deep.state_dict().items() if v.ndim == 5}
    image, depth = torch.randn(1, 3, 12, 17), field + 64
    with torch.no_grad():
        maps = zip(flat(image), deep(image.unsqueeze(2).expand(-1, -1, depth, -1, -1)), deep.strides, strict=True)
        for expected, found, stride in maps:
            first, last = -(-field // 2 // stride[0]), (depth - field // 2) // stride[0]
            inner = found[:, :, first:last]
            assert inner.shape[2]
            torch.testing.assert_close(inner, expected.unsqueeze(2).expand_as(inner), **CLOSE)
    assert expected.abs().max() > 0.01


EXACT = {
    "vgg16_bn": lambda dims: VGGEncoder(dims, 3, "vgg16_bn", width=2),
    "resnet18": lambda dims: ResNetEncoder(dims, 3, "resnet18", width=4),
    "resnet18 dilated": lambda dims: ResNetEncoder(dims, 3, "resnet18", width=4, output_stride=8),
    "se_resnet18": lambda dims: ResNetEncoder(dims, 3, "se_resnet18", width=4),
    "instance norm": lambda dims: ResNetEncoder(dims, 3, "resnet18", width=4, style=Style("instance", "relu")),
    "convnext_tiny": lambda dims: ConvNeXtEncoder(dims, 3, "convnext_tiny", width=4),
    "convnextv2_atto": lambda dims: ConvNeXtEncoder(dims, 3, "convnextv2_atto", width=4),
    "convnext dilated": lambda dims: ConvNeXtEncoder(dims, 3, "convnext_tiny", width=4, output_stride=8),
}


@pytest.mark.parametrize("family", EXACT)
def test_a_kernel_in_the_centre_is_exact_at_every_z(family: str, saved: Callable) -> None:
    flat, deep = randomized(EXACT[family](2)), EXACT[family](3).eval()
    assert load_weights(deep, saved(flat), inflation="centre").complete
    image = torch.randn(1, 3, 35, 38)
    with torch.no_grad():
        for expected, found in zip(flat(image), deep(image.unsqueeze(2).expand(-1, -1, 9, -1, -1)), strict=True):
            torch.testing.assert_close(found, expected.unsqueeze(2).expand_as(found), atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("dims", [2, 3])
def test_a_fully_connected_layer_becomes_the_convolution_it_is(dims: int, tmp_path: Path) -> None:
    """fc6 of FCN (Shelhamer et al. 2017): torchvision's `Linear(512 * 7 * 7, 4096)`, smaller."""
    linear = nn.Linear(5 * 7 * 7, 8)
    torch.save({"0.weight": linear.weight, "0.bias": linear.bias}, tmp_path / "fc6.pth")
    layers = nn.Sequential(conv(dims, 5, 8, 7, padding="valid"))
    assert load_weights(layers, tmp_path / "fc6.pth").complete
    image = torch.randn(2, 5, 7, 7)
    found = layers(image if dims == 2 else image.unsqueeze(2).expand(-1, -1, 7, -1, -1))
    torch.testing.assert_close(found.flatten(1), linear(image.flatten(1)), **CLOSE)
