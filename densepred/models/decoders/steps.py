"""A step of a U-Net: up to the next finer grid, the encoder's maps put beside it, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from densepred.models.blocks import ConvBlock, Padding, Style, conv_blocks
from densepred.models.layers import Size, center_crop, conv, fit, patch_conv, transposed_conv, upsample


@dataclass(frozen=True)
class UNetOptions:
    """What sets one U-Net's expanding path apart from another's.

    Attributes:
        widths: channels of each step, finest first; by default those of the encoder's map on that grid.
        upsampling: by transposed convolution whose kernel is the stride ("transposed"), or by linear interpolation
            after a convolution of one voxel ("interpolate").
        keep_channels: going up keeps the channels of the coarser map (3D U-Net, Cicek et al. 2016), and interpolation
            then has no convolution; otherwise it goes to the step's width.
        up_bias: whether that convolution has a bias.
        bias: whether the others have one; by default where no norm follows.
        residual: a shortcut leads around the convolutions of each step (He et al. 2016).
        attention: gates on the skips (Oktay et al. 2018).
        padding: "same" keeps the size; "valid" keeps the voxels whose kernel lies inside and cuts the skips to match.

    Raises:
        ValueError: an unknown `upsampling` or `padding`.

    Example:
        >>> UNetOptions(upsampling="interpolate", attention=True).keep_channels
        False
    """

    widths: tuple[int, ...] | None = None
    upsampling: Literal["transposed", "interpolate"] = "transposed"
    keep_channels: bool = False
    up_bias: bool = True
    bias: bool | None = None
    residual: bool = False
    attention: bool = False
    padding: Padding = "same"

    def __post_init__(self) -> None:
        if self.upsampling not in ("transposed", "interpolate"):
            raise ValueError(f"upsampling must be 'transposed' or 'interpolate', got {self.upsampling!r}")
        if self.padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same' or 'valid', got {self.padding!r}")


@dataclass(frozen=True)
class StepShape:
    """What one step leads from and to.

    Attributes:
        below: channels of the coarser map.
        skips: channels of all maps put beside it, together.
        out: channels it gives.
        ratio: voxels of its grid for each of the coarser one, per axis.
        kernel: of its convolutions.
    """

    below: int
    skips: int
    out: int
    ratio: tuple[int, ...]
    kernel: Size = 3


class UpStep(nn.Module):
    """One step of a U-Net's way up.

    Args:
        dims: 2 or 3.
        shape: channels, ratio and kernel.
        count: convolutions.
        style: norm, activation, dropout.
        options: what kind of U-Net it is.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> step = UpStep(2, StepShape(below=8, skips=4, out=6, ratio=(2, 2)))
        >>> step(torch.zeros(1, 8, 4, 3), [torch.zeros(1, 4, 7, 6)], (7, 6)).shape
        torch.Size([1, 6, 7, 6])
    """

    def __init__(
        self,
        dims: int,
        shape: StepShape,
        count: int = 2,
        style: Style | None = None,
        options: UNetOptions | None = None,
    ) -> None:
        super().__init__()
        style, options = style or Style(), options or UNetOptions()
        width = shape.below if options.keep_channels else shape.out
        self.valid = options.padding == "valid"
        if options.upsampling == "transposed":
            self.up = transposed_conv(dims, shape.below, width, shape.ratio, options.up_bias)
        else:
            self.up = Interpolation(dims, shape.below, width, shape.ratio, options)
        before = width + shape.skips
        blocks = conv_blocks(
            dims, before, shape.out, shape.kernel, 1, count, style, padding=options.padding, bias=options.bias
        )
        if options.residual:
            blocks = [Shortcut(dims, before, shape.out, blocks, style)]
        self.blocks = nn.Sequential(*blocks, style.make_dropout(dims))
        gated = options.attention and shape.skips
        self.gate = AttentionGate(dims, shape.below, shape.skips, shape.ratio) if gated else None

    def forward(self, x: Tensor, skips: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(B, below, *coarse), [(B, C_i, *size)] -> (B, out, *size); valid convolutions leave less."""
        up = self.up(x) if self.valid else fit(self.up(x), size)
        if self.valid:
            skips = [center_crop(skip, up.shape[2:]) for skip in skips]
        if self.gate is not None:
            skips = [self.gate(torch.cat(list(skips), dim=1), x)]
        out: Tensor = self.blocks(torch.cat((up, *skips), dim=1) if skips else up)
        return out


