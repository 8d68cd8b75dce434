"""Convolution, normalisation and activation as one block, and the style all blocks of a network share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from densepred.models.layers import ACTIVATIONS, Size, conv, dropout
from densepred.models.norms import NORMS
from densepred.registry import lookup


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
    ) -> None:
        super().__init__()
        style = style or Style()
        self.conv = conv(dims, in_channels, out_channels, kernel, stride, bias=style.bias)
        self.norm = style.make_norm(out_channels)
        self.activation = style.make_activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *ceil(spatial / stride))."""
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out


def conv_blocks(
    dims: int, in_channels: int, out_channels: int, kernel: Size, stride: Size, count: int, style: Style
) -> list[nn.Module]:
    """`count` blocks one after another, the first of them with the stride."""
    if count < 1:
        raise ValueError(f"convs_per_stage must be at least 1, got {count!r}")
    first = ConvBlock(dims, in_channels, out_channels, kernel, stride, style)
    return [first, *(ConvBlock(dims, out_channels, out_channels, kernel, 1, style) for _ in range(count - 1))]
