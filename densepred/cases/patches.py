"""Training patches: every draw is a function of (seed, epoch, sample), never of the order of calls or of a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from densepred.cases.cache import CachedCase
from densepred.cases.labels import IGNORE
from densepred.errors import InputError

_ORDER, _SAMPLE = 1, 2  # separate streams of one seed


@dataclass(frozen=True)
class Batch:
    """Patches with the ids of their cases and a seed each for augmentation."""

    image: np.ndarray
    """Float32 `(B, C, *size)`."""
    label: np.ndarray
    """int16 `(B, *size)`, -1 where there is no truth or no image."""
    ids: tuple[str, ...]
    seeds: tuple[int, ...]


class PatchSampler:
    """Draws batches of patches from cached cases.

    The cases come in random orders, one after the other, so that each occurs equally often. The last
    `max(1, round(batch * foreground))` samples of a batch (none if `foreground` is 0) are centred, as far as the case's
    edges allow, on a voxel of a class that is drawn evenly among those in the case; the others lie anywhere, evenly.
    Cases smaller than the patch stand in its middle.

    Args:
        cases: at least one.
        size: of the patch, per spatial axis.
        batch: samples per batch.
        foreground: share of centred samples, 0 to 1.
        seed: of all draws.
        steps: batches of an epoch, with which the orders run on from epoch to epoch; without it each epoch starts anew.

    Raises:
        InputError: cases with another number of axes than the patch, or of channels than the first.

    Source: the foreground share is nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z).
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        size: Sequence[int],
        batch: int,
        foreground: float,
        seed: int,
        steps: int | None = None,
    ) -> None:
        if not cases or batch < 1 or not 0 <= foreground <= 1 or min(size) < 1:
            got = f"{len(cases)} cases, size {tuple(size)}, batch {batch}, foreground {foreground}"
            raise ValueError(f"cases, size and batch must be positive and foreground within 0 and 1, got {got}")
        for case in cases:
            if len(case.shape) - 1 != len(size):
                what = f"{len(case.shape) - 1} spatial axes, but patches of {len(size)}: {tuple(size)}"
                raise InputError(what, "set model.dims and patch.size to the images' own axes", case=case.id)
            if case.shape[0] != cases[0].shape[0]:
                what = f"{case.shape[0]} channels, but {cases[0].id} has {cases[0].shape[0]}"
                raise InputError(what, "give every case the same channels", case=case.id)
        self.cases, self.size, self.batch_size = list(cases), tuple(size), batch
        self.centred = max(1, round(batch * foreground)) if foreground > 0 and batch > 1 else 0
        self.alone = foreground if batch == 1 else 0.0
        self.seed, self.steps = seed % 2**63, steps

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of a step of an epoch, both from 0."""
        channels = self.cases[0].shape[0]
        image = np.zeros((self.batch_size, channels, *self.size), np.float32)
        label = np.full((self.batch_size, *self.size), IGNORE, np.int16)
        ids, seeds = [], []
        for slot in range(self.batch_size):
            sample = step * self.batch_size + slot
            case = self._case(epoch, sample)
            generator = _generator(self.seed, _SAMPLE, epoch, sample)
            seeds.append(int(generator.integers(2**63)))
            ids.append(case.id)
            centred = slot >= self.batch_size - self.centred or float(generator.random()) < self.alone
            start = self._start(case, generator, centred)
            source, target = _windows(case.shape[1:], self.size, start)
            image[slot][:, *target] = case.image[:, *source]
            label[slot][target] = case.label[source]
        return Batch(image, label, tuple(ids), tuple(seeds))

    def _case(self, epoch: int, sample: int) -> CachedCase:
        if self.steps is not None:
            epoch, sample = 0, epoch * self.steps * self.batch_size + sample
        turn, place = divmod(sample, len(self.cases))
        return self.cases[_order(self.seed, epoch, turn, len(self.cases))[place]]

    def _start(self, case: CachedCase, generator: np.random.Generator, centred: bool) -> list[int]:
        """First voxel of the patch along each axis; negative where the case is smaller."""
        centre = None
        if centred and case.classes:
            first, stop = list(case.classes.values())[int(generator.integers(len(case.classes)))]
            centre = case.locations[int(generator.integers(first, stop)), 1:]
        out: list[int] = []
        for axis, (length, size) in enumerate(zip(case.shape[1:], self.size, strict=True)):
            if length <= size:
                out.append(-((size - length) // 2))
            elif centre is None:
                out.append(int(generator.integers(length - size + 1)))
            else:
                out.append(min(max(int(centre[axis]) - size // 2, 0), length - size))
        return out


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, turn: int, cases: int) -> list[int]:
    """A random order of the cases."""
    order: list[int] = _generator(seed, _ORDER, epoch, turn).permutation(cases).tolist()
    return order


def _windows(
    shape: tuple[int, ...], size: tuple[int, ...], start: list[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the patch lies in the case, and where that part lies in the patch."""
    source = tuple(slice(max(a, 0), min(a + s, n)) for a, s, n in zip(start, size, shape, strict=True))
    target = tuple(slice(w.start - a, w.stop - a) for w, a in zip(source, start, strict=True))
    return source, target
