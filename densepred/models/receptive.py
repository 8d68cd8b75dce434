"""Which voxels of the image a voxel of a feature map can depend on, found by following tensors through the network.

Convolutions, pooling, transposed convolutions, crops and pads are followed exactly, through all branches at once; the
statistics of normalisation layers, which see the whole map, are left out, as is usual (Araujo et al. 2019, "Computing
receptive fields of convolutional neural networks").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Axes = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """How one operation moves along each axis.

    Output voxel i reads the input voxels i * stride - padding + dilation * t for t in [0, kernel). In a transposed one
    it reads the input voxels j for which it is j * stride - padding + dilation * t.
    """

    kernel: Axes
    stride: Axes
    padding: Axes
    dilation: Axes
    transposed: bool = False

    def needs(self, axis: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and last input voxels that the output voxels low to high read."""
        stride, padding = self.stride[axis], self.padding[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        if self.transposed:
            return -((reach - padding - low) // stride), (high + padding) // stride
        return low * stride - padding, high * stride - padding + reach


@dataclass(frozen=True)
class Node:
    """A tensor of the network: what it was made of, and its voxel size in voxels of the image."""

    parents: tuple[int, ...]
    step: Step | None
    stride: Axes


class Tracer(TorchDispatchMode):
    """Records, while active, how every tensor came from the image, and the FLOPs spent.

    Args:
        image: the input (B, C, *spatial) of the network; a meta tensor will do.

    Attributes:
        flops: operations of convolutions and matrix products so far, a multiply-add counting two.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.dims = image.ndim - 2
        self.flops = 0
        self.nodes = [Node((), None, (1,) * self.dims)]
        self._index = {id(image): 0}
        self._alive = [image]  # an id is unique only among living tensors

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        parents = tuple({self._index[id(t)]: None for t in tree_leaves(args) if id(t) in self._index})
        if parents:
            self._record(parents, self._step(func, args), [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out

    def _record(self, parents: tuple[int, ...], step: Step | None, tensors: list[Tensor]) -> None:
        stride = self.nodes[parents[0]].stride
        if step is not None:
            pairs = zip(stride, step.stride, strict=True)
            stride = tuple(max(a // b, 1) if step.transposed else a * b for a, b in pairs)
        self.nodes.append(Node(parents, step, stride))
        for tensor in tensors:
            self._index[id(tensor)] = len(self.nodes) - 1
            self._alive.append(tensor)

    def _step(self, func: Any, args: tuple[Any, ...]) -> Step | None:
        reader = _READERS.get(func.overloadpacket)
        return reader(args, self.dims) if reader else None

    def stride(self, tensor: Tensor) -> Axes:
        """Voxels of the image per voxel of a feature map, along each axis."""
        return self.nodes[self._index[id(tensor)]].stride

    def receptive_field(self, tensor: Tensor) -> Axes:
        """Voxels of the image a voxel of a feature map depends on, along each axis; the most where voxels differ."""
        last = self._index[id(tensor)]
        phases = np.arange(max(max(node.stride) for node in self.nodes))
        return tuple(self._extent(last, axis, phases) for axis in range(self.dims))

    def _extent(self, last: int, axis: int, voxels: np.ndarray) -> int:
        """Go back from `voxels` of one tensor to the image, keeping the first and last voxel needed of each tensor."""
        needed = {last: (voxels, voxels)}
        for index in range(last, 0, -1):
            if index not in needed:
                continue
            low, high = needed.pop(index)
            node = self.nodes[index]
            if node.step is not None:
                low, high = node.step.needs(axis, low, high)
            for parent in node.parents:
                first, final = needed.get(parent, (low, high))
                needed[parent] = np.minimum(first, low), np.maximum(final, high)
        low, high = needed[0]
        return int((high - low).max()) + 1


def _axes(values: Any, dims: int) -> Axes:
    """A list argument of an operation, which may hold one value for all axes."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    return tuple(values * dims if len(values) == 1 else values)


def _convolution(args: tuple[Any, ...], dims: int) -> Step:
    _, weight, _, stride, padding, dilation, transposed = args[:7]
    kernel = tuple(weight.shape[2:])
    return Step(kernel, _axes(stride, dims), _axes(padding, dims), _axes(dilation, dims), transposed)


def _pool(args: tuple[Any, ...], dims: int) -> Step:
    _, kernel, *rest = args
    stride = rest[0] if rest and rest[0] else kernel
    padding = rest[1] if len(rest) > 1 else 0
    dilation = rest[2] if len(rest) > 2 and not isinstance(rest[2], bool) else 1
    return Step(_axes(kernel, dims), _axes(stride, dims), _axes(padding, dims), _axes(dilation, dims))


def _slice(args: tuple[Any, ...], dims: int) -> Step | None:
    axis, start = (args[1] if len(args) > 1 else 0) - 2, (args[2] if len(args) > 2 else 0) or 0
    return _shift({axis: start}, dims) if axis >= 0 else None


def _pad(args: tuple[Any, ...], dims: int) -> Step:
    return _shift({dims - 1 - i: -before for i, before in enumerate(args[1][::2])}, dims)


def _shift(starts: dict[int, int], dims: int) -> Step:
    """Output voxel i is input voxel i + start."""
    ones = (1,) * dims
    return Step(ones, ones, tuple(-starts.get(axis, 0) for axis in range(dims)), ones)


_READERS: dict[Any, Callable[[tuple[Any, ...], int], Step | None]] = {
    aten.convolution: _convolution,
    aten.max_pool2d_with_indices: _pool,
    aten.max_pool3d_with_indices: _pool,
    aten.avg_pool2d: _pool,
    aten.avg_pool3d: _pool,
    aten.slice: _slice,
    aten.constant_pad_nd: _pad,
}
