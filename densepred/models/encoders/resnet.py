"""Residual networks (He et al. 2016) with torchvision's stem, parameter names and arithmetic, in 2 and 3 dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from densepred.models.blocks import Style
from densepred.models.encoders.base import Encoder
from densepred.models.layers import conv, max_pool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, dims: int, in_channels: int, width: int, stride: int, style: Style) -> None:
        super().__init__()
        self.conv1 = conv(dims, in_channels, width, 3, stride, bias=style.bias)
        self.bn1 = style.make_norm(width)
        self.conv2 = conv(dims, width, width, 3, bias=style.bias)
        self.bn2 = style.make_norm(width)
        self.relu = style.make_activation()
        self.downsample = _shortcut(dims, in_channels, width, stride, style)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, width, *ceil(spatial / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 one strides, as in torchvision ("v1.5")."""

    expansion = 4

    def __init__(self, dims: int, in_channels: int, width: int, stride: int, style: Style) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv(dims, in_channels, width, 1, bias=style.bias)
        self.bn1 = style.make_norm(width)
        self.conv2 = conv(dims, width, width, 3, stride, bias=style.bias)
        self.bn2 = style.make_norm(width)
        self.conv3 = conv(dims, width, out_channels, 1, bias=style.bias)
        self.bn3 = style.make_norm(out_channels)
        self.relu = style.make_activation()
        self.downsample = _shortcut(dims, in_channels, out_channels, stride, style)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, 4 * width, *ceil(spatial / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return out


def _shortcut(dims: int, in_channels: int, out_channels: int, stride: int, style: Style) -> nn.Module:
    """The identity, or a 1x1 projection where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    projection = conv(dims, in_channels, out_channels, 1, stride, bias=style.bias)
    return nn.Sequential(projection, style.make_norm(out_channels))


Block = BasicBlock | Bottleneck
DEPTHS: dict[int, tuple[type[Block], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ResNetEncoder(Encoder):
    """ResNet without its classifier: the stem's map at stride 2 and the four stages' at 4, 8, 16 and 32.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        depth: 18, 34 or 50.
        width: channels of the stem and of the first stage's 3x3 convolutions; doubled from stage to stage.
        style: norm, activation, dropout; by default batch and relu as published.

    Raises:
        ValueError: an unknown depth, or a width or channel count below 1.

    Example:
        >>> import torch
        >>> ResNetEncoder(2, 3, width=4)(torch.zeros(1, 3, 65, 70))[-1].shape
        torch.Size([1, 32, 3, 3])
    """

    def __init__(
        self, dims: int, in_channels: int, depth: int = 18, width: int = 64, style: Style | None = None
    ) -> None:
        super().__init__()
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels and width must be positive, got {in_channels!r} and {width!r}")
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth!r}")
        block, counts = DEPTHS[depth]
        self.style = style = style or Style("batch", "relu")
        self.conv1 = conv(dims, in_channels, width, 7, 2, bias=style.bias)
        self.bn1 = style.make_norm(width)
        self.relu = style.make_activation()
        self.maxpool = max_pool(dims, 3, 2)
        self.dropout = style.make_dropout(dims)
        widths = [width * 2**i for i in range(4)]
        self.channels = (width, *(w * block.expansion for w in widths))
        self.strides = tuple((2 ** (i + 1),) * dims for i in range(5))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(block, dims, self.channels[i], widths[i], counts[i], 1 if i == 0 else 2) for i in range(4)
        )

    def _stage(
        self, block: type[Block], dims: int, in_channels: int, width: int, count: int, stride: int
    ) -> nn.Sequential:
        first = block(dims, in_channels, width, stride, self.style)
        rest = (block(dims, width * block.expansion, width, 1, self.style) for _ in range(count - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps = [self.dropout(x)]
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = self.dropout(layer(x))
            maps.append(x)
        return maps
