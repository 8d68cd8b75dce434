"""The layers every network is made of, for 2 and 3 dimensions.

No other module names `Conv2d` or `Conv3d`. Shapes: (B, C, *spatial), spatial = (Y, X) or (Z, Y, X).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | Sequence[int]
Kinds = dict[int, Callable[..., nn.Module]]
Network = TypeVar("Network", bound=nn.Module)
_CONV: Kinds = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Kinds = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MAX_POOL: Kinds = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVG_POOL: Kinds = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_DROPOUT: Kinds = {2: nn.Dropout2d, 3: nn.Dropout3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, *TRANSPOSED)


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
    padding: Literal["same", "valid"] = "same",
) -> nn.Module:
    """A convolution: "same" makes ceil(n / stride) voxels of n, "valid" keeps only those whose kernel lies inside.

    Raises:
        ValueError: an even kernel with "same", which cannot be padded evenly; groups that do not divide the channels.
    """
    sizes = to_tuple(kernel, dims, "kernel")
    steps = to_tuple(stride, dims, "stride")
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups must divide the channels, got {groups} for {in_channels} to {out_channels}")
    if padding == "same" and any(k % 2 == 0 for k in sizes):
        raise ValueError(f"kernel must be odd along each axis, got {kernel!r}")
    margin = tuple(dilation * (k // 2) if padding == "same" else 0 for k in sizes)
    kind: Callable[..., nn.Module] = _CONV[dims]
    if dims == 3 and margin[0] > 2 and steps[0] > 1:
        kind = ShallowConv3d
    return kind(in_channels, out_channels, sizes, steps, margin, dilation=dilation, groups=groups, bias=bias)


class ShallowConv3d(nn.Conv3d):
    """Pads a shallow volume itself where a gradient is wanted.

    oneDNN 3.12 writes beyond its arrays in the weights' gradient of a strided convolution that it pads in depth, where
    the volume is less deep than kernel and stride together (7, stride 2: up to 7 planes): NaN, other values or a crash.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) -> (B, K, *ceil(size / stride))."""
        depth, reach = self.padding[0], self.dilation[0] * (self.kernel_size[0] - 1) + self.stride[0]
        if not torch.is_grad_enabled() or torch.compiler.is_exporting() or x.shape[2] > reach:
            return super().forward(x)
        x, margin = F.pad(x, (0, 0, 0, 0, int(depth), int(depth))), (0, *self.padding[1:])
        return F.conv3d(x, self.weight, self.bias, self.stride, margin, self.dilation, self.groups)


class _Patches(nn.Module):
    """Fills the last patch along each axis with zeros before the convolution of class `nn.Conv*d` it is mixed into."""

    stride: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, K, *ceil(spatial / patch))."""
        missing = [-n % s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        if torch.compiler.is_exporting() or any(missing):
            x = F.pad(x, [width for n in reversed(missing) for width in (0, n)])
        out: Tensor = super().forward(x)
        return out


class _PatchConv2d(_Patches, nn.Conv2d):
    pass


class _PatchConv3d(_Patches, nn.Conv3d):
    pass


def patch_conv(dims: int, in_channels: int, out_channels: int, patch: Size, bias: bool = True) -> nn.Module:
    """A convolution of patches side by side (kernel = stride): n voxels give ceil(n / patch), zeros fill the last."""
    steps = to_tuple(patch, dims, "patch")
    kinds: Kinds = {2: _PatchConv2d, 3: _PatchConv3d}
    return kinds[dims](in_channels, out_channels, steps, steps, bias=bias)


def transposed_conv(
    dims: int, in_channels: int, out_channels: int, stride: Size, bias: bool = True, kernel: Size | None = None
) -> nn.Module:
    """An upsampling convolution: n voxels give n * stride.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: a number or one per axis.
        bias: whether it adds one.
        kernel: a number or one per axis; by default the stride, without overlap. It exceeds the stride by an even
            number along each axis, half of which is cut off at either end.

    Raises:
        ValueError: a kernel below the stride, or above it by an odd number.
    """
    steps = to_tuple(stride, dims, "stride")
    sizes = to_tuple(steps if kernel is None else kernel, dims, "kernel")
    if any(k < s or (k - s) % 2 for k, s in zip(sizes, steps, strict=True)):
        raise ValueError(f"kernel must exceed the stride by an even number, got {sizes} at stride {steps}")
    padding = tuple((k - s) // 2 for k, s in zip(sizes, steps, strict=True))
    return _TRANSPOSED[dims](in_channels, out_channels, sizes, steps, padding, bias=bias)


def max_pool(dims: int, kernel: Size, stride: Size) -> nn.Module:
    """Max pooling; n voxels give ceil(n / stride), whether the kernel is the stride or an odd number above it."""
    sizes, steps = to_tuple(kernel, dims, "kernel"), to_tuple(stride, dims, "stride")
    padding = tuple(0 if k == s else k // 2 for k, s in zip(sizes, steps, strict=True))
    kind = OverlappingMaxPool3d if dims == 3 and sizes != steps else _MAX_POOL[dims]
    return kind(sizes, steps, padding, ceil_mode=sizes == steps)


class OverlappingMaxPool3d(nn.MaxPool3d):
    """`max_pool_3d` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) -> (B, C, *ceil(size / stride))."""
        sizes = (self.kernel_size, self.stride, self.padding)
        return max_pool_3d(x, *((size,) * 3 if isinstance(size, int) else size for size in sizes))


def max_pool_3d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Max pooling of volumes: (B, C, Z, Y, X) -> (B, C, *pooled).

    On GPUs in two steps, in planes and across them: the same maxima, of equal voxels the same one. torch's gradient of
    overlapping windows in 3D is added up there in whatever order its threads come; in 2D it is not.
    """
    size, step, margin = (tuple(values) for values in (kernel, stride, padding))
    if not x.is_cuda:
        return F.max_pool3d(x, size, step, margin)
    planes = F.max_pool2d(x.flatten(1, 2), size[1:], step[1:], margin[1:]).unflatten(1, x.shape[1:3])
    out = F.max_pool2d(planes.flatten(3), (size[0], 1), (step[0], 1), (margin[0], 0))
    return out.unflatten(3, planes.shape[3:])


class MeanPool(nn.Module):
    """The mean of windows side by side, the last one of those voxels that are there.

    Maps smaller than the window are fine, which torch refuses in 3D: zeros are filled in, and taken out of the mean.

    Args:
        dims: 2 or 3.
        size: of the windows, a number or one per axis.

    Example:
        >>> import torch
        >>> MeanPool(2, 2)(torch.tensor([[[[1.0, 3.0, 5.0]]]])).tolist()
        [[[[2.0, 5.0]]]]
    """

    def __init__(self, dims: int, size: Size) -> None:
        super().__init__()
        self.size = to_tuple(size, dims, "size")
        self.pool = _AVG_POOL[dims](self.size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *ceil(spatial / size))."""
        missing = [-n % s for n, s in zip(x.shape[2:], self.size, strict=True)]
        out: Tensor
        if torch.compiler.is_exporting() or any(missing):
            margin = [width for n in reversed(missing) for width in (0, n)]
            real = F.pad(x.new_ones(1, 1, *x.shape[2:]), margin)
            out = self.pool(F.pad(x, margin)) / self.pool(real)
        else:
            out = self.pool(x)
        return out


def global_pool(x: Tensor) -> Tensor:
    """The mean over all voxels: (B, C, *spatial) -> (B, C)."""
    return x.flatten(2).mean(2)


def upsample(x: Tensor, size: Sequence[int], mode: Literal["linear", "nearest"] = "linear") -> Tensor:
    """Interpolate (B, C, *spatial) to `size`; voxel edges, not centres, coincide at the border."""
    if mode == "nearest":
        return F.interpolate(x, list(size), mode="nearest-exact")
    if x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_exporting():
        out: Tensor = _Interpolation.apply(x, tuple(size))
        return out
    return _linear(x, size)


def _linear(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, list(size), mode={2: "bilinear", 3: "trilinear"}[x.ndim - 2], align_corners=False)


class _Interpolation(torch.autograd.Function):
    """Linear interpolation with a gradient of the same bits in every run, which torch's own has not on GPUs.

    There torch adds up the gradient in whatever order its threads come; here it is a product with a matrix for each
    axis, the transposed one of interpolation along it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """(B, C, *spatial) -> (B, C, *size)."""
        ctx.before = x.shape[2:]
        return _linear(x, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(B, C, *size) -> (B, C, *spatial)."""
        (out,) = gradients
        for axis, n in enumerate(ctx.before, start=2):
            if n != out.shape[axis]:
                taps = _taps(n, out.shape[axis], out.device, out.dtype)
                out = torch.tensordot(out, taps, dims=([axis], [0])).movedim(-1, axis)
        return out, None


@lru_cache(maxsize=64)
def _taps(before: int, after: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix (after, before) of linear interpolation along an axis, between half-pixel centres."""
    centres = ((torch.arange(after, dtype=torch.float64) + 0.5) * before / after - 0.5).clamp(0, before - 1)
    taps = (1 - (centres.unsqueeze(1) - torch.arange(before)).abs()).clamp(min=0)
    return taps.to(device, dtype, non_blocking=True)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a sample's whole branch is dropped, and the others scaled up.

    Args:
        probability: of dropping; 0 <= p < 1.

    Raises:
        ValueError: a probability outside.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"stochastic depth must be at least 0 and below 1, got {probability!r}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        if not self.training or not self.probability:
            return x
        keep = 1 - self.probability
        shape = (x.shape[0], *(1 for _ in x.shape[1:]))
        return x * (torch.rand(shape, device=x.device) < keep).to(x.dtype) / keep

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.probability:.3f}"


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


def center_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Cut `size` out of the middle of `x` (B, C, *spatial); of an odd surplus the larger half goes at the far end."""
    for axis, n in enumerate(size, start=2):
        x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


def fill_bilinear_(layer: nn.Module) -> nn.Module:
    """Make a transposed convolution exact linear interpolation of each channel onto its own; changes and returns it.

    Channel i of the output takes channel i mod C of the input. The kernel has to be twice the stride along each axis
    (the stride's parity permitting, else 2 * stride - 1), as in Long, Shelhamer and Darrell 2015.

    Raises:
        ValueError: a kernel of another size.
    """
    profiles = []
    for k, s in zip(layer.kernel_size, layer.stride, strict=True):  # type: ignore[arg-type]
        if k != 2 * s - s % 2:
            raise ValueError(f"kernel must be {2 * s - s % 2} for linear interpolation at stride {s}, got {k}")
        profiles.append(1 - (torch.arange(k) - (k - 1) / 2).abs() / s)
    return _fill_pairs(layer, profiles)


def fill_nearest_(layer: nn.Module) -> nn.Module:
    """Make a transposed convolution repeat its voxels (ICNR, Aitken et al. 2017); changes and returns it.

    The kernel has to be the stride. Channel i of the output takes channel i mod C of the input.

    Raises:
        ValueError: a kernel of another size.
    """
    if layer.kernel_size != layer.stride:
        raise ValueError(f"kernel must be the stride {layer.stride} to repeat voxels, got {layer.kernel_size}")
    return _fill_pairs(layer, [torch.ones(k) for k in layer.kernel_size])  # type: ignore[union-attr]


def _fill_pairs(layer: nn.Module, profiles: list[Tensor]) -> nn.Module:
    """Give the channel pairs (i mod C, i) the outer product of one profile per axis, and all else zero."""
    kernel = profiles[0]
    for profile in profiles[1:]:
        kernel = kernel.unsqueeze(-1) * profile
    weight: Tensor = layer.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight.zero_()
        for out in range(weight.shape[1]):
            weight[out % weight.shape[0], out] = kernel.to(weight)
        if layer.bias is not None:
            layer.bias.zero_()  # type: ignore[operator]
    return layer


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
    "none": nn.Identity,
}


def to_channels_last(model: Network) -> Network:
    """Lay the convolution weights of a model out channels-last, in place; its feature maps follow."""
    for parameter in model.parameters():
        layout = CHANNELS_LAST.get(parameter.ndim - 2)
        if layout is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model
