"""One operation as the rules see it, and what a rule says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from densepred.models.tracing.layout import Layout, Steps, settle


@dataclass(frozen=True)
class Traced:
    """A tensor that depends on the image: its node in the graph, and where the image's axes are in it."""

    node: int
    layout: Layout


@dataclass(frozen=True)
class Effect:
    """How one output came to be.

    Attributes:
        layout: where the image's axes are in it. Along an axis that is nowhere it depends on all of the image.
        edges: the nodes it was made of, with what happened along each axis; nothing along those left out.
        whole: axes along which it depends on all of the image though it extends along them.
    """

    layout: Layout
    edges: list[tuple[int, Steps]]
    whole: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Call:
    """One operation.

    Attributes:
        func: the operation, such as `aten.add.Tensor`.
        args, kwargs: what it was given.
        out: its tensors.
        inputs: those of its arguments that depend on the image.
        look_up: the same for one argument, None where it does not.
        known: the value of a small tensor of whole numbers on the CPU, None where it is not known.
        put: adds an effect to the graph and returns its node.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: list[Tensor]
    inputs: list[Traced]
    look_up: Callable[[Any], Traced | None]
    known: Callable[[Tensor], Tensor | None]
    put: Callable[[Effect], int]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by its place or name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return tuple(self.out[0].shape)

    def settled(self, traced: Traced) -> Traced:
        """The same with each dimension as one atom."""
        layout, steps = settle(traced.layout)
        return Traced(self.put(Effect(layout, [(traced.node, steps)])), layout) if layout != traced.layout else traced

    @property
    def only(self) -> Traced | None:
        """The first argument, if nothing else depends on the image."""
        return self.look_up(self.args[0]) if len(self.inputs) == 1 else None
