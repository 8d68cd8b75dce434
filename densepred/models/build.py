"""From names and options to a network: encoder, decoder and heads in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from densepred.config import ModelConfig
from densepred.config.contradictions import of_model
from densepred.config.loading import field_faults
from densepred.errors import NetworkError
from densepred.models import presets
from densepred.models.adapters.smp_decoder import smp_decoder
from densepred.models.adapters.smp_encoder import smp_encoder
from densepred.models.adapters.timm_encoder import timm_encoder
from densepred.models.adapters.torchvision_encoder import torchvision_encoder
from densepred.models.blocks import Style
from densepred.models.catalog import CHANNELS
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.deconvnet import DeconvNetDecoder
from densepred.models.decoders.deeplab import DeepLabV3PlusDecoder
from densepred.models.decoders.fcn import FCNDecoder
from densepred.models.decoders.fpn import FPNDecoder
from densepred.models.decoders.steps import UNetOptions
from densepred.models.decoders.unet import UNetDecoder, stride_ratio, way_up
from densepred.models.decoders.unetplusplus import UNetPlusPlusDecoder
from densepred.models.dense import DensePredictor, Model
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.convnext import VARIANTS as CONVNEXT
from densepred.models.encoders.convnext import ConvNeXtEncoder
from densepred.models.encoders.lenet import LeNetEncoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.residual import ResidualEncoder
from densepred.models.encoders.resnet import VARIANTS as RESNET
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VARIANTS as VGG
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.heads import HeadSpec
from densepred.models.layers import CONVOLUTIONS, TRANSPOSED, Network, fill_nearest_
from densepred.models.weights import load_weights
from densepred.registry import lookup

Heads = Mapping[str, HeadSpec] | int


def _style(config: ModelConfig, norm: str, activation: str) -> Style:
    return Style(config.norm or norm, config.activation or activation, config.dropout)


def _own_style(config: ModelConfig, encoder: Encoder) -> Style:
    """The decoder's: that of the encoder, and what is given for one whose own layers do not take it."""
    own = encoder.style
    return Style(config.norm or own.norm, config.activation or own.activation, config.dropout or own.dropout)


def _plain(config: ModelConfig, in_channels: int) -> Encoder:
    counts, style = config.convs_per_stage or 2, _style(config, "instance", "leaky_relu")
    stages = (config.channels or CHANNELS, config.strides, config.kernels, counts)
    return PlainEncoder(config.dims, in_channels, *stages, style, config.pool)


def _residual(config: ModelConfig, in_channels: int) -> Encoder:
    style = _style(config, "instance", "leaky_relu")
    stages = (config.channels or CHANNELS, config.strides, config.kernels, config.convs_per_stage)
    return ResidualEncoder(config.dims, in_channels, *stages, style, config.stochastic_depth)


def _vgg(config: ModelConfig, in_channels: int) -> Encoder:
    style = _style(config, "batch" if config.encoder.endswith("_bn") else "none", "relu")
    taps: Literal["convs", "pools"] = "pools" if config.decoder in ("deconvnet", *_FCN) else "convs"
    given = _given(config, "width", "depth", "output_stride")
    return VGGEncoder(config.dims, in_channels, config.encoder, style=style, taps=taps, **given)


def _resnet(config: ModelConfig, in_channels: int) -> Encoder:
    given = _given(config, "width", "depth", "output_stride", "stochastic_depth")
    return ResNetEncoder(config.dims, in_channels, config.encoder, style=_style(config, "batch", "relu"), **given)


def _convnext(config: ModelConfig, in_channels: int) -> Encoder:
    given = _given(config, "width", "depth", "output_stride", "stochastic_depth")
    return ConvNeXtEncoder(config.dims, in_channels, config.encoder, style=_style(config, "layer", "gelu"), **given)


def _given(config: ModelConfig, *names: str) -> dict[str, Any]:
    """Options that were given; the others stay at the network's own defaults."""
    given = {name: getattr(config, name) for name in names if getattr(config, name)}
    if config.decoder == "deeplabv3plus" and "output_stride" in names:
        given.setdefault("output_stride", 16)  # as published (Chen et al. 2018)
    return given


