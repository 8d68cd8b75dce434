"""U-Nets: the published ones to the number, peers' outputs with peers' weights, and every option at any size."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from densepred.models.encoders.residual import ResidualEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.heads import Classification, Segmentation
from densepred.models.layers import CONVOLUTIONS, fill_nearest_
from densepred.models.mirror import Mirrored, mirror
from densepred.models.nnunet_weights import from_nnunet
from densepred.models.presets import NNUNET_CHANNELS, nnunet, nnunet_residual, unet3d2016, unet2015
from densepred.models.valid import ValidAxis, ValidPredictor

SIZES = [(65, 70), (7, 7), (1, 1), (2, 3), (33, 30, 37), (7, 7, 7), (1, 1, 1), (2, 3, 1)]
OPTIONS = {
    "interpolated": UNetOptions(upsampling="interpolate"),
    "kept": UNetOptions(upsampling="interpolate", keep_channels=True, bias=True),
    "transposed_kept": UNetOptions(keep_channels=True, up_bias=False),
    "residual": UNetOptions(residual=True),
    "attention": UNetOptions(attention=True),
    "all": UNetOptions(upsampling="interpolate", residual=True, attention=True),
}
DECODERS = [*product([UNetDecoder], OPTIONS), *product([UNetPlusPlusDecoder], ["interpolated", "residual"])]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomize(model: nn.Module) -> None:
    """Weights, biases and statistics that no two layers share and that leave nothing at zero or one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.3)
            elif tensor.ndim > 1:
                tensor.normal_(0, (1 / tensor[0].numel()) ** 0.5)


def build(encoder: str, kind: type[Decoder], options: UNetOptions, dims: int) -> DensePredictor:
    body = ResNetEncoder(dims, 2, "resnet18", 4) if encoder == "resnet" else PlainEncoder(dims, 2, (4, 6, 8))
    decoder = kind(dims, body.channels, body.strides, convs_per_stage=2, style=body.style, options=options)
    return DensePredictor(body, decoder, dims, 2, 3)


def tiny(dims: int = 2, in_channels: int = 1, channels: Sequence[int] = (4, 6, 8)) -> ValidPredictor:
    style = Style("none", "relu")
    encoder = PlainEncoder(dims, in_channels, channels, style=style, pool="max", padding="valid")
    options = UNetOptions(padding="valid")
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, style=style, options=options)
    return ValidPredictor(encoder, decoder, dims, in_channels, 2)


def test_unet_of_2015() -> None:
    with torch.device("meta"):
        model = unet2015()
        assert count(model) == 31_030_658
        assert sum(isinstance(layer, CONVOLUTIONS) for layer in model.modules()) == 23  # "in total the network has 23"
        for size, output in ((572, 388), (188, 4), (204, 20)):
            assert model(torch.zeros(1, 1, size, size)).shape == (1, 2, output, output)
    axis = model.axes[0]
    assert [n for n in range(1, 600) if n >= axis.smallest and (n - axis.smallest) % axis.period == 0] == [
        *range(188, 600, 16)
    ]


def test_3d_unet_of_2016() -> None:
    with torch.device("meta"):
        model = unet3d2016()
        norms = sum(count(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
        assert (count(model) - norms, norms) == (19_069_955, 4_672)
        assert model(torch.zeros(1, 3, 116, 132, 132)).shape == (1, 3, 28, 44, 44)
        assert model.output_size((116, 132, 132)) == (28, 44, 44)


def test_sizes_that_do_not_fit_are_answered_with_the_arithmetic() -> None:
    with torch.device("meta"):
        model = unet2015()
        message = (
            r"an input of 572 x 570 voxels does not fit the network: along x, 570 voxels do not fit: 279 voxels are left "
            r"before pooling 2 \(570 -> 566 -> 279\), no multiple of its window 2; the nearest sizes that fit are 556 "
            r"and 572"
        )
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 1, 572, 570))
        with pytest.raises(ValueError, match=r"stage 5 take 4 voxels off the 1 that are left; .* are 188 and 204"):
            model(torch.zeros(1, 1, 76, 572))
        with pytest.raises(ValueError, match=r"decoder leave nothing of the 1 voxels .* fit are 188 and 204"):
            model(torch.zeros(1, 1, 140, 572))


