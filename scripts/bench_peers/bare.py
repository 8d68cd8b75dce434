"""The network alone, on noise of the size of a window, in every setting that may be its fastest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench_peers.common import Setting, Task, steady
from densepred.models.layers import CHANNELS_LAST, to_channels_last


@dataclass(frozen=True)
class Variant(Setting):
    """A setting, and whether tensors lie channels-last."""

    last: bool = True

    def __str__(self) -> str:
        return f"{super().__str__()}, {'channels-last' if self.last else 'contiguous'}"


def variants(device: str, compiled: bool) -> list[Variant]:
    batches = (1, 2, 4, 8) if device.startswith("cuda") else (1, 2)
    found = [Variant("float32", last=False), Variant("auto", last=False)]
    found += [Variant("auto", batch) for batch in batches]
    return found + ([Variant("auto", batch, True) for batch in (1, batches[-1])] if compiled else [])


def measure(task: Task, compiled: bool, seconds: float) -> dict[str, float]:
    """Seconds of a forward pass for each window of a batch, by variant."""
    return {str(variant): per_window(task, variant, seconds) for variant in variants(task.device, compiled)}


def per_window(task: Task, variant: Variant, seconds: float) -> float:
    """Seconds of one window."""
    model = task.network()
    x = torch.randn(variant.batch, task.channels, *task.window, device=task.device)
    if variant.last:
        to_channels_last(model)
        x = x.contiguous(memory_format=CHANNELS_LAST[x.ndim - 2])
    run = torch.compile(model) if variant.compiled else model
    with torch.inference_mode(), task.autocast(variant):
        return steady(lambda: run(x), task.device, seconds) / variant.batch
