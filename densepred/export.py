"""Networks as programs that need none of this library: torch.export's `.pt2` and ONNX, with free sizes."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    inputs = [torch.zeros(2, model.in_channels, *size, dtype=parameter.dtype, device=parameter.device)]
    free = [dict.fromkeys((0, *range(2, model.dims + 2)), torch.export.Dim.DYNAMIC)]
    if model.covariates:
        inputs.append(inputs[0].new_zeros(2, model.covariates))
        free.append({0: torch.export.Dim.DYNAMIC})
    training = model.training
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), tuple(inputs), dynamic_shapes=tuple(free))
    finally:
        model.train(training)


def export(model: Model, path: str | Path, size: Sequence[int]) -> Path:
    """Write the forward pass to `path`: `.pt2` for torch.export.load, `.onnx` for ONNX Runtime, OpenVINO and others.

    Batch and spatial sizes stay free, as in `to_program`. The inputs and outputs are the model's own: normalised images
    in (and covariates, where a head takes them), logits out. Outputs bear the names of the heads.

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
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                output_names=_output_names(model, program),
                custom_translation_table=_translations(),
            )
            assert onnx is not None
            onnx.save(part)
    return path


def _output_names(model: Model, program: torch.export.ExportedProgram) -> list[str]:
    """Those of the heads, and of their coarser outputs."""
    spec = program.call_spec.out_spec
    assert spec is not None
    outputs = spec.unflatten(range(spec.num_leaves))
    return list(outputs) if isinstance(outputs, dict) else list(model.specs)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Where torch's own translations to ONNX are wrong.

    ONNX divides whole numbers towards zero and torch's translation leaves it there, so that -(-77 // 32), the voxels of
    a coarser grid, would be 2. ONNX's remainder has the sign of the divisor, as Python's.
    """
    from onnxscript import INT64, opset18

    def floordiv(number: INT64, divisor: INT64) -> INT64:
        whole = opset18.Sub(number, opset18.Mod(number, divisor))
        return opset18.Div(whole, divisor)

    return {operator.floordiv: floordiv}
