"""Rules of the operations that look at windows of voxels: convolutions, pooling, interpolation, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from densepred.models.tracing.call import Call, Effect
from densepred.models.tracing.layout import NONE, Atom, axis_of, blank
from densepred.models.tracing.steps import Kind, Resample, Step, Window, grow, shift, shrink


def _moved(call: Call, steps: Sequence[Step | None]) -> Effect | None:
    """What the steps along the last dimensions do; the one before them, the channels, is mixed."""
    if (traced := call.only) is None:
        return None
    traced = call.settled(traced)
    dims = [*map(blank, call.shape)]
    if len(dims) != len(traced.layout):
        return None
    first = len(dims) - len(steps)
    for place in range(first - 1):
        dims[place] = traced.layout[place]
    taken: dict[int, Step] = {}
    for place, step in enumerate(steps, start=first):
        axis = axis_of(traced.layout[place])
        if axis != NONE:
            dims[place] = (Atom(axis, call.shape[place]),)
            if step is not None:
                taken[axis] = step
    return Effect(tuple(dims), [(traced.node, taken)])


def _each(values: Any, count: int) -> list[int]:
    """A list argument of an operation, which may hold one value for all dimensions."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    return values * count if len(values) == 1 else values


def _convolution(call: Call) -> Effect | None:
    _, weight, _, stride, padding, dilation, transposed = call.args[:7]
    kernel = list(weight.shape[2:])
    settings = zip(kernel, *(_each(v, len(kernel)) for v in (stride, padding, dilation)), strict=True)
    return _moved(call, [Window(k, s, p, d, transposed) for k, s, p, d in settings])


def _pool(dims: int, dilated: bool) -> Callable[[Call], Effect | None]:
    def rule(call: Call) -> Effect | None:
        kernel = _each(call.args[1], dims)
        stride = _each(call.arg(2, "stride") or kernel, dims)
        padding = _each(call.arg(3, "padding", 0), dims)
        dilation = _each(call.arg(4, "dilation", 1) if dilated else 1, dims)
        return _moved(call, [Window(*values) for values in zip(kernel, stride, padding, dilation, strict=True)])

    return rule


def _adaptive(dims: int) -> Callable[[Call], Effect | None]:
    def rule(call: Call) -> Effect | None:
        ratios = [Fraction(n, m) for n, m in zip(call.args[0].shape[-dims:], call.shape[-dims:], strict=True)]
        effect = _moved(call, [None if ratio == 1 else Resample(ratio, "adaptive") for ratio in ratios])
        if effect is not None:  # one voxel from several is all of the axis
            single = [m == 1 and r > 1 for m, r in zip(call.shape[-dims:], ratios, strict=True)]
            kept = [blank(1) if one else dim for one, dim in zip(single, effect.layout[-dims:], strict=True)]
            effect = Effect((*effect.layout[:-dims], *kept), effect.edges)
        return effect

    return rule


def _interpolation(dims: int, kind: Kind) -> Callable[[Call], Effect | None]:
    def rule(call: Call) -> Effect | None:
        aligned = kind in ("linear", "cubic") and call.arg(2, "align_corners")
        if aligned and kind == "cubic":
            return None
        scales = list(call.args[2 if kind.startswith("nearest") else 3 :]) or [None] * dims
        steps: list[Step | None] = []
        for n, m, scale in zip(call.args[0].shape[-dims:], call.shape[-dims:], scales, strict=True):
            ratio = Fraction(1 / scale).limit_denominator(4096) if scale else Fraction(n, m)
            if aligned:
                ratio = Fraction(n - 1, m - 1) if m > 1 else Fraction(0)
            steps.append(None if n == m else Resample(ratio, "aligned" if aligned else kind))
        return _moved(call, steps)

    return rule


def _padded(call: Call) -> Effect | None:
    """Zeros, or copies of voxels, beyond the ends."""
    if (traced := call.only) is None:
        return None
    traced = call.settled(traced)
    dims, steps = list(traced.layout), {}
    for i, before in enumerate(call.args[1][::2]):
        place = len(dims) - 1 - i
        axis = axis_of(dims[place])
        dims[place] = (Atom(axis, call.shape[place]),)
        if axis != NONE:
            steps[axis] = shift(-before)
    return Effect(tuple(dims), [(traced.node, dict[int, Step](steps))])


def _shuffled(factor: Callable[[int], Step]) -> Callable[[Call], Effect | None]:
    return lambda call: _moved(call, [factor(call.args[1])] * 2)


_LINEAR = {2: "upsample_bilinear2d", 3: "upsample_trilinear3d"}
RULES: dict[str, Callable[[Call], Effect | None]] = {
    "convolution": _convolution,
    "pixel_shuffle": _shuffled(grow),
    "pixel_unshuffle": _shuffled(shrink),
    "upsample_bicubic2d": _interpolation(2, "cubic"),
    **dict.fromkeys(
        [f"{kind}_pad{dims}d" for kind in ("reflection", "replication") for dims in (2, 3)] + ["constant_pad_nd"],
        _padded,
    ),
    **{_LINEAR[dims]: _interpolation(dims, "linear") for dims in (2, 3)},
    **{f"upsample_nearest{dims}d": _interpolation(dims, "nearest") for dims in (2, 3)},
    **{f"_upsample_nearest_exact{dims}d": _interpolation(dims, "nearest-exact") for dims in (2, 3)},
    **{f"max_pool{dims}d_with_indices": _pool(dims, True) for dims in (2, 3)},
    **{f"avg_pool{dims}d": _pool(dims, False) for dims in (2, 3)},
    **{f"_adaptive_avg_pool{dims}d": _adaptive(dims) for dims in (2, 3)},
    **{f"adaptive_max_pool{dims}d": _adaptive(dims) for dims in (2, 3)},
}
"""Name of an operation -> its rule."""
