"""Feature pyramid network (Lin et al. 2017) with the semantic branch of Panoptic FPN (Kirillov et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.unet import stride_ratio
from densepred.models.layers import conv
from densepred.models.norms import GroupNorm
from densepred.models.upsampling import enlarge

GROUPS = 32


class Branch(nn.Module):
    """A level of the pyramid on its way to the finest: convolution, group norm, activation, interpolation, repeated.

    Args:
        dims: 2 or 3.
        channels: of the pyramid, C, and to return, K.
        ratios: factors from grid to grid, coarse to fine; none for the finest level, which is not interpolated.
        style: activation.

    Example:
        >>> import torch
        >>> Branch(2, (4, 8), [(2, 2), (1, 2)], Style())(torch.zeros(1, 4, 2, 3), [(3, 5), (3, 9)]).shape
        torch.Size([1, 8, 3, 9])
    """

    def __init__(self, dims: int, channels: tuple[int, int], ratios: Sequence[tuple[int, ...]], style: Style) -> None:
        super().__init__()
        before, after = channels
        self.ratios = ratios
        self.blocks = nn.ModuleList()
        for i in range(max(len(ratios), 1)):
            layer = conv(dims, before if i == 0 else after, after, 3, bias=False)
            norm = GroupNorm(math.gcd(GROUPS, after), after)
            self.blocks.append(nn.Sequential(layer, norm, style.make_activation()))

    def forward(self, x: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """(B, C, *spatial), and the size after each factor -> (B, K, *sizes[-1])."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.ratios:
                x = enlarge(x, self.ratios[i], sizes[i])
        return x


class FPNDecoder(Decoder):
    """A pyramid of equally wide maps, each brought to the finest one's grid by convolutions, and summed.

    Each level is a 1x1 convolution of the encoder's map plus the next coarser level (nearest neighbours), smoothed by
    a 3x3 convolution. Then 3x3 convolution, group norm, activation and linear interpolation are repeated for each grid
    on the way to the pyramid's finest. Their sum is interpolated to the image.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        pyramid_channels: channels of the pyramid.
        segmentation_channels: channels to return.
        maps: how many of the encoder's maps make the pyramid, the coarsest ones; all where it has fewer.
        style: activation, and dropout of the sum; by default relu and none. The norm is group norm as published, in 32
            groups or as many of them as divide the channels.
        outputs: give this many scores instead, computed before the last interpolation: the same function as a 1x1
            convolution after it, for a fraction of the memory.

    Raises:
        ValueError: strides that are no multiples of the finer ones, or fewer than one map.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 8, 4, 3)]
        >>> decoder = FPNDecoder(2, (4, 8), ((2, 2), (4, 4)), pyramid_channels=16, segmentation_channels=8)
        >>> decoder(maps, (13, 12))[0].shape
        torch.Size([1, 8, 13, 12])
    """

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        pyramid_channels: int = 256,
        segmentation_channels: int = 128,
        maps: int = 4,
        style: Style | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if maps < 1:
            raise ValueError(f"maps must be at least 1, got {maps!r}")
        style = style or Style("group", "relu")
        inputs, grids = channels[-maps:], [(1,) * dims, *strides[-maps:]]
        self.ratios = [stride_ratio(coarse, fine) for fine, coarse in pairwise(grids)]
        self.lateral = nn.ModuleList(conv(dims, c, pyramid_channels, 1) for c in inputs)
        self.smooth = nn.ModuleList(conv(dims, pyramid_channels, pyramid_channels, 3) for _ in inputs)
        widths = (pyramid_channels, segmentation_channels)
        ways = [self.ratios[level:0:-1] for level in range(len(inputs))]
        self.branches = nn.ModuleList(Branch(dims, widths, way, style) for way in ways)
        self.dropout = style.make_dropout(dims)
        self.score = nn.Identity() if outputs is None else conv(dims, segmentation_channels, outputs, 1)
        self.scores = outputs is not None
        self.channels = (segmentation_channels if outputs is None else outputs,)
        self.strides = ((1,) * dims,)

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[0], *size)]."""
        used = features[-len(self.lateral) :]
        levels: list[Tensor] = [self.lateral[-1](used[-1])]
        for i in reversed(range(len(used) - 1)):
            skip = self.lateral[i](used[i])
            levels.insert(0, skip + enlarge(levels[0], self.ratios[i + 1], skip.shape[2:], "nearest"))
        sizes = [level.shape[2:] for level in levels]
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        parts = [branch(x, sizes[:i][::-1]) for i, (branch, x) in enumerate(zip(self.branches, smoothed, strict=True))]
        total = sum(parts[1:], start=parts[0])
        return [enlarge(self.score(self.dropout(total)), self.ratios[0], size)]
