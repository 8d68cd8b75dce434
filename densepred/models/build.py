"""From names and options to a network: encoder, decoder and heads in one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from densepred.config import ModelConfig
from densepred.models.blocks import Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.unet import UNetDecoder
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.heads import HEADS
from densepred.models.layers import CONVOLUTIONS, Size
from densepred.registry import lookup


def _plain(config: ModelConfig, in_channels: int) -> Encoder:
    style = Style(config.norm or "instance", config.activation or "leaky_relu", config.dropout)
    return PlainEncoder(
        config.dims, in_channels, config.channels, config.strides, config.kernels, config.convs_per_stage, style
    )


def _resnet(depth: int, config: ModelConfig, in_channels: int) -> Encoder:
    for name in ("strides", "kernels"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} belongs to the plain encoder, encoder is {config.encoder!r}")
    style = Style(config.norm or "batch", config.activation or "relu", config.dropout)
    return ResNetEncoder(config.dims, in_channels, depth, style=style)


def _unet(config: ModelConfig, encoder: Encoder) -> Decoder:
    kernels = config.kernels if config.encoder == "plain" else None
    return UNetDecoder(config.dims, encoder.channels, encoder.strides, kernels, config.convs_per_stage, encoder.style)


ENCODERS: dict[str, Callable[[ModelConfig, int], Encoder]] = {
    "plain": _plain,
    "resnet18": partial(_resnet, 18),
    "resnet34": partial(_resnet, 34),
    "resnet50": partial(_resnet, 50),
}
DECODERS: dict[str, Callable[[ModelConfig, Encoder], Decoder]] = {"unet": _unet}


class DensePredictor(nn.Module):
    """An encoder, a decoder and named heads.

    Args:
        encoder: gives feature maps, finest first.
        decoder: gives maps from the image's size to coarser ones.
        dims: 2 or 3.
        in_channels: channels of the image.
        classes: outputs per voxel.
        deep_supervision: coarser decoder maps that get a head of their own.

    Raises:
        ValueError: more of them than the decoder has coarser maps, or two of the same stride.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, dims: int, in_channels: int, classes: int, deep_supervision: int = 0
    ) -> None:
        super().__init__()
        coarser = len(decoder.channels) - 1
        if not 0 <= deep_supervision <= coarser:
            raise ValueError(f"deep_supervision must be 0 to {coarser} coarser decoder maps, got {deep_supervision!r}")
        self.encoder, self.decoder = encoder, decoder
        self.dims, self.in_channels, self.classes = dims, in_channels, classes
        strides = decoder.strides[: deep_supervision + 1]
        names = ["segmentation", *(f"segmentation@{max(stride)}" for stride in strides[1:])]
        if len(set(names)) < len(names):
            raise ValueError(f"deep_supervision needs maps of different largest strides, got {strides}")
        self.heads = nn.ModuleDict()
        for name, width in zip(names, decoder.channels, strict=False):
            self.heads[name] = HEADS["segmentation"](dims, width, classes)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """(B, C, *spatial) -> logits (B, K, *spatial).

        With deep supervision a dict in training and evaluation alike: "segmentation" as above, and "segmentation@s" of
        (B, K, *ceil(spatial / s)) for each further map, s being its stride (the largest over the axes).

        Raises:
            ValueError: the input has another number of axes or channels than the model.
        """
        self._check(x)
        maps = self.decoder(self.encoder(x), x.shape[2:])
        outputs = {name: head(m) for (name, head), m in zip(self.heads.items(), maps, strict=False)}
        return outputs if len(outputs) > 1 else outputs["segmentation"]

    def _check(self, x: Tensor) -> None:
        shape = tuple(x.shape)
        axes = "(batch, channels, z, y, x)" if self.dims == 3 else "(batch, channels, y, x)"
        if x.ndim != self.dims + 2:
            raise ValueError(f"model expects {self.dims + 2} axes {axes}, input {shape} has {x.ndim}")
        if x.shape[1] != self.in_channels:
            noun = "channel" if self.in_channels == 1 else "channels"
            raise ValueError(f"model expects {self.in_channels} {noun}, input {shape} has {x.shape[1]}")


def build(config: ModelConfig, in_channels: int, classes: int, seed: int | None = None) -> DensePredictor:
    """The network that a configuration describes, with fresh weights.

    Args:
        config: the section `model`.
        in_channels: channels of the image.
        classes: outputs per voxel.
        seed: the weights are a function of it and of the architecture alone; by default drawn from torch's generator.

    Raises:
        ValueError: an unknown name or impossible combination.
    """
    encoder = lookup(ENCODERS, config.encoder, "encoder")(config, in_channels)
    decoder = lookup(DECODERS, config.decoder, "decoder")(config, encoder)
    model = DensePredictor(encoder, decoder, config.dims, in_channels, classes, config.deep_supervision)
    return initialize(model, seed)


def create_model(
    encoder: str = "plain",
    decoder: str = "unet",
    dims: Literal[2, 3] = 3,
    in_channels: int = 1,
    classes: int = 3,
    *,
    channels: Sequence[int] = (32, 64, 128, 256, 320),
    strides: Sequence[Size] | None = None,
    kernels: Sequence[Size] | None = None,
    convs_per_stage: int = 2,
    norm: Literal["instance", "batch", "group", "none"] | None = None,
    activation: str | None = None,
    dropout: float = 0.0,
    deep_supervision: int = 0,
    seed: int | None = None,
) -> DensePredictor:
    """A network from names and options; see `ModelConfig` for what each means and `DensePredictor` for what it returns.

    Raises:
        ValueError: an unknown name, a value outside its range or an impossible combination.

    Example:
        >>> import torch
        >>> model = create_model("plain", "unet", dims=2, in_channels=1, classes=3, channels=(8, 16))
        >>> model(torch.zeros(1, 1, 65, 70)).shape
        torch.Size([1, 3, 65, 70])
    """
    options = {
        "encoder": encoder,
        "decoder": decoder,
        "dims": dims,
        "channels": channels,
        "strides": strides,
        "kernels": kernels,
        "convs_per_stage": convs_per_stage,
        "norm": norm,
        "activation": activation,
        "dropout": dropout,
        "deep_supervision": deep_supervision,
    }
    config = ModelConfig.model_validate(options)
    return build(config, in_channels, classes, seed)


def initialize(model: DensePredictor, seed: int | None = None) -> DensePredictor:
    """Fill the convolutions: He et al. 2015 for leaky ReLU of slope 0.01, biases zero. Changes and returns `model`.

    The numbers depend on the seed and the order of the layers, not on device or memory format. Meta tensors stay so.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    generator = torch.Generator("cpu").manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, CONVOLUTIONS) and not layer.weight.is_meta:
            weight = torch.empty(layer.weight.shape, device="cpu")
            nn.init.kaiming_normal_(weight, a=0.01, generator=generator)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.zero_()
    return model
