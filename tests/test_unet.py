"""The U-Net's options and U-Net++: peers' outputs with peers' weights, and the image's size back at any size."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.steps import AttentionGate, StepShape, UpStep
from densepred.models.decoders.unet import UNetDecoder, UNetOptions
from densepred.models.decoders.unetplusplus import UNetPlusPlusDecoder
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from tests.unet_helpers import SIZES, count, exported, randomize

OPTIONS = {
    "interpolated": UNetOptions(upsampling="interpolate"),
    "kept": UNetOptions(upsampling="interpolate", keep_channels=True, bias=True),
    "transposed_kept": UNetOptions(keep_channels=True, up_bias=False),
    "residual": UNetOptions(residual=True),
    "attention": UNetOptions(attention=True),
    "all": UNetOptions(upsampling="interpolate", residual=True, attention=True),
}
DECODERS = [*product([UNetDecoder], OPTIONS), *product([UNetPlusPlusDecoder], ["interpolated", "residual"])]


def build(encoder: str, kind: type[Decoder], options: UNetOptions, dims: int) -> DensePredictor:
    body = ResNetEncoder(dims, 2, "resnet18", 4) if encoder == "resnet" else PlainEncoder(dims, 2, (4, 6, 8))
    decoder = kind(dims, body.channels, body.strides, convs_per_stage=2, style=body.style, options=options)
    return DensePredictor(body, decoder, dims, 2, 3)


@pytest.mark.parametrize(("kind", "name"), DECODERS)
@pytest.mark.parametrize("encoder", ["plain", "resnet"])
def test_every_option_gives_the_size_of_the_image_on_every_encoder(
    encoder: str, kind: type[Decoder], name: str
) -> None:
    torch.manual_seed(0)
    for dims in (2, 3):
        model = build(encoder, kind, OPTIONS[name], dims)
        for size in [size for size in SIZES if len(size) == dims]:
            maps = model.decoder(model.encoder(torch.zeros(1, 2, *size)), size)
            assert [m.shape[1] for m in maps] == list(model.decoder.channels)
            grids = [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in model.decoder.strides]
            assert [tuple(m.shape[2:]) for m in maps] == grids
            assert grids[0] == size
        out = model(torch.randn(1, 2, *(13, 10, 9)[:dims]))
        out.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [UNetDecoder, UNetPlusPlusDecoder])
def test_widths_are_given_finest_first(kind: type[Decoder]) -> None:
    encoder = ResNetEncoder(2, 3, "resnet18", 4)
    decoder = kind(2, encoder.channels, encoder.strides, options=UNetOptions(widths=(3, 5, 7, 9, 11)))
    assert decoder.channels == (3, 5, 7, 9, 11)
    maps = decoder(encoder(torch.zeros(1, 3, 33, 35)), (33, 35))
    assert [m.shape[1] for m in maps] == [3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match=r"a positive int for each of the 5 steps, got \(256, 128\)"):
        kind(2, encoder.channels, encoder.strides, options=UNetOptions(widths=(256, 128)))


def smp_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """smp's names of the layers in a step -> ours."""
    inner = {
        "conv1.0": "blocks.0.conv",
        "conv1.1": "blocks.0.norm",
        "conv2.0": "blocks.1.conv",
        "conv2.1": "blocks.1.norm",
    }
    return {re.sub(r"conv\d\.\d", lambda m: inner[m[0]], name): tensor for name, tensor in state.items()}


def test_unet_and_unetplusplus_compute_what_smps_do() -> None:
    imports.smp()
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

    channels, widths, strides = (6, 8, 10, 12), (3, 5, 7, 9), ((2, 2), (4, 4), (8, 8), (16, 16))
    options = UNetOptions(widths=widths, upsampling="interpolate", keep_channels=True)
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, (s, _) in zip((1, *channels), ((1, 1), *strides), strict=True)]
    for theirs_kind, kind in ((UnetDecoder, UNetDecoder), (UnetPlusPlusDecoder, UNetPlusPlusDecoder)):
        theirs = theirs_kind((1, *channels), widths[::-1], n_blocks=4, interpolation_mode="bilinear").eval()
        ours = kind(2, channels, strides, style=Style("batch", "relu"), options=options).eval()
        randomize(theirs)
        state = smp_names(theirs.state_dict())
        state = {re.sub(r"^blocks\.(\d)", r"steps.\1", name): tensor for name, tensor in state.items()}
        state = {re.sub(r"^blocks\.x_0_3", "steps.0", name): tensor for name, tensor in state.items()}
        # smp's x_i_k is in row 2 - k, and in the last column for i = 0
        node = lambda m: f"nodes.{2 - int(m[2])}_{int(m[2]) - int(m[1]) + 1}"  # noqa: E731
        ours.load_state_dict({re.sub(r"^blocks\.x_(\d)_(\d)", node, name): tensor for name, tensor in state.items()})
        assert count(ours) == count(theirs)
        expected = theirs(maps) if kind is UNetPlusPlusDecoder else theirs(list(maps))
        torch.testing.assert_close(ours(maps[1:], (64, 96))[0], expected, atol=1e-5, rtol=1e-5)


