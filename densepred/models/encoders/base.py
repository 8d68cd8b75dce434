"""What every encoder promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from densepred.models.blocks import Style

if TYPE_CHECKING:
    from densepred.models.weights.report import Pretraining


class Encoder(nn.Module):
    """A network that gives feature maps, finest first.

    Attributes:
        channels: channels of each feature map, such as (32, 64, 128).
        strides: voxels of the input per voxel of each feature map and axis, such as ((1, 1), (2, 2), (4, 4)). A map
            has ceil(n / stride) voxels along an axis of n.
        style: the norm, activation and dropout it is made with, for a decoder to continue.
        switch_channels: for each map, the channels of the switches that lead from its grid to the next finer one (the
            image's for the first), or None where there are none. Empty for encoders that do not pool.
        own_initialization: whether its weights start as constructed, rather than as `build.initialize` fills them.
        pretraining: where its weights come from and how images were normalised then, once `load_weights` has filled it.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    style: Style
    switch_channels: tuple[int | None, ...] = ()
    own_initialization: bool = False
    pretraining: Pretraining | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        raise NotImplementedError

    def forward_with_switches(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """As `forward`, and for each map the positions of the pooled maxima (`upsampling.pool_with_switches`) or None.

        Raises:
            TypeError: the encoder does not pool.
        """
        raise TypeError(f"{type(self).__name__} has no pooling to take switches from")


def cumulative(steps: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Strides relative to the input from those of each stage: ((1, 1), (2, 2), (2, 1)) -> ((1, 1), (2, 2), (4, 2))."""
    totals: list[tuple[int, ...]] = []
    for step in steps:
        before = totals[-1] if totals else (1,) * len(step)
        totals.append(tuple(a * b for a, b in zip(before, step, strict=True)))
    return tuple(totals)
