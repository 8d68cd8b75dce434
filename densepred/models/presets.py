"""Whole networks as published: the U-Nets of 2015 and 2016, and the shapes of nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from densepred.models.blocks import Style
from densepred.models.catalog import NNUNET_CHANNELS
from densepred.models.decoders.unet import UNetDecoder, UNetOptions
from densepred.models.dense import DensePredictor
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.residual import ResidualEncoder
from densepred.models.heads import HeadSpec
from densepred.models.layers import Size
from densepred.models.mirror import Mirrored
from densepred.models.valid import ValidPredictor

Heads = Mapping[str, HeadSpec] | int
Border = Literal["valid", "mirror"]


def unet2015(in_channels: int = 1, heads: Heads = 2, padding: Border = "valid") -> ValidPredictor | Mirrored:
    """The U-Net of Ronneberger, Fischer and Brox 2015 (arXiv:1505.04597), less the dropout of its two coarsest stages.

    Convolutions are valid and have biases, there is no norm; an image of 572 x 572 gives 388 x 388. One channel and two
    classes make 31,030,658 parameters.

    Args:
        in_channels: channels of the image.
        heads: what to predict, as for `DensePredictor`.
        padding: "valid" gives the middle of an image of one of the sizes that fit; "mirror" gives all of any image, the
            border mirrored as in the paper's overlap-tile strategy.

    Raises:
        ValueError: an unknown padding.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     unet2015(padding="mirror")(torch.zeros(1, 1, 65, 70)).shape
        torch.Size([1, 2, 65, 70])
    """
    style = Style("none", "relu")
    encoder = PlainEncoder(2, in_channels, (64, 128, 256, 512, 1024), style=style, pool="max", padding="valid")
    decoder = UNetDecoder(2, encoder.channels, encoder.strides, style=style, options=UNetOptions(padding="valid"))
    return _bordered(ValidPredictor(encoder, decoder, 2, in_channels, heads), padding)


def unet3d2016(in_channels: int = 3, heads: Heads = 3, padding: Border = "valid") -> ValidPredictor | Mirrored:
    """The 3D U-Net of Cicek et al. 2016 (arXiv:1606.06650).

    Convolutions are valid, have biases and a batch norm behind each, channels double before each pooling; a volume of
    116 x 132 x 132 gives 28 x 44 x 44. Three channels and classes make 19,069,955 parameters, and 4,672 of the norms,
    which the paper does not count.

    Args:
        in_channels: channels of the volume.
        heads: what to predict, as for `DensePredictor`.
        padding: as for `unet2015`.

    Raises:
        ValueError: an unknown padding.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     unet3d2016()(torch.zeros(1, 3, 116, 132, 132)).shape
        torch.Size([1, 3, 28, 44, 44])
    """
    style = Style("batch", "relu")
    channels = ((32, 64), (64, 128), (128, 256), (256, 512))
    encoder = PlainEncoder(3, in_channels, channels, style=style, pool="max", padding="valid", bias=True)
    options = UNetOptions(padding="valid", keep_channels=True, up_bias=False, bias=True)
    decoder = UNetDecoder(3, encoder.channels, encoder.strides, style=style, options=options)
    return _bordered(ValidPredictor(encoder, decoder, 3, in_channels, heads), padding)


def nnunet(
    dims: int = 3,
    in_channels: int = 1,
    heads: Heads = 2,
    channels: Sequence[int] | None = None,
    strides: Sequence[Size] | None = None,
    kernels: Sequence[Size] | None = None,
    convs_per_stage: int | Sequence[int] = 2,
    decoder_convs: int = 2,
    deep_supervision: int = 0,
) -> DensePredictor:
    """The U-Net that nnU-Net plans (Isensee et al. 2021): strided convolutions, instance norm, leaky ReLU.

    The same function as dynamic_network_architectures' PlainConvUNet; `nnunet_weights.from_nnunet` takes its weights.
    The biases that the instance norm cancels are left out.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        heads: what to predict, as for `DensePredictor`.
        channels: of each stage, finest first; by default nnU-Net's for large patches.
        strides: downsampling at the start of each stage, a number or one per axis; by default 1, then 2.
        kernels: odd kernel of each stage, a number or one per axis; by default 3.
        convs_per_stage: convolutions in each stage of the encoder, a number or one per stage.
        decoder_convs: convolutions in each step of the decoder.
        deep_supervision: coarser decoder maps that get heads of their own.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> model = nnunet(3, 1, 2, channels=(4, 8), strides=(1, (1, 2, 2)), kernels=((1, 3, 3), 3))
        >>> model(torch.zeros(1, 1, 5, 6, 7)).shape
        torch.Size([1, 2, 5, 6, 7])
    """
    encoder = PlainEncoder(dims, in_channels, channels or NNUNET_CHANNELS[dims], strides, kernels, convs_per_stage)
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, kernels, decoder_convs, encoder.style)
    return DensePredictor(encoder, decoder, dims, in_channels, heads, deep_supervision)


def nnunet_residual(
    dims: int = 3,
    in_channels: int = 1,
    heads: Heads = 2,
    channels: Sequence[int] | None = None,
    strides: Sequence[Size] | None = None,
    kernels: Sequence[Size] | None = None,
    blocks_per_stage: int | Sequence[int] | None = None,
    decoder_convs: int = 1,
    deep_supervision: int = 0,
) -> DensePredictor:
    """The U-Net with a residual encoder that nnU-Net plans (Isensee et al. 2024, arXiv:2404.09556).

    The same function as dynamic_network_architectures' ResidualEncoderUNet; otherwise as `nnunet`.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        heads: what to predict, as for `DensePredictor`.
        channels: of each stage, finest first; by default nnU-Net's for large patches.
        strides: downsampling at the start of each stage, a number or one per axis; by default 1, then 2.
        kernels: odd kernel of each stage, a number or one per axis; by default 3.
        blocks_per_stage: residual blocks of each stage, a number or one per stage; by default 1, 3, 4, then 6.
        decoder_convs: convolutions in each step of the decoder.
        deep_supervision: coarser decoder maps that get heads of their own.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> nnunet_residual(2, 3, 4, channels=(4, 8, 8))(torch.zeros(1, 3, 33, 30)).shape
        torch.Size([1, 4, 33, 30])
    """
    encoder = ResidualEncoder(dims, in_channels, channels or NNUNET_CHANNELS[dims], strides, kernels, blocks_per_stage)
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, kernels, decoder_convs, encoder.style)
    return DensePredictor(encoder, decoder, dims, in_channels, heads, deep_supervision)


def _bordered(model: ValidPredictor, padding: str) -> ValidPredictor | Mirrored:
    if padding not in ("valid", "mirror"):
        raise ValueError(f"padding must be 'valid' or 'mirror', got {padding!r}")
    return Mirrored(model) if padding == "mirror" else model
