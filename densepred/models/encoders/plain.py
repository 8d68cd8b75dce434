"""VGG-like stages of convolutions: the contracting path of U-Nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from densepred.models.blocks import Style, conv_blocks
from densepred.models.encoders.base import Encoder, cumulative
from densepred.models.layers import Size, max_pool, per_stage


class PlainEncoder(Encoder):
    """Stages of convolution blocks, each coarser than the one before (Ronneberger et al. 2015; Isensee et al. 2021).

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        channels: channels of each stage, finest first.
        strides: downsampling at the start of each stage, a number or one per axis; by default 1, then 2.
        kernels: odd kernel of each stage, a number or one per axis; by default 3.
        convs_per_stage: convolutions in each stage.
        style: norm, activation, dropout.
        pool: downsample by the first convolution of the stage ("stride") or by max pooling before it ("max").

    Raises:
        ValueError: an argument outside these ranges; as many strides and kernels as stages are needed.

    Example:
        >>> import torch
        >>> [m.shape[1:] for m in PlainEncoder(2, 1, (4, 8))(torch.zeros(1, 1, 7, 6))]
        [torch.Size([4, 7, 6]), torch.Size([8, 4, 3])]
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[Size] | None = None,
        kernels: Sequence[Size] | None = None,
        convs_per_stage: int = 2,
        style: Style | None = None,
        pool: Literal["stride", "max"] = "stride",
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or in_channels < 1:
            raise ValueError(f"channels and in_channels must be positive, got {channels!r} and {in_channels!r}")
        if pool not in ("stride", "max"):
            raise ValueError(f"pool must be 'stride' or 'max', got {pool!r}")
        self.style = style or Style()
        self.channels = tuple(channels)
        count = len(channels)
        steps = per_stage(strides or (1, *[2] * (count - 1)), count, dims, "strides")
        sizes = per_stage(kernels or (3,) * count, count, dims, "kernels")
        self.strides = cumulative(steps)
        self.stages = nn.ModuleList()
        for before, after, step, size in zip((in_channels, *channels), channels, steps, sizes, strict=False):
            pools: list[nn.Module] = [max_pool(dims, step, step)] if pool == "max" and max(step) > 1 else []
            blocks = conv_blocks(dims, before, after, size, 1 if pool == "max" else step, convs_per_stage, self.style)
            self.stages.append(nn.Sequential(*pools, *blocks, self.style.make_dropout(dims)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
