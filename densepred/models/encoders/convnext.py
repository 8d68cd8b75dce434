"""ConvNeXt (Liu et al. 2022) with torchvision's parameter names, and ConvNeXt V2 (Woo et al. 2023); in 2D and 3D."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.blocks import Style, drop_paths
from densepred.models.encoders.base import Encoder
from densepred.models.layers import CONVOLUTIONS, conv, patch_conv
from densepred.registry import lookup


@dataclass(frozen=True)
class Variant:
    """What tells the members of the family apart.

    Args:
        width: channels of the first stage; doubled from stage to stage.
        counts: blocks of each stage.
        response_norm: whether blocks have global response normalisation (version 2) instead of layer scale.
    """

    width: int
    counts: tuple[int, int, int, int]
    response_norm: bool = False


VARIANTS: dict[str, Variant] = {
    "convnext_tiny": Variant(96, (3, 3, 9, 3)),
    "convnext_small": Variant(96, (3, 3, 27, 3)),
    "convnext_base": Variant(128, (3, 3, 27, 3)),
    "convnext_large": Variant(192, (3, 3, 27, 3)),
    "convnextv2_atto": Variant(40, (2, 2, 6, 2), True),
    "convnextv2_femto": Variant(48, (2, 2, 6, 2), True),
    "convnextv2_pico": Variant(64, (2, 2, 6, 2), True),
    "convnextv2_nano": Variant(80, (2, 2, 8, 2), True),
    "convnextv2_tiny": Variant(96, (3, 3, 9, 3), True),
    "convnextv2_base": Variant(128, (3, 3, 27, 3), True),
    "convnextv2_large": Variant(192, (3, 3, 27, 3), True),
    "convnextv2_huge": Variant(352, (3, 3, 27, 3), True),
}

_DEVIATION = 0.02
"""Of initial weights, as published."""


class Pointwise(nn.Linear):
    """A linear layer over the channels of each voxel: of maps laid out channels-last nothing is copied.

    Example:
        >>> import torch
        >>> Pointwise(4, 8)(torch.zeros(1, 4, 2, 3, 5)).shape
        torch.Size([1, 8, 2, 3, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *spatial)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GlobalResponseNorm(nn.Module):
    """Weighs each channel by its norm over all voxels, relative to the mean of the channels' (Woo et al. 2023, 3.2).

    Args:
        channels: C. Weight and bias start at zero, where the layer does nothing.

    Example:
        >>> import torch
        >>> x = torch.rand(1, 4, 2, 3, 5)
        >>> torch.equal(GlobalResponseNorm(4)(x), x)
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        shape = (-1, *(1 for _ in x.shape[2:]))
        norm = torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)), keepdim=True)
        relative = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return x * (1 + self.weight.view(shape) * relative) + self.bias.view(shape)


class ConvNeXtBlock(nn.Module):
    """A wide convolution of each channel by itself, then two linear layers across channels, beside the identity.

    Args:
        dims: 2 or 3.
        channels: C.
        dilation: of the convolution.
        response_norm: as in `Variant`.
        style: norm, activation.
        drop_path: what the branch passes before it is added.

    Example:
        >>> import torch
        >>> block = ConvNeXtBlock(3, 4, 1, True, Style("layer", "gelu"), nn.Identity())
        >>> block(torch.zeros(1, 4, 2, 3, 5)).shape
        torch.Size([1, 4, 2, 3, 5])
    """

    def __init__(
        self, dims: int, channels: int, dilation: int, response_norm: bool, style: Style, drop_path: nn.Module
    ) -> None:
        super().__init__()
        activation = style.make_activation()
        if response_norm:
            activation = nn.Sequential(activation, GlobalResponseNorm(4 * channels))
        self.block = nn.Sequential(
            conv(dims, channels, channels, 7, groups=channels, dilation=dilation),
            nn.Identity(),  # so that the numbers that follow are torchvision's
            style.make_norm(channels),
            Pointwise(channels, 4 * channels),
            activation,
            Pointwise(4 * channels, channels),
        )
        scale = None if response_norm else nn.Parameter(torch.full((channels, *[1] * dims), 1e-6))
        self.register_parameter("layer_scale", scale)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        y = self.block(x)
        if self.layer_scale is not None:
            y = y * self.layer_scale
        out: Tensor = self.drop_path(y) + x
        return out


class Downsample(nn.Sequential):
    """A norm and a convolution of patches of 2 voxels; or, dilated, of voxels so far apart, and at every voxel.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        out_channels: channels of the output, K.
        style: the norm.
        dilation: None to stride.

    Example:
        >>> import torch
        >>> Downsample(2, 4, 8, Style("layer"), None)(torch.zeros(1, 4, 5, 7)).shape
        torch.Size([1, 8, 3, 4])
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, style: Style, dilation: int | None) -> None:
        layer = (
            patch_conv(dims, in_channels, out_channels, 2)
            if dilation is None
            else conv(dims, in_channels, out_channels, 2, dilation=dilation, padding="valid")
        )
        super().__init__(style.make_norm(in_channels), layer)
        self.margin = [0, dilation or 0] * dims

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *ceil(spatial / 2)), or (B, K, *spatial) where dilated."""
        norm, layer = self
        x = norm(x)
        out: Tensor = layer(F.pad(x, self.margin) if any(self.margin) else x)
        return out


class ConvNeXtEncoder(Encoder):
    """ConvNeXt without its classifier: the four stages' maps at strides 4, 8, 16 and 32.

    In 2D and at the variant's own width the `state_dict` of version 1 is torchvision's less `classifier.*`. Version 2,
    which torchvision does not have, continues its names; the response norm is `block.4.1`.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        variant: a name in `VARIANTS`.
        width: channels of the first stage; by default the variant's. Doubled from stage to stage.
        depth: maps to give, finest first, 1 to 4; by default all. Layers beyond are not built.
        style: norm, activation, dropout; by default layer and gelu as published.
        stochastic_depth: probability that the last block's branch is dropped in training; proportionally less before.
        output_stride: 4, 8, 16 or 32; stages that would stride beyond it are dilated instead (Chen et al. 2017).

    Raises:
        ValueError: an argument outside these ranges.

    Example:
        >>> import torch
        >>> maps = ConvNeXtEncoder(2, 3, "convnext_tiny", width=4)(torch.zeros(1, 3, 65, 70))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(4, 17, 18), (8, 9, 9), (16, 5, 5), (32, 3, 3)]
    """

    own_initialization = True

    def __init__(
        self,
        dims: int,
        in_channels: int,
        variant: str = "convnext_tiny",
        width: int | None = None,
        depth: int | None = None,
        style: Style | None = None,
        stochastic_depth: float = 0.0,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        kind = lookup(VARIANTS, variant, "variant")
        first = kind.width if width is None else width
        if in_channels < 1 or first < 1:
            raise ValueError(f"in_channels and width must be positive, got {in_channels!r} and {first!r}")
        if depth is not None and depth not in range(1, 5):
            raise ValueError(f"depth must be 1 to 4 maps, got {depth!r}")
        if output_stride not in (None, 4, 8, 16, 32):
            raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride!r}")
        self.style = style = style or Style("layer", "gelu")
        self.channels = tuple(first * 2**i for i in range(depth or 4))
        self.strides = tuple((min(4 * 2**i, output_stride or 32),) * dims for i in range(depth or 4))
        self.dropout = style.make_dropout(dims)
        self.features = nn.Sequential(nn.Sequential(patch_conv(dims, in_channels, first, 4), style.make_norm(first)))
        drops = drop_paths(stochastic_depth, sum(kind.counts[: len(self.channels)]))
        for i, (channels, (stride, *_)) in enumerate(zip(self.channels, self.strides, strict=True)):
            if i:
                before = self.strides[i - 1][0]
                dilation = None if stride > before else 2 * 2**i // before  # the stride given up so far
                self.features.append(Downsample(dims, channels // 2, channels, style, dilation))
            stage, drops = drops[: kind.counts[i]], drops[kind.counts[i] :]
            spread = 4 * 2**i // stride
            blocks = [ConvNeXtBlock(dims, channels, spread, kind.response_norm, style, drop) for drop in stage]
            self.features.append(nn.Sequential(*blocks))
        self.apply(_fill)
        # where an image is exactly 0, a stem without biases gives 0, which the norm would divide by the root of its eps
        nn.init.trunc_normal_(self.get_parameter("features.0.0.bias"), std=_DEVIATION * (in_channels * 4**dims) ** 0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:  # stems and downsampling alternate with stages
                x = self.dropout(x)
                maps.append(x)
        return maps


def _fill(layer: nn.Module) -> None:
    """The published initial weights."""
    if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        nn.init.trunc_normal_(layer.weight, std=_DEVIATION)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
