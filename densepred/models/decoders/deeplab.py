"""The decoder of DeepLabv3+ (Chen et al. 2018), for any encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densepred.models.blocks import ConvBlock, Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.unet import stride_ratio
from densepred.models.layers import conv
from densepred.models.upsampling import enlarge

LOW_LEVEL_STRIDE = 4


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel, one across channels, normalisation, activation.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        out_channels: channels of the output, K.
        dilation: voxels between the taps of the 3x3 convolution.
        style: norm, activation.

    Example:
        >>> import torch
        >>> SeparableBlock(3, 2, 4, 6, Style())(torch.zeros(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, dilation: int, style: Style) -> None:
        super().__init__()
        self.depthwise = conv(dims, in_channels, in_channels, 3, bias=False, groups=in_channels, dilation=dilation)
        self.pointwise = ConvBlock(dims, in_channels, out_channels, 1, style=style)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *spatial)."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017): one map seen at several scales, and as a whole.

    Args:
        dims: 2 or 3.
        in_channels: channels of the map, C.
        width: channels of each branch and of the result.
        rates: dilations of the separable 3x3 convolutions.
        style: norm, activation, dropout of the result. The mean of the map gets no instance norm, which would make
            a constant of it.

    Example:
        >>> import torch
        >>> AtrousPyramid(2, 3, 8, (2, 4), Style("batch", "relu"))(torch.zeros(1, 3, 5, 6)).shape
        torch.Size([1, 8, 5, 6])
    """

    def __init__(self, dims: int, in_channels: int, width: int, rates: Sequence[int], style: Style) -> None:
        super().__init__()
        atrous = [SeparableBlock(dims, in_channels, width, rate, style) for rate in rates]
        self.branches = nn.ModuleList([ConvBlock(dims, in_channels, width, 1, style=style), *atrous])
        self.whole = ConvBlock(dims, in_channels, width, 1, style=style.of_vectors())
        self.project = ConvBlock(dims, (len(rates) + 2) * width, width, 1, style=style)
        self.dropout = style.make_dropout(dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, width, *spatial)."""
        parts = [branch(x) for branch in self.branches]
        mean = self.whole(x.mean(tuple(range(2, x.ndim)), keepdim=True))
        out: Tensor = self.dropout(self.project(torch.cat([*parts, mean.expand_as(parts[0])], dim=1)))
        return out


class DeepLabV3PlusDecoder(Decoder):
    """The coarsest map through an atrous pyramid, interpolated to a finer map, refined with it, interpolated again.

    The finer, low-level map is the encoder's first at a stride of 4 or more.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        width: channels of the pyramid and to return.
        low_level_channels: channels that the low-level map is reduced to.
        rates: dilations of the pyramid where the coarsest map's stride is 16; doubled for 8, halved for 32. The
            largest stride of the axes counts.
        style: norm, activation, dropout of the pyramid's result; by default batch and relu as published.
        outputs: give this many scores instead, computed before the last interpolation: the same function as a 1x1
            convolution after it, for a fraction of the memory.

    Raises:
        ValueError: strides that are no multiples of the finer ones, or a rate below 1.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 8, 2, 2)]
        >>> DeepLabV3PlusDecoder(2, (4, 8), ((4, 4), (16, 16)), width=8)(maps, (27, 22))[0].shape
        torch.Size([1, 8, 27, 22])
    """

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        width: int = 256,
        low_level_channels: int = 48,
        rates: Sequence[int] = (6, 12, 18),
        style: Style | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if not rates or min(rates) < 1:
            raise ValueError(f"rates must be positive, got {rates!r}")
        style = style or Style("batch", "relu")
        scaled = [max(1, round(rate * 16 / max(strides[-1]))) for rate in rates]
        self.low_level = _low_level(strides)
        fine = tuple(strides[self.low_level])
        self.ratio, self.last_ratio = stride_ratio(tuple(strides[-1]), fine), fine
        self.pyramid = AtrousPyramid(dims, channels[-1], width, scaled, style)
        self.reduce = ConvBlock(dims, channels[self.low_level], low_level_channels, 1, style=style)
        self.refine = nn.Sequential(
            SeparableBlock(dims, width + low_level_channels, width, 1, style),
            SeparableBlock(dims, width, width, 1, style),
        )
        self.score = nn.Identity() if outputs is None else conv(dims, width, outputs, 1)
        self.scores = outputs is not None
        self.channels, self.strides = (width if outputs is None else outputs,), ((1,) * dims,)

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[0], *size)]."""
        low = self.reduce(features[self.low_level])
        x = enlarge(self.pyramid(features[-1]), self.ratio, low.shape[2:])
        x = self.score(self.refine(torch.cat((x, low), dim=1)))
        return [enlarge(x, self.last_ratio, size)]


def _low_level(strides: Sequence[tuple[int, ...]]) -> int:
    """The first map at the low-level stride or beyond, but one before the last where there is one."""
    coarse = [i for i, stride in enumerate(strides) if max(stride) >= LOW_LEVEL_STRIDE]
    return max(0, min([*coarse, len(strides) - 2]))
