"""Normalisation layers for any number of spatial axes, and for a single voxel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

HALVES = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) that also takes a single voxel, whose result is the bias.

    Works in and keeps the memory format and type of its input, and computes statistics of bfloat16 input in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        out = torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        # autocast on GPUs makes float32 of it, which would take twice the memory up to the next layer
        return out if out.dtype == x.dtype else out.to(x.dtype)


class InstanceNorm(GroupNorm):
    """Affine instance normalisation (Ulyanov et al. 2016), as group normalisation with a group for each channel.

    The functions are the same; the group form is as fast on contiguous tensors and keeps channels-last ones so, which
    bfloat16 inference on CPUs gains most from. There its statistics are plain float32 sums: exact to 1e-4 where a
    channel's mean is within its standard deviation, to 0.3 % at three times that. Training takes the kernel that copies
    to contiguous first: exact, and faster backward (11 ms against 67 ms at 2x32x40x56x40 in bfloat16).

    Without gradients, channels-last float32 on CPUs takes `normalized_in_passes`, half precision on GPUs
    `normalized_by_sums`, and a compiler the formula: all keep the memory format; the parameters may stay float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        if torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self._by_kernel(x)
        if torch.compiler.is_compiling():
            return normalized_by_formula(x, self.weight, self.bias, self.eps)
        if x.is_cuda and x.dtype in HALVES:
            with torch.autocast(x.device.type, enabled=False):  # which would copy all of it to float32 first
                return normalized_by_sums(x, self.weight, self.bias, self.eps)
        if x.is_cpu and x.dtype == torch.float32 and not x.is_contiguous():
            return normalized_in_passes(x, self.weight, self.bias, self.eps)
        return self._by_kernel(x)

    def _by_kernel(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.is_cpu and not x.is_contiguous() and self._copies(x):
            return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
        return super().forward(x)

    @staticmethod
    def _copies(x: Tensor) -> bool:
        """Whether a channels-last tensor is better copied."""
        return x.requires_grad or x.dtype == torch.float32


def normalized_by_sums(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalisation in three passes that keep the memory format: mean, root of the sum of squares, result.

    The variance is the mean square less the squared mean, in float32, and so exact to 1e-4 where a channel's mean is
    within ten of its standard deviations; bfloat16, for which this is meant, itself has no more digits there.

    Args:
        x: (B, C, *spatial), float32 or half precision, on any device.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.

    Returns:
        As `x`: its shape, type and memory format.
    """
    axes, shape = list(range(2, x.ndim)), (1, -1, *(1 for _ in x.shape[2:]))
    mean = x.mean(axes, keepdim=True, dtype=torch.float32)
    root = torch.linalg.vector_norm(x, 2, axes, keepdim=True, dtype=torch.float32)
    variance = (root.square() / x.shape[2:].numel() - mean.square()).clamp_min(0)
    scale = weight.float().view(shape) * torch.rsqrt(variance + eps)
    shift = bias.float().view(shape) - mean * scale
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def normalized_in_passes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalisation with a variance of centred values, which is exact to rounding whatever the mean.

    On channels-last float32 at 1x32x96x96x96 it takes a fifth of the time of the kernel that copies to contiguous.
    Arguments as for `normalized_by_sums`.
    """
    axes, shape = list(range(2, x.ndim)), (1, -1, *(1 for _ in x.shape[2:]))
    mean = x.mean(axes, keepdim=True, dtype=torch.float32)
    variance = (x - mean).square_().mean(axes, keepdim=True)
    scale = weight.float().view(shape) * torch.rsqrt(variance + eps)
    shift = bias.float().view(shape) - mean * scale
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def normalized_by_formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance normalisation as textbooks have it, for compilers to fuse; arguments as for `normalized_by_sums`."""
    axes, shape = list(range(2, x.ndim)), (1, -1, *(1 for _ in x.shape[2:]))
    variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
    scaled = (x.float() - mean) * torch.rsqrt(variance + eps)
    return (scaled * weight.float().view(shape) + bias.float().view(shape)).to(x.dtype)


class BatchNorm(_BatchNorm):
    """Batch normalisation (Ioffe & Szegedy 2015) for any number of spatial axes.

    A batch with one value per channel has no variance: in training it is normalised by the running statistics and
    leaves them alone.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Any number of axes will do."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        if self.training and x.shape[0] * math.prod(x.shape[2:]) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each voxel (Ba et al. 2016), as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _group_norm(channels: int) -> GroupNorm:
    """Eight groups, or as many of them as divide the channels."""
    return GroupNorm(math.gcd(8, channels), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": InstanceNorm,
    "batch": BatchNorm,
    "group": _group_norm,
    "layer": LayerNorm,
    "none": lambda channels: nn.Identity(),
}
