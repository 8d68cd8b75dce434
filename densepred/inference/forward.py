"""What one call of the network is: several models and mirrored views of the same windows, and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations

import torch
from torch import Tensor

from densepred.inference.reduce import Spread

Model = Callable[[Tensor], Tensor | Mapping[str, Tensor]]


class Forward:
    """Logits of windows, the mean over all models and all mirrored views.

    Args:
        models: each maps (B, C, *window) to logits (B, K, *window), or to a dict of such.
        mirror_axes: spatial axes to mirror: 2^len(mirror_axes) views.
        output: the name of the output to take of a dict; by default its first.
        spread: append a channel: the variance of the class probabilities over models and views, the mean over the
            classes; of the softmax of the logits divided by so much. None appends nothing.
        dtype: of autocast; float32 switches it off.
    """

    def __init__(
        self,
        models: Sequence[Model],
        mirror_axes: Sequence[int],
        output: str | None,
        spread: float | None,
        dtype: torch.dtype,
    ) -> None:
        axes = sorted({axis + 2 for axis in mirror_axes})
        self.flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))
        self.models, self.output, self.spread, self.dtype = models, output, spread, dtype

    def __call__(self, cut: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window) float32; one channel more with `spread`."""
        if len(self.flips) == len(self.models) == 1 and self.spread is None:
            return self._one(self.models[0], cut)
        count = len(self.flips) * len(self.models)
        total, spread = cut.new_zeros(()), Spread()
        for logits in self._views(cut):
            total = total + logits
            if self.spread is not None:
                spread.add((logits / self.spread).softmax(1))
        total = total / count
        return total if self.spread is None else torch.cat([total, spread.variance(1)], 1)

    def _views(self, cut: Tensor) -> Iterator[Tensor]:
        for model in self.models:
            for axes in self.flips:  # flip copies, so a model that works in place leaves `cut` as it is
                yield self._one(model, cut.flip(axes)).flip(axes)

    def _one(self, model: Model, cut: Tensor) -> Tensor:
        with torch.autocast(cut.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = pick(model(cut), self.output)
        if logits.ndim != cut.ndim or (logits.shape[0], *logits.shape[2:]) != (cut.shape[0], *cut.shape[2:]):
            expected = f"({cut.shape[0]}, K, {', '.join(map(str, cut.shape[2:]))})"
            raise ValueError(f"model must give logits of shape {expected} for its input, got {tuple(logits.shape)}")
        # the ring's own layout: adding channels-last logits to it takes more than twice as long
        return logits.to(torch.float32, memory_format=torch.contiguous_format)


def pick(output: Tensor | Mapping[str, Tensor], name: str | None) -> Tensor:
    """One tensor of what a model returned: the tensor itself, or of a dict the one called `name` or else the first.

    Raises:
        ValueError: no output of this name.
        TypeError: neither a tensor nor a dict of tensors.
    """
    if isinstance(output, Mapping):
        if not output or (name is not None and name not in output):
            raise ValueError(f"output must be one of {', '.join(output) or 'none at all'}, got {name!r}")
        output = output[next(iter(output)) if name is None else name]
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor or a dict of tensors, got {type(output).__name__}")
    return output