def _adapted(make: Callable[..., Encoder], config: ModelConfig, in_channels: int) -> Encoder:
    name = config.encoder.partition(".")[2]
    return make(name, config.dims, in_channels, config.depth, config.options)


ENCODERS: dict[str, Callable[[ModelConfig, int], Encoder]] = {
    "plain": _plain,
    "residual": _residual,
    **dict.fromkeys(VGG, _vgg),
    **dict.fromkeys(RESNET, _resnet),
    **dict.fromkeys(CONVNEXT, _convnext),
    "lenet5": lambda config, in_channels: LeNetEncoder(config.dims, in_channels),
    "timm.": partial(_adapted, timm_encoder),
    "torchvision.": partial(_adapted, torchvision_encoder),
    "smp.": partial(_adapted, smp_encoder),
}
"""Makers of encoders; a name that ends in a dot stands for all of a library's."""

_FCN = {"fcn32s": 32, "fcn16s": 16, "fcn8s": 8}


def _unet(make: type[UNetDecoder | UNetPlusPlusDecoder], config: ModelConfig, encoder: Encoder, _: int) -> Decoder:
    kernels = config.kernels if config.encoder in ("plain", "residual") else None
    if kernels is not None:
        kernels = (*(3,) * (len(encoder.channels) - len(kernels)), *kernels)  # those of fine stages
    options = UNetOptions(
        widths=_widths(config, encoder),
        upsampling=config.upsampling,
        residual=config.residual,
        attention=config.attention,
    )
    grid = (config.dims, encoder.channels, encoder.strides)
    return make(*grid, kernels, config.decoder_convs, _own_style(config, encoder), options)


def _widths(config: ModelConfig, encoder: Encoder) -> tuple[int, ...] | None:
    given = config.decoder_channels
    widths = (given,) if isinstance(given, int) else given
    usual = way_up(encoder.channels, encoder.strides, None)[0]
    if widths is not None and len(widths) != len(usual):
        raise ValueError(
            f"decoder_channels must be {len(usual)} numbers for {config.decoder} on {config.encoder}, one for each "
            f"step, finest first (by default {list(usual)}), got {given}"
        )
    return widths


def _fc_channels(config: ModelConfig) -> int | None:
    """4096 on VGG as published, in proportion to its width."""
    vgg = 4096 * (config.width or 64) // 64 if config.encoder in VGG else None
    return config.fc_channels or vgg


def _fcn(config: ModelConfig, encoder: Encoder, outputs: int) -> Decoder:
    grid, style = (config.dims, encoder.channels, encoder.strides), _own_style(config, encoder)
    return FCNDecoder(*grid, outputs, _FCN[config.decoder], fc_channels=_fc_channels(config), style=style)


def _deconvnet(config: ModelConfig, encoder: Encoder, _: int) -> Decoder:
    grid = (config.dims, encoder.channels, encoder.strides, encoder.switch_channels)
    style, fc_channels = _own_style(config, encoder), _fc_channels(config)
    return DeconvNetDecoder(*grid, style=style, unpooling=config.unpooling, fc_channels=fc_channels)


def _pyramid(
    make: Callable[..., Decoder],
    widths: Callable[[int], dict[str, int]],
    config: ModelConfig,
    encoder: Encoder,
    outputs: int,
) -> Decoder:
    if isinstance(config.decoder_channels, tuple):
        raise ValueError(f"decoder_channels must be one number for {config.decoder}, got {config.decoder_channels}")
    given = {} if config.decoder_channels is None else widths(config.decoder_channels)
    style = _own_style(config, encoder)
    return make(config.dims, encoder.channels, encoder.strides, style=style, outputs=outputs, **given)


def _smp(config: ModelConfig, encoder: Encoder, _: int) -> Decoder:
    return smp_decoder(config.decoder.partition(".")[2], encoder.channels, encoder.strides, config.options)


