"""The network alone, on noise of the size of a window, in every setting that may be its fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from bench_peers.common import Setting, Task, steady
from densepred.device import pick_precision
from densepred.errors import DensepredError
from densepred.inference.backends import prepare
from densepred.models.layers import CHANNELS_LAST, CONVOLUTIONS, to_channels_last


@dataclass(frozen=True)
class Variant(Setting):
    """A setting, and how the network computes.

    Args:
        layout: of tensors, or "prepared": as our predictions prepare it.
        cast: weights are in the precision already, rather than cast at each call.
    """

    layout: str = "prepared"
    cast: bool = False

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.layout}{', weights cast' if self.cast else ''}"


def variants(device: str, compiled: bool) -> list[Variant]:
    batches = (1, 2, 4, 8) if device.startswith("cuda") else (1, 2)
    found = [Variant("float32", layout="contiguous"), Variant("auto", layout="contiguous")]
    found += [Variant("auto", batch) for batch in batches]
    if device.startswith("cuda"):
        layouts = ("contiguous", "channels-last")
        found += [Variant("auto", batch, layout=layout, cast=True) for layout in layouts for batch in batches]
    if not device.startswith("cuda") and find_spec("openvino"):
        found.append(Variant("auto", backend="openvino"))
    if compiled:
        found += [Variant("auto", batch, backend="compiled") for batch in (1, batches[-1])]
    return found


def measure(task: Task, compiled: bool, seconds: float) -> dict[str, float]:
    """Seconds of a forward pass for each window of a batch, by variant."""
    found = {}
    for variant in variants(task.device, compiled):
        try:
            found[str(variant)] = per_window(task, variant, seconds)
        except DensepredError as error:
            print(f"without the bare network in {variant}: {error.what}", file=sys.stderr)
    return found


def per_window(task: Task, variant: Variant, seconds: float) -> float:
    """Seconds of one window."""
    if variant.layout == "prepared":
        return steady(prepared_run(task, variant), task.device, seconds) / variant.batch
    model = task.network()
    x = torch.randn(variant.batch, task.channels, *task.window, device=task.device)
    if variant.cast:
        precision = pick_precision(variant.precision, torch.device(task.device))
        for layer in model.modules():
            if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                layer.to(precision)
    if variant.layout == "channels-last":
        to_channels_last(model)
        x = x.contiguous(memory_format=CHANNELS_LAST[x.ndim - 2])
    with torch.inference_mode(), task.autocast(variant):
        return steady(lambda: model(x), task.device, seconds) / variant.batch


def prepared_run(task: Task, variant: Variant) -> Callable[[], object]:
    """A call of the network as it is prepared for windows, by torch or another runtime."""
    device, shape = torch.device(task.device), (variant.batch, task.channels, *task.window)
    run = prepare(task.network(), shape, device, pick_precision(variant.precision, device), variant.backend)
    x = torch.randn(shape, device=device)
    return lambda: run(x)
