"""Networks as programs that need none of this library: torch.export's `.pt2` and ONNX, with free sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from densepred.errors import InputError
from densepred.files import atomic_path
from densepred.models.dense import Model

OPSET = 20
"""ONNX operator set."""


def to_program(model: Model, size: Sequence[int]) -> torch.export.ExportedProgram:
    """The forward pass in evaluation mode, for any batch and any spatial size beyond the network's coarsest stride.

    Args:
        model: the network.
        size: a spatial size to trace it with, itself beyond that stride; nothing in the program depends on it.

    Raises:
        ValueError: `size` is not `model.dims` numbers.

    Example:
        >>> from densepred.models.build import create_model
        >>> program = to_program(create_model(dims=2, channels=(4, 8)), (33, 30))
        >>> program.module()(torch.zeros(1, 1, 40, 51)).shape
        torch.Size([1, 3, 40, 51])
    """
    if len(size) != model.dims:
        raise ValueError(f"size must be {model.dims} numbers, got {tuple(size)}")
    parameter = next(model.parameters())
    image = torch.zeros(2, model.in_channels, *size, dtype=parameter.dtype, device=parameter.device)
    free = dict.fromkeys((0, *range(2, model.dims + 2)), torch.export.Dim.DYNAMIC)
    training = model.training
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), (image,), dynamic_shapes={"x": free})
    finally:
        model.train(training)


def export(model: Model, path: str | Path, size: Sequence[int]) -> Path:
    """Write the forward pass to `path`: `.pt2` for torch.export.load, `.onnx` for ONNX Runtime, OpenVINO and others.

    Batch and spatial sizes stay free, as in `to_program`. The inputs and outputs are the model's own: normalised images
    in, logits out.

    Raises:
        InputError: another suffix, or onnxscript is missing.
        ValueError: `size` is not `model.dims` numbers.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"cannot export to {path.suffix or 'a file without suffix'}", "name it .pt2 or .onnx", path)
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise InputError("onnxscript is not installed", "pip install 'densepred[onnx]'")
    program = to_program(model, size)
    with atomic_path(path) as part:
        if path.suffix == ".pt2":
            torch.export.save(program, part)
        else:
            onnx = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
            assert onnx is not None
            onnx.save(part)
    return path
