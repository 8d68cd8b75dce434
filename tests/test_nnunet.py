"""nnU-Net's networks: the outputs of dynamic_network_architectures with its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.decoders.unet import UNetDecoder, UNetOptions
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.residual import ResidualEncoder
from densepred.models.nnunet_weights import from_nnunet
from densepred.models.presets import NNUNET_CHANNELS, nnunet, nnunet_residual
from tests.unet_helpers import randomize

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
    image = torch.randn(2, 2, *((32, 64) if dims == 2 else (16, 32, 24)))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = image.to(dtype)
        expected = theirs.to(dtype)(x)[: deep + 1] if deep else [theirs.to(dtype)(x)]
        outputs = ours.to(dtype)(x) if deep else {"segmentation": ours.to(dtype)(x)}
        assert len(outputs) == deep + 1
        for output, reference in zip(outputs.values(), expected, strict=True):
            torch.testing.assert_close(output, reference, atol=bound * float(reference.detach().abs().max()), rtol=0)


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
    found = {name: tensor.shape for name, tensor in from_nnunet(theirs.state_dict()).items()}
    assert found == {name: tensor.shape for name, tensor in ours.state_dict().items()}


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