@pytest.mark.parametrize(("pools", "kernels"), [((1, 2, 2), (3, 3, 5)), ((1, 3, 1), (1, 5, 3)), ((1, 2, 4), (3, 1, 3))])
def test_output_sizes_are_those_of_the_layers(pools: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        encoder = PlainEncoder(2, 1, (1, 1, 1), pools, kernels, style=Style("none"), pool="max", padding="valid")
        options = UNetOptions(padding="valid", residual=True)
        decoder = UNetDecoder(2, encoder.channels, encoder.strides, kernels, 1, encoder.style, options)
        model = ValidPredictor(encoder, decoder, 2, 1, 1)
        fitting = []
        for n in range(1, 70):
            try:
                expected = model.output_size((n, n))
            except ValueError:
                continue
            fitting.append(n)
            maps = encoder(torch.zeros(1, 1, n, n))
            assert decoder(maps, (n, n))[0].shape[2:] == expected
            assert all(m.shape[2] % pool == 0 for m, pool in zip(maps, pools[1:], strict=False))
    assert fitting == [*range(fitting[0], 70, model.axes[0].period)]
    assert model.axes[0].output(fitting[0]) <= model.axes[0].period


def test_valid_networks_are_made_of_fitting_parts() -> None:
    plain = PlainEncoder(2, 1, (4, 8), padding="valid")
    pooled = PlainEncoder(2, 1, (4, 8), pool="max", padding="valid")
    valid, same = (UNetDecoder(2, (4, 8), ((1, 1), (2, 2)), options=UNetOptions(padding=p)) for p in ("valid", "same"))
    with pytest.raises(ValueError, match="pool='max', got pool='stride'"):
        ValidPredictor(plain, valid, 2, 1, 2)
    with pytest.raises(ValueError, match="padding='valid', got padding='same'"):
        ValidPredictor(pooled, same, 2, 1, 2)
    with pytest.raises(ValueError, match=r"stride 1, got \(2, 2\)"):
        ValidPredictor(PlainEncoder(2, 1, (4, 8), (2, 2), pool="max", padding="valid"), valid, 2, 1, 2)
    with pytest.raises(ValueError, match="need odd kernels"):
        ValidAxis((1, 2), (3, 4), (4,))
    with pytest.raises(ValueError, match="padding must be 'valid' or 'mirror', got 'same'"):
        unet2015(padding="same")  # type: ignore[arg-type]


def centred_identity(model: DensePredictor, through_skips: bool) -> None:
    """Make the network hand its input on: by the finest skip, or by way of the coarsest map alone."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, CONVOLUTIONS):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[0, 0][tuple(k // 2 for k in layer.kernel_size)] = 1
        for step in model.decoder.steps:
            fill_nearest_(step.up)
        if through_skips:  # the first channel after those that come from below
            first = model.decoder.steps[-1].blocks[0].conv
            first.weight[0, first.out_channels] = first.weight[0, 0]
            first.weight[0, 0] = 0


@pytest.mark.parametrize("dims", [2, 3])
def test_the_output_is_the_middle_of_the_input(dims: int) -> None:
    model = tiny(dims)
    image = torch.rand(1, 1, *(44, 48, 52)[:dims])
    blocks = torch.rand(1, 1, *(12, 13, 14)[:dims])  # of the 4 voxels that two poolings join: they leave them alone
    for axis in range(2, 2 + dims):
        blocks = blocks.repeat_interleave(4, axis).narrow(axis, 2, image.shape[axis])  # pooling starts at voxel 2
    inner = (..., *(slice(2, -2),) * dims)
    for through_skips, x in ((True, image), (False, blocks)):
        centred_identity(model, through_skips)
        out = model(x)[:, :1]
        middle = tuple(slice((n - m) // 2, (n + m) // 2) for n, m in zip(x.shape[2:], out.shape[2:], strict=True))
        assert torch.equal(out, x[(..., *middle)])
        assert out.shape[2:] == model.output_size(x.shape[2:])
    assert torch.equal(Mirrored(model)(blocks)[:, :1][inner], blocks[inner])


def test_tiles_of_a_valid_network_join_to_what_the_mirrored_one_gives() -> None:
    torch.manual_seed(0)
    model = tiny()
    image = torch.rand(1, 1, 101, 90)
    whole = Mirrored(model)(image)
    assert whole.shape == (1, 2, 101, 90)
    axis = model.axes[0]
    before = axis.margin // 2
    for start in (20, 40):  # whole pooling periods
        tile = image[:, :, start - before :, start - before :][:, :, :60, :60]
        out = model(tile)
        n = axis.output(60)
        torch.testing.assert_close(out, whole[:, :, start : start + n, start : start + n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mirrored_networks_take_any_size(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Mirrored(tiny(len(size)))
    randomize(model)
    x = torch.rand(1, 1, *size, requires_grad=True)
    out = model(x)
    assert out.shape == (1, 2, *size)
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert float(x.grad.abs().sum()) > 0


def test_mirroring_is_numpys_reflection() -> None:
    np = pytest.importorskip("numpy")
    for n, before, after in ((1, 3, 2), (2, 5, 4), (3, 7, 9), (6, 2, 5)):
        row = torch.rand(1, 1, n, 2)
        expected = np.pad(row[0, 0].numpy(), ((before, after), (1, 1)), mode="reflect")
        assert torch.equal(mirror(row, (before, 1), (after, 1))[0, 0], torch.from_numpy(expected))


def test_a_mirrored_network_shares_weights_and_names_with_the_valid_one() -> None:
    encoder, decoder = tiny().encoder, tiny().decoder
    heads = {"organ": Segmentation(3), "grade": Classification(2)}
    valid = ValidPredictor(encoder, decoder, 2, 1, heads)  # type: ignore[arg-type]
    mirrored = Mirrored(valid)
    assert [*mirrored.state_dict()] == [*valid.state_dict()]
    assert all(a is b for a, b in zip(mirrored.parameters(), valid.parameters(), strict=True))
    shapes = {name: tuple(out.shape) for name, out in mirrored(torch.rand(2, 1, 9, 11)).items()}
    assert shapes == {"organ": (2, 3, 9, 11), "grade": (2, 2)}


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


def dna(kind: str, dims: int, stages: dict[str, Sequence[object]], **more: object) -> nn.Module:
    """A network of dynamic_network_architectures with nnU-Net's settings."""
    imports.torchvision()
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dims == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    settings = {"conv_bias": True, "norm_op": norm, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, **more}
    settings |= {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    count = len(stages["channels"])
    model: nn.Module = getattr(unet, kind)(
        2, count, stages["channels"], conv, stages["kernels"], stages["strides"], num_classes=3, **settings
    )
    return model


STAGES: dict[int, dict[str, Sequence[object]]] = {
    2: {
        "channels": (4, 6, 8, 10),
        "strides": ((1, 1), (2, 1), (2, 2), (2, 2)),
        "kernels": ((3, 3), (5, 3), (3, 3), (1, 3)),
    },
    3: {
        "channels": (4, 6, 8, 8),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)),
        "kernels": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    },
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("deep", [0, 2])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunet_computes_what_dynamic_network_architectures_does(kind: str, deep: int, dims: int) -> None:
    stages = STAGES[dims]
    if kind == "PlainConvUNet":
        theirs = dna(kind, dims, stages, n_conv_per_stage=2, n_conv_per_stage_decoder=2, deep_supervision=deep > 0)
        ours = nnunet(dims, 2, 3, **stages, deep_supervision=deep)  # type: ignore[arg-type]
    else:
        blocks = (1, 3, 4, 6)
        theirs = dna(
            kind, dims, stages, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1, deep_supervision=deep > 0
        )
        ours = nnunet_residual(dims, 2, 3, **stages, deep_supervision=deep)  # type: ignore[arg-type]
    randomize(theirs)
    ours.load_state_dict(from_nnunet(theirs.state_dict(), deep))
    x = torch.randn(2, 2, *((32, 64) if dims == 2 else (16, 32, 24)))
    expected = theirs(x)[: deep + 1] if deep else [theirs(x)]
    outputs = ours(x) if deep else {"segmentation": ours(x)}
    assert len(outputs) == deep + 1
    for output, reference in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)


