"""What a network is made of: layers, shapes, parameters, FLOPs, strides and receptive fields, with nothing computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from densepred.models.dense import Model
from densepred.models.receptive import Field, Tracer


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: where it is in the model, such as `encoder.stages.0.0.conv`.
        kind: its class.
        shape: output (C, *spatial) for one image.
        parameters: numbers it learns, where it runs first; with those of parts that it uses without running them.
        flops: operations for one image; convolutions and matrix products only, a multiply-add counting two. Those of
            its parts that have rows of their own are not counted again.
        stride: voxels of the image per voxel of the output, along each axis; None where it does not extend along it.
        receptive_field: voxels of the image an output voxel depends on, along each axis (norm statistics left out);
            None where it may be the whole axis, because something looks at all of it or could not be followed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    stride: Field
    receptive_field: Field


@dataclass(frozen=True)
class Summary:
    """All layers in the order they run, with the totals.

    Attributes:
        size: spatial size of the image.
        rows: the layers.
        parameters: numbers in the model, each counted once.
        trainable: those that training changes.
        flops: operations for one image.
        receptive_field: voxels of the image that a voxel of the first output depends on, along each axis; as in `Row`.
    """

    size: tuple[int, ...]
    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    flops: int
    receptive_field: Field

    def cells(self) -> list[tuple[str, ...]]:
        """A heading and a line of text for each layer."""
        heading = ("layer", "type", "output", "parameters", "GFLOP", "stride", "receptive field")
        return [heading, *(_cells(row) for row in self.rows)]

    def table(self) -> str:
        """The layers as columns of plain text, the totals below."""
        lines = self.cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join([*("  ".join(line).rstrip() for line in padded), "", *self.totals()])

    def totals(self) -> list[str]:
        """Lines with the totals."""
        return [
            f"parameters       {self.parameters:,} ({self.trainable:,} trainable)",
            f"FLOPs            {self.flops / 1e9:,.3f} G for one image of {_times(self.size)} (multiply-add = 2)",
            f"receptive field  {self._field()} for a voxel of the output",
        ]

    def _field(self) -> str:
        if None not in self.receptive_field:
            return f"{_times(self.receptive_field)} voxels of the image"
        text = "the whole image" if not any(self.receptive_field) else _field(self.receptive_field)
        return f"up to {text} (an operation sees all of an axis, or is not followed)"


def summarize(model: Model, size: Sequence[int]) -> Summary:
    """Follow one image of `size` through the model on the meta device: nothing is computed, nothing is changed.

    Args:
        model: the network, on any device; as it is in evaluation.
        size: spatial size of the image, slowest axis first.

    Raises:
        ValueError: `size` is not `model.dims` positive numbers, or one that the model does not take.

    Example:
        >>> from densepred.models.build import create_model
        >>> summarize(create_model(channels=(8, 16)), (32, 32, 32)).receptive_field
        (15, 15, 15)
    """
    with _watching(model) as watch:
        tracer, output = trace(model, size, watch)
    rows, field = watch.rows, tracer.receptive_field(output)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(n for n, learns in counts if learns)
    return Summary(tuple(size), tuple(rows), sum(n for n, _ in counts), trainable, tracer.flops, field)


def trace(model: Model, size: Sequence[int], watch: _Watch | None = None) -> tuple[Tracer, Tensor]:
    """Follow one image of `size` through the model, and say what became of it: the first output, on the meta device.

    Raises:
        ValueError: as `summarize`.
    """
    if len(size) != model.dims or min(size) < 1:
        raise ValueError(f"size must be {model.dims} positive numbers for a {model.dims}D model, got {tuple(size)}")
    image = torch.empty((1, model.in_channels, *size), device="meta")
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    tracer = Tracer(image)
    if watch is not None:
        watch.tracer = tracer
    with evaluating(model), torch.no_grad(), tracer:
        return tracer, main_output(torch.func.functional_call(model, state, inputs(model, image)))


def inputs(model: Model, image: Tensor) -> tuple[Tensor, ...]:
    """What the model takes with an image (B, C, *spatial): itself, and covariates of zero for heads that need any."""
    counts = [getattr(spec, "covariates", 0) for spec in model.specs.values()]
    return (image, image.new_zeros(image.shape[0], max(counts))) if max(counts) else (image,)


def main_output(outputs: object) -> Tensor:
    """The first tensor of what a model gives."""
    return next(out for out in tree_leaves(outputs) if isinstance(out, Tensor))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, in which all layers take one image alone; afterwards as it was."""
    training = [layer for layer in model.modules() if layer.training]
    model.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    """While active, layers that run add their rows."""
    watch = _Watch()
    hooks = []
    for name, layer in model.named_modules():
        hooks.append(layer.register_forward_pre_hook(watch.start))
        hooks.append(layer.register_forward_hook(lambda layer, _, out, name=name: watch.end(name, layer, out)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    """Tells layers' FLOPs from those of their parts, and makes their rows."""

    tracer: Tracer

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._running: list[tuple[int, int]] = []  # FLOPs, and those in rows, when each layer around the present began
        self._in_rows = 0
        self._counted: set[int] = set()

    def start(self, layer: nn.Module, inputs: Any) -> None:
        """A layer begins."""
        self._running.append((self.tracer.flops, self._in_rows))

    def end(self, name: str, layer: nn.Module, output: Any) -> None:
        """A layer is done: a row if it has no parts, or has FLOPs or weights that are in no row yet."""
        flops, in_rows = self._running.pop()
        own = self.tracer.flops - flops - (self._in_rows - in_rows)
        new = {id(p): p.numel() for p in layer.parameters() if id(p) not in self._counted}
        bare = not isinstance(layer, nn.Identity) and not any(True for _ in layer.children())
        if not (own or bare or new):
            return
        out = main_output(output)
        self._counted |= new.keys()
        self._in_rows += own
        stride, field = self.tracer.stride(out), self.tracer.receptive_field(out)
        self.rows.append(Row(name, type(layer).__name__, tuple(out.shape[1:]), sum(new.values()), own, stride, field))


def _cells(row: Row) -> tuple[str, ...]:
    flops = f"{row.flops / 1e9:.3f}" if row.flops else "-"
    parameters = f"{row.parameters:,}" if row.parameters else "-"
    shape = " x ".join(filter(None, (str(row.shape[0]), _times(row.shape[1:])))) if row.shape else "-"
    stride = _times(row.stride) if any(row.stride) else "-"
    return row.name or "(model)", row.kind, shape, parameters, flops, stride, _field(row.receptive_field)


def _field(field: Field) -> str:
    """(3, None) -> "3xwhole"; "whole" for all axes, "-" for what does not see the image."""
    if not any(field):
        return "whole" if None in field else "-"
    return _times(["whole" if n is None else n for n in field])


def _times(values: Sequence[int | str | None]) -> str:
    """(2, 3) -> "2x3"."""
    return "x".join("-" if value is None else str(value) for value in values)
