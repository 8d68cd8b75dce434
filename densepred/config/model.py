"""The section `model` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from densepred.config.base import PerStage, Positive, Section

Scalar = bool | int | float | str
Row = Scalar | Annotated[tuple[Scalar, ...], Field(strict=False)]
Option = Row | Annotated[tuple[Row, ...], Field(strict=False)] | None
"""A number or text, or a list of them, or a list of such lists."""


class ModelConfig(Section):
    """The network: an encoder and a decoder by name, or a whole published network; `densepred models` lists them."""

    encoder: str = "plain"
    """plain, residual, resnet18, vgg16_bn, convnext_tiny, se_resnet50, timm.NAME, torchvision.NAME, smp.NAME ..."""
    decoder: str = "unet"
    """unet, unetplusplus, fcn32s, fcn16s, fcn8s, deconvnet, fpn, deeplabv3plus or smp.NAME."""
    network: str | None = None
    """A whole network instead: unet2015, unet3d2016, nnunet, nnunet_residual or monai.NAME."""
    dims: Literal[2, 3] = 3
    """Spatial dimensions."""
    channels: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2)] | None = None
    """Feature maps of each stage, finest first; by default 32, 64, 128, 256, 320, and nnU-Net's own for `nnunet`."""
    strides: PerStage | None = None
    """Downsampling at the start of each plain or residual stage, a number or one per axis; by default 1, then 2."""
    kernels: PerStage | None = None
    """Convolution kernel of each plain or residual stage, one number or one per axis; by default 3."""
    convs_per_stage: Positive | Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Convolutions of each plain stage (by default 2), blocks of each residual one (by default 1, 3, 4, 6, 6 ...)."""
    pool: Literal["stride", "max"] = "stride"
    """How a plain encoder downsamples: by the stride of its first convolution, or by max pooling before it."""
    width: Positive | None = None
    """Channels of the first stage of an ImageNet family; by default as published."""
    depth: Positive | None = None
    """Keep only so many of the encoder's maps, finest first."""
    output_stride: Literal[8, 16, 32] | None = None
    """Stages of an ImageNet family that would stride beyond are dilated instead."""
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of skipping the last residual block in training; that of the others grows towards it."""
    pretrained: str | None = None
    """Weights to start the encoder from: `imagenet` for those of its library, or a file (.safetensors, .pth)."""
    norm: Literal["instance", "batch", "group", "layer", "none"] | None = None
    """Normalisation of our layers; by default the family's: instance for plain and residual, batch for ResNets ..."""
    activation: str | None = None
    """leaky_relu, relu, elu, gelu, silu or none, in our layers; by default the family's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Channel dropout after each stage."""
    decoder_channels: Positive | Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Widths of the U-Net's steps, finest first (by default the encoder's), or the one width of fpn, deeplabv3plus."""
    fine_channels: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] | None = None
    """Stages of two convolutions on the grids finer than the encoder's first map, whose maps join the U-Net's last
    steps: the width of each, finest first (two where a stem strides by 4); by default none."""
    decoder_convs: Positive = 2
    """Convolutions in each step of a U-Net decoder."""
    upsampling: Literal["transposed", "interpolate"] = "transposed"
    """How a U-Net decoder goes to the finer grid: transposed convolution, or linear interpolation."""
    smooth_start: bool = False
    """Transposed convolutions start as nearest or linear interpolation: no checkerboard before training."""
    residual: bool = False
    """Shortcuts around the convolutions of each U-Net step."""
    attention: bool = False
    """Attention gates on the skips of a U-Net decoder (Oktay et al. 2018)."""
    fc_channels: Positive | None = None
    """Width of fc6 and fc7 in FCN and DeconvNet; by default 4096 on a VGG encoder, none on others."""
    unpooling: Literal["switches", "transposed"] | None = None
    """DeconvNet: with the encoder's switches or by strided transposed convolution; by default switches if there are."""
    deep_supervision: Annotated[int, Field(ge=0)] = 0
    """Number of coarser decoder stages that get an output and a loss of their own."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Arguments of a network of timm, smp or monai."""
