"""Ways from feature maps to the image: counts from the papers, peers' outputs, exact interpolation, any size."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.build import initialize
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.deconvnet import DeconvNetDecoder, FullyConnected
from densepred.models.decoders.deeplab import DeepLabV3PlusDecoder
from densepred.models.decoders.fcn import FCNDecoder, LinearUpsampling
from densepred.models.decoders.fpn import FPNDecoder
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.layers import CONVOLUTIONS

RELU = Style("batch", "relu")


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def seeded(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """All parameters drawn anew, those that start at zero too."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator) if tensor.ndim == 1 else tensor.data
            if tensor.ndim > 1:
                tensor.data = torch.randn(tensor.shape, generator=generator) * scale
    return module.eval()


# Interpolation


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("ratio", [(2, 2), (3, 1), (8, 16), (1, 2, 2), (4, 3, 2)])
def test_upsampling_is_torchs_interpolation(ratio: tuple[int, ...], learn: bool) -> None:
    dims = len(ratio)
    x = torch.randn(2, 3, *(3, 4, 2)[:dims])
    whole = [n * r for n, r in zip(x.shape[2:], ratio, strict=True)]
    expected = F.interpolate(x, whole, mode="bilinear" if dims == 2 else "trilinear", align_corners=False)
    cut = tuple(slice(0, n - r + 1) for n, r in zip(whole, ratio, strict=True))
    up = LinearUpsampling(dims, 3, ratio, learn)
    assert (count(up) > 0) == learn
    found = up(x, [s.stop for s in cut])
    torch.testing.assert_close(found, expected[(..., *cut)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (65, 70), (33, 30, 37)])
