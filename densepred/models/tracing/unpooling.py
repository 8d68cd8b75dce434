"""Unpooling, followed though the places that it scatters values to depend on the image.

Each value goes to one of a few places of its window, and these are known. Where all of them lie in the window, voxel i
of the output can only have come from voxel i // window. Of a last window that is cut off at the end of its axis, the
places beyond are taken never to occur: there was no voxel to find the maximum in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from densepred.models.tracing.call import Call, Effect, Traced
from densepred.models.tracing.layout import NONE, Atom, Layout, Steps, blank
from densepred.models.tracing.steps import grow

aten = torch.ops.aten
_MOST = 2**24


@dataclass(frozen=True)
class _Scattered:
    """A tensor (..., N), values of which were put where `places` (choices, number of values) says they can be."""

    values: Traced
    index: Traced
    places: Tensor


class Unpooling:
    """Keeps the possible values of indices, (choices, ...) with dimensions of 1 where they are all the same."""

    def __init__(self) -> None:
        self._choices: dict[int, Tensor] = {}
        self._scattered: dict[int, _Scattered] = {}

    def effect(self, call: Call) -> Effect | None:
        """How the output came to be, if it was unpooled; takes note of what leads there."""
        op = call.func.overloadpacket
        if op is aten.view and (scattered := self._scattered.get(id(call.args[0]))) is not None:
            return _unpooled(call, scattered)
        if op is aten.scatter:
            self._scatter(call)
        elif op in (aten.index, aten.add, aten.view):
            choices = {aten.index: self._looked_up, aten.add: self._added, aten.view: self._viewed}[op](call)
            if choices is not None and choices.numel() <= _MOST:
                self._choices[id(call.out[0])] = choices
        return None

    def _looked_up(self, call: Call) -> Tensor | None:
        """An element of a known list: any of them."""
        table, indices = call.known(call.args[0]), call.args[1]
        if table is None or table.ndim != 1 or len(indices) != 1:
            return None
        return table.view(-1, *(1 for _ in call.shape))

    def _added(self, call: Call) -> Tensor | None:
        choices = self._choices.get(id(call.args[0]))
        other = call.known(call.args[1]) if isinstance(call.args[1], Tensor) else None
        return None if choices is None or other is None or call.kwargs else choices + other

    def _viewed(self, call: Call) -> Tensor | None:
        """All dimensions behind the first merged into one."""
        choices = self._choices.get(id(call.args[0]))
        before, kept = tuple(call.args[0].shape), len(call.shape) - 1
        if choices is None or before[:kept] != call.shape[:kept] or set(choices.shape[1 : kept + 1]) - {1}:
            return None
        return choices.expand(*choices.shape[: kept + 1], *before[kept:]).flatten(kept + 1)

    def _scatter(self, call: Call) -> None:
        target, dim, index, source = call.args[:4]
        values, by = call.look_up(source), call.look_up(index)
        choices = self._choices.get(id(index))
        last = isinstance(source, Tensor) and dim % target.ndim == target.ndim - 1 and source.shape == index.shape
        if values is None or by is None or choices is None or not last or call.look_up(target) is not None:
            return
        if choices.numel() == choices.shape[0] * choices.shape[-1] and by.layout == values.layout:
            self._scattered[id(call.out[0])] = _Scattered(values, by, choices.flatten(1))


def _unpooled(call: Call, scattered: _Scattered) -> Effect | None:
    """The last dimension of what was scattered made the axes of the image again."""
    *channels, grid = scattered.values.layout
    spatial = call.shape[len(channels) :]
    if len(grid) != len(spatial) or any(atom.axis == NONE for atom in grid):
        return None
    if math.prod(spatial) != call.args[0].shape[-1] or call.shape[: len(channels)] != call.args[0].shape[:-1]:
        return None
    steps: Steps = {}
    places, sources = scattered.places, torch.arange(scattered.places.shape[1])
    astray, cut = torch.zeros(places.shape, dtype=torch.bool), torch.zeros(sources.shape, dtype=torch.bool)
    for atom, n in reversed(list(zip(grid, spatial, strict=True))):
        place, source = places % n, sources % atom.size
        first = (source == 0) & ~cut
        if not first.any():
            return None
        window = int(place[:, first].max()) + 1
        astray |= place // window != source
        cut |= (source + 1) * window > n
        steps[atom.axis] = grow(window)
        places, sources = places // n, sources // atom.size
    if (astray & ~cut).any():
        return None
    axes = [(Atom(atom.axis, n),) for atom, n in zip(grid, spatial, strict=True)]
    layout: Layout = (
        *(dim if len(dim) == 1 else blank(n) for dim, n in zip(channels, call.shape, strict=False)),
        *axes,
    )
    return Effect(layout, [(scattered.values.node, steps), (scattered.index.node, steps)])
