"""The deconvolution network (Noh, Hong and Han 2015), for any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.blocks import ConvBlock, Style
from densepred.models.decoders.base import Decoder
from densepred.models.decoders.unet import stride_ratio
from densepred.models.layers import Size, conv, fit, transposed_conv
from densepred.models.upsampling import unpool


class FullyConnected(nn.Module):
    """fc6, fc7 and the reverse of fc6: a window of the map becomes one vector, and that a window again.

    fc6 is not padded, so that a map of `kernel` voxels gives a single vector, as published. A larger one gives several,
    whose windows overlap and are summed; a smaller one is filled with zeros to `kernel` voxels.

    Args:
        dims: 2 or 3.
        in_channels: channels of the map, C.
        width: channels of fc6 and fc7.
        out_channels: channels to return, K.
        kernel: odd, voxels of the window along each axis.
        style: norm, activation.

    Example:
        >>> import torch
        >>> FullyConnected(2, 3, 8, 4, 7, Style("batch", "relu"))(torch.zeros(1, 3, 2, 9)).shape
        torch.Size([1, 4, 2, 9])
    """

    def __init__(self, dims: int, in_channels: int, width: int, out_channels: int, kernel: int, style: Style) -> None:
        super().__init__()
        self.kernel, style = kernel, style.of_vectors()
        self.fc6 = ConvBlock(dims, in_channels, width, kernel, style=style, padding="valid", bias=True)
        self.fc7 = ConvBlock(dims, width, width, 1, style=style, bias=True)
        self.fc6_deconv = DeconvBlock(dims, width, out_channels, kernel, 1, style)
        self.fc6_deconv.conv.padding = (0,) * dims  # type: ignore[assignment]  # gives back what fc6 has taken

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *spatial)."""
        size = x.shape[2:]
        missing = [torch.sym_max(self.kernel - n, 0) for n in size]
        x = F.pad(x, [width for n in reversed(missing) for width in (0, n)])
        return fit(self.fc6_deconv(self.fc7(self.fc6(x))), size)


class DeconvBlock(nn.Module):
    """Transposed convolution with a bias, normalisation, activation.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        out_channels: channels of the output, K.
        kernel: a number or one per axis; odd at stride 1.
        stride: a number or one per axis.
        style: norm, activation.

    Example:
        >>> import torch
        >>> DeconvBlock(3, 2, 4, 3, 1, Style())(torch.zeros(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, kernel: Size, stride: Size, style: Style
    ) -> None:
        super().__init__()
        self.conv = transposed_conv(dims, in_channels, out_channels, stride, kernel=kernel)
        self.norm = style.make_norm(out_channels)
        self.activation = style.make_activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *spatial * stride)."""
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out


class DeconvStage(nn.Module):
    """To the next finer grid by unpooling or a strided transposed convolution, then transposed convolutions on it.

    Args:
        dims: 2 or 3.
        channels: of the input, C, and the output, K.
        ratio: factor along each axis.
        count: transposed convolutions; all but the last keep the channels.
        style: norm, activation, dropout.
        switched: whether it unpools.
    """

    def __init__(
        self, dims: int, channels: tuple[int, int], ratio: tuple[int, ...], count: int, style: Style, switched: bool
    ) -> None:
        super().__init__()
        before, after = channels
        self.ratio, self.switched = ratio, switched
        strided = max(ratio) > 1 and not switched
        self.up = DeconvBlock(dims, before, before, ratio, ratio, style) if strided else nn.Identity()
        blocks = [DeconvBlock(dims, before, after if i == count - 1 else before, 3, 1, style) for i in range(count)]
        self.blocks = nn.Sequential(*blocks, style.make_dropout(dims))

    def forward(self, x: Tensor, switches: Tensor | None, size: Sequence[int]) -> Tensor:
        """(B, C, *coarse), and switches of the same shape or nothing -> (B, K, *size)."""
        if self.switched:
            assert switches is not None
            x = unpool(x, switches, self.ratio, size)
        else:
            x = fit(self.up(x), size)
        out: Tensor = self.blocks(x)
        return out


