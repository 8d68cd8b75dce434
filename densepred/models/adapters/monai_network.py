"""Whole networks of MONAI, for images of any size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from monai.networks import nets
from monai.networks.nets.mednext import create_mednext
from torch import Tensor, nn

from densepred.models.adapters.wrapped import built, dry_run
from densepred.models.dense import Model
from densepred.models.layers import Size, fit, to_tuple, upsample
from densepred.registry import lookup

Options = Mapping[str, object]
Arguments = Mapping[str, Any]

_OURS = frozenset({"spatial_dims", "in_channels", "out_channels", "variant"})
_NOT_OFFERED = frozenset({"deep_supervision", "deep_supr_num", "pretrained", "norm_layer", "save_attn"})


class AnySizeUNETR(nets.UNETR):
    """MONAI's UNETR, whose position embeddings are interpolated to the image's number of patches."""

    def forward(self, x_in: Tensor) -> Tensor:
        """(B, C, *spatial), spatial of whole patches -> (B, K, *spatial)."""
        grid = [n // p for n, p in zip(x_in.shape[2:], self.patch_size, strict=True)]
        tokens, states = self._transformed(x_in, grid)

        def as_map(state: Tensor) -> Tensor:
            return state.transpose(1, 2).unflatten(2, grid)

        x = self.decoder5(as_map(tokens), self.encoder4(as_map(states[9])))
        x = self.decoder4(x, self.encoder3(as_map(states[6])))
        x = self.decoder3(x, self.encoder2(as_map(states[3])))
        out: Tensor = self.out(self.decoder2(x, self.encoder1(x_in)))
        return out

    def _transformed(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        embedding = self.vit.patch_embedding
        tokens = embedding.patch_embeddings(x)
        if embedding.proj_type == "conv":
            tokens = tokens.flatten(2).transpose(1, 2)
        positions = embedding.position_embeddings.transpose(1, 2).unflatten(2, self.feat_size)
        x = embedding.dropout(tokens + upsample(positions, grid).flatten(2).transpose(1, 2))
        states = []
        for block in self.vit.blocks:
            x = block(x)
            states.append(x)
        return self.vit.norm(x), states


def _product_of_strides(arguments: Arguments) -> tuple[int, ...]:
    dims = arguments["spatial_dims"]
    steps = [to_tuple(stride, dims, "strides") for stride in arguments["strides"]]
    return tuple(math.prod(axis) for axis in zip(*steps, strict=True))


def _halvings(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: 2 ** len(arguments[name])


def _dynunet_defaults(dims: int, options: Options) -> dict[str, object]:
    strides = cast(Sequence[Size], options.get("strides", (1, 2, 2, 2, 2)))
    kernels = (3,) * len(strides)
    return {"kernel_size": kernels, "strides": strides, "upsample_kernel_size": strides[1:]}


def _unet_defaults(dims: int, options: Options) -> dict[str, object]:
    return {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}


@dataclass(frozen=True)
class Kind:
    """How one of MONAI's networks is built.

    Args:
        create: its class or the function that makes it.
        divisor: its arguments -> what it takes whole numbers of voxels of, for all axes or for each.
        defaults: dims and options -> arguments that it has no default for, or a different one here.
    """

    create: Callable[..., nn.Module]
    divisor: Callable[[Arguments], int | tuple[int, ...]]
    defaults: Callable[[int, Options], Mapping[str, object]] = lambda dims, options: {}


def _mednext(variant: str) -> Kind:
    return Kind(create_mednext, lambda arguments: 16, lambda dims, options: {"variant": variant})


KINDS: dict[str, Kind] = {
    "UNet": Kind(nets.UNet, _product_of_strides, lambda d, o: {**_unet_defaults(d, o), "num_res_units": 2}),
    "AttentionUnet": Kind(nets.AttentionUnet, _product_of_strides, _unet_defaults),
    "BasicUNet": Kind(nets.BasicUNet, lambda arguments: 16),
    "BasicUNetPlusPlus": Kind(nets.BasicUNetPlusPlus, lambda arguments: 16),
    "DynUNet": Kind(nets.DynUNet, _product_of_strides, _dynunet_defaults),
    "FlexibleUNet": Kind(nets.FlexibleUNet, lambda arguments: 32, lambda d, o: {"backbone": "efficientnet-b0"}),
    "MedNeXt": Kind(nets.MedNeXt, _halvings("blocks_down")),
    "MedNeXtSmall": _mednext("S"),
    "MedNeXtBase": _mednext("B"),
    "MedNeXtMedium": _mednext("M"),
    "MedNeXtLarge": _mednext("L"),
    "SegResNet": Kind(nets.SegResNet, lambda arguments: 2 ** (len(arguments["blocks_down"]) - 1)),
    "SwinUNETR": Kind(nets.SwinUNETR, lambda arguments: arguments["patch_size"] ** 5),
    "UNETR": Kind(AnySizeUNETR, lambda arguments: 16, lambda d, o: {"img_size": 224 if d == 2 else 96}),
    "VNet": Kind(nets.VNet, lambda arguments: 16, lambda d, o: {"dropout_dim": d}),
}


def names() -> list[str]:
    """The networks of MONAI that can be built.

    Example:
        >>> "SwinUNETR" in names()
        True
    """
    return list(KINDS)


class MonaiNetwork(Model):
    """A network of MONAI for images of any size.

    Images are padded at their far ends, their last voxels repeated, to whole numbers of `divisor` voxels, and the
    logits cropped to the image. Where that leaves a network a single voxel at its coarsest that it cannot normalise in
    training, the last axis is padded to two.

    Args:
        network: (B, C, *spatial) -> (B, K, *spatial), or a list of which that is the first.
        dims: 2 or 3.
        in_channels: channels of the image.
        classes: outputs per voxel.
        divisor: voxels per axis that the network takes whole numbers of.

    Example:
        >>> network = monai_network("SegResNet", 2, in_channels=1, classes=3)
        >>> network.divisor, network(torch.zeros(1, 1, 9, 20)).shape
        ((8, 8), torch.Size([1, 3, 9, 20]))
    """

    def __init__(
        self, network: nn.Module, dims: int, in_channels: int, classes: int, divisor: int | tuple[int, ...]
    ) -> None:
        super().__init__(dims, in_channels, classes)
        self.network = network
        self.network.own_initialization = True  # type: ignore[assignment]
        self.divisor = to_tuple(divisor, dims, "divisor")
        self._takes_one = self._runs_on_one()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> logits (B, K, *spatial).

        Raises:
            ValueError: the input has another number of axes or channels than the network.
        """
        self.check_input(x)
        size = x.shape[2:]
        counts = [-(-n // d) for n, d in zip(size, self.divisor, strict=True)]
        # an exported program is for images larger than one voxel at the coarsest, or it would be for one size only
        if not self._takes_one and not torch.compiler.is_exporting() and all(count == 1 for count in counts):
            counts[-1] = 2
        out = self.network(fit(x, [count * d for count, d in zip(counts, self.divisor, strict=True)]))
        return fit(out[0] if isinstance(out, list | tuple) else out, size)

    def _runs_on_one(self) -> bool:
        try:
            dry_run(self.network, lambda: torch.empty(1, self.in_channels, *self.divisor), training=True)
        except ValueError:  # what torch raises for statistics over one voxel
            return False
        return True


def monai_network(name: str, dims: int, in_channels: int, classes: int, options: Options | None = None) -> MonaiNetwork:
    """A network of MONAI, with fresh weights.

    Arguments are MONAI's defaults, and where it has none: for `UNet` and `AttentionUnet` channels 16 to 256 with four
    strides of 2 (`UNet` with 2 residual units), for `DynUNet` kernels of 3 and strides (1, 2, 2, 2, 2) with upsampling
    kernels equal to them, for `UNETR` an `img_size` of 224 in 2D and 96 in 3D, whose position embeddings other sizes
    interpolate, for `FlexibleUNet` the backbone "efficientnet-b0". `MedNeXtSmall` to `Large` are the published ones.

    Args:
        name: of MONAI's class, such as "SwinUNETR".
        dims: 2 or 3.
        in_channels: channels of the image.
        classes: outputs per voxel.
        options: further arguments of MONAI's constructor: numbers, strings and lists of them.

    Raises:
        ValueError: an unknown name or option, or values that MONAI refuses.

    Example:
        >>> monai_network("DynUNet", 3, 1, 2, {"strides": [1, [1, 2, 2], 2]}).divisor
        (2, 4, 4)
    """
    kind = lookup(KINDS, name, "network monai.<name>")
    to_tuple(1, dims, "dims")
    given = {key: _plain(key, value) for key, value in (options or {}).items()}
    signature = inspect.signature(kind.create)
    allowed = [key for key in signature.parameters if key not in _OURS | _NOT_OFFERED]
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"options of monai.{name} must be among {', '.join(allowed)}, got {', '.join(unknown)}")
    shape = {"spatial_dims": dims, "in_channels": in_channels, "out_channels": classes}
    arguments = {**kind.defaults(dims, given), **given, **shape}
    try:
        network = built(lambda: kind.create(**arguments))
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"monai.{name} with {in_channels} channels and options {given}: {error}") from error
    bound = signature.bind(**arguments)
    bound.apply_defaults()
    return MonaiNetwork(network, dims, in_channels, classes, kind.divisor(bound.arguments))


def _plain(name: str, value: object) -> object:
    """An option as MONAI takes it: lists as tuples.

    Raises:
        ValueError: neither a number, a string, None nor a list or mapping of such.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(name, item) for item in value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    raise ValueError(f"option {name} must hold numbers, strings and lists of them, got {type(value).__name__}")
