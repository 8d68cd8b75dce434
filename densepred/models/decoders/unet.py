"""The expanding path of the U-Net (Ronneberger et al. 2015; Cicek et al. 2016), for any encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.steps import StepShape, UNetOptions, UpStep
from densepred.models.layers import Size, per_stage

__all__ = ["UNetDecoder", "UNetOptions"]


class UNetDecoder(Decoder):
    """From the coarsest feature map up: to the next finer grid, skip concatenation, convolution blocks.

    Where the encoder's finest map is coarser than the image (the stem of a ResNet), further steps without a skip lead
    back to its size, each by a factor of two with half the channels.

    With valid convolutions its maps are smaller than the image and lie in the middle of it; `densepred.models.valid`
    knows which sizes of image fit.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        kernels: odd kernel for each of the encoder's maps; by default 3.
        convs_per_stage: convolutions in each stage.
        style: norm, activation, dropout.
        options: widths, way of upsampling, residual steps, attention gates, padding, biases.

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
        options: UNetOptions | None = None,
    ) -> None:
        super().__init__()
        style, options = style or Style(), options or UNetOptions()
        sizes = per_stage(kernels or (3,) * len(channels), len(channels), dims, "kernels")
        widths, grids = way_up(channels, strides, options.widths)
        bare = len(grids) - len(channels)  # grids that the encoder has no map of
        self.steps = nn.ModuleList()
        below = channels[-1]
        for i in reversed(range(len(widths))):
            skip, kernel = (channels[i - bare], sizes[i - bare]) if i >= bare else (0, (3,) * dims)
            shape = StepShape(below, skip, widths[i], stride_ratio(grids[i + 1], grids[i]), kernel)
            self.steps.append(UpStep(dims, shape, convs_per_stage, style, options))
            below = widths[i]
        self.channels = widths or (below,)
        self.strides = grids[: len(self.channels)]

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, and the image's size -> [(B, channels[i], *ceil(size / strides[i]))]."""
        x, *skips = reversed(features)
        maps: list[Tensor] = []
        for i, (step, stride) in enumerate(zip(self.steps, reversed(self.strides), strict=False)):
            beside = skips[i : i + 1]
            target = beside[0].shape[2:] if beside else [-(-n // s) for n, s in zip(size, stride, strict=True)]
            x = step(x, beside, target)
            maps.insert(0, x)
        return maps or [x]


def way_up(
    channels: Sequence[int], strides: Sequence[tuple[int, ...]], widths: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The width of each step and the strides of all grids, both finest first: the image's, then those of the encoder.

    From the encoder's finest map to the image even strides are halved and odd ones taken at once.

    Args:
        channels: of the encoder's maps.
        strides: of the encoder's maps.
        widths: of the steps; by default the encoder's channels, and half as many with each step beyond its finest map.

    Raises:
        ValueError: not as many widths as there are steps, or one below 1.

    Example:
        >>> way_up((32, 64), ((4, 4), (8, 8)), None)
        ((8, 16, 32), ((1, 1), (2, 2), (4, 4), (8, 8)))
    """
    default, grids = [*channels[:-1]], [tuple(stride) for stride in strides]
    width = channels[0]
    while max(grids[0]) > 1:
        width = max(width // 2, 1)
        default.insert(0, width)
        grids.insert(0, tuple(s // 2 if s % 2 == 0 else 1 for s in grids[0]))
    chosen = tuple(default if widths is None else widths)
    if len(chosen) != len(default) or min(chosen, default=1) < 1:
        raise ValueError(f"widths must have a positive int for each of the {len(default)} steps, got {widths!r}")
    return chosen, tuple(grids)


def stride_ratio(coarse: tuple[int, ...], fine: tuple[int, ...]) -> tuple[int, ...]:
    """How often the fine stride goes into the coarse one along each axis.

    Raises:
        ValueError: it does not divide it.

    Example:
        >>> stride_ratio((4, 8), (2, 2))
        (2, 4)
    """
    if any(c % f for c, f in zip(coarse, fine, strict=True)):
        raise ValueError(f"strides must be multiples of the finer map's, got {coarse} after {fine}")
    return tuple(c // f for c, f in zip(coarse, fine, strict=True))
