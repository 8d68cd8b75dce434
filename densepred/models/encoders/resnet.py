"""Residual networks and their relatives with torchvision's parameter names and arithmetic, in 2 and 3 dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densepred.models.blocks import Style, drop_paths
from densepred.models.encoders.base import Encoder
from densepred.models.layers import conv, max_pool
from densepred.registry import lookup


@dataclass(frozen=True)
class Variant:
    """What tells the members of the family apart.

    Args:
        bottleneck: whether the blocks are bottlenecks, with four times as many channels outside as their width.
        counts: blocks of each stage.
        groups: of the bottlenecks' 3x3 convolutions, the cardinality of Xie et al. 2017.
        base_width: channels of each group where the stage is 64 wide.
        squeeze: whether blocks end in squeeze and excitation.
    """

    bottleneck: bool
    counts: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64
    squeeze: bool = False

    @property
    def expansion(self) -> int:
        """Channels of a block's output over the width of its stage."""
        return 4 if self.bottleneck else 1

    def inner(self, width: int) -> int:
        """Channels of the 3x3 convolution in a bottleneck of a stage of this width.

        Raises:
            ValueError: not one channel for each group.
        """
        each = width * self.base_width // 64
        if each < 1:
            raise ValueError(
                f"width must be at least {-(-64 // self.base_width)}, so that each of the {self.groups} groups gets "
                f"width * {self.base_width} // 64 >= 1 channels, got {width}"
            )
        return each * self.groups


