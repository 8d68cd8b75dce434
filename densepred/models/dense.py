"""The network that users train: an encoder, a decoder and named heads in one module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from densepred.models.decoders.base import Decoder
from densepred.models.encoders.base import Encoder
from densepred.models.heads import Classification, HeadSpec, Scalar, Segmentation, build_head


def _covariates(spec: HeadSpec) -> int:
    """How many a head takes."""
    return spec.covariates if isinstance(spec, Classification | Scalar) else 0


class Model(nn.Module):
    """What all networks have in common.

    Attributes:
        dims: 2 or 3.
        in_channels: channels of the image.
        specs: what each output is, by name.
    """

    def __init__(self, dims: int, in_channels: int, heads: Mapping[str, HeadSpec] | int) -> None:
        super().__init__()
        self.dims, self.in_channels = dims, in_channels
        named: Mapping[str, HeadSpec] = {"segmentation": Segmentation(heads)} if isinstance(heads, int) else heads
        self.specs: dict[str, HeadSpec] = dict(named)
        if not self.specs:
            raise ValueError("heads must name at least one output, got none")

    @property
    def classes(self) -> int:
        """Classes of the head `segmentation`.

        Raises:
            AttributeError: there is no such head.
        """
        spec = self.specs.get("segmentation")
        if not isinstance(spec, Segmentation):
            raise AttributeError(f"no head named segmentation, there are {', '.join(self.specs)}")
        return spec.classes

    @property
    def stride(self) -> tuple[int, ...]:
        """Size of a voxel of its coarsest map: moved by whole numbers of them, an image is predicted alike."""
        divisor: tuple[int, ...] | None = getattr(self, "divisor", None)
        if divisor is not None:
            return divisor
        strides: tuple[tuple[int, ...], ...] = self.get_submodule("encoder").strides  # type: ignore[assignment]
        return tuple(max(axis) for axis in zip(*strides, strict=True))

    @property
    def covariates(self) -> int:
        """How many numbers beside the image its heads take, F."""
        return max(map(_covariates, self.specs.values()))

    def check_input(self, x: Tensor) -> None:
        """Is `x` (B, C, *spatial) what the model takes?

        Raises:
            ValueError: it has another number of axes or channels.
        """
        shape = tuple(x.shape)
        axes = "(batch, channels, z, y, x)" if self.dims == 3 else "(batch, channels, y, x)"
        if x.ndim != self.dims + 2:
            raise ValueError(f"model expects {self.dims + 2} axes {axes}, input {shape} has {x.ndim}")
        if x.shape[1] != self.in_channels:
            noun = "channel" if self.in_channels == 1 else "channels"
            raise ValueError(f"model expects {self.in_channels} {noun}, input {shape} has {x.shape[1]}")


class DensePredictor(Model):
    """An encoder, a decoder and named heads.

    Args:
        encoder: gives feature maps, finest first.
        decoder: gives maps from the image's size to coarser ones; None where all heads are global.
        dims: 2 or 3.
        in_channels: channels of the image.
        heads: what to predict, by name; a number stands for one head `segmentation` of so many classes. Dense heads
            look at the decoder's finest map, global ones at the encoder's coarsest.
        deep_supervision: coarser decoder maps that get dense heads of their own.
        fine: gives the decoder further maps, finer than the encoder's.

    Raises:
        ValueError: more of them than the decoder has coarser maps, or two of the same stride; a dense head without a
            decoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        dims: int,
        in_channels: int,
        heads: Mapping[str, HeadSpec] | int,
        deep_supervision: int = 0,
        fine: Encoder | None = None,
    ) -> None:
        super().__init__(dims, in_channels, heads)
        self.encoder, self.decoder, self.fine = encoder, decoder, fine
        self.dense = [name for name, spec in self.specs.items() if spec.dense]
        self.heads = nn.ModuleDict()
        if self.dense:
            self._add_dense(decoder, deep_supervision)
        for name, spec in self.specs.items():
            if not spec.dense:
                self.heads[name] = build_head(dims, encoder.channels[-1], spec)

    def _add_dense(self, decoder: Decoder | None, deep_supervision: int) -> None:
        if decoder is None:
            raise ValueError(f"decoder must be given for the dense heads {', '.join(self.dense)}, got None")
        coarser = len(decoder.channels) - 1
        if not 0 <= deep_supervision <= coarser:
            raise ValueError(f"deep_supervision must be 0 to {coarser} coarser decoder maps, got {deep_supervision!r}")
        strides = decoder.strides[: deep_supervision + 1]
        suffixes = ["", *(f"@{max(stride)}" for stride in strides[1:])]
        if len(set(suffixes)) < len(suffixes):
            raise ValueError(f"deep_supervision needs maps of different largest strides, got {strides}")
        self.suffixes = suffixes
        for suffix, width in zip(suffixes, decoder.channels, strict=False):
            for name in self.dense:
                self.heads[name + suffix] = build_head(self.dims, None if decoder.scores else width, self.specs[name])

    def part(self, dense: bool) -> DensePredictor:
        """The same network, of the same weights, that gives its dense outputs alone, or the global ones alone.

        Raises:
            ValueError: there are none.
        """
        specs = {name: spec for name, spec in self.specs.items() if spec.dense == dense}
        if not specs:
            raise ValueError(f"no {'dense' if dense else 'global'} head among {', '.join(self.specs)}")
        other = copy.copy(self)
        other.__dict__.pop("forward", None)  # what mixed precision puts there is bound to the whole network
        other._modules = self._modules.copy()  # of its own, the layers in it shared
        other.specs = specs
        if not dense:
            other.dense, other.decoder, other.fine = [], None, None
        return other

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, C, *spatial) and covariates (B, F) for heads that take them -> the output of the one head.

        A segmentation head gives logits (B, K, *spatial). With several heads or deep supervision a dict in training
        and evaluation alike: by name, and "NAME@s" of (B, K, *ceil(spatial / s)) for each further map, s being its
        stride (the largest over the axes).

        Raises:
            ValueError: the input has another number of axes or channels than the model, or covariates no head takes.
        """
        self.check_input(x)
        if covariates is not None and not self.covariates:
            raise ValueError(f"covariates {tuple(covariates.shape)} given, but no head takes any")
        features, switches = self._encode(x)
        maps = features if self.fine is None else [*self.fine(x), *features]
        outputs = self._dense_outputs(maps, x.shape[2:], switches) if self.dense else {}
        for name, spec in self.specs.items():
            if not spec.dense:
                outputs[name] = self.heads[name](features[-1], covariates if _covariates(spec) else None)
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def _encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None] | None]:
        if self.decoder is not None and self.decoder.needs_switches:
            return self.encoder.forward_with_switches(x)
        return self.encoder(x), None

    def _dense_outputs(
        self, features: list[Tensor], size: Sequence[int], switches: list[Tensor | None] | None
    ) -> dict[str, Tensor]:
        assert self.decoder is not None
        maps = self.decoder(features, size, switches) if switches is not None else self.decoder(features, size)
        outputs: dict[str, Tensor] = {}
        for suffix, one in zip(self.suffixes, maps, strict=False):
            widths = [self.specs[name].channels for name in self.dense]
            parts = one.split(widths, dim=1) if self.decoder.scores else [one] * len(widths)
            for name, part in zip(self.dense, parts, strict=True):
                outputs[name + suffix] = self.heads[name + suffix](part)
        return outputs