DECODERS: dict[str, Callable[[ModelConfig, Encoder, int], Decoder]] = {
    "unet": partial(_unet, UNetDecoder),
    "unetplusplus": partial(_unet, UNetPlusPlusDecoder),
    **dict.fromkeys(_FCN, _fcn),
    "deconvnet": _deconvnet,
    "fpn": partial(_pyramid, FPNDecoder, lambda width: {"pyramid_channels": 2 * width, "segmentation_channels": width}),
    "deeplabv3plus": partial(_pyramid, DeepLabV3PlusDecoder, lambda width: {"width": width}),
    "smp.": _smp,
}
"""Makers of decoders from the options, the encoder and the number of channels that the dense heads need."""


def _nnunet(make: Callable[..., Model], counts: str, config: ModelConfig, in_channels: int, heads: Heads) -> Model:
    given = _given(config, "strides", "kernels", "decoder_convs", "deep_supervision")
    if config.convs_per_stage:
        given[counts] = config.convs_per_stage
    return make(config.dims, in_channels, heads, config.channels, **given)


def _monai(config: ModelConfig, in_channels: int, heads: Heads) -> Model:
    if not isinstance(heads, int):
        raise ValueError(f"{config.network} has a head of its own: give the number of classes instead of heads")
    from densepred.models.adapters.monai_network import monai_network  # seconds to import

    return monai_network(str(config.network).partition(".")[2], config.dims, in_channels, heads, config.options)


NETWORKS: dict[str, Callable[[ModelConfig, int, Heads], Model]] = {
    "unet2015": lambda config, in_channels, heads: presets.unet2015(in_channels, heads, "mirror"),
    "unet3d2016": lambda config, in_channels, heads: presets.unet3d2016(in_channels, heads, "mirror"),
    "nnunet": partial(_nnunet, presets.nnunet, "convs_per_stage"),
    "nnunet_residual": partial(_nnunet, presets.nnunet_residual, "blocks_per_stage"),
    "monai.": _monai,
}
"""Makers of whole networks from the options, the channels of the image and what to predict."""