VARIANTS: dict[str, Variant] = {
    "resnet18": Variant(False, (2, 2, 2, 2)),
    "resnet34": Variant(False, (3, 4, 6, 3)),
    "resnet50": Variant(True, (3, 4, 6, 3)),
    "resnet101": Variant(True, (3, 4, 23, 3)),
    "resnet152": Variant(True, (3, 8, 36, 3)),
    "resnext50_32x4d": Variant(True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": Variant(True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Variant(True, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": Variant(True, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": Variant(True, (3, 4, 23, 3), base_width=128),
    "se_resnet18": Variant(False, (2, 2, 2, 2), squeeze=True),
    "se_resnet34": Variant(False, (3, 4, 6, 3), squeeze=True),
    "se_resnet50": Variant(True, (3, 4, 6, 3), squeeze=True),
    "se_resnet101": Variant(True, (3, 4, 23, 3), squeeze=True),
    "se_resnet152": Variant(True, (3, 8, 36, 3), squeeze=True),
}


class SqueezeExcitation(nn.Module):
    """Weighs channels by what all voxels hold (Hu et al. 2018), with timm's names and reduced width.

    Args:
        dims: 2 or 3.
        channels: C; reduced to the multiple of 8 nearest to a sixteenth of it, at least 8.
        style: the activation between the two layers.

    Example:
        >>> SqueezeExcitation(3, 4, Style())(torch.zeros(1, 4, 2, 3, 5)).shape
        torch.Size([1, 4, 2, 3, 5])
    """

    def __init__(self, dims: int, channels: int, style: Style) -> None:
        super().__init__()
        reduced = max(8, (channels + 64) // 128 * 8)
        self.fc1 = conv(dims, channels, reduced, 1)
        self.act = style.make_activation()
        self.fc2 = conv(dims, reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(self.fc2(self.act(self.fc1(mean))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5 left).

    Args:
        dims: 2 or 3.
        in_channels: channels of the input, C.
        width: of the stage.
        stride: of the first convolution and the shortcut.
        dilations: of the first and the second convolution.
        variant: the member of the family.
        style: norm, activation.
        drop_path: what the branch passes before it is added.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        width: int,
        stride: int,
        dilations: tuple[int, int],
        variant: Variant,
        style: Style,
        drop_path: nn.Module,
    ) -> None:
        super().__init__()
        self.conv1 = conv(dims, in_channels, width, 3, stride, bias=style.bias, dilation=dilations[0])
        self.bn1 = style.make_norm(width)
        self.conv2 = conv(dims, width, width, 3, bias=style.bias, dilation=dilations[1])
        self.bn2 = style.make_norm(width)
        self.relu = style.make_activation()
        self.downsample = _shortcut(dims, in_channels, width, stride, style)
        self.se = SqueezeExcitation(dims, width, style) if variant.squeeze else nn.Identity()
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, width, *ceil(spatial / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.drop_path(self.se(self.bn2(self.conv2(y))))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 one strides, as in torchvision ("v1.5").

    Arguments as for `BasicBlock`; the 3x3 convolution has the first of the dilations.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        width: int,
        stride: int,
        dilations: tuple[int, int],
        variant: Variant,
        style: Style,
        drop_path: nn.Module,
    ) -> None:
        super().__init__()
        inner, out_channels = variant.inner(width), width * variant.expansion
        self.conv1 = conv(dims, in_channels, inner, 1, bias=style.bias)
        self.bn1 = style.make_norm(inner)
        self.conv2 = conv(dims, inner, inner, 3, stride, style.bias, variant.groups, dilations[0])
        self.bn2 = style.make_norm(inner)
        self.conv3 = conv(dims, inner, out_channels, 1, bias=style.bias)
        self.bn3 = style.make_norm(out_channels)
        self.relu = style.make_activation()
        self.downsample = _shortcut(dims, in_channels, out_channels, stride, style)
        self.se = SqueezeExcitation(dims, out_channels, style) if variant.squeeze else nn.Identity()
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, 4 * width, *ceil(spatial / stride))."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.se(self.bn3(self.conv3(y))))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


def _shortcut(dims: int, in_channels: int, out_channels: int, stride: int, style: Style) -> nn.Module:
    """The identity, or a 1x1 projection where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    projection = conv(dims, in_channels, out_channels, 1, stride, bias=style.bias)
    return nn.Sequential(projection, style.make_norm(out_channels))


class ResNetEncoder(Encoder):
    """ResNet without its classifier: the stem's map at stride 2 and the four stages' at 4, 8, 16 and 32.

    With its relatives: ResNeXt (Xie et al. 2017), wide ResNet (Zagoruyko and Komodakis 2016), and ResNet with squeeze
    and excitation (Hu et al. 2018). In 2D and at width 64 the `state_dict` is torchvision's less `fc.*`, that of
    `se_resnet*` timm's `seresnet*`.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        variant: a name in `VARIANTS`.
        width: channels of the stem and nominal width of the first stage; doubled from stage to stage.
        depth: maps to give, finest first, 1 to 5; by default all. Layers beyond are not built.
        style: norm, activation, dropout; by default batch and relu as published.
        stochastic_depth: probability that the last block's branch is dropped in training; proportionally less before.
        output_stride: 4, 8, 16 or 32; stages that would stride beyond it are dilated instead (Chen et al. 2017).

    Raises:
        ValueError: an argument outside these ranges, or a width that leaves groups without a channel.

    Example:
        >>> import torch
        >>> ResNetEncoder(2, 3, "resnet18", width=4)(torch.zeros(1, 3, 65, 70))[-1].shape
        torch.Size([1, 32, 3, 3])
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        dims: int,
        in_channels: int,
        variant: str = "resnet18",
        width: int = 64,
        depth: int | None = None,
        style: Style | None = None,
        stochastic_depth: float = 0.0,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        kind = lookup(VARIANTS, variant, "variant")
        if in_channels < 1 or width < 1:
            raise ValueError(f"in_channels and width must be positive, got {in_channels!r} and {width!r}")
        if depth is not None and depth not in range(1, 6):
            raise ValueError(f"depth must be 1 to 5 maps, got {depth!r}")
        if output_stride not in (None, 4, 8, 16, 32):
            raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride!r}")
        maps = depth or 5
        self.style = style = style or Style("batch", "relu")
        self.conv1 = conv(dims, in_channels, width, 7, 2, bias=style.bias)
        self.bn1 = style.make_norm(width)
        self.relu = style.make_activation()
        self.maxpool = max_pool(dims, 3, 2)
        self.dropout = style.make_dropout(dims)
        self.channels = (width, *(width * 2**i * kind.expansion for i in range(maps - 1)))
        self.strides = tuple((min(2 ** (i + 1), output_stride or 32),) * dims for i in range(maps))
        drops = drop_paths(stochastic_depth, sum(kind.counts[: maps - 1]))
        for i, count in enumerate(kind.counts[: maps - 1], start=1):
            setattr(self, f"layer{i}", self._stage(dims, i, width * 2 ** (i - 1), kind, drops[:count]))
            drops = drops[count:]

    def _stage(self, dims: int, index: int, width: int, variant: Variant, drops: list[nn.Module]) -> nn.Sequential:
        """The blocks that give map `index`; a stride given up before them is a dilation from their second on."""
        before, after = self.strides[index - 1][0], self.strides[index][0]
        dilation, wide = 2**index // before, 2 ** (index + 1) // after
        block = Bottleneck if variant.bottleneck else BasicBlock
        blocks: list[nn.Module] = []
        for i, drop in enumerate(drops):
            inputs = width * variant.expansion if i else self.channels[index - 1]
            stride = after // before if i == 0 and index > 1 else 1  # the max pooling strides for the first stage
            dilations = (wide if i else dilation, wide)
            blocks.append(block(dims, inputs, width, stride, dilations, variant, self.style, drop))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps = [self.dropout(x)]
        for i in range(1, len(self.channels)):
            x = self.dropout(getattr(self, f"layer{i}")(self.maxpool(x) if i == 1 else x))
            maps.append(x)
        return maps