def test_weights_of_batch_normed_networks_take_the_bias_off_the_running_mean() -> None:
    more = {"norm_op": nn.BatchNorm2d, "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1}
    theirs = dna("PlainConvUNet", 2, STAGES[2], **more).eval()
    randomize(theirs)
    style = Style("batch", "leaky_relu")
    stages = STAGES[2]
    encoder = PlainEncoder(2, 2, stages["channels"], stages["strides"], stages["kernels"], 1, style)  # type: ignore[arg-type]
    decoder = UNetDecoder(2, encoder.channels, encoder.strides, stages["kernels"], 1, style)  # type: ignore[arg-type]
    ours = DensePredictor(encoder, decoder, 2, 2, 3).eval()
    ours.load_state_dict(from_nnunet(theirs.state_dict()))
    x = torch.randn(2, 2, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_weights_of_other_networks_are_refused() -> None:
    up = {"decoder.transpconvs.0.weight": torch.zeros(4, 4, 2, 2)}
    with pytest.raises(ValueError, match=r"got a weight called encoder\.stages\.0\.blocks\.0\.conv3\.conv\.weight"):
        from_nnunet({"encoder.stages.0.blocks.0.conv3.conv.weight": torch.zeros(1), **up})
    with pytest.raises(ValueError, match="deep_supervision must be at least 0 and below 1 stages, got 1"):
        from_nnunet(up, deep_supervision=1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_default_nnunets_have_dynamic_network_architectures_parameters(kind: str, dims: int) -> None:
    channels = NNUNET_CHANNELS[dims]
    stages = {"channels": channels, "strides": (1, *[2] * (len(channels) - 1)), "kernels": (3,) * len(channels)}
    with torch.device("meta"):
        if kind == "PlainConvUNet":
            ours = nnunet(dims, 2, 3)
            theirs = dna(kind, dims, stages, n_conv_per_stage=2, n_conv_per_stage_decoder=2)
        else:
            blocks = (1, 3, 4, *[6] * (len(channels) - 3))
            ours = nnunet_residual(dims, 2, 3)
            theirs = dna(kind, dims, stages, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1)
        ours.load_state_dict(from_nnunet(theirs.state_dict()), assign=True)


@pytest.mark.parametrize("dims", [2, 3])
def test_residual_steps_compute_what_dynamic_network_architectures_do(dims: int) -> None:
    more = {"n_blocks_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": False}
    theirs = dna("ResidualUNet", dims, STAGES[dims], **more)
    randomize(theirs)
    encoder = ResidualEncoder(dims, 2, **STAGES[dims], blocks_per_stage=1)  # type: ignore[arg-type]
    decoder = UNetDecoder(
        dims,
        encoder.channels,
        encoder.strides,
        STAGES[dims]["kernels"],  # type: ignore[arg-type]
        options=UNetOptions(residual=True, up_bias=False),
    )
    ours = DensePredictor(encoder, decoder, dims, 2, 3)
    inner = {"conv1": "blocks.0", "conv2": "blocks.1", "skip.0.conv": "projection.0", "skip.0.norm": "projection.1"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        match = re.fullmatch(r"decoder\.stages\.(\d)\.blocks\.0\.(conv1|conv2|skip\.0\.conv|skip\.0\.norm)(.+)", name)
        if match and "all_modules" not in name:
            state[f"decoder.steps.{match[1]}.blocks.0.{inner[match[2]]}{match[3]}"] = tensor
    rest = {n: t for n, t in theirs.state_dict().items() if not n.startswith("decoder.stages.")}
    ours.load_state_dict(state | from_nnunet(rest))
    x = torch.randn(2, 2, *(16, 32, 24)[:dims])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


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


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    free = dict.fromkeys(range(2, x.ndim), torch.export.Dim.DYNAMIC) | {0: torch.export.Dim.AUTO}
    return torch.export.export(model.eval(), (x,), dynamic_shapes={"x": free}).module()


@pytest.mark.parametrize("name", ["all", "kept", "unetplusplus", "mirrored"])
def test_they_export_with_free_sizes(name: str) -> None:
    torch.manual_seed(0)
    dims = 3 if name == "all" else 2
    if name == "mirrored":
        model: DensePredictor = Mirrored(tiny(dims, 2))
    else:
        kind = UNetPlusPlusDecoder if name == "unetplusplus" else UNetDecoder
        model = build("plain", kind, OPTIONS.get(name, UNetOptions()), dims)
    program = exported(model, torch.randn(2, 2, *(33, 30, 37)[:dims]))
    for size in ((12, 13, 14), (40, 40, 40), (9, 31, 5)):
        x = torch.randn(1, 2, *size[:dims])
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_wrong_options_name_what_is_allowed_and_what_came() -> None:
    with pytest.raises(ValueError, match="upsampling must be 'transposed' or 'interpolate', got 'nearest'"):
        UNetOptions(upsampling="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding must be 'same' or 'valid', got 'mirror'"):
        UNetOptions(padding="mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither attention gates nor valid convolutions"):
        UNetPlusPlusDecoder(2, (4, 8), ((1, 1), (2, 2)), options=UNetOptions(attention=True))
