"""Which voxels of the image a voxel of a feature map can depend on, found by following tensors through the network.

Convolutions, pooling, interpolation, crops, pads and the reshapes between them are followed exactly, through all
branches at once; `tracing.rules` says how. What looks at a whole axis (a mean, attention) or cannot be followed is
marked as such and never given a number. The statistics of normalisation layers, which see the whole map, are left out,
as is usual (Araujo et al. 2019, "Computing receptive fields of convolutional neural networks").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from densepred.models.tracing.call import Call, Effect, Traced
from densepred.models.tracing.known import Known
from densepred.models.tracing.layout import Steps, blank, of_image
from densepred.models.tracing.rules import effects
from densepred.models.tracing.steps import Range
from densepred.models.tracing.unpooling import Unpooling

Field = tuple[int | None, ...]


@dataclass(frozen=True)
class Node:
    """A tensor of the network, as the image's axes see it.

    Attributes:
        edges: the nodes it was made of, with what happened along each axis of the image; nothing along those left out.
        whole: axes along which its voxels may depend on the whole image.
        stride: voxels of the image per voxel along each axis; None where it does not extend along that axis.
        size: its voxels along each axis.
    """

    edges: tuple[tuple[int, Steps], ...]
    whole: frozenset[int]
    stride: Field
    size: Field


class Tracer(TorchDispatchMode):
    """Records, while active, how every tensor came from the image, and the FLOPs spent.

    Args:
        image: the input (B, C, *spatial) of the network; a meta tensor will do.

    Attributes:
        flops: operations of convolutions and matrix products so far, a multiply-add counting two.

    Example:
        >>> import torch
        >>> from densepred.models.layers import conv
        >>> image = torch.zeros(1, 1, 16, 16)
        >>> layers = torch.nn.Sequential(conv(2, 1, 1, 3, stride=2), conv(2, 1, 1, 3))
        >>> with torch.no_grad(), Tracer(image) as tracer:
        ...     out = layers(image)
        >>> tracer.receptive_field(out), tracer.stride(out)
        ((7, 7), (2, 2))
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.dims = image.ndim - 2
        self.flops = 0
        self.nodes = [Node((), frozenset(), (1,) * self.dims, tuple(image.shape[2:]))]
        self._traced = {id(image): Traced(0, of_image(image.shape))}
        self._alive = [image]  # an id is unique only among living tensors
        self._known, self._unpooling = Known(), Unpooling()
        self._noted: dict[int, int] = {}  # how many tensors there had been when one was followed last
        self._written: dict[int, tuple[int, int]] = {}  # storages that were written to: likewise when, and the node

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += tensors
        self._known.record(func, args, kwargs, tensors)
        inputs = [traced for t in tree_leaves((args, kwargs)) if (traced := self._look_up(t)) is not None]
        if inputs and tensors:
            call = Call(func, args, kwargs, tensors, inputs, self._look_up, self._known.get, self._put)
            unpooled = self._unpooling.effect(call)
            for tensor, effect in zip(tensors, [unpooled] if unpooled else effects(call), strict=True):
                if effect is not None:
                    self._note(tensor, effect, func._schema.is_mutable)
        return out

    def _note(self, tensor: Tensor, effect: Effect, overwritten: bool) -> None:
        node, now = self._put(effect), len(self._alive)
        before = self._traced.get(id(tensor))
        if overwritten and (before is None or before.node != node):
            self._written[_storage(tensor)] = now, node
        self._traced[id(tensor)], self._noted[id(tensor)] = Traced(node, effect.layout), now

    def _look_up(self, value: Any) -> Traced | None:
        traced = self._traced.get(id(value)) if isinstance(value, Tensor) else None
        if not isinstance(value, Tensor) or not self._written:
            return traced
        time, node = self._written.get(_storage(value), (0, 0))
        if time <= self._noted.get(id(value), 0):
            return traced
        # something was written into it by another name, a slice say: in ways that are not followed
        layout = tuple(map(blank, value.shape)) if traced is None else traced.layout
        nodes = {node} if traced is None else {node, traced.node}
        return Traced(self._put(Effect(layout, [(n, {}) for n in nodes], set(range(self.dims)))), layout)

    def _put(self, effect: Effect) -> int:
        """Add a node for what an effect says, or find the one that is the same."""
        size = {atom.axis: atom.size for dim in effect.layout for atom in dim}
        every = set(range(self.dims))
        first, steps = effect.edges[0]
        whole = (effect.whole | (every - size.keys())) & every
        whole = whole.union(*(self.nodes[parent].whole for parent, _ in effect.edges))
        node = self.nodes[first]
        if all(edge == (first, {}) for edge in effect.edges) and whole == node.whole:
            return first
        stride = [
            node.stride[a] if a not in steps else steps[a].stride_after(node.stride[a] or 1) for a in sorted(every)
        ]
        placed = tuple(n if axis in size else None for axis, n in enumerate(stride))
        self.nodes.append(Node(tuple(effect.edges), frozenset(whole), placed, tuple(map(size.get, sorted(every)))))
        return len(self.nodes) - 1

    def stride(self, tensor: Tensor) -> Field:
        """Voxels of the image per voxel of a tensor, along each axis; None where it does not extend along it."""
        traced = self._look_up(tensor)
        return (None,) * self.dims if traced is None else self.nodes[traced.node].stride

    def receptive_field(self, tensor: Tensor) -> Field:
        """Voxels of the image a voxel of a tensor depends on, along each axis; the most where voxels differ.

        None where it may be the whole axis: something looks at all of it, or could not be followed. Zero for what does
        not depend on the image.
        """
        traced = self._look_up(tensor)
        if traced is None:
            return (0,) * self.dims
        return tuple(self._extent(traced.node, axis) for axis in range(self.dims))

    def region(self, tensor: Tensor, voxel: Sequence[int]) -> tuple[tuple[int, int] | None, ...]:
        """The first and one past the last voxel of the image that one voxel depends on, along each axis.

        They may lie beyond the image's ends. None where it may be the whole axis, as in `receptive_field`.

        Args:
            tensor: a tensor (B, C, *spatial) that depends on the image.
            voxel: its place in `tensor`, along each axis.
        """
        traced = self._look_up(tensor)
        assert traced is not None
        ends = [self._reach(traced.node, axis, np.array([place])) for axis, place in enumerate(voxel)]
        return tuple(None if end is None else (int(end[0][0]), int(end[1][0]) + 1) for end in ends)

    def _extent(self, node: int, axis: int) -> int | None:
        phases = max(other.stride[axis] or 1 for other in self.nodes[: node + 1])
        ends = self._reach(node, axis, np.arange(max(phases, self.nodes[node].size[axis] or 1)))
        return None if ends is None else int((ends[1] - ends[0]).max()) + 1

    def _reach(self, last: int, axis: int, voxels: np.ndarray) -> Range | None:
        """Go back from a node's voxels to the image, keeping the first and last voxel needed of each node."""
        if axis in self.nodes[last].whole:
            return None
        needed = {last: (voxels, voxels)}
        for index in range(last, 0, -1):
            if index not in needed:
                continue
            low, high = needed.pop(index)
            for parent, steps in self.nodes[index].edges:
                step = steps.get(axis)
                first, final = step.needs(low, high) if step else (low, high)
                if parent in needed:
                    first, final = np.minimum(needed[parent][0], first), np.maximum(needed[parent][1], final)
                needed[parent] = first, final
        return needed[0]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
