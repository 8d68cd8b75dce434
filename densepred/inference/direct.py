"""Any model on any image, without a run directory: kinds of result slab by slab, within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepred.config.base import parse_size
from densepred.inference import reduce
from densepred.inference.compute import Compute, WithinMemory
from densepred.inference.forward import Model
from densepred.inference.modes import evaluating
from densepred.inference.outputs import Predicted
from densepred.inference.sliding_window import Progress, SlidingWindowInferer, Source, home_of
from densepred.inference.spool import Arrays
from densepred.inference.volume_pass import VolumePass


def _labels(planes: Predicted) -> Tensor:
    count = planes.logits.shape[0]
    kind = torch.uint8 if count <= 256 else torch.int16 if count <= 2**15 else torch.int32
    return reduce.labels(planes.logits, torch.arange(count, dtype=kind))


def _variance(planes: Predicted) -> Tensor:
    assert planes.variance is not None
    return planes.variance


KINDS: dict[str, Callable[[Predicted], Tensor]] = {
    "labels": _labels,
    "probabilities": lambda planes: reduce.probabilities(planes.logits),
    "logits": lambda planes: planes.logits,
    "regression": lambda planes: planes.logits,
    "entropy": lambda planes: reduce.entropy(planes.logits),
    "variance": _variance,
}
"""Kind of result -> (C, n, *rest) from finished planes."""


class _AllValid:
    """An image all of whose voxels count."""

    def __init__(self, source: Source) -> None:
        self._source, self.shape = source, tuple(source.shape)

    def read(self, key: Any) -> tuple[Any, NDArray[np.bool_] | None]:
        return self._source[key], None


def results(
    inferer: SlidingWindowInferer,
    model: Model | Sequence[Model],
    source: Source,
    outputs: Sequence[str] = ("labels",),
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[int, int, Arrays], None, None]:
    """As `SlidingWindowInferer.results`, which see.

    Raises:
        ValueError: an unknown kind, or no size of memory.
    """
    unknown = [kind for kind in outputs if kind not in KINDS]
    if unknown or not outputs:
        raise ValueError(f"outputs must be some of {', '.join(KINDS)}, got {', '.join(outputs) or 'none'}")
    models = list(model) if isinstance(model, Sequence) else [model]
    device = torch.device(inferer.device) if inferer.device is not None else home_of(models[0], source)
    for each in models:
        if isinstance(each, nn.Module):
            each.to(device)
    placed = replace(inferer, device=device, variance="variance" in outputs)
    image = VolumePass(_AllValid(source), (1.0,) * (len(source.shape) - 1))
    within = WithinMemory(image, Compute(models, placed), None if memory is None else parse_size(memory))

    def arrays(planes: Predicted) -> Arrays:
        return {kind: KINDS[kind](planes).cpu().numpy() for kind in outputs}

    def slabs() -> Generator[tuple[int, int, Arrays], None, None]:
        with evaluating(*models):
            yield from within.slabs(arrays, progress)

    return slabs()
