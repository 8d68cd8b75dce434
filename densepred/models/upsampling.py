"""Ways up: unpooling to where each maximum was (Zeiler & Fergus 2014; Noh et al. 2015), and interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.models.layers import Size, fit, to_tuple, upsample

_MAX_POOL: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}


def pool_with_switches(x: Tensor, kernel: Size) -> tuple[Tensor, Tensor]:
    """Max pooling over windows side by side, and for each the place of its maximum.

    n voxels give ceil(n / kernel): the last window may hold fewer. Of equal voxels the first wins, NaN wins over all.

    Args:
        x: (B, C, *spatial).
        kernel: voxels of a window, a number or one per axis; at most 256 in all.

    Returns:
        The maxima, (B, C, *ceil(spatial / kernel)), and the switches, uint8 of the same shape: the voxel's number
        within the full window, row by row.

    Raises:
        ValueError: a window of more than 256 voxels.

    Example:
        >>> import torch
        >>> pooled, switches = pool_with_switches(torch.tensor([[[[1.0, 2.0, 0.0], [4.0, 3.0, 5.0]]]]), 2)
        >>> pooled.tolist(), switches.tolist()
        ([[[[4.0, 5.0]]]], [[[[2, 2]]]])
    """
    window = _window(kernel, x.ndim - 2)
    pooled, flat = _MAX_POOL[len(window)](x, window, ceil_mode=True, return_indices=True)
    rest = flat - _corners(window, x.shape[2:], pooled.shape[2:], x.device)
    rest = rest.to(torch.int32)  # division is most of the work, and faster so
    switches, pitch = torch.zeros_like(rest), math.prod(x.shape[2:])
    for n, k in zip(x.shape[2:], window, strict=True):
        pitch = pitch // n
        step = rest // pitch
        switches, rest = switches * k + step, rest - step * pitch
    return pooled, switches.to(torch.uint8)


def unpool(x: Tensor, switches: Tensor, kernel: Size, size: Sequence[int]) -> Tensor:
    """Put each value where its window had the maximum, and zero elsewhere.

    Args:
        x: (B, C, *spatial).
        switches: uint8, of the same shape, as `pool_with_switches` gives them.
        kernel: that of the pooling.
        size: spatial size to return, that of the map pooled.

    Returns:
        (B, C, *size).

    Raises:
        ValueError: a window of more than 256 voxels.

    Example:
        >>> import torch
        >>> unpool(torch.tensor([[[[7.0]]]]), torch.tensor([[[[2]]]], dtype=torch.uint8), 2, (2, 2)).tolist()
        [[[[0.0, 0.0], [7.0, 0.0]]]]
    """
    window = _window(kernel, x.ndim - 2)
    # max_unpool has no dependable ONNX form (pytorch#25088); a scatter has one and is as fast.
    within = _flat([torch.arange(k, device=x.device) for k in window], size).flatten()
    flat = within[switches.long()] + _corners(window, size, x.shape[2:], x.device)
    empty = x.new_zeros(*x.shape[:2], math.prod(size))
    return empty.scatter(2, flat.flatten(2), x.flatten(2)).view(*x.shape[:2], *size)


def _corners(window: tuple[int, ...], size: Sequence[int], grid: Sequence[int], device: torch.device) -> Tensor:
    """The number, in a map of `size`, of the first voxel of each window: (*grid)."""
    return _flat([torch.arange(n, device=device) * k for n, k in zip(grid, window, strict=True)], size)


def _flat(places: list[Tensor], size: Sequence[int]) -> Tensor:
    """The numbers, row by row in a map of `size`, of the voxels at all combinations of places along the axes."""
    numbers = places[0]
    for n, along in zip(size[1:], places[1:], strict=True):
        numbers = numbers.unsqueeze(-1) * n + along
    return numbers


def _window(kernel: Size, dims: int) -> tuple[int, ...]:
    """The window's voxels along each axis."""
    window = to_tuple(kernel, dims, "kernel")
    if math.prod(window) > 256:
        raise ValueError(f"kernel must hold at most 256 voxels, which uint8 can number, got {kernel!r}")
    return window


def enlarge(
    x: Tensor, ratio: Sequence[int], size: Sequence[int], mode: Literal["linear", "nearest"] = "linear"
) -> Tensor:
    """Interpolate by whole factors, then crop at the far end: voxels stay where they are, however odd the size.

    Args:
        x: (B, C, *spatial).
        ratio: factor along each axis.
        size: spatial size to return, at most spatial * ratio.
        mode: "linear" or "nearest".

    Returns:
        (B, C, *size).

    Example:
        >>> import torch
        >>> enlarge(torch.tensor([[[[0.0, 4.0]]]]), (1, 2), (1, 3)).tolist()
        [[[[0.0, 1.0, 3.0]]]]
    """
    if max(ratio) > 1:
        x = upsample(x, [n * r for n, r in zip(x.shape[2:], ratio, strict=True)], mode)
    return fit(x, size)
