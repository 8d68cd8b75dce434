"""Residual stages for volumes with per-axis strides and kernels: the encoder of nnU-Net's "ResEnc" presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from densepred.models.blocks import ConvBlock, Style, drop_paths
from densepred.models.encoders.base import Encoder, cumulative
from densepred.models.encoders.plain import counts_per_stage
from densepred.models.layers import MeanPool, Size, per_stage, to_tuple


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that averages where they stride (He, T. et al. 2019, "ResNet-D").

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        out_channels: channels of the output, K.
        kernel: of both convolutions, a number or one per axis.
        stride: of the first convolution and the shortcut, a number or one per axis.
        style: norm, activation.
        drop_path: what the branch passes before it is added; by default nothing.

    Example:
        >>> import torch
        >>> ResidualBlock(2, 3, 4, 3, (1, 2), Style())(torch.zeros(1, 3, 7, 6)).shape
        torch.Size([1, 4, 7, 3])
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        stride: Size,
        style: Style,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        linear = replace(style, activation="none")
        self.conv1 = ConvBlock(dims, in_channels, out_channels, kernel, stride, style)
        self.conv2 = ConvBlock(dims, out_channels, out_channels, kernel, 1, linear)
        skip: list[nn.Module] = []
        if max(to_tuple(stride, dims, "stride")) > 1:
            skip.append(MeanPool(dims, stride))
        if in_channels != out_channels:
            skip.append(ConvBlock(dims, in_channels, out_channels, 1, 1, linear, bias=False))
        self.skip = nn.Sequential(*skip) if skip else nn.Identity()
        self.drop_path = drop_path or nn.Identity()
        self.activation = style.make_activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *ceil(spatial / stride))."""
        out: Tensor = self.activation(self.drop_path(self.conv2(self.conv1(x))) + self.skip(x))
        return out


class ResidualEncoder(Encoder):
    """A convolution block, then stages of residual blocks, each coarser than the one before (Isensee et al. 2024).

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        channels: channels of each stage, finest first; the first block has those of the first stage.
        strides: downsampling at the start of each stage, a number or one per axis; by default 1, then 2.
        kernels: odd kernel of each stage, a number or one per axis; by default 3.
        blocks_per_stage: a number or one per stage; by default nnU-Net's 1, 3, 4, and 6 in all others.
        style: norm, activation, dropout.
        stochastic_depth: probability that the last block's branch is dropped in training; proportionally less before.

    Raises:
        ValueError: an argument outside these ranges; as many strides and kernels as stages are needed.

    Example:
        >>> import torch
        >>> [m.shape[1:] for m in ResidualEncoder(2, 1, (4, 8))(torch.zeros(1, 1, 7, 6))]
        [torch.Size([4, 7, 6]), torch.Size([8, 4, 3])]
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[Size] | None = None,
        kernels: Sequence[Size] | None = None,
        blocks_per_stage: int | Sequence[int] | None = None,
        style: Style | None = None,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or in_channels < 1:
            raise ValueError(f"channels and in_channels must be positive, got {channels!r} and {in_channels!r}")
        self.style = style = style or Style()
        self.channels = tuple(channels)
        count = len(channels)
        if blocks_per_stage is None:
            blocks_per_stage = (1, 3, 4, *[6] * count)[:count]
        counts = counts_per_stage(blocks_per_stage, count, "blocks_per_stage")
        steps = per_stage(strides or (1, *[2] * (count - 1)), count, dims, "strides")
        sizes = per_stage(kernels or (3,) * count, count, dims, "kernels")
        self.strides = cumulative(steps)
        self.stem = ConvBlock(dims, in_channels, channels[0], sizes[0], 1, style)
        self.stages = nn.ModuleList()
        drops = iter(drop_paths(stochastic_depth, sum(counts)))
        before = channels[0]
        for after, step, size, blocks in zip(channels, steps, sizes, counts, strict=True):
            stage = [ResidualBlock(dims, before, after, size, step, style, next(drops))]
            stage += [ResidualBlock(dims, after, after, size, 1, style, next(drops)) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage, style.make_dropout(dims)))
            before = after

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
