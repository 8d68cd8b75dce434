"""What tells of a network's health: the gradient's norm and the share of dead units, stage by stage."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from densepred.models.encoders.base import Encoder
from densepred.models.surgery import stages_of
from densepred.training import ranks

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.ReLU6, nn.PReLU, nn.Hardswish, nn.Mish)


def stage_names(model: nn.Module) -> dict[str, str]:
    """The stage of each parameter, by name: `encoder.0` (finest), `decoder.1`, `heads`.

    Example:
        >>> from densepred.models.build import create_model
        >>> names = stage_names(create_model(channels=(4, 8)))
        >>> sorted(set(names.values()))
        ['decoder.0', 'encoder.0', 'encoder.1', 'heads']
    """
    encoder = getattr(model, "encoder", None)
    stages = stages_of(encoder) if isinstance(encoder, Encoder) else {}
    found = {}
    for name, _ in model.named_parameters():
        top, _, rest = name.partition(".")
        number = re.search(r"\.(\d+)\.", f".{rest}") if top != "heads" else None
        within = stages.get(rest) if top == "encoder" else number and number[1]
        found[name] = top if within is None else f"{top}.{within}"
    return found


def gradient_norms(model: nn.Module, stages: dict[str, str]) -> dict[str, float]:
    """The norm of the gradient of each stage's parameters; stages that have none are left out."""
    squares: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.detach().float().square().sum()
            squares[stages[name]] = squares.get(stages[name], torch.zeros_like(square)) + square
    squares = ranks.full(squares)
    return {stage: float(square) ** 0.5 for stage, square in squares.items()}


@torch.no_grad()
def dead_shares(
    model: nn.Module, images: Iterable[Tensor | tuple[Tensor, ...]], stages: dict[str, str]
) -> dict[str, float]:
    """The share of each stage's channels that no voxel of any image activates: whose activation is positive nowhere.

    Args:
        model: looked at in evaluation; only activations that are layers are seen.
        images: batches (B, C, *spatial), in a tuple with covariates if the network takes any.
        stages: of `stage_names`.
    """
    copied = copy.deepcopy(model).eval()
    peaks: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            peak = output.detach().transpose(0, 1).flatten(1).amax(1)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    for name, layer in copied.named_modules():
        if isinstance(layer, _ACTIVATIONS):
            layer.register_forward_hook(note(name))  # type: ignore[arg-type]
    for image in images:
        copied(*((image,) if isinstance(image, Tensor) else image))
    dead: dict[str, list[bool]] = {}
    for name, peak in peaks.items():
        dead.setdefault(_stage(name, stages), []).extend((peak <= 0).tolist())
    return {stage: sum(flags) / len(flags) for stage, flags in dead.items()}


def _stage(layer: str, stages: dict[str, str]) -> str:
    """The stage of a layer without parameters: that of the nearest parameters around it."""
    around = layer
    while around:
        around = around.rpartition(".")[0]
        for name, stage in stages.items():
            if name.startswith(f"{around}." if around else ""):
                return stage
    return "network"
