"""torchio: GridSampler, a DataLoader and GridAggregator with Hann weights, always on the CPU's side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench_peers.common import Setting, Task

REQUIRES = ("torchio",)
ON_DEVICE = False
AGAINST = ("gaussian", "fixed")
FORMATS: tuple[str, ...] = ()


def settings(device: str, compiled: bool) -> list[Setting]:
    return [Setting(), Setting("bfloat16", 4)]


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    import torchio

    model = task.network(setting.compiled)

    def logits(image: Tensor) -> Tensor:
        subject = torchio.Subject(image=torchio.ScalarImage(tensor=image))
        sampler = torchio.inference.GridSampler(subject, task.window, task.steps)
        aggregator = torchio.inference.GridAggregator(sampler, overlap_mode="hann")
        with torch.inference_mode(), task.autocast(setting):
            for batch in torchio.SubjectsLoader(sampler, batch_size=setting.batch):
                found = model(batch["image"][torchio.DATA].to(task.device))
                aggregator.add_batch(found, batch[torchio.LOCATION])
        return aggregator.get_output_tensor()

    return logits
