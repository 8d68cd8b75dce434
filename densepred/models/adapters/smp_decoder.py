"""Decoders from segmentation_models_pytorch (SMP), on any encoder whose strides are powers of two."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from densepred.models.adapters import imports
from densepred.models.adapters.wrapped import dry_run, whole
from densepred.models.decoders.base import Decoder
from densepred.models.layers import fit, upsample
from densepred.models.norms import BatchNorm
from densepred.registry import lookup


@dataclass(frozen=True)
class Kind:
    """What one of SMP's decoders is and needs.

    SMP hands a decoder a list of maps: the image at position 0, then one of each stride 2, 4, 8, ...

    Args:
        path: of its class within SMP's `decoders`.
        needs: positions that must hold a map, from and up to as in a slice; the last always must.
        deepest: the last position must be this or beyond.
        last: the last position it looks at, or None for all.
        least: voxels per axis that the coarsest map must have.
        divides: what the channels of the last map must be divisible by.
        defaults: arguments that SMP's whole network gives it.
    """

    path: str
    needs: tuple[int, int | None] = (-1, None)
    deepest: int = 1
    last: int | None = None
    least: int = 1
    divides: int = 1
    defaults: Mapping[str, object] | None = None


_ASPP = {"out_channels": 256, "atrous_rates": (12, 24, 36), "aspp_dropout": 0.5}

KINDS: dict[str, Kind] = {
    "Unet": Kind("unet.decoder.UnetDecoder"),
    "UnetPlusPlus": Kind("unetplusplus.decoder.UnetPlusPlusDecoder", (1, None)),
    "Linknet": Kind("linknet.decoder.LinknetDecoder"),
    "FPN": Kind("fpn.decoder.FPNDecoder", (-4, None), deepest=3),
    "PSPNet": Kind("pspnet.decoder.PSPDecoder", last=3, divides=4),
    "PAN": Kind("pan.decoder.PANDecoder", (2, None), 3, last=5, least=8, defaults={"decoder_channels": 32}),
    "MAnet": Kind("manet.decoder.MAnetDecoder"),
    "DeepLabV3": Kind("deeplabv3.decoder.DeepLabV3Decoder", defaults={**_ASPP, "aspp_separable": False}),
    "DeepLabV3Plus": Kind(
        "deeplabv3.decoder.DeepLabV3PlusDecoder", (2, 3), 3, defaults={**_ASPP, "aspp_separable": True}
    ),
    "UPerNet": Kind("upernet.decoder.UPerNetDecoder", (2, None), 3),
    "Segformer": Kind("segformer.decoder.SegformerDecoder", (2, None), 3),
}


def names() -> list[str]:
    """SMP's decoders that can be built, by the names of its networks.

    Example:
        >>> "Unet" in names(), "DPT" in names()
        (True, False)
    """
    return list(KINDS)


class SMPDecoder(Decoder):
    """One of SMP's decoders, its map interpolated to the image's size.

    The encoder's maps are first padded at their far ends, their last voxels repeated, to the sizes they would have for
    an image of a whole number of the coarsest voxels. Of several maps of one stride the last is taken.

    Args:
        decoder: SMP's own.
        channels: of each map of the encoder, finest first.
        strides: of each map of the encoder.
        positions: for each of SMP's positions the encoder's map, or None where there is none.
        least: voxels per axis that the coarsest map must have.

    Example:
        >>> decoder = smp_decoder("Unet", (8, 16), ((2, 2), (4, 4)))
        >>> decoder([torch.zeros(1, 8, 3, 4), torch.zeros(1, 16, 2, 2)], (5, 7))[0].shape
        torch.Size([1, 16, 5, 7])
    """

    own_initialization = True

    def __init__(
        self,
        decoder: nn.Module,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        positions: Sequence[int | None],
        least: int = 1,
    ) -> None:
        super().__init__()
        self.decoder, self._positions, self._least = decoder, tuple(positions), least
        self._coarsest = 2 ** (len(positions) - 1)
        size = max(8, least) * self._coarsest
        sizes = [[-(-size // n) for n in stride] for stride in strides]
        maps = [(1, c, *n) for c, n in zip(channels, sizes, strict=True)]
        out = dry_run(decoder, lambda: self._listed([torch.empty(shape) for shape in maps], [size, size]))
        self.channels, self.strides = (out.shape[1],), ((1, 1),)
        self._coarse = out.shape[2] != size

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, Y_i, X_i)] finest first, and the image's size -> [(B, channels[0], *size)]."""
        padded = [whole(n, self._coarsest, self._least) for n in size]
        out = self.decoder(self._listed(features, padded))
        return [fit(upsample(out, padded) if self._coarse else out, size)]

    def _listed(self, features: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """What SMP expects: a map at every position, one without channels where the encoder has none."""
        listed = []
        for i, index in enumerate(self._positions):
            voxels = [n // 2**i for n in size]
            if index is None:
                listed.append(features[0].new_zeros((features[0].shape[0], 0, *voxels)))
            else:
                listed.append(fit(features[index], voxels))
        return listed


def smp_decoder(
    name: str, channels: Sequence[int], strides: Sequence[Sequence[int]], options: Mapping[str, object] | None = None
) -> SMPDecoder:
    """One of SMP's decoders for 2D, with fresh weights.

    PSPNet looks at the map of stride 8 and PAN at those up to 32, as SMP's own networks do; the others at all. Some
    normalise over single voxels when training (DeepLabV3, DeepLabV3Plus, PAN): they need batches of two or more.

    Args:
        name: of SMP's network: "Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "PAN", "MAnet", "DeepLabV3",
            "DeepLabV3Plus", "UPerNet" or "Segformer".
        channels: of each map of the encoder, finest first.
        strides: of each map of the encoder, powers of two and the same along both axes.
        options: further arguments of the decoder's class, such as `decoder_channels`, `attention_type`, `use_norm`.

    Raises:
        ValueError: an unknown name or option, strides that are no powers of two, a map missing that the decoder needs.

    Example:
        >>> smp_decoder("FPN", (64, 128, 256, 512), ((4, 4), (8, 8), (16, 16), (32, 32))).channels
        (128,)
    """
    if name == "DPT":
        raise ValueError("decoder smp.DPT needs the tokens of a vision transformer, which no encoder here gives")
    kind = lookup(KINDS, name, "decoder smp.<name>")
    positions = _positions(name, kind, strides)
    listed = [0 if index is None else channels[index] for index in positions]
    if listed[-1] % kind.divides:
        raise ValueError(
            f"smp.{name} needs a multiple of {kind.divides} channels in the map of stride {2 ** (len(positions) - 1)}, "
            f"got {listed[-1]} = {listed[-1] // kind.divides} x {kind.divides} + {listed[-1] % kind.divides}"
        )
    try:
        decoder = _decoder(name, kind, listed, options or {})
        return SMPDecoder(decoder, channels, strides, positions, kind.least)
    except (TypeError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
        raise ValueError(f"smp.{name} with options {dict(options or {})}: {error}") from error


def _positions(name: str, kind: Kind, strides: Sequence[Sequence[int]]) -> list[int | None]:
    """The encoder's map at each of SMP's positions.

    Raises:
        ValueError: strides that are no powers of two, or a map missing.
    """
    by_stride: dict[int, int] = {}
    for i, stride in enumerate(strides):
        if len(stride) != 2 or stride[0] != stride[1] or stride[0].bit_count() != 1:
            raise ValueError(f"smp.{name} needs strides that are equal powers of two along 2 axes, got {tuple(stride)}")
        by_stride[stride[0]] = i
    coarsest = max(by_stride)
    if kind.last is not None:  # the finest map there, or else the next coarser one
        coarsest = min((s for s in by_stride if s >= 2**kind.last), default=coarsest)
    positions = [by_stride.get(2**i) for i in range(coarsest.bit_length())]
    needed = list(range(len(positions)))[slice(*kind.needs)]
    lacking = [2**i for i in needed if positions[i] is None]
    if lacking or len(positions) <= kind.deepest:
        raise ValueError(
            f"smp.{name} needs maps of strides {', '.join(str(2**i) for i in needed)} and a coarsest one of "
            f"{2**kind.deepest} or more; the encoder has {', '.join(map(str, sorted(by_stride)))}"
        )
    return positions


def _decoder(name: str, kind: Kind, channels: list[int], options: Mapping[str, object]) -> nn.Module:
    library = imports.smp()
    create = attrgetter(kind.path)(library.decoders)
    deepest = len(channels) - 1
    fixed = {
        "encoder_channels": channels,
        "n_blocks": deepest,
        "encoder_depth": deepest,
        "in_channels": channels[-1],
        "output_stride": 16,
    }
    widths = {"decoder_channels": tuple(16 * 2**i for i in reversed(range(deepest)))}
    accepted = inspect.signature(create).parameters
    allowed = [key for key in accepted if key not in fixed]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"options of smp.{name} must be among {', '.join(allowed)}, got {', '.join(unknown)}")
    if kind.defaults is None and accepted.get("decoder_channels", inspect.Parameter).default is inspect.Parameter.empty:
        fixed |= widths
    given = {key: value for key, value in fixed.items() if key in accepted}
    decoder = create(**{**given, **(kind.defaults or {}), **options})
    library.base.initialization.initialize_decoder(decoder)
    for module in decoder.modules():
        if isinstance(module, _BatchNorm):  # SMP's pooled branches hold one value per channel: fatal for a batch of one
            module.__class__ = BatchNorm
    if name == "DeepLabV3Plus":
        decoder.up.scale_factor = float(2**deepest // 4)  # SMP knows coarsest strides of 8 and 16 only
    return decoder
