"""Predictions averaged over blocks of pixels, as they stream by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from densepred.inference.outputs import Predicted
from densepred.inference.reduce import probabilities


def in_blocks(planes: Iterator[Predicted], factor: int, done: int = 0) -> Iterator[Predicted]:
    """The mean probabilities of blocks of `factor` x `factor` pixels, of the valid ones in each.

    The blocks lie along the two fastest axes. Incomplete blocks at the far edges are left out, and a block without a
    valid pixel is invalid. The logits that come out are the logarithms of the means, whose softmax they are.

    Args:
        planes: of an image, in order.
        factor: pixels along a side.
        done: the number of the first plane that comes out.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for part in planes:
        shares = probabilities(part.logits, part.temperature)
        valid = torch.ones(part.logits.shape[1:], device=part.logits.device)
        if part.invalid is not None:
            valid[torch.from_numpy(part.invalid).to(valid.device)] = 0
        held.append((shares * valid, valid))
        along = factor if shares.ndim == 3 else 1  # an image streams along an axis of its blocks
        sums, counts = (torch.cat(parts, axis) for parts, axis in zip(zip(*held, strict=True), (1, 0), strict=True))
        whole = counts.shape[0] // along * along
        held = [(sums[:, whole:], counts[whole:])]
        if whole:
            yield _means(sums[:, :whole], counts[:whole], factor, done)
            done += whole // along


def _means(sums: Tensor, counts: Tensor, factor: int, done: int) -> Predicted:
    total, number = _summed(sums, factor), _summed(counts[None], factor)[0]
    invalid = number == 0
    mean = (total / number.clamp(min=1)).log()
    mean[:, invalid] = 0
    found: np.ndarray | None = invalid.cpu().numpy() if bool(invalid.any()) else None
    return Predicted(done, done + mean.shape[1], mean, found)


def _summed(values: Tensor, factor: int) -> Tensor:
    """Sums (K, ..., Y / factor, X / factor) over blocks of (K, ..., Y, X)."""
    for axis in (values.ndim - 2, values.ndim - 1):
        whole = values.narrow(axis, 0, values.shape[axis] // factor * factor)
        values = sum(_every(whole, axis, first, factor) for first in range(1, factor)) + _every(whole, axis, 0, factor)
    return values


def _every(values: Tensor, axis: int, first: int, step: int) -> Tensor:
    """Every `step`-th of an axis."""
    return values[(*[slice(None)] * axis, slice(first, None, step))]
