"""The layers every network is made of, for 2 and 3 dimensions.

No other module names `Conv2d` or `Conv3d`. Shapes: (B, C, *spatial), spatial = (Y, X) or (Z, Y, X).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Size = int | Sequence[int]
Kinds = dict[int, Callable[..., nn.Module]]
_CONV: Kinds = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Kinds = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL: Kinds = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_DROPOUT: Kinds = {2: nn.Dropout2d, 3: nn.Dropout3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def to_tuple(value: Size, dims: int, name: str) -> tuple[int, ...]:
    """One positive int per axis: a number stands for all axes.

    Raises:
        ValueError: `dims` is not 2 or 3, or `value` is not a positive int or `dims` of them.
    """
    if dims not in _CONV:
        raise ValueError(f"dims must be 2 or 3, got {dims!r}")
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(v, int) and v > 0 for v in values):
        raise ValueError(f"{name} must be a positive int or {dims} of them, got {value!r}")
    return values


def per_stage(values: Sequence[Size], stages: int, dims: int, name: str) -> tuple[tuple[int, ...], ...]:
    """One tuple per stage from one number or tuple per stage.

    Raises:
        ValueError: there are not as many values as stages.
    """
    if len(values) != stages:
        raise ValueError(f"{name} must have one entry for each of the {stages} stages, got {len(values)}: {values!r}")
    return tuple(to_tuple(value, dims, name) for value in values)


def conv(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel: Size,
    stride: Size = 1,
    bias: bool = True,
    groups: int = 1,
    dilation: int = 1,
) -> nn.Module:
    """A convolution padded so that n voxels give ceil(n / stride).

    Raises:
        ValueError: an even kernel, which cannot be padded evenly.
    """
    sizes = to_tuple(kernel, dims, "kernel")
    if any(k % 2 == 0 for k in sizes):
        raise ValueError(f"kernel must be odd along each axis, got {kernel!r}")
    padding = tuple(dilation * (k // 2) for k in sizes)
    steps = to_tuple(stride, dims, "stride")
    return _CONV[dims](in_channels, out_channels, sizes, steps, padding, dilation=dilation, groups=groups, bias=bias)


def transposed_conv(dims: int, in_channels: int, out_channels: int, stride: Size, bias: bool = True) -> nn.Module:
    """An upsampling convolution whose kernel is its stride: n voxels give n * stride, without overlap."""
    steps = to_tuple(stride, dims, "stride")
    return _TRANSPOSED[dims](in_channels, out_channels, steps, steps, bias=bias)


def max_pool(dims: int, kernel: Size, stride: Size) -> nn.Module:
    """Max pooling; n voxels give ceil(n / stride), whether the kernel is the stride or an odd number above it."""
    sizes, steps = to_tuple(kernel, dims, "kernel"), to_tuple(stride, dims, "stride")
    padding = tuple(0 if k == s else k // 2 for k, s in zip(sizes, steps, strict=True))
    return _MAX_POOL[dims](sizes, steps, padding, ceil_mode=sizes == steps)


def dropout(dims: int, probability: float) -> nn.Module:
    """Dropout of whole channels."""
    return _DROPOUT[dims](probability)


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Crop `x` (B, C, *spatial) to `size` at the far end of each axis, or repeat its last voxels where it is short."""
    exporting = torch.compiler.is_exporting()  # a slice would tie the program to whether this very size needs one
    for axis, n in enumerate(size, start=2):
        if not exporting and x.shape[axis] >= n:
            x = x.narrow(axis, 0, n)
        else:
            x = x.index_select(axis, torch.arange(n, device=x.device).clamp(max=x.shape[axis] - 1))
    return x


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
    "none": nn.Identity,
}


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay the convolution weights of a model out channels-last, in place; its feature maps follow."""
    for parameter in model.parameters():
        layout = CHANNELS_LAST.get(parameter.ndim - 2)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model
