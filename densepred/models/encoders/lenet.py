"""LeNet-5 (LeCun et al. 1998) as published, and as an encoder in 2 and 3 dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densepred.models.blocks import Padding, Style
from densepred.models.encoders.base import Encoder
from densepred.models.layers import MeanPool, conv

C3_INPUTS = (
    ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    (
        *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
        *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    ),
    ((0, 1, 2, 3, 4, 5),),
)
"""Which maps of S2 each of C3's 16 sees (table 1 of the paper), those with equally many together."""

_DIGITS = """
.#####. ...##.. .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
##...## ..###.. ##...## ##...## ...###. ##..... .##.... .....## ##...## ##...##
##...## .####.. .....## .....## ..####. ##..... ##..... .....## ##...## ##...##
##...## ...##.. .....## .....## .##.##. ##..... ##..... ....##. ##...## ##...##
##...## ...##.. ....##. .....## ##..##. ######. ######. ....##. ##...## ##...##
##...## ...##.. ...##.. ..####. ##..##. ##...## ##...## ...##.. .#####. ##...##
##...## ...##.. ..##... .....## ##..##. .....## ##...## ...##.. ##...## .######
##...## ...##.. .##.... .....## ####### .....## ##...## ..##... ##...## .....##
##...## ...##.. ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...##.. ##..... .....## ....##. .....## ##...## .##.... ##...## .....##
##...## ...##.. ##..... ##...## ....##. ##...## ##...## .##.... ##...## ....##.
.#####. .###### ####### .#####. ....##. .#####. .#####. .##.... .#####. .####..
"""


def digit_codes() -> Tensor:
    """Pictures of the digits 0 to 9, 7 wide and 12 high, as rows of 84 numbers: +1 for ink and -1 for paper.

    They are of the kind and size of the paper's figure 3, drawn afresh: its pixels are not copied.

    Example:
        >>> digit_codes().shape
        torch.Size([10, 84])
    """
    rows = [line.split() for line in _DIGITS.split("\n") if line]
    return torch.tensor([[1.0 if c == "#" else -1.0 for row in rows for c in row[digit]] for digit in range(10)])


class ScaledTanh(nn.Module):
    """1.7159 tanh(2 x / 3), which takes 1 to 1 and -1 to -1 (appendix A).

    Example:
        >>> round(float(ScaledTanh()(torch.ones(()))), 4)
        1.0
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsampling(nn.Module):
    """The sum over windows of 2 voxels along each axis, times a coefficient and plus a bias for each channel.

    A last window that is not full counts as if its missing voxels were the mean of the others.

    Args:
        dims: 2 or 3.
        channels: C.

    Example:
        >>> Subsampling(2, 6)(torch.zeros(1, 6, 5, 7)).shape
        torch.Size([1, 6, 3, 4])
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.mean = MeanPool(dims, 2)
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        _fill(self, 2**dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *ceil(spatial / 2))."""
        dims = x.ndim - 2
        shape = (-1, *[1] * dims)
        return self.mean(x) * (2**dims * self.weight.view(shape)) + self.bias.view(shape)


class SparseConv(nn.Module):
    """C3: a 5x5 convolution of 6 maps to 16, each of which sees the maps of `C3_INPUTS` alone.

    Args:
        dims: 2 or 3.
        padding: "same" or "valid".

    Example:
        >>> sum(p.numel() for p in SparseConv(2, "valid").parameters())
        1516
    """

    def __init__(self, dims: int, padding: Padding) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        for inputs in C3_INPUTS:
            count, each = len(inputs), len(inputs[0])
            layer = conv(dims, count * each, count, 5, groups=count, padding=padding)
            self.groups.append(_fill(layer, each * 5**dims))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, *spatial) -> (B, 16, *spatial)."""
        one = x.split(1, 1)
        seen = [torch.cat([one[i] for group in inputs for i in group], 1) for inputs in C3_INPUTS]
        return torch.cat([layer(maps) for layer, maps in zip(self.groups, seen, strict=True)], 1)


