"""What the operations of torch do to the voxels of the image: a rule for each kind, a table of operations to rules.

An operation that is in no table, or used in a way that its rule does not cover, is taken to look at the whole image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from densepred.models.tracing import views, windows
from densepred.models.tracing.call import Call, Effect, Traced
from densepred.models.tracing.layout import NONE, Atom, Dim, Layout, Steps, axes, axis_of, blank, size
from densepred.models.tracing.steps import shift

aten = torch.ops.aten
Result = Effect | list[Effect] | None


def effects(call: Call) -> list[Effect | None]:
    """How each output came to be; None for one that holds no values of the image."""
    name = call.func.overloadpacket.__name__
    if name.startswith(_FRESH):
        return [None] * len(call.out)
    result = _rule(call, name)
    if isinstance(result, list):
        return list(result)
    if result is None:
        return [unfollowed(call, tuple(t.shape)) for t in call.out]
    same = [result if t.shape == call.out[0].shape else unfollowed(call, tuple(t.shape)) for t in call.out[1:]]
    return [result, *same]


def _rule(call: Call, name: str) -> Result:
    name = name.removesuffix("_")
    rule = RULES.get(name)
    if rule is not None:
        return rule(call)
    kept = getattr(getattr(aten, name, None), call.func._overloadname, call.func)  # the form that does not overwrite
    pointwise = torch.Tag.pointwise in {*call.func.tags, *kept.tags} or name in _POINTWISE
    return _pointwise(call) if pointwise else None


def unfollowed(call: Call, shape: tuple[int, ...]) -> Effect:
    """Every voxel depends on the whole image; the axes are where they were if the shape is still the same."""
    layout = next((t.layout for t in call.inputs if tuple(map(size, t.layout)) == shape), tuple(map(blank, shape)))
    return Effect(layout, [(t.node, {}) for t in call.inputs], {0, 1, 2})


def _pointwise(call: Call) -> Effect:
    """Each voxel by itself, or with its like in other tensors."""
    return _joined(call, call.inputs, call.shape)


def _joined(call: Call, inputs: list[Traced], shape: tuple[int, ...]) -> Effect:
    """Tensors laid over each other, broadcast to `shape`."""
    if len({traced.layout for traced in inputs}) > 1:
        inputs = [call.settled(traced) for traced in inputs]
    dims: list[Dim] = []
    whole: set[int] = set()
    for place, n in enumerate(shape, start=-len(shape)):
        found = [t.layout[place] for t in inputs if len(t.layout) >= -place]
        dim = next((dim for dim in found if axes(dim) and size(dim) == n), blank(n))
        whole |= {axis for other in found if other != dim for axis in axes(other)}
        dims.append(dim)
    return Effect(*_once(tuple(dims), whole, [(t.node, {}) for t in inputs]))


def _once(
    layout: Layout, whole: set[int], edges: list[tuple[int, Steps]]
) -> tuple[Layout, list[tuple[int, Steps]], set[int]]:
    """Leave an axis in the first dimension alone that it is in; along it voxels then depend on the whole image."""
    seen: set[int] = set()
    dims: list[Dim] = []
    for dim in layout:
        twice = axes(dim) & seen
        whole = whole | twice
        dims.append(blank(size(dim)) if twice else dim)
        seen |= axes(dim)
    return tuple(dims), edges, whole


def _reduced(call: Call) -> Result:
    """A value for all of some dimensions."""
    if (traced := call.only) is None:
        return None
    given = call.arg(2 if call.func.overloadpacket is aten.linalg_vector_norm else 1, "dim")
    if isinstance(given, bool | Tensor):
        return None  # another overload, such as the larger of two tensors
    places = _places(given, len(traced.layout)) if given not in (None, []) else range(len(traced.layout))
    if len(call.shape) == len(traced.layout):
        layout = tuple(blank(1) if i in places else dim for i, dim in enumerate(traced.layout))
    else:
        layout = tuple(dim for i, dim in enumerate(traced.layout) if i not in places)
    return Effect(layout, [(traced.node, {})]) if tuple(map(size, layout)) == call.shape else None


def _mixed(call: Call) -> Result:
    """Each voxel with all others along a dimension."""
    if (traced := call.only) is None or tuple(map(size, traced.layout)) != call.shape:
        return None
    place = call.arg(1, "dim")
    whole = {axis for i in _places(place, len(traced.layout)) for axis in axes(traced.layout[i])}
    return Effect(traced.layout, [(traced.node, {})], whole)


def _rolled(call: Call) -> Result:
    """A cyclic shift: what comes in at one end is from the other."""
    if (traced := call.only) is None:
        return None
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims", [])
    moved = [i for i, n in zip(dims, shifts, strict=False) if n % call.shape[i]]
    whole = {axis for i in moved for axis in axes(traced.layout[i])}
    return Effect(traced.layout, [(traced.node, {})], whole) if dims else None


def _halved(call: Call) -> Result:
    """Gated linear units: one half of the channels times a function of the other."""
    if (traced := call.only) is None:
        return None
    place = call.arg(1, "dim", -1) % len(traced.layout)
    layout = list(traced.layout)
    layout[place] = blank(call.shape[place])
    return Effect(tuple(layout), [(traced.node, {})])


def _multiplied(call: Call) -> Effect:
    """Matrix products: what is summed over is mixed, the rows come from one factor and the columns from the other."""
    offset = 1 if call.func.overloadpacket in (aten.addmm, aten.baddbmm) else 0
    batch = len(call.shape) - 2
    whole: set[int] = set()
    layouts: list[Layout] = []
    inputs: list[Traced] = []
    for kept, summed, place in ((batch, batch + 1, offset), (batch + 1, batch, offset + 1)):
        if (traced := call.look_up(call.args[place])) is None:
            continue
        whole |= axes(traced.layout[summed])
        dims: list[Dim] = [*traced.layout[:batch], blank(1), blank(1)]
        dims[kept] = traced.layout[kept]
        layouts.append(tuple(dims))
        inputs.append(traced)
    if offset and (bias := call.look_up(call.args[0])) is not None:
        layouts.append(bias.layout)
        inputs.append(bias)
    joined = _joined(call, [Traced(t.node, layout) for t, layout in zip(inputs, layouts, strict=True)], call.shape)
    return Effect(joined.layout, joined.edges, joined.whole | whole)


def _concatenated(call: Call) -> Effect:
    """Tensors one behind the other."""
    tensors = [t for t in call.args[0] if t.numel() or t.ndim > 1]
    place = call.arg(1, "dim", 0) % len(call.shape)
    inputs: list[Traced] = []
    start = 0
    for tensor in tensors:
        if (traced := call.look_up(tensor)) is not None:
            traced = call.settled(traced)
            dims = list(traced.layout)
            axis = axis_of(dims[place])
            dims[place] = (Atom(axis, call.shape[place]),)
            steps: Steps = {axis: shift(-start)} if axis != NONE else {}
            inputs.append(Traced(call.put(Effect(tuple(dims), [(traced.node, steps)])), tuple(dims)))
        start += tensor.shape[place]
    return _joined(call, inputs, call.shape)


def _stacked(call: Call) -> Effect:
    """Tensors beside each other along a new dimension."""
    place = call.arg(1, "dim", 0) % len(call.shape)
    inputs = []
    for traced in call.inputs:
        dims = list(traced.layout)
        dims.insert(place, blank(call.shape[place]))
        inputs.append(Traced(traced.node, tuple(dims)))
    return _joined(call, inputs, call.shape)


def _from_list(call: Call) -> Effect | None:
    """Elements of a list, by numbers that depend on the image."""
    table, indices = call.args[0], call.args[1]
    if call.look_up(table) is not None or table.ndim != 1 or len(indices) != 1:
        return None
    return _pointwise(call)


def _places(given: int | list[int], count: int) -> set[int]:
    return {place % count for place in ([given] if isinstance(given, int) else given)}


_MEANS = "mean sum amax amin max min any all argmax argmin var std var_mean std_mean logsumexp prod linalg_vector_norm"
_MIXING = "_softmax _safe_softmax _log_softmax cumsum cumprod"
_PRODUCTS = "mm addmm bmm baddbmm"
_UNTAGGED = """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_layer_norm
    _batch_norm_with_update native_group_norm native_dropout _prelu_kernel hardswish rrelu_with_noise
    floor_divide clone _to_copy detach alias lift_fresh copy"""
_POINTWISE = frozenset(_UNTAGGED.split())
"""Pointwise, without torch's tag for it. The statistics of norms are left out."""
_FRESH = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")

RULES: dict[str, Callable[[Call], Result]] = {
    **dict.fromkeys(_MEANS.split(), _reduced),
    **dict.fromkeys(_MIXING.split(), _mixed),
    **dict.fromkeys(_PRODUCTS.split(), _multiplied),
    **views.RULES,
    "index": lambda call: _from_list(call) or views.RULES["index"](call),
    **windows.RULES,
    "roll": _rolled,
    "glu": _halved,
    "cat": _concatenated,
    "stack": _stacked,
}
"""Name of an operation, without the underscore of those that overwrite -> its rule."""
