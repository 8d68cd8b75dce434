"""From logits to what people want to know: each a function of one slab, computed where the slab lies.

All take logits (K, n, *rest), of any number of planes and axes, and leave them as they are. A voxel's result is the
same to the bit however the planes are cut into slabs: sums over the classes go in their order, by operations on single
elements, for those of torch over an axis (softmax, sum) round otherwise at the ends of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PIECE = 1 << 22
"""Bytes of logits that are reduced at a time, beyond those of one plane."""
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
    values = values.to(logits.device)
    out = torch.empty_like(logits[:1], dtype=values.dtype)
    return _by_pieces(lambda piece: values[piece.max(0, keepdim=True).indices], logits, out)


def likeliest_classes(logits: Tensor, regions: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Logits of exclusive classes, up to a common term, from those of regions they make up: (classes, n, *rest).

    A class says of each region whether it lies in it; the regions being independent, the logarithm of its probability
    is the sum of the logits of its regions, and a term that all classes share.

    Args:
        logits: (K, n, *rest), of the regions.
        regions: for each the indices of its classes.
        classes: how many there are.

    Example:
        >>> likeliest_classes(torch.tensor([[3.0], [-1.0]]), [(1, 2), (2,)], 3).flatten().tolist()
        [0.0, 3.0, 2.0]
    """
    out = logits.new_zeros(classes, *logits.shape[1:])
    for one, members in zip(logits, regions, strict=True):
        for member in members:
            out[member] += one
    return out


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The softmax over the classes of the logits divided by a temperature: (K, n, *rest).

    Example:
        >>> probabilities(torch.tensor([[0.0], [0.0]])).flatten().tolist()
        [0.5, 0.5]
    """
    return _by_pieces(lambda piece: _softmax(_cooled(piece, temperature)), logits, torch.empty_like(logits))


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _softmax(logits: Tensor) -> Tensor:
    weights, total, _ = _weights(logits)
    return weights.div_(total)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log p over the classes in nats, from 0 to log K: (1, n, *rest); p as of `probabilities`.

    As log(sum exp(d)) - sum exp(d) d / sum exp(d), d the distance to the largest logit: no term is negative, so that
    nothing cancels, and a class with a logit of minus infinity adds nothing (Shannon 1948).

    Example:
        >>> round(entropy(torch.tensor([[0.0], [0.0]])).item(), 6)
        0.693147
    """
    return _by_pieces(lambda piece: _entropy(_cooled(piece, temperature)), logits, torch.empty_like(logits[:1]))


def _entropy(logits: Tensor) -> Tensor:
    weights, total, below = _weights(logits)
    return total.log() - _sum(weights.mul_(below.clamp_(min=LEAST_LOG))) / total


def _weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax before it is divided by its sum, that sum, and the logarithm of the former."""
    below = logits - logits.amax(0, keepdim=True)
    weights = below.exp()
    return weights, _sum(weights), below


def _sum(values: Tensor) -> Tensor:
    first, *others = values.split(1)
    total = first.clone()
    for other in others:
        total += other
    return total


def _by_pieces(reduction: Callable[[Tensor], Tensor], logits: Tensor, out: Tensor) -> Tensor:
    """(K, n, *rest) -> `out`, some planes at a time, which stay in a cache and need hardly any memory."""
    step = max(PIECE * logits.shape[1] // max(logits.nbytes, 1), 1)
    for piece, target in zip(logits.split(step, 1), out.split(step, 1), strict=True):
        target.copy_(reduction(piece))
    return out


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