def build(config: ModelConfig, in_channels: int, heads: Heads, seed: int | None = None) -> Model:
    """The network that a configuration describes, with fresh weights.

    Args:
        config: the section `model`.
        in_channels: channels of the image.
        heads: what to predict, by name; a number stands for one head `segmentation` of so many classes.
        seed: the weights are a function of it and of the architecture alone; by default drawn from torch's generator.

    Raises:
        NetworkError (a ValueError): an unknown name or impossible combination.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _assembled(config, in_channels, heads)
    except ValueError as error:
        raise NetworkError(str(error), "change the options of the network (the section model of a recipe)") from error
    return initialize(model, seed, config.smooth_start)


def _assembled(config: ModelConfig, in_channels: int, heads: Heads) -> Model:
    if config.network:
        return lookup(NETWORKS, _key(config.network), "network")(config, in_channels, heads)
    encoder = lookup(ENCODERS, _key(config.encoder), "encoder")(config, in_channels)
    widths = [heads] if isinstance(heads, int) else [spec.channels for spec in heads.values() if spec.dense]
    fine = _fine(config, in_channels, encoder) if widths and config.fine_channels else None
    seen = encoder if fine is None else _Joined(fine, encoder)
    decoder = lookup(DECODERS, _key(config.decoder), "decoder")(config, seen, sum(widths)) if widths else None
    return DensePredictor(encoder, decoder, config.dims, in_channels, heads, config.deep_supervision, fine)


def _fine(config: ModelConfig, in_channels: int, encoder: Encoder) -> Encoder:
    """Stages on the grids that the encoder has no map of.

    Raises:
        ValueError: not as many widths as there are such grids.
    """
    given = config.fine_channels or ()
    grids = way_up(encoder.channels, encoder.strides, None)[1]
    finer = grids[: len(grids) - len(encoder.strides)]
    if len(given) != len(finer):
        wanted = f"{len(finer)} numbers, one for each grid finer than its first map" if finer else "left out"
        raise ValueError(f"fine_channels must be {wanted} on {config.encoder}, got {given}")
    steps = [finer[0], *(stride_ratio(coarse, fine) for fine, coarse in pairwise(finer))]
    return PlainEncoder(config.dims, in_channels, given, steps, style=_own_style(config, encoder))


class _Joined(Encoder):
    """What a decoder sees of two encoders, of which the first has the finer maps; computes nothing."""

    def __init__(self, fine: Encoder, encoder: Encoder) -> None:
        super().__init__()
        self.channels, self.strides = (*fine.channels, *encoder.channels), (*fine.strides, *encoder.strides)
        self.style = encoder.style


def _key(name: str) -> str:
    """`timm.` of `timm.resnet18`, `unet` of `unet`."""
    library, dot, _ = name.partition(".")
    return library + dot


def create_model(
    encoder: str = "plain",
    decoder: str = "unet",
    dims: Literal[2, 3] = 3,
    in_channels: int = 1,
    classes: int | None = None,
    *,
    heads: Mapping[str, HeadSpec] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Model:
    """A network from names and options.

    Args:
        encoder: a name that `densepred models --encoders` lists.
        decoder: a name that `densepred models --decoders` lists; not looked at where all heads are global.
        dims: 2 or 3.
        in_channels: channels of the image.
        classes: exclusive classes to segment, the background among them; by default 3.
        heads: what to predict, by name, instead of `classes`; see `densepred.models.heads`.
        seed: the weights are a function of it and of the architecture; by default drawn from torch's generator.
        options: the other fields of `ModelConfig`, such as `network`, `channels`, `width`, `norm` or `pretrained`.

    Returns:
        See `DensePredictor.forward` for what it takes and gives.

    Raises:
        NetworkError (a ValueError): an unknown name, a value outside its range or an impossible combination.
        DensepredError: pretrained weights that are not there or do not fit.

    Example:
        >>> import torch
        >>> model = create_model("plain", "unet", dims=2, in_channels=1, classes=3, channels=(8, 16))
        >>> model(torch.zeros(1, 1, 65, 70)).shape
        torch.Size([1, 3, 65, 70])
    """
    if classes is not None and heads is not None:
        raise ValueError("give classes or heads, not both")
    config = _checked({"encoder": encoder, "decoder": decoder, "dims": dims, **options})
    model = build(config, in_channels, heads if heads is not None else 3 if classes is None else classes, seed)
    if config.pretrained and isinstance(model, DensePredictor):
        load_weights(model.encoder, config.pretrained, config.encoder)
    return model


def _checked(options: Mapping[str, Any]) -> ModelConfig:
    try:
        config = ModelConfig.model_validate(options)
    except ValidationError as error:
        wrong = [f"{'.'.join(path)}: {text}" for path, text in field_faults(error, ModelConfig)]
        raise NetworkError("; ".join(wrong), "correct the options; `densepred schema` describes them") from error
    wrong = [f"{path.removeprefix('model.')}: {text}" for broken, path, text in of_model(config) if broken]
    if wrong:
        raise NetworkError("; ".join(wrong), "`densepred models` lists what can be built")
    return config


def initialize(model: Network, seed: int | None = None, smooth: bool = False) -> Network:
    """Fill the convolutions: He et al. 2015 for leaky ReLU of slope 0.01, biases zero. Changes and returns `model`.

    Parts that bring an initialisation of their own, as other libraries' do, keep it. The numbers depend on the seed
    and the order of the layers, not on device or memory format. Meta tensors stay so.

    Args:
        model: a network.
        seed: by default drawn from torch's generator.
        smooth: start transposed convolutions as repetition of voxels.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    generator = torch.Generator("cpu").manual_seed(seed)
    for layer in _layers(model):
        if isinstance(layer, CONVOLUTIONS) and not layer.weight.is_meta:
            weight = torch.empty(layer.weight.shape, device="cpu")
            nn.init.kaiming_normal_(weight, a=0.01, generator=generator)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if layer.bias is not None:
                    layer.bias.zero_()
            if smooth and isinstance(layer, TRANSPOSED) and layer.kernel_size == layer.stride:
                fill_nearest_(layer)
    return model


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """All modules but those below a part with an initialisation of its own."""
    yield module
    for child in module.children():
        if not getattr(child, "own_initialization", False):
            yield from _layers(child)