class Stages(nn.Module):
    """The convolutions C1, C3 and C5 with the subsampling S2 and S4 between them, each followed by the scaled tanh.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.
        padding: of the convolutions; "valid" in the paper.

    Example:
        >>> [tuple(m.shape[1:]) for m in Stages(2, 1, "valid")(torch.zeros(1, 1, 32, 32))]
        [(6, 28, 28), (16, 10, 10), (120, 1, 1)]
    """

    def __init__(self, dims: int, in_channels: int, padding: Padding) -> None:
        super().__init__()
        self.c1 = _fill(conv(dims, in_channels, 6, 5, padding=padding), in_channels * 5**dims)
        self.s2 = Subsampling(dims, 6)
        self.c3 = SparseConv(dims, padding)
        self.s4 = Subsampling(dims, 16)
        self.c5 = _fill(conv(dims, 16, 120, 5, padding=padding), 16 * 5**dims)
        self.squash = ScaledTanh()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> the maps of C1, C3 and C5."""
        c1 = self.squash(self.c1(x))
        c3 = self.squash(self.c3(self.squash(self.s2(c1))))
        c5 = self.squash(self.c5(self.squash(self.s4(c3))))
        return [c1, c3, c5]


class LeNetEncoder(Encoder):
    """The convolutions of LeNet-5, padded to keep the size: maps of 6, 16 and 120 channels at strides 1, 2 and 4.

    The `state_dict` is that part of `LeNet5`'s that begins with `stages`, for one channel in 2D. A decoder goes on
    without norms and with ReLU, for the scaled tanh belongs to this network alone.

    Args:
        dims: 2 or 3.
        in_channels: channels of the image.

    Raises:
        ValueError: an argument outside these ranges.

    Example:
        >>> [tuple(m.shape[1:]) for m in LeNetEncoder(3, 2)(torch.zeros(1, 2, 5, 7, 9))]
        [(6, 5, 7, 9), (16, 3, 4, 5), (120, 2, 2, 3)]
    """

    channels = (6, 16, 120)

    own_initialization = True

    def __init__(self, dims: int, in_channels: int) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be positive, got {in_channels!r}")
        self.stages = Stages(dims, in_channels, "same")
        self.strides = tuple((stride,) * dims for stride in (1, 2, 4))
        self.style = Style("none", "relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, *spatial) -> [(B, channels[i], *ceil(spatial / strides[i])) for each i]."""
        maps: list[Tensor] = self.stages(x)
        return maps


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, section II.B), with 60,000 weights to train.

    Its outputs are radial basis functions: squared distances between the 84 units of F6 and a fixed code for each
    class, so the smallest is the answer (and their negatives are logits).

    Args:
        codes: (K, 84), for each class the activities that stand for it; by default `digit_codes`.

    Raises:
        ValueError: codes of another shape.

    Example:
        >>> LeNet5()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    codes: Tensor

    def __init__(self, codes: Tensor | None = None) -> None:
        super().__init__()
        codes = digit_codes() if codes is None else codes
        if codes.ndim != 2 or codes.shape[1] != 84:
            raise ValueError(f"codes must have the shape (classes, 84), got {tuple(codes.shape)}")
        self.stages = Stages(2, 1, "valid")
        self.f6 = _fill(nn.Linear(120, 84), 120)
        self.squash = ScaledTanh()
        self.register_buffer("codes", codes.to(torch.get_default_dtype()).clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 32, 32), paper -0.1 and ink 1.175 -> (B, K) squared distances.

        Raises:
            ValueError: images of another size.
        """
        if x.shape[1:] != (1, 32, 32):
            raise ValueError(f"LeNet-5 takes images (B, 1, 32, 32), got {tuple(x.shape)}")
        f6 = self.squash(self.f6(self.stages(x)[-1].flatten(1)))
        return (f6.unsqueeze(1) - self.codes).square().sum(2)


def _fill(layer: nn.Module, inputs: int) -> nn.Module:
    """Uniform weights and biases within 2.4 over the number of a unit's inputs (appendix A); returns the layer."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -2.4 / inputs, 2.4 / inputs)
    return layer
