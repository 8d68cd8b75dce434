"""The expanding path of the U-Net (Ronneberger et al. 2015; Cicek et al. 2016), for any encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densepred.models.blocks import Style, conv_blocks
from densepred.models.decoders.base import Decoder
from densepred.models.layers import Size, fit, per_stage, transposed_conv


class UpStep(nn.Module):
    """A transposed convolution to the next finer grid, the encoder's map put beside it, convolution blocks."""

    def __init__(
        self, dims: int, channels: tuple[int, int, int], stride: Size, kernel: Size, count: int, style: Style
    ) -> None:
        super().__init__()
        below, skip, out = channels
        self.up = transposed_conv(dims, below, out, stride)
        blocks = conv_blocks(dims, out + skip, out, kernel, 1, count, style)
        self.blocks = nn.Sequential(*blocks, style.make_dropout(dims))

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """(B, below, *coarse), (B, skip, *size) or nothing -> (B, out, *size)."""
        x = fit(self.up(x), size)
        out: Tensor = self.blocks(x if skip is None else torch.cat((x, skip), dim=1))
        return out


class UNetDecoder(Decoder):
    """From the coarsest feature map up: transposed convolution, skip concatenation, convolution blocks.

    Where the encoder's finest map is coarser than the image (the stem of a ResNet), further steps without a skip lead
    back to its size, each by a factor of two with half the channels.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        kernels: odd kernel for each of the encoder's maps; by default 3.
        convs_per_stage: convolutions in each stage.
        style: norm, activation, dropout.

    Raises:
        ValueError: strides that are no multiples of the finer ones, or other arguments outside their ranges.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 8, 4, 3)]
        >>> UNetDecoder(2, (4, 8), ((1, 1), (2, 2)))(maps, (7, 6))[0].shape
        torch.Size([1, 4, 7, 6])
    """

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        kernels: Sequence[Size] | None = None,
        convs_per_stage: int = 2,
        style: Style | None = None,
    ) -> None:
        super().__init__()
        style = style or Style()
        sizes = per_stage(kernels or (3,) * len(channels), len(channels), dims, "kernels")
        targets = [*zip(channels[:-1], strides[:-1], sizes[:-1], channels[:-1], strict=True)][::-1]
        below, coarse = channels[-1], tuple(strides[-1])
        targets += [(out, stride, (3,) * dims, 0) for out, stride in _steps_to_image(channels[0], tuple(strides[0]))]
        self.steps = nn.ModuleList()
        made: list[tuple[int, tuple[int, ...]]] = []
        for out, stride, kernel, skip in targets:
            ratio = _ratio(coarse, stride)
            self.steps.append(UpStep(dims, (below, skip, out), ratio, kernel, convs_per_stage, style))
            below, coarse = out, tuple(stride)
            made.insert(0, (below, coarse))
        self.channels = tuple(c for c, _ in made) or (below,)
        self.strides = tuple(s for _, s in made) or (coarse,)

    def forward(self, features: list[Tensor], size: Sequence[int]) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[i], *ceil(size / strides[i]))]."""
        x, *skips = reversed(features)
        maps: list[Tensor] = []
        for i, (step, stride) in enumerate(zip(self.steps, reversed(self.strides), strict=False)):
            skip = skips[i] if i < len(skips) else None
            target = [-(-n // s) for n, s in zip(size, stride, strict=True)] if skip is None else skip.shape[2:]
            x = step(x, skip, target)
            maps.insert(0, x)
        return maps or [x]


def _ratio(coarse: tuple[int, ...], fine: tuple[int, ...]) -> tuple[int, ...]:
    """How often the fine stride goes into the coarse one along each axis."""
    if any(c % f for c, f in zip(coarse, fine, strict=True)):
        raise ValueError(f"strides must be multiples of the finer map's, got {coarse} after {fine}")
    return tuple(c // f for c, f in zip(coarse, fine, strict=True))


def _steps_to_image(channels: int, stride: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """(channels, stride) of each step from the encoder's finest map to stride 1: even strides halve, odd go at once."""
    steps = []
    while max(stride) > 1:
        channels, stride = max(channels // 2, 1), tuple(s // 2 if s % 2 == 0 else 1 for s in stride)
        steps.append((channels, stride))
    return steps
