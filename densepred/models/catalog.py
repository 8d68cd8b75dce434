"""The names of all networks and the options each takes; knows nothing of torch, so that recipes are checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CHANNELS = (32, 64, 128, 256, 320)
"""Of the stages of a plain or residual encoder, where nothing else is given."""
NNUNET_CHANNELS = {2: (32, 64, 128, 256, 512, 512, 512, 512), 3: (32, 64, 128, 256, 320, 320)}
"""What nnU-Net plans for large patches, by dimensions."""
STYLE = frozenset({"norm", "activation", "dropout"})
"""Options of nearly every network of our own."""


@dataclass(frozen=True)
class Entry:
    """What can be said of a network without building it.

    Attributes:
        options: the fields of `ModelConfig` it takes, besides encoder, decoder, network and dims.
        dims: numbers of spatial dimensions it exists in.
    """

    options: frozenset[str]
    dims: tuple[int, ...] = (2, 3)


def _entries(names: str, *options: str, style: bool = True, dims: tuple[int, ...] = (2, 3)) -> dict[str, Entry]:
    entry = Entry(frozenset(options) | (STYLE if style else frozenset()), dims)
    return dict.fromkeys(names.split(), entry)


_STAGES = ("channels", "strides", "kernels")
_FAMILY = ("width", "depth", "output_stride", "pretrained")

ENCODERS: dict[str, Entry] = {
    **_entries("plain", *_STAGES, "convs_per_stage", "pool", "pretrained"),
    **_entries("residual", *_STAGES, "convs_per_stage", "stochastic_depth", "pretrained"),
    **_entries("vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn", *_FAMILY),
    **_entries("resnet18 resnet34 resnet50 resnet101 resnet152", *_FAMILY, "stochastic_depth"),
    **_entries("resnext50_32x4d resnext101_32x8d resnext101_64x4d", *_FAMILY, "stochastic_depth"),
    **_entries("wide_resnet50_2 wide_resnet101_2", *_FAMILY, "stochastic_depth"),
    **_entries("se_resnet18 se_resnet34 se_resnet50 se_resnet101 se_resnet152", *_FAMILY, "stochastic_depth"),
    **_entries("convnext_tiny convnext_small convnext_base convnext_large", *_FAMILY, "stochastic_depth"),
    **_entries("convnextv2_atto convnextv2_femto convnextv2_pico convnextv2_nano", *_FAMILY, "stochastic_depth"),
    **_entries("convnextv2_tiny convnextv2_base convnextv2_large convnextv2_huge", *_FAMILY, "stochastic_depth"),
    **_entries("lenet5", style=False),
}
"""Encoders of our own."""

_WIDTHS, _SMOOTH = "decoder_channels", ("smooth_start", "deep_supervision")

DECODERS: dict[str, Entry] = {
    **_entries("unet", _WIDTHS, "decoder_convs", "fine_channels", "upsampling", "residual", "attention", *_SMOOTH),
    **_entries("unetplusplus", _WIDTHS, "decoder_convs", "fine_channels", "upsampling", "residual", *_SMOOTH),
    **_entries("fcn32s fcn16s fcn8s", "fc_channels", "dropout", style=False),  # scores have no norm
    **_entries("deconvnet", "fc_channels", "unpooling"),
    **_entries("fpn", _WIDTHS, "activation", "dropout", style=False),  # its group norm is as published
    **_entries("deeplabv3plus", _WIDTHS),
}
"""Decoders of our own."""

NETWORKS: dict[str, Entry] = {
    **_entries("unet2015", style=False, dims=(2,)),
    **_entries("unet3d2016", style=False, dims=(3,)),
    **_entries("nnunet nnunet_residual", *_STAGES, "convs_per_stage", "decoder_convs", "deep_supervision", style=False),
}
"""Whole networks as published, named instead of an encoder and a decoder."""

ADAPTERS: dict[str, dict[str, Entry]] = {
    "encoder": {
        "timm.": Entry(frozenset({"depth", "options", "pretrained"}), (2,)),
        "torchvision.": Entry(frozenset({"depth", "options", "pretrained"}), (2,)),
        "smp.": Entry(frozenset({"depth", "options", "pretrained"}), (2,)),
    },
    "decoder": {"smp.": Entry(frozenset({"options"}), (2,))},
    "network": {"monai.": Entry(frozenset({"options"}))},
}
"""Other libraries' networks: the start of the name -> what holds for all of them."""

ACTIVATIONS = ("leaky_relu", "relu", "elu", "gelu", "silu", "none")

REGISTRIES: dict[str, Mapping[str, Entry]] = {"encoder": ENCODERS, "decoder": DECODERS, "network": NETWORKS}


def find(kind: str, name: str) -> Entry | None:
    """The entry of a name of ours or of another library's; None where there is no such name.

    Args:
        kind: "encoder", "decoder" or "network".
        name: such as "resnet18" or "timm.mobilenetv3_small_050" (the part behind the dot is not looked at).
    """
    prefix = name.partition(".")[0] + "."
    return REGISTRIES[kind].get(name) or ADAPTERS[kind].get(prefix)