@pytest.mark.parametrize("learn", [True, False])
def test_fcn_keeps_constants_and_ramps(size: tuple[int, ...], learn: bool) -> None:
    dims = len(size)
    decoder = FCNDecoder(dims, (1, 1, 1), [(s,) * dims for s in (2, 4, 8)], 1, 8, learn_upsampling=learn)
    nn.init.ones_(decoder.score_layers[-1].weight)  # the finer maps' scores stay zero
    grids = [[-(-n // s) for n in size] for s in (2, 4, 8)]
    constant = decoder([torch.full((1, 1, *grid), 3.0) for grid in grids], size)[0]
    torch.testing.assert_close(constant, torch.full((1, 1, *size), 3.0))
    for axis, n in enumerate(size):
        centres = (torch.arange(grids[2][axis]) + 0.5) * 8  # of the coarse voxels, in voxels of the image
        shape = [-1 if a == axis else 1 for a in range(dims)]
        ramp = centres.view(shape).expand(grids[2])[None, None]
        out = decoder([torch.zeros(1, 1, *grid) for grid in grids[:2]] + [ramp], size)[0]
        inner = slice(8, int(centres[-1]) - 4)  # the outermost coarse voxels are extended as constants
        expected = (torch.arange(n) + 0.5).view(shape).expand(size)
        torch.testing.assert_close(out[0, 0].movedim(axis, 0)[inner], expected.movedim(axis, 0)[inner])


# Peers


@pytest.mark.parametrize("kernel", [3, 7])
def test_deconvnets_fc_head_gives_back_what_it_takes(kernel: int) -> None:
    torch.manual_seed(0)
    head = FullyConnected(2, 2, 5, 3, kernel, Style("none", "relu"))
    x = torch.randn(1, 2, kernel, kernel)
    vector = F.relu(
        head.fc7.conv(
            F.relu(torch.einsum("bcyx,kcyx->bk", x, head.fc6.conv.weight) + head.fc6.conv.bias)[..., None, None]
        )
    )
    window = torch.einsum("bk,kcyx->bcyx", vector[..., 0, 0], head.fc6_deconv.conv.weight)
    expected = F.relu(window + head.fc6_deconv.conv.bias[:, None, None])
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)


def unaligned(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace) -> None:
    """Have a peer interpolate between voxel edges: with corners aligned, maps would shift against each other."""

    def interpolate(x: Tensor, mode: str, align_corners: bool | None = None, **options: object) -> Tensor:
        return F.interpolate(x, mode=mode, align_corners=False if mode == "bilinear" else None, **options)

    monkeypatch.setattr(module, "F", SimpleNamespace(interpolate=interpolate))


def test_fpn_is_smps(monkeypatch: pytest.MonkeyPatch) -> None:
    imports.smp()
    from segmentation_models_pytorch.decoders.fpn import decoder as peer

    unaligned(monkeypatch, peer)
    channels = (3, 4, 6, 8, 12)
    theirs = seeded(peer.FPNDecoder((3, *channels), pyramid_channels=16, segmentation_channels=64))
    ours = FPNDecoder(2, channels, [(2**i, 2**i) for i in range(1, 6)], 16, 64).eval()
    for layer in ours.smooth:  # which they leave out
        nn.init.zeros_(layer.bias)
        nn.init.dirac_(layer.weight)
    laterals = [theirs.p2.skip_conv, theirs.p3.skip_conv, theirs.p4.skip_conv, theirs.p5]
    for mine, its in zip(ours.lateral, laterals, strict=True):
        mine.load_state_dict(its.state_dict())
    for branch, its in zip(ours.branches, reversed(theirs.seg_blocks), strict=True):
        for block, other in zip(branch.blocks, its.block, strict=True):
            block.load_state_dict(other.block.state_dict())
    maps = [torch.randn(2, c, 64 >> i, 96 >> i) for i, c in enumerate(channels, start=1)]
    expected = F.interpolate(theirs(maps), scale_factor=4.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(maps, (64, 96))[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplab_is_smps(output_stride: int) -> None:
    imports.smp()
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder as Peer

    channels, strides = (3, 4, 6, 8, 12), [min(2**i, output_stride) for i in range(1, 6)]
    rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
    theirs = seeded(Peer((3, *channels), 5, 32, rates, output_stride, True, 0.5))
    theirs.up.align_corners = False  # see `unaligned`
    theirs.aspp = theirs.aspp[:1]  # they refine before and after the low-level map comes in, Chen et al. twice after
    ours = DeepLabV3PlusDecoder(2, channels, [(s, s) for s in strides], 32).eval()
    ours.refine[1] = nn.Identity()
    pairs = zip(dict(modules_of(ours)).values(), dict(modules_of(theirs)).values(), strict=True)
    for mine, its in pairs:
        mine.load_state_dict(its.state_dict())
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)]
    expected = F.interpolate(theirs([maps[0], *maps]), scale_factor=4.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(maps, (64, 96))[0], expected, atol=1e-5, rtol=1e-5)


def modules_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with parameters, in the order in which both networks are written."""
    return [(name, m) for name, m in network.named_modules() if list(m.parameters(recurse=False))]


# Any encoder, any size


def vgg(dims: int) -> Encoder:
    return VGGEncoder(dims, 1, "vgg11_bn", width=2, taps="pools")


def pooling(dims: int) -> Encoder:
    strides = (1, 2, (2, 2, 1)[-dims:])
    return PlainEncoder(dims, 1, (3, 4, 6), strides, convs_per_stage=1, style=RELU, pool="max")


def striding(dims: int) -> Encoder:
    return PlainEncoder(dims, 1, (3, 4, 6), convs_per_stage=1)


def resnet(dims: int) -> Encoder:
    return ResNetEncoder(dims, 1, "resnet18", width=4)


def dilated(dims: int) -> Encoder:
    return ResNetEncoder(dims, 1, "resnet18", width=4, output_stride=8)


ENCODERS = [vgg, pooling, striding, resnet, dilated]


def fcn(dims: int, encoder: Encoder) -> Decoder:
    decoder = FCNDecoder(dims, encoder.channels, encoder.strides, 2, 8, fc_channels=3, fc_kernel=3, style=encoder.style)
    for layer in decoder.score_layers:  # as after a step of training
        nn.init.normal_(layer.weight)
    return decoder


def deconvnet(dims: int, encoder: Encoder) -> Decoder:
    maps = (encoder.channels, encoder.strides, encoder.switch_channels)
    return DeconvNetDecoder(dims, *maps, style=encoder.style, fc_channels=4, fc_kernel=3)


def fpn(dims: int, encoder: Encoder) -> Decoder:
    return FPNDecoder(dims, encoder.channels, encoder.strides, 8, 6, style=encoder.style, outputs=2)


def deeplab(dims: int, encoder: Encoder) -> Decoder:
    return DeepLabV3PlusDecoder(dims, encoder.channels, encoder.strides, 4, 3, style=encoder.style)


DECODERS = [fcn, deconvnet, fpn, deeplab]


class Both(nn.Module):
    """An encoder and its decoder, with switches where it wants them."""

    def __init__(self, dims: int, encoder: Encoder, make: Callable[[int, Encoder], Decoder]) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, make(dims, encoder)

    def forward(self, x: Tensor) -> Tensor:
        if self.decoder.needs_switches:
            return self.decoder(*self._with_switches(x))[0]
        return self.decoder(self.encoder(x), x.shape[2:])[0]

    def _with_switches(self, x: Tensor) -> tuple[list[Tensor], tuple[int, ...], list[Tensor | None]]:
        maps, switches = self.encoder.forward_with_switches(x)
        return maps, x.shape[2:], switches


@pytest.mark.parametrize("size", [(65, 70), (1, 1), (7, 3), (33, 30, 37), (1, 1, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_size_comes_back(
    decoder: Callable[[int, Encoder], Decoder], encoder: Callable[[int], Encoder], size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dims = len(size)
    model = Both(dims, encoder(dims), decoder)
    assert model.decoder.strides == ((1,) * dims,)
    out = model(torch.randn(2, 1, *size))
    assert out.shape == (2, *model.decoder.channels, *size)
    out.square().mean().backward()
    grads = [p.grad for p in model.decoder.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("encoder", [vgg, resnet])
@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_reach_every_layer(
    decoder: Callable[[int, Encoder], Decoder], encoder: Callable[[int], Encoder]
) -> None:
    torch.manual_seed(0)
    model = Both(2, encoder(2), decoder)
    model(torch.randn(2, 1, 65, 70)).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    used = [name for name in silent if not name.endswith("bias")]  # a norm takes away the bias before it
    assert not used


def test_scores_before_the_last_interpolation_are_the_same_function() -> None:
    torch.manual_seed(0)
    encoder = resnet(2)
    for kind in (FPNDecoder, DeepLabV3PlusDecoder):
        late = kind(2, encoder.channels, encoder.strides, 8).eval()
        early = kind(2, encoder.channels, encoder.strides, 8, outputs=2).eval()
        assert (early.scores, late.scores) == (True, False)
        early.load_state_dict(late.state_dict(), strict=False)
        maps = encoder(torch.randn(2, 1, 65, 70))
        torch.testing.assert_close(early(maps, (65, 70))[0], early.score(late(maps, (65, 70))[0]), atol=1e-5, rtol=1e-5)


# What sets the FCN and DeconvNet apart


def test_fcn_scores_start_at_zero_and_at_once_scales_the_finer_maps() -> None:
    maps = [torch.ones(1, 1, n, n) for n in (8, 4, 2)]
    strides = [(2, 2), (4, 4), (8, 8)]
    assert not FCNDecoder(2, (1, 1, 1), strides, 1, 8)(maps, (16, 16))[0].any()
    decoder = FCNDecoder(2, (1, 1, 1), strides, 1, 8, at_once=True)
    for layer, weight in zip(decoder.score_layers, (3.0, 5.0, 7.0), strict=True):
        nn.init.constant_(layer.weight, weight)
    torch.testing.assert_close(decoder(maps, (16, 16))[0], torch.full((1, 1, 16, 16), 7 + 5 * 0.01 + 3 * 0.0001))
    decoder.reset_parameters()
    assert not decoder(maps, (16, 16))[0].any()


def test_fcn_keeps_its_start_where_networks_are_filled_with_random_weights() -> None:
    decoder = FCNDecoder(2, (1, 1), [(2, 2), (4, 4)], 2, 16, fc_channels=3)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    initialize(decoder, seed=0)
    changed = {
        name.partition(".")[0] for name, parameter in decoder.named_parameters() if (parameter != before[name]).any()
    }
    assert changed == {"fc"}


def test_deconvnet_unpools_where_the_encoder_pools() -> None:
    assert [stage.switched for stage in deconvnet(2, vgg(2)).stages] == [True] * 5
    assert [stage.switched for stage in deconvnet(2, pooling(2)).stages] == [True] * 2
    plain = deconvnet(2, striding(2))
    assert not plain.needs_switches
    assert [stage.up.conv.stride for stage in plain.stages] == [(2, 2)] * 2
    encoder = vgg(2)
    strided = DeconvNetDecoder(2, encoder.channels, encoder.strides, encoder.switch_channels, unpooling="transposed")
    assert not strided.needs_switches


@pytest.mark.parametrize("taps", ["pools", "convs"])
def test_deconvnet_with_identities_is_unpooling_alone(taps: Literal["pools", "convs"]) -> None:
    torch.manual_seed(0)
    encoder = VGGEncoder(2, 1, "vgg11", width=2, depth=3, taps=taps).eval()
    decoder = DeconvNetDecoder(2, encoder.channels, encoder.strides, encoder.switch_channels, style=encoder.style)
    for layer in decoder.modules():
        if isinstance(layer, CONVOLUTIONS):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    x = torch.randn(2, 1, 35, 38)
    maps, switches = encoder.forward_with_switches(x)
    expected = maps[-1]
    for image in reversed(before_pools(encoder, x)):
        indices = F.max_pool2d(image, 2, ceil_mode=True, return_indices=True)[1]
        expected = F.max_unpool2d(expected[:, : image.shape[1]], indices, 2, output_size=image.shape[2:])
    assert torch.equal(decoder(maps, (35, 38), switches)[0], expected[:, : decoder.channels[0]])
    with pytest.raises(ValueError, match="switches must be given"):
        decoder(maps, (35, 38))


def before_pools(encoder: VGGEncoder, x: Tensor) -> list[Tensor]:
    """What each pool of a VGG is given."""
    given = []
    for layer in encoder.features:
        if isinstance(layer, nn.MaxPool2d):
            given.append(x)
        x = layer(x)
    return given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FCNDecoder(2, (4, 8), [(2, 2), (4, 4)], 3, 8),
            r"takes the coarsest map and 2 finer, 3 in all, and the .* 2.* stride 16",
        ),
        (lambda: FCNDecoder(2, (4, 8), [(2, 2), (4, 4)], 3, 4), "stride must be 32, 16 or 8, got 4"),
        (lambda: FCNDecoder(2, (4, 8), [(2, 2), (5, 4)], 3, 16), "multiples"),
        (
            lambda: DeconvNetDecoder(2, (4, 8), [(2, 2), (4, 4)], (None, 4), unpooling="switches"),
            r"needs 2 poolings to reverse, .* encoder has 1: none before its maps \[0\]",
        ),
        (lambda: DeconvNetDecoder(2, (4,), [(2, 2)], unpooling="max"), "'switches', 'transposed' or None, got 'max'"),
        (lambda: DeconvNetDecoder(2, (4,), [(2, 2)], convs_per_stage=(1, 2)), "each of 1 steps"),
        (lambda: FPNDecoder(2, (4,), [(2, 2)], maps=0), "maps must be at least 1, got 0"),
        (lambda: DeepLabV3PlusDecoder(2, (4,), [(2, 2)], rates=(0, 6)), "rates must be positive"),
    ],
)
def test_errors_say_what_is_wrong(make: Callable[[], Decoder], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
