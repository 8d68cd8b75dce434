"""VGG-like stages of convolutions: the contracting path of U-Nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from densepred.models.blocks import Padding, Style, conv_blocks
from densepred.models.encoders.base import Encoder, cumulative
from densepred.models.layers import Size, max_pool, per_stage
from densepred.models.upsampling import pool_with_switches


def counts_per_stage(count: int | Sequence[int], stages: int, name: str) -> tuple[int, ...]:
    """One positive number per stage from that or a number for all.

    Raises:
        ValueError: there are not as many numbers as stages, or one is below 1.

    Example:
        >>> counts_per_stage(2, 3, "convs_per_stage")
        (2, 2, 2)
    """
    counts = (count,) * stages if isinstance(count, int) else tuple(count)
    if len(counts) != stages:
        raise ValueError(f"{name} must be a number or one for each of the {stages} stages, got {len(counts)}: {count}")
    if min(counts) < 1:
        raise ValueError(f"{name} must be at least 1, got {count!r}")
    return counts


class PlainEncoder(Encoder):
    """Stages of convolution blocks, each coarser than the one before (Ronneberger et al. 2015; Isensee et al. 2021).

    With "valid" padding each convolution takes its kernel less one voxel off every axis, as in the original U-Nets: the
    strides stay true, but the maps are smaller than ceil(n / stride).

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        channels: channels of each stage, finest first: a number, or one for each of its convolutions where they differ,
            as in the 3D U-Net (Cicek et al. 2016), ((32, 64), (64, 128), ...).
        strides: downsampling at the start of each stage, a number or one per axis; by default 1, then 2.
        kernels: odd kernel of each stage, a number or one per axis; by default 3.
        convs_per_stage: convolutions in each stage, a number or one per stage.
        style: norm, activation, dropout.
        pool: downsample by the first convolution of the stage ("stride") or by max pooling before it ("max").
        padding: "same", or "valid": only voxels whose kernel lies inside the image.
        bias: whether convolutions have one; by default where no norm follows.

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
        channels: Sequence[int | Sequence[int]],
        strides: Sequence[Size] | None = None,
        kernels: Sequence[Size] | None = None,
        convs_per_stage: int | Sequence[int] = 2,
        style: Style | None = None,
        pool: Literal["stride", "max"] = "stride",
        padding: Padding = "same",
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        _check(in_channels, channels, pool, padding)
        self.style = style or Style()
        stages = len(channels)
        self.channels = tuple(c if isinstance(c, int) else c[-1] for c in channels)
        counts = counts_per_stage(convs_per_stage, stages, "convs_per_stage")
        steps = per_stage(strides or (1, *[2] * (stages - 1)), stages, dims, "strides")
        sizes = per_stage(kernels or (3,) * stages, stages, dims, "kernels")
        self.strides = cumulative(steps)
        inputs = (in_channels, *self.channels)
        self.windows = tuple(step if pool == "max" and max(step) > 1 else None for step in steps)
        if pool == "max":
            self.switch_channels = tuple(c if w else None for c, w in zip(inputs, self.windows, strict=False))
        self.stages = nn.ModuleList()
        for i, (before, after, size, count) in enumerate(zip(inputs, channels, sizes, counts, strict=False)):
            step = 1 if pool == "max" else steps[i]
            window = self.windows[i]
            pools = [max_pool(dims, window, window)] if window else []
            blocks = conv_blocks(dims, before, after, size, step, count, self.style, padding, bias)
            self.stages.append(nn.Sequential(*pools, *blocks, self.style.make_dropout(dims)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i] with "same" padding."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_with_switches(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """As `forward`, and for each map the positions of the pooled maxima, or None for a stage that does not pool.

        Raises:
            TypeError: the encoder does not pool.
        """
        if not self.switch_channels:
            return super().forward_with_switches(x)
        maps: list[Tensor] = []
        switches: list[Tensor | None] = []
        for stage, window in zip(self.stages, self.windows, strict=True):
            found = None
            for i, layer in enumerate(stage.children()):
                if window and i == 0:
                    x, found = pool_with_switches(x, window)
                else:
                    x = layer(x)
            maps.append(x)
            switches.append(found)
        return maps, switches


def _check(in_channels: int, channels: Sequence[int | Sequence[int]], pool: str, padding: str) -> None:
    flat = [c for entry in channels for c in ((entry,) if isinstance(entry, int) else entry or (0,))]
    if min(flat, default=0) < 1 or in_channels < 1:
        raise ValueError(f"channels and in_channels must be positive, got {channels!r} and {in_channels!r}")
    if pool not in ("stride", "max"):
        raise ValueError(f"pool must be 'stride' or 'max', got {pool!r}")
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be 'same' or 'valid', got {padding!r}")