class Interpolation(nn.Module):
    """A convolution of one voxel, unless the channels are kept, and linear interpolation: n voxels give n * ratio."""

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, ratio: tuple[int, ...], options: UNetOptions
    ) -> None:
        super().__init__()
        self.ratio = ratio
        # on the coarse grid, where it costs least: interpolation and a convolution of one voxel commute
        self.conv = (
            nn.Identity() if options.keep_channels else conv(dims, in_channels, out_channels, 1, bias=options.up_bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *(spatial * ratio))."""
        return _stretch(self.conv(x), self.ratio)


class Shortcut(nn.Module):
    """A shortcut around convolution blocks, joined before the last activation (He et al. 2016, figure 2)."""

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, blocks: Sequence[nn.Module], style: Style
    ) -> None:
        super().__init__()
        last = blocks[-1]
        assert isinstance(last, ConvBlock)
        self.activation, last.activation = last.activation, nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.projection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            projection = conv(dims, in_channels, out_channels, 1, bias=style.bias)
            self.projection = nn.Sequential(projection, style.make_norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *what the blocks leave of spatial)."""
        y = self.blocks(x)
        out: Tensor = self.activation(y + center_crop(self.projection(x), y.shape[2:]))
        return out


class AttentionGate(nn.Module):
    """Additive attention on a skip (Oktay et al. 2018, arXiv:1804.03999, equations 1 and 2).

    alpha = sigmoid(psi(relu(theta(skip) + phi(gating)))) on the coarse grid of the gating signal, linearly interpolated
    to the skip's, multiplies all channels of the skip.

    Args:
        dims: 2 or 3.
        gating: channels of the gating signal, the coarser map of the decoder.
        channels: of the skip; half as many lie between.
        ratio: voxels of the skip for each of the gating signal, per axis.

    Example:
        >>> gate = AttentionGate(2, gating=8, channels=4, ratio=(2, 2))
        >>> gate(torch.ones(1, 4, 7, 6), torch.zeros(1, 8, 4, 3)).shape
        torch.Size([1, 4, 7, 6])
    """

    def __init__(self, dims: int, gating: int, channels: int, ratio: tuple[int, ...]) -> None:
        super().__init__()
        between = max(channels // 2, 1)
        self.ratio = ratio
        self.theta = patch_conv(dims, channels, between, ratio, bias=False)
        self.phi = conv(dims, gating, between, 1)
        self.psi = conv(dims, between, 1, 1)

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """(B, C, *fine), (B, G, *coarse) -> (B, C, *fine)."""
        alpha = torch.relu(fit(self.theta(skip), gating.shape[2:]) + self.phi(gating))
        alpha = torch.sigmoid(self.psi(alpha))
        alpha = _stretch(alpha, self.ratio)
        for axis, n in enumerate(skip.shape[2:], start=2):  # torch.compile at free sizes has no views of one channel
            places = torch.arange(n, device=alpha.device).clamp(max=alpha.shape[axis] - 1)
            alpha = alpha.index_select(axis, places)
        return skip * alpha


def _stretch(x: Tensor, ratio: tuple[int, ...]) -> Tensor:
    """Linear interpolation of n voxels to n * ratio."""
    if max(ratio) == 1:
        return x
    return upsample(x, [n * r for n, r in zip(x.shape[2:], ratio, strict=True)])