class DeconvNetDecoder(Decoder):
    """The encoder's mirror image: unpooling with its switches and transposed convolutions, up to the image.

    On VGG16 with norms (`taps="pools"`), `fc_channels=4096` and batch norm it is the published network, for images of
    any size; at 224 x 224 voxels, the only size it was published for, fc6 sees the whole map.

    Args:
        dims: 2 or 3.
        channels: channels of the encoder's maps, finest first.
        strides: cumulative strides of the encoder's maps.
        switch_channels: channels of the encoder's switches, None for maps without; empty where it has none at all.
        convs_per_stage: transposed convolutions after each step up, finest first; by default VGG16's 2, 2, 3, 3, 3 ...
        style: norm, activation, dropout after each stage; by default batch and relu as published.
        unpooling: "switches" for every step up, "transposed" (strided transposed convolutions) for every one, or None:
            switches where the encoder has them.
        fc_channels: channels of fc6 and fc7; by default there are none.
        fc_kernel: odd kernel of fc6 and of its reverse.

    Raises:
        ValueError: unpooling with switches that the encoder does not have, not one entry of `convs_per_stage` for each
            step up, strides that are no multiples of the finer ones.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, 4, 7, 6), torch.zeros(1, 8, 4, 3)]
        >>> DeconvNetDecoder(2, (4, 8), ((2, 2), (4, 4)))(maps, (13, 12))[0].shape
        torch.Size([1, 4, 13, 12])
    """

    def __init__(
        self,
        dims: int,
        channels: Sequence[int],
        strides: Sequence[tuple[int, ...]],
        switch_channels: Sequence[int | None] = (),
        convs_per_stage: Sequence[int] | None = None,
        style: Style | None = None,
        unpooling: Literal["switches", "transposed"] | None = None,
        fc_channels: int | None = None,
        fc_kernel: int = 7,
    ) -> None:
        super().__init__()
        style = style or Style("batch", "relu")
        grids = [(1,) * dims, *strides]
        ratios = [stride_ratio(coarse, fine) for fine, coarse in pairwise(grids)]
        self.first = 0 if max(ratios[0]) > 1 else 1  # no stage leads from a map on the image's own grid
        found = list(switch_channels) or [None] * len(channels)
        switched = _switched(unpooling, found, ratios)
        widths = [c if s is None or not use else s for c, s, use in zip(channels, found, switched, strict=True)]
        self.middle: nn.Module = nn.Identity()
        if fc_channels is not None:
            self.middle = FullyConnected(dims, channels[-1], fc_channels, widths[-1], fc_kernel, style)
        elif channels[-1] != widths[-1]:
            self.middle = conv(dims, channels[-1], widths[-1], 1)
        counts = _counts(convs_per_stage, len(channels) - self.first)
        self.stages = nn.ModuleList()
        for i, count in enumerate(counts, start=self.first):
            pair = (widths[i], widths[max(i - 1, 0)])
            self.stages.append(DeconvStage(dims, pair, ratios[i], count, style, switched[i]))
        self.needs_switches = any(switched)
        self.channels, self.strides = (widths[0],), ((1,) * dims,)

    def forward(
        self, features: list[Tensor], size: Sequence[int], switches: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """[(B, C_i, *spatial_i)] finest first, the image's size and switches -> [(B, channels[0], *size)].

        Raises:
            ValueError: no switches for a decoder that unpools with them.
        """
        if self.needs_switches and switches is None:
            raise ValueError(
                "switches must be given: this decoder unpools with them; see Encoder.forward_with_switches"
            )
        given = switches or [None] * len(features)
        sizes = [size, *(feature.shape[2:] for feature in features[:-1])]
        x = self.middle(features[-1])
        for i in reversed(range(len(self.stages))):
            at = i + self.first
            x = self.stages[i](x, given[at], sizes[at])
        return [x]


def _switched(unpooling: str | None, found: Sequence[int | None], ratios: Sequence[tuple[int, ...]]) -> list[bool]:
    """Whether the step from each map to the next finer grid is an unpooling."""
    if unpooling not in (None, "switches", "transposed"):
        raise ValueError(f"unpooling must be 'switches', 'transposed' or None, got {unpooling!r}")
    rising = [max(ratio) > 1 for ratio in ratios]
    bare = [i for i, (up, width) in enumerate(zip(rising, found, strict=True)) if up and width is None]
    if unpooling == "switches" and bare:
        raise ValueError(
            f"unpooling='switches' needs {sum(rising)} poolings to reverse, one for each step up, and the encoder has "
            f"{sum(rising) - len(bare)}: none before its maps {bare}, which a strided convolution, overlapping windows "
            "or patches lead to; take unpooling=None, or an encoder that pools, such as vgg16_bn or plain with "
            "pool='max'"
        )
    return [up and width is not None and unpooling != "transposed" for up, width in zip(rising, found, strict=True)]


def _counts(convs_per_stage: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Transposed convolutions of each stage, finest first."""
    if convs_per_stage is None:
        return tuple(2 if i < 2 else 3 for i in range(stages))
    if len(convs_per_stage) != stages or min(convs_per_stage, default=1) < 1:
        raise ValueError(f"convs_per_stage must be a positive int for each of {stages} steps, got {convs_per_stage!r}")
    return tuple(convs_per_stage)
