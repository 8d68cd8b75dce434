"""One or several models and the inferer that lays their windows: what one pass over an image needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import TypeVar

import torch
from torch import Tensor, nn

from densepred.inference.reduce import Spread
from densepred.inference.resample import Resampled, resample_slabs
from densepred.inference.sliding_window import Progress, Slab, SlidingWindowInferer, Source, pick

Item = TypeVar("Item")


@dataclass(frozen=True)
class Engine:
    """Predicts images with one model, or with the mean of several.

    Args:
        inferer: lays the windows.
        models: each maps windows (B, C, *window) to logits (B, K, *window).
        variance: whether slabs have one more channel, behind the logits: the variance of the classes' probabilities
            over models and mirrored views (the mean over the classes), blended as the logits are.
    """

    inferer: SlidingWindowInferer
    models: tuple[nn.Module, ...]
    variance: bool = False

    def stream(
        self, source: Source, target: Sequence[int] | None = None, progress: Progress | None = None
    ) -> Iterator[Slab]:
        """Slabs on the grid of the source, in order; see `SlidingWindowInferer.stream`.

        Args:
            source: the image, (C, *spatial), read forward once.
            target: the spatial shape to predict it at, to which and from which is resampled; by default its own.
            progress: called with the windows done and all windows.
        """
        shape = tuple(source.shape[1:])
        target = shape if target is None else tuple(target)
        device = torch.device(self.inferer.device or "cpu")
        image = source if target == shape else Resampled(source, target, device)
        with ended(self._windows(image, progress)) as slabs:
            yield from slabs if target == shape else resample_slabs(slabs, target, shape)

    def _windows(self, source: Source, progress: Progress | None) -> Iterator[Slab]:
        if len(self.models) == 1 and not self.variance:
            return self.inferer.stream(self.models[0], source, progress)
        joint = Mean(self.models, self.inferer.mirror_axes, self.variance, self.inferer.output)
        return replace(self.inferer, mirror_axes=()).stream(joint, source, progress)


class Mean(nn.Module):
    """The mean of the logits of several models and all mirrored views of a window.

    Args:
        models: each maps (B, C, *window) to logits (B, K, *window), or to a dict of such.
        mirror_axes: spatial axes; the views are all combinations of them.
        variance: one more channel follows the logits, as of `Engine`.
        output: the name of the output to take of a dict; by default its first.

    Example:
        >>> mean = Mean([nn.Identity(), nn.Identity()], mirror_axes=[0], variance=True)
        >>> mean(torch.ones(1, 2, 3, 3)).shape
        torch.Size([1, 3, 3, 3])
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        mirror_axes: Sequence[int] = (),
        variance: bool = False,
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.models, self._variance, self._output = nn.ModuleList(models), variance, output
        axes = sorted({axis + 2 for axis in mirror_axes})
        self._views = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window) float32, or (B, K + 1, *window) with variance."""
        total, spread = torch.zeros((), device=x.device), Spread()
        for axes in self._views:
            for model in self.models:
                logits = pick(model(x.flip(axes)), self._output).float().flip(axes)  # a copy: a model may work in place
                total = total + logits
                if self._variance:
                    spread.add(logits.softmax(1))
        total = total / (len(self._views) * len(self.models))
        return torch.cat([total, spread.variance(1)], 1) if self._variance else total


@contextmanager
def ended(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """A generator for the time of the block, closed behind it, so that what it holds is given back at once."""
    try:
        yield items
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
