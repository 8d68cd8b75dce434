"""VGG networks (Simonyan & Zisserman 2015) with torchvision's parameter names, in 2 and 3 dimensions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.encoders.base import Encoder
from densepred.models.layers import CONVOLUTIONS, conv, max_pool
from densepred.models.upsampling import pool_with_switches
from densepred.registry import lookup

_CONVS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
VARIANTS: dict[str, tuple[int, ...]] = {**_CONVS, **{f"{name}_bn": convs for name, convs in _CONVS.items()}}
"""Convolutions of each stage."""


class DensePool(nn.Module):
    """The maxima of 2-voxel windows at every voxel, the window's voxels `dilation` apart; it keeps the grid.

    Every so many voxels they are what pooling with strides gives, so that pretrained filters, dilated from here on,
    see what they were trained on (the hole algorithm of Chen et al. 2015).

    Args:
        dilation: strides given up before.

    Example:
        >>> import torch
        >>> DensePool(1)(torch.tensor([[[[1.0, 3.0, 2.0]]]])).tolist()
        [[[[3.0, 3.0, 2.0]]]]
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        for axis in range(2, x.ndim):
            far_end = [0, 0] * (x.ndim - 1 - axis) + [0, self.dilation]
            next_ones = F.pad(x, far_end, value=-torch.inf).narrow(axis, self.dilation, x.shape[axis])
            x = torch.maximum(x, next_ones)
        return x


class VGGEncoder(Encoder):
    """VGG without its classifier, with as many stages as maps are asked for.

    In 2D and at width 64 the `state_dict` is torchvision's less `classifier.*`. Pooling keeps a last window that is
    not full, as Caffe's does; at multiples of 32 voxels, where there is none, the maps are torchvision's.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        variant: a name in `VARIANTS`; with "_bn" norms follow the convolutions, which keep their biases.
        width: channels of the first stage; doubled from stage to stage, up to eight times.
        depth: maps to give, finest first; by default all. Layers beyond are not built.
        style: norm, activation, dropout; by default none or batch, and relu, as published.
        output_stride: 4, 8, 16 or 32; pools that would stride beyond it become dense, and what follows is dilated.
        taps: "convs" gives the map before each pool and after the last one, 6 with strides 1 to 32; "pools" the map
            after each pool, 5 with strides 2 to 32, as FCN and DeconvNet take them.

    Raises:
        ValueError: an argument outside these ranges, or a norm where the variant has none and the other way round.

    Example:
        >>> import torch
        >>> maps = VGGEncoder(2, 3, "vgg11", width=4, taps="pools")(torch.zeros(1, 3, 65, 70))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(4, 33, 35), (8, 17, 18), (16, 9, 9), (32, 5, 5), (32, 3, 3)]
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        variant: str = "vgg16",
        width: int = 64,
        depth: int | None = None,
        style: Style | None = None,
        output_stride: int | None = None,
        taps: Literal["convs", "pools"] = "convs",
    ) -> None:
        super().__init__()
        counts = lookup(VARIANTS, variant, "variant")
        self.style = _style(variant, style)
        maps = _checked_depth(in_channels, width, depth, output_stride, taps)
        after = tuple(min(2 ** (i + 1), output_stride or 32) for i in range(5))  # strides behind each pool
        widths = tuple(width * min(2**i, 8) for i in range(5))
        self.dropout = self.style.make_dropout(dims)
        self.features = nn.Sequential()
        self._ends, self._pools = set[int](), dict[int, bool]()  # last layers of stages; pools, and whether they stride
        before, stride = in_channels, 1
        for i in range(min(maps, 5)):
            self._add_stage(dims, before, widths[i], counts[i], 2**i // stride)
            if taps == "pools" or maps > i + 1:
                self._pools[len(self.features)] = after[i] > stride
                self.features.append(max_pool(dims, 2, 2) if after[i] > stride else DensePool(2**i // stride))
            before, stride = widths[i], after[i]
        self._taps = set(self._pools) if taps == "pools" else self._ends | {len(self.features) - 1}
        totals, channels = (after, widths) if taps == "pools" else ((1, *after), (*widths, widths[-1]))
        self.channels, self.strides = channels[:maps], tuple((s,) * dims for s in totals[:maps])
        pooled = [widths[i] if strides else None for i, strides in enumerate(self._pools.values())]
        self.switch_channels = tuple(pooled) if taps == "pools" else (None, *pooled)

    def _add_stage(self, dims: int, before: int, width: int, count: int, dilation: int) -> None:
        """Convolutions, each with He et al.'s 2015 weights: with torch's, maps without norms would fade with depth."""
        for _ in range(count):
            layer = conv(dims, before, width, 3, dilation=dilation)
            assert isinstance(layer, CONVOLUTIONS)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            norms = [] if self.style.norm == "none" else [self.style.make_norm(width)]
            self.features.extend([layer, *norms, self.style.make_activation()])
            before = width
        self._ends.add(len(self.features) - 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        return self._walk(x, False)[0]

    def forward_with_switches(self, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """As `forward`, and for each map the positions of the maxima in the pool before it, None where none strides."""
        return self._walk(x, True)

    def _walk(self, x: Tensor, with_switches: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        maps: list[Tensor] = []
        switches: list[Tensor | None] = []
        switch: Tensor | None = None
        for i, layer in enumerate(self.features):
            if with_switches and self._pools.get(i):
                x, switch = pool_with_switches(x, 2)
            else:
                x = layer(x)
            if i in self._ends:
                x = self.dropout(x)
            if i in self._taps:
                maps.append(x)
                switches.append(switch)
                switch = None
        return maps, switches


def _style(variant: str, style: Style | None) -> Style:
    """The published style, or the one given if its norm goes with the variant."""
    normed = variant.endswith("_bn")
    style = style or Style("batch" if normed else "none", "relu")
    if normed != (style.norm != "none"):
        other = variant.removesuffix("_bn") if normed else f"{variant}_bn"
        raise ValueError(f"norm must be {'one' if normed else 'none'} for {variant}, got {style.norm!r}; try {other!r}")
    return style


def _checked_depth(in_channels: int, width: int, depth: int | None, output_stride: int | None, taps: str) -> int:
    """How many maps to give."""
    if taps not in ("convs", "pools"):
        raise ValueError(f"taps must be 'convs' or 'pools', got {taps!r}")
    if in_channels < 1 or width < 1:
        raise ValueError(f"in_channels and width must be positive, got {in_channels!r} and {width!r}")
    most = 6 if taps == "convs" else 5
    if depth is not None and depth not in range(1, most + 1):
        raise ValueError(f"depth must be 1 to {most} maps with taps={taps!r}, got {depth!r}")
    if output_stride not in (None, 4, 8, 16, 32):
        raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride!r}")
    return depth or most
