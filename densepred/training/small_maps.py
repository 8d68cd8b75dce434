"""A guard against wrong gradients of convolutions of small maps on CPUs."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from densepred.models.layers import CONVOLUTIONS


def guard_small_maps(model: nn.Module) -> None:
    """Let convolutions compute in float32, under bfloat16 autocast, where a map is smaller than their kernel.

    oneDNN's bfloat16 kernels (in torch 2.13, on CPUs with AVX-512 BF16) give weights whose gradient there depends on
    whatever lay in memory before, and may write beyond their own: a 3x3x3 convolution of a map two voxels deep, say.
    Such maps are small, so that float32 costs nothing.

    Args:
        model: changed in place; copies of it are guarded too.
    """
    for layer in model.modules():
        if isinstance(layer, CONVOLUTIONS) and max(layer.kernel_size) > 1:
            layer.forward = MethodType(_guarded, layer)  # type: ignore[method-assign]


def _guarded(layer: nn.Module, x: Tensor) -> Tensor:
    kernel: tuple[int, ...] = layer.kernel_size  # type: ignore[assignment]
    forward = type(layer).forward
    if any(size < taps for size, taps in zip(x.shape[2:], kernel, strict=True)):
        with torch.autocast(x.device.type, enabled=False):
            return forward(layer, x.float())
    return forward(layer, x)