def test_attention_gate_computes_what_monais_does() -> None:
    attention = pytest.importorskip("monai.networks.nets.attentionunet")
    theirs = attention.AttentionBlock(3, f_int=3, f_g=5, f_l=6).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_var.fill_(1 - layer.eps)  # so that it hands its input on
    ours = AttentionGate(3, gating=5, channels=6, ratio=(1, 1, 1))
    with torch.no_grad():
        for mine, conv in ((ours.theta, theirs.W_x), (ours.phi, theirs.W_g), (ours.psi, theirs.psi)):
            mine.weight.copy_(conv[0].conv.weight)
            if mine.bias is not None:
                mine.bias.copy_(conv[0].conv.bias)
        ours.phi.bias += theirs.W_x[0].conv.bias
    skip, gating = torch.randn(2, 6, 4, 5, 6), torch.randn(2, 5, 4, 5, 6)
    torch.testing.assert_close(ours(skip, gating), theirs(gating, skip), atol=1e-6, rtol=1e-5)


def test_attention_coefficients_are_found_on_the_coarse_grid() -> None:
    gate = AttentionGate(2, gating=3, channels=4, ratio=(2, 1))
    skip, gating = torch.randn(1, 4, 7, 6), torch.randn(1, 3, 4, 6)
    padded = F.pad(skip, (0, 0, 0, 1))
    theta = sum(torch.einsum("oc,bcyx->boyx", gate.theta.weight[:, :, i, 0], padded[:, :, i::2]) for i in (0, 1))
    phi = torch.einsum("oc,bcyx->boyx", gate.phi.weight[:, :, 0, 0], gating) + gate.phi.bias[:, None, None]
    psi = torch.einsum("oc,bcyx->boyx", gate.psi.weight[:, :, 0, 0], (theta + phi).clamp(min=0)) + gate.psi.bias
    coarse = 1 / (1 + (-psi).exp())
    left, right = coarse[:, :, :-1], coarse[:, :, 1:]  # voxel 2i lies a quarter of the way to i - 1, 2i + 1 to i + 1
    inner = torch.stack((0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right), dim=3).flatten(2, 3)
    fine = torch.cat((coarse[:, :, :1], inner), dim=2)
    torch.testing.assert_close(gate(skip, gating), skip * fine, atol=1e-6, rtol=1e-5)


def test_interpolation_keeps_ramps_straight() -> None:
    step = UpStep(2, StepShape(below=1, skips=0, out=1, ratio=(2, 1)), 1, options=UNetOptions(upsampling="interpolate"))
    with torch.no_grad():
        step.up.conv.weight.fill_(1)
        step.up.conv.bias.zero_()
    ramp = torch.arange(5.0).reshape(1, 1, 5, 1)
    fine = step.up(ramp).flatten()
    assert fine[1:-1].tolist() == [0.25 + 0.5 * i for i in range(8)]


def test_unetplusplus_supervises_each_grid_once() -> None:
    encoder = PlainEncoder(3, 1, (4, 6, 8, 10))
    decoder = UNetPlusPlusDecoder(3, encoder.channels, encoder.strides)
    outputs = DensePredictor(encoder, decoder, 3, 1, 3, deep_supervision=2)(torch.zeros(1, 1, 9, 10, 11))
    assert [tuple(out.shape[2:]) for out in outputs.values()] == [(9, 10, 11), (5, 5, 6), (3, 3, 3)]
    assert [*outputs] == ["segmentation", "segmentation@2", "segmentation@4"]


def test_wrong_options_name_what_is_allowed_and_what_came() -> None:
    with pytest.raises(ValueError, match="upsampling must be 'transposed' or 'interpolate', got 'nearest'"):
        UNetOptions(upsampling="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding must be 'same' or 'valid', got 'mirror'"):
        UNetOptions(padding="mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither attention gates nor valid convolutions"):
        UNetPlusPlusDecoder(2, (4, 8), ((1, 1), (2, 2)), options=UNetOptions(attention=True))


@pytest.mark.parametrize(("name", "dims"), [("all", 3), ("kept", 2), ("unetplusplus", 2)])
def test_they_export_with_free_sizes(name: str, dims: int) -> None:
    torch.manual_seed(0)
    kind = UNetPlusPlusDecoder if name == "unetplusplus" else UNetDecoder
    model = build("plain", kind, OPTIONS.get(name, UNetOptions()), dims)
    program = exported(model, torch.randn(2, 2, *(33, 30, 37)[:dims]))
    for size in ((12, 13, 14), (40, 40, 40), (9, 31, 5)):
        x = torch.randn(1, 2, *size[:dims])
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)
