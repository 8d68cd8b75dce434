"""Rules of the operations that only take elements out of a tensor or order them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from densepred.models.tracing.call import Call, Effect, Traced
from densepred.models.tracing.layout import NONE, Atom, Dim, Layout, axes, axis_of, blank, reshape, size
from densepred.models.tracing.steps import Window, shift

aten = torch.ops.aten


def _viewed(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    layout, steps = reshape(traced.layout, call.shape)
    return Effect(layout, [(traced.node, steps)])


def _permuted(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    order = list(range(len(traced.layout)))
    if call.func.overloadpacket is aten.permute:
        order = [place % len(order) for place in call.args[1]]
    else:
        a, b = call.args[1:3] if len(call.args) > 1 else (0, len(order) - 1)
        order[a], order[b] = order[b], order[a]
    return Effect(tuple(traced.layout[place] for place in order), [(traced.node, {})])


def _unsqueezed(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    dims = list(traced.layout)
    dims.insert(call.arg(1, "dim") % len(call.shape), blank(1))
    return Effect(tuple(dims), [(traced.node, {})])


def _squeezed(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    given = call.arg(1, "dim", range(len(traced.layout)))
    places = [place % len(traced.layout) for place in ([given] if isinstance(given, int) else given)]
    layout = tuple(dim for i, dim in enumerate(traced.layout) if i not in places or size(dim) > 1)
    return Effect(layout, [(traced.node, {})])


def _expanded(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    dims = list(map(blank, call.shape))
    for place, dim in enumerate(traced.layout, start=-len(traced.layout)):
        if size(dim) == size(dims[place]):
            dims[place] = dim
    return Effect(tuple(dims), [(traced.node, {})])


def _sliced(call: Call) -> Effect | None:
    if (traced := call.only) is None:
        return None
    place = call.arg(1, "dim", 0) % len(call.shape)
    start, step = call.arg(2, "start") or 0, call.arg(4, "step", 1)
    n = size(traced.layout[place])
    return _taken(call, traced, place, Window(stride=step, padding=-(start + n if start < 0 else start)), call.shape)


def _taken(call: Call, traced: Traced, place: int, step: Window, shape: Sequence[int]) -> Effect:
    """Some voxels along a dimension, by the step."""
    if tuple(shape) == tuple(map(size, traced.layout)) and step == shift(0):
        return Effect(traced.layout, [(traced.node, {})])
    traced = call.settled(traced) if axes(traced.layout[place]) else traced
    dims = list(traced.layout)
    axis = axis_of(dims[place])
    dims[place] = (Atom(axis, shape[place]),)
    return Effect(tuple(dims), [(traced.node, {axis: step} if axis != NONE else {})])


def _split(call: Call) -> list[Effect] | None:
    if (traced := call.only) is None:
        return None
    place = call.arg(2, "dim", 0) % len(traced.layout)
    effects, start = [], 0
    for out in call.out:
        effects.append(_taken(call, traced, place, shift(start), out.shape))
        start += out.shape[place]
    return effects


def _selected(call: Call) -> Effect | None:
    """One element along a dimension; along an axis of the image that is not followed."""
    if (traced := call.only) is None:
        return None
    return Effect(_without(traced.layout, call.arg(1, "dim", 0)), [(traced.node, {})])


def _unbound(call: Call) -> list[Effect] | None:
    if (traced := call.only) is None:
        return None
    layout = _without(traced.layout, call.arg(1, "dim", 0))
    return [Effect(layout, [(traced.node, {})]) for _ in call.out]


def _without(layout: Layout, place: int) -> Layout:
    dims: list[Dim] = list(layout)
    dims.pop(place)
    return tuple(dims)


def _indexed(call: Call) -> Effect | None:
    """Elements along one dimension at known places: a crop, or one with copies or mirrored voxels beyond its ends."""
    if (traced := call.only) is None:
        return None
    if call.func.overloadpacket is aten.index:
        given = [(i, index) for i, index in enumerate(call.args[1]) if index is not None]
        if len(given) != 1 or given[0][1].ndim != 1:
            return None
        place, index = given[0]
    else:
        place, index = call.args[1] % len(traced.layout), call.args[2]
    if not axes(traced.layout[place]):
        return _taken(call, traced, place, shift(0), call.shape)
    values = call.known(index)
    start = None if values is None else border_start(values.tolist(), size(traced.layout[place]))
    return None if start is None else _taken(call, traced, place, shift(start), call.shape)


def border_start(places: Sequence[int], n: int) -> int | None:
    """The first of n voxels of a crop; before voxel 0 and after the last one, voxels may be repeated or mirrored.

    Returns:
        None if the places are no crop of that kind.

    Example:
        >>> border_start([1, 2, 3, 3, 3], 4), border_start([2, 1, 0, 1, 2], 3), border_start([0, 2, 1], 3)
        (1, -2, None)
    """
    period = max(2 * (n - 1), 1)
    starts = {place - i for i, place in enumerate(places)}
    for start in sorted(starts, key=lambda start: max(start, 0) - min(start + len(places), n)):
        straight = range(start, start + len(places))
        mirrored = [min(i % period, period - i % period) for i in straight]
        if [min(max(i, 0), n - 1) for i in straight] == list(places) or mirrored == list(places):
            return start
    return None


def _rules(
    pairs: Iterable[tuple[Callable[[Call], Effect | list[Effect] | None], str]],
) -> dict[str, Callable[[Call], Effect | list[Effect] | None]]:
    return {name: rule for rule, names in pairs for name in names.split()}


RULES = _rules(
    [
        (_viewed, "view _unsafe_view reshape _reshape_alias"),
        (_permuted, "permute transpose t"),
        (_unsqueezed, "unsqueeze"),
        (_squeezed, "squeeze"),
        (_expanded, "expand"),
        (_sliced, "slice"),
        (_split, "split split_with_sizes"),
        (_selected, "select"),
        (_unbound, "unbind"),
        (_indexed, "index index_select"),
    ]
)
