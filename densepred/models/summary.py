"""What a network is made of: layers, shapes, parameters, FLOPs, strides and receptive fields, with nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from densepred.models.build import DensePredictor
from densepred.models.receptive import Tracer


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: where it is in the model, such as `encoder.stages.0.0.conv`.
        kind: its class.
        shape: output (C, *spatial) for one image.
        parameters: numbers it learns.
        flops: operations for one image; convolutions and matrix products only, a multiply-add counting two.
        stride: voxels of the image per voxel of the output, along each axis.
        receptive_field: voxels of the image an output voxel depends on, along each axis (norm statistics left out).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    stride: tuple[int, ...]
    receptive_field: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """All layers in the order they run, with the totals.

    Attributes:
        size: spatial size of the image.
        rows: the layers.
        parameters: numbers in the model, each counted once.
        trainable: those that training changes.
        flops: operations for one image.
        receptive_field: voxels of the image that a voxel of the main output depends on, along each axis.
    """

    size: tuple[int, ...]
    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    flops: int
    receptive_field: tuple[int, ...]

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
            f"receptive field  {_times(self.receptive_field)} voxels of the image for a voxel of the output",
        ]


def summarize(model: DensePredictor, size: Sequence[int]) -> Summary:
    """Follow one image of `size` through the model on the meta device: nothing is computed, nothing is changed.

    Args:
        model: the network, on any device.
        size: spatial size of the image, slowest axis first.

    Raises:
        ValueError: `size` is not `model.dims` positive numbers.

    Example:
        >>> from densepred.models.build import create_model
        >>> summarize(create_model(channels=(8, 16)), (32, 32, 32)).receptive_field
        (15, 15, 15)
    """
    if len(size) != model.dims or min(size) < 1:
        raise ValueError(f"size must be {model.dims} positive numbers for a {model.dims}D model, got {tuple(size)}")
    image = torch.empty((1, model.in_channels, *size), device="meta")
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    tracer = Tracer(image)
    rows: list[Row] = []
    layers = [(name, layer) for name, layer in model.named_modules() if _is_row(layer)]
    hooks = [layer.register_forward_hook(_watch(name, tracer, rows)) for name, layer in layers]
    try:
        with torch.no_grad(), tracer:
            torch.func.functional_call(model, state, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    main = next(row for row in rows if row.name.startswith("heads.segmentation."))
    trainable = sum(n for n, learns in counts if learns)
    return Summary(tuple(size), tuple(rows), sum(n for n, _ in counts), trainable, tracer.flops, main.receptive_field)


def _is_row(layer: nn.Module) -> bool:
    """Layers without parts, or with parameters of their own."""
    own = any(True for _ in layer.parameters(recurse=False))
    return own or (not isinstance(layer, nn.Identity) and not any(True for _ in layer.children()))


def _watch(name: str, tracer: Tracer, rows: list[Row]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that adds a row when the layer has run."""

    def hook(layer: nn.Module, inputs: Any, out: Tensor) -> None:
        flops = tracer.flops - sum(row.flops for row in rows)
        count = sum(p.numel() for p in layer.parameters(recurse=False))
        shape, stride, field = tuple(out.shape[1:]), tracer.stride(out), tracer.receptive_field(out)
        rows.append(Row(name, type(layer).__name__, shape, count, flops, stride, field))

    return hook


def _cells(row: Row) -> tuple[str, ...]:
    flops = f"{row.flops / 1e9:.3f}" if row.flops else "-"
    parameters = f"{row.parameters:,}" if row.parameters else "-"
    shape = f"{row.shape[0]} x {_times(row.shape[1:])}"
    return row.name, row.kind, shape, parameters, flops, _times(row.stride), _times(row.receptive_field)


def _times(values: Sequence[int]) -> str:
    """(2, 3) -> "2x3"."""
    return "x".join(map(str, values))
