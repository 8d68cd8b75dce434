"""Convolution, normalisation and activation as one block, and the style all blocks of a network share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from densepred.models.layers import ACTIVATIONS, DropPath, Size, conv, dropout
from densepred.models.norms import NORMS
from densepred.registry import lookup

Padding = Literal["same", "valid"]


@dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    Args:
        norm: a name in `NORMS`.
        activation: a name in `ACTIVATIONS`.
        dropout: probability of losing a whole channel after each stage.

    Raises:
        ValueError: an unknown name, or a probability outside 0 <= p < 1.
    """

    norm: str = "instance"
    activation: str = "leaky_relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        lookup(NORMS, self.norm, "norm")
        lookup(ACTIVATIONS, self.activation, "activation")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    @property
    def bias(self) -> bool:
        """Whether convolutions have one: a norm that follows takes it away again."""
        return self.norm == "none"

    def of_vectors(self) -> Style:
        """The same for maps that may hold a single voxel, which instance normalisation would wipe out."""
        return replace(self, norm="none") if self.norm == "instance" else self

    def make_norm(self, channels: int) -> nn.Module:
        """A new normalisation layer."""
        return NORMS[self.norm](channels)

    def make_activation(self) -> nn.Module:
        """A new activation layer."""
        return ACTIVATIONS[self.activation]()

    def make_dropout(self, dims: int) -> nn.Module:
        """A new dropout layer, or one that does nothing."""
        return dropout(dims, self.dropout) if self.dropout else nn.Identity()


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        out_channels: channels of the output, K.
        kernel: a number or one per axis.
        stride: a number or one per axis.
        style: norm, activation.
        padding: "same" keeps ceil(n / stride) voxels of n, "valid" only those whose kernel lies inside.
        bias: whether the convolution has one; by default where no norm follows.

    Example:
        >>> import torch
        >>> ConvBlock(3, 1, 8, stride=2)(torch.zeros(1, 1, 5, 6, 7)).shape
        torch.Size([1, 8, 3, 3, 4])
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel: Size = 3,
        stride: Size = 1,
        style: Style | None = None,
        padding: Padding = "same",
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        style = style or Style()
        bias = style.bias if bias is None else bias
        self.conv = conv(dims, in_channels, out_channels, kernel, stride, bias=bias, padding=padding)
        self.norm = style.make_norm(out_channels)
        self.activation = style.make_activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *ceil(spatial / stride)) with "same" padding."""
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out


def conv_blocks(
    dims: int,
    in_channels: int,
    out_channels: int | Sequence[int],
    kernel: Size,
    stride: Size,
    count: int,
    style: Style,
    padding: Padding = "same",
    bias: bool | None = None,
) -> list[nn.Module]:
    """`count` blocks one after another, the first of them with the stride.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of every block, or one number per block.
        kernel: of every block.
        stride: of the first block.
        count: blocks.
        style: norm, activation.
        padding: as for `ConvBlock`.
        bias: as for `ConvBlock`.

    Raises:
        ValueError: a count below 1, or not as many `out_channels`.

    Example:
        >>> [block.conv.out_channels for block in conv_blocks(2, 1, (4, 8), 3, 1, 2, Style())]
        [4, 8]
    """
    if count < 1:
        raise ValueError(f"convs_per_stage must be at least 1, got {count!r}")
    widths = (out_channels,) * count if isinstance(out_channels, int) else tuple(out_channels)
    if len(widths) != count:
        raise ValueError(f"channels must be a number or one for each of the {count} convolutions, got {out_channels!r}")
    return [
        ConvBlock(dims, before, after, kernel, stride if i == 0 else 1, style, padding, bias)
        for i, (before, after) in enumerate(zip((in_channels, *widths), widths, strict=False))
    ]


def drop_paths(probability: float, count: int) -> list[nn.Module]:
    """Stochastic depth for `count` residual blocks in a row (Huang et al. 2016, equation 4).

    Block l of L is dropped with probability l / L times that of the last one.

    Args:
        probability: of dropping the last block; 0 <= p < 1.
        count: blocks.

    Raises:
        ValueError: a probability outside.

    Example:
        >>> [drop.probability for drop in drop_paths(0.5, 2)]
        [0.25, 0.5]
    """
    if not 0 <= probability < 1:
        raise ValueError(f"stochastic_depth must be at least 0 and below 1, got {probability!r}")
    return [DropPath(probability * (i + 1) / count) if probability else nn.Identity() for i in range(count)]
