"""From logits to what people want to know: each a function of one slab, computed where the slab lies.

All take logits (K, n, *rest), of any number of planes and axes, and leave them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_LOG = -1e4
"""Logarithms of probabilities below count as this: its exponential is 0, and so is their product."""


def labels(logits: Tensor, values: Tensor) -> Tensor:
    """The value of the likeliest class, of equal ones the first: (1, n, *rest) of the type of `values`.

    Args:
        logits: (K, n, *rest).
        values: (K,), what is written for each class.

    Raises:
        ValueError: not one value for each class.

    Example:
        >>> labels(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 7], dtype=torch.uint8))
        tensor([[7, 0]], dtype=torch.uint8)
    """
    if values.shape != logits.shape[:1]:
        raise ValueError(f"values must have shape ({logits.shape[0]},), got {tuple(values.shape)}")
    return values.to(logits.device)[logits.max(0, keepdim=True).indices]


def probabilities(logits: Tensor) -> Tensor:
    """The softmax over the classes: (K, n, *rest).

    Example:
        >>> probabilities(torch.tensor([[0.0], [0.0]])).flatten().tolist()
        [0.5, 0.5]
    """
    return logits.softmax(0)


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p over the classes in nats, from 0 to log K: (1, n, *rest).

    From the logarithm of the softmax, to 1e-6 of float64's, also where the softmax itself is 0 or 1 in float32. Classes
    with a logit of minus infinity add nothing (Shannon 1948).

    Example:
        >>> round(entropy(torch.tensor([[0.0], [0.0]])).item(), 6)
        0.693147
    """
    logs = logits.log_softmax(0).clamp_(min=LEAST_LOG)
    return logs.exp().mul_(logs).sum(0, keepdim=True).abs_()  # no term is positive


class Spread:
    """How far several predictions are apart, added one by one: the variance of each class over them, and its mean.

    By the update of Welford 1962, Technometrics 4, 419, which keeps its digits where they hardly differ.

    Example:
        >>> spread = Spread()
        >>> for one in ([[1.0], [0.0]], [[0.0], [1.0]]):
        ...     spread.add(torch.tensor(one))
        >>> spread.variance(axis=0).tolist()
        [[0.25]]
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, probabilities: Tensor) -> None:
        """One more, of the shape of the others."""
        self.count += 1
        if self.count == 1:
            self._mean, self._squares = probabilities.clone(), torch.zeros_like(probabilities)
            return
        apart = probabilities - self._mean
        self._mean += apart / self.count
        self._squares += apart * (probabilities - self._mean)

    def variance(self, axis: int) -> Tensor:
        """The mean along `axis`, which stays with one entry, of squared distances from the mean; between 0 and 1/4."""
        return self._squares.mean(axis, keepdim=True) / self.count


def split(slab: Tensor, with_variance: bool) -> tuple[Tensor, Tensor | None]:
    """A slab of the inferer as logits (K, n, *rest) and, where it has one more channel for it, variance (1, n, *rest).

    Example:
        >>> [part.shape[0] for part in split(torch.zeros(4, 2, 5, 5), True)]
        [3, 1]
    """
    return (slab[:-1], slab[-1:]) if with_variance else (slab, None)
