"""Training patches: every draw is a function of (seed, epoch, sample), never of the order of calls or of a thread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from densepred.cases.cache import CachedCase
from densepred.cases.labels import IGNORE
from densepred.cases.plan import Plan
from densepred.config.patch import PatchConfig
from densepred.errors import InputError

TRIES = 32
"""Draws of a place, of which the first is taken that is labelled enough, else the one that is most."""
SPARSE = 0.5
"""Share of a case with a truth below which patches are centred on such voxels."""
_ORDER, _SAMPLE, _CENTRED = 1, 2, 3  # separate streams of one seed
_ANY = -1  # in the place of a class: any voxel with a truth


@dataclass(frozen=True)
class Batch:
    """Patches with the ids of their cases and a seed each for augmentation."""

    image: np.ndarray
    """Float32 `(B, C, *size)`."""
    label: np.ndarray
    """int16 `(B, *size)`, -1 where there is no truth or no image."""
    ids: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """Where a patch lies: its first voxel along each axis of the case, negative where that is smaller, and its size."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def windows(self, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the case, and where that lies in the patch."""
        each = list(zip(self.start, self.size, shape, strict=True))
        source = tuple(slice(max(a, 0), min(a + s, n)) for a, s, n in each)
        target = tuple(slice(w.start - a, w.stop - a) for w, a in zip(source, self.start, strict=True))
        return source, target


class PatchSampler:
    """Draws batches of patches from cached cases.

    The last `max(1, round(batch * foreground))` samples of a batch (none if `foreground` is 0; of batches of one, as
    many in the long run) are centred, as far as the case's edges allow, on a voxel of a class. The class is drawn by
    weight among those in the case, and the voxel evenly among all of that class in the case. The other patches lie
    anywhere, evenly; in cases of which less than half has a truth, they are centred on voxels that have one, drawn
    evenly. The cases come in random orders, one after the other, so that each occurs equally often; centred samples
    have an order of their own, of the cases that have such a class. Cases smaller than the patch stand in its middle.

    Args:
        cases: at least one.
        size: of the patch, per spatial axis.
        batch: samples per batch.
        foreground: share of centred samples, 0 to 1.
        seed: of all draws.
        steps: batches of an epoch, with which the orders run on from epoch to epoch; without it each epoch starts anew.
        weights: class index -> how often patches are centred on it; by default all classes but the background alike.
        labelled: least share with a truth of that part of a patch that lies in the case; of `TRIES` draws the first
            that has it is taken, else the one that has most. A patch without any truth is never drawn.
        axis: patches are planes of volumes: across this axis, or across each of the three, drawn evenly ("all").

    Raises:
        InputError: cases with another number of axes than the patch, or of channels than the first, or without truth.

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
        weights: Mapping[int, float] | None = None,
        labelled: float = 0.0,
        axis: Literal[0, 1, 2, "all"] | None = None,
    ) -> None:
        if not cases or batch < 1 or not 0 <= foreground <= 1 or min(size) < 1:
            got = f"{len(cases)} cases, size {tuple(size)}, batch {batch}, foreground {foreground}"
            raise ValueError(f"cases, size and batch must be positive and foreground within 0 and 1, got {got}")
        for case in cases:
            _check(case, cases[0], size, axis)
        self.cases, self.size, self.batch_size = list(cases), tuple(size), batch
        self.centred = max(1, round(batch * foreground)) if foreground > 0 and batch > 1 else 0
        self.alone = foreground if batch == 1 else 0.0
        self.seed, self.steps, self.weights = seed % 2**63, steps, weights
        self.labelled, self.axis = labelled, axis
        self._with_class = [case for case in self.cases if self._classes(case)] or self.cases

    @classmethod
    def of(
        cls, patch: PatchConfig, cases: Sequence[CachedCase], plan: Plan, seed: int, steps: int | None = None
    ) -> PatchSampler:
        """As a recipe says; its weights are of label values.

        Raises:
            InputError: a weight of a value that is no class.
        """
        weights: dict[int, float] | None = None
        if isinstance(patch.classes, dict):
            unknown = [value for value in patch.classes if value not in plan.label_map]
            if unknown:
                raise InputError(f"patch.classes: {unknown} are no label values", f"known: {sorted(plan.label_map)}")
            weights = {}
            for value, weight in patch.classes.items():
                weights[plan.label_map[value]] = weights.get(plan.label_map[value], 0.0) + weight
        sizes = (patch.size, patch.batch, patch.foreground)
        return cls(cases, *sizes, seed, steps, weights, patch.labelled, patch.axis)

    def batch(self, epoch: int, step: int, slots: Iterable[int] | None = None) -> Batch:
        """The batch of a step of an epoch, both from 0; of several processes each may take some of its samples."""
        chosen = list(range(self.batch_size) if slots is None else slots)
        image = np.zeros((len(chosen), self.cases[0].shape[0], *self.size), np.float32)
        label = np.full((len(chosen), *self.size), IGNORE, np.int16)
        told = [self._sample(epoch, step, slot, image[at], label[at]) for at, slot in enumerate(chosen)]
        ids, seeds = zip(*told, strict=True) if told else ((), ())
        return Batch(image, label, ids, seeds)

    def _sample(self, epoch: int, step: int, slot: int, image: np.ndarray, label: np.ndarray) -> tuple[str, int]:
        """Fill in one sample; returns the id of its case and its seed."""
        generator = _generator(self.seed, _SAMPLE, epoch, step * self.batch_size + slot)
        seed = int(generator.integers(2**63))
        case, centred = self._case(epoch, step, slot)
        place, part = self._draw(case, generator, centred)
        source, target = place.windows(case.shape[1:])
        label.reshape(place.size)[target] = part
        spans = [(0, len(image)), *((one.start, one.stop) for one in source)]
        case.image.read_into(image.reshape(len(image), *place.size)[(slice(None), *target)], spans)
        return case.id, seed

    def _case(self, epoch: int, step: int, slot: int) -> tuple[CachedCase, bool]:
        """The case of a sample, and whether it is centred on a class."""
        if self.steps is not None:
            epoch, step = 0, epoch * self.steps + step
        if self.batch_size == 1:
            before = math.floor(step * self.alone + 1e-9)
            centred = math.floor((step + 1) * self.alone + 1e-9) > before
            number = before if centred else step - before
        else:
            others = self.batch_size - self.centred
            centred = slot >= others
            number = step * self.centred + slot - others if centred else step * others + slot
        cases = self._with_class if centred else self.cases
        turn, place = divmod(number, len(cases))
        return cases[_order(self.seed, _CENTRED if centred else _ORDER, epoch, turn, len(cases))[place]], centred

    def _classes(self, case: CachedCase) -> dict[int, float]:
        """The classes of a case that patches are centred on, with their weights."""
        if self.weights is None:
            return dict.fromkeys(case.classes, 1.0)
        background = case.labelled - sum(case.classes.values())
        present = {0: background} | case.classes
        return {index: weight for index, weight in self.weights.items() if weight and present.get(index)}

    def _draw(self, case: CachedCase, generator: np.random.Generator, centred: bool) -> tuple[_Place, np.ndarray]:
        """Where a patch lies, and the label of that part of it that lies in the case."""
        sparse = case.labelled < SPARSE * math.prod(case.shape[1:])
        best, found = -1.0, (_Place((), ()), np.empty(0))
        for number in range(TRIES):
            place = self._place(case, generator, centred, on_truth=sparse or number == TRIES - 1)
            part = case.label[place.windows(case.shape[1:])[0]]
            share = float(np.count_nonzero(part != IGNORE)) / part.size
            if share > best:
                best, found = share, (place, part)
            if share >= self.labelled and share > 0:
                break
        return found

    def _place(self, case: CachedCase, generator: np.random.Generator, centred: bool, on_truth: bool) -> _Place:
        size = self.size
        if self.axis is not None:
            axis = int(generator.integers(3)) if self.axis == "all" else self.axis
            size = (*size[:axis], 1, *size[axis:])
        classes = self._classes(case) if centred else {}
        centre = None
        if classes:
            weights = np.array([*classes.values()])
            at = int(np.searchsorted(np.cumsum(weights), generator.random() * weights.sum(), side="right"))
            centre = voxel(case, [*classes][min(at, len(classes) - 1)], generator)
        elif on_truth:
            centre = voxel(case, _ANY, generator)
        start: list[int] = []
        for axis, (length, wanted) in enumerate(zip(case.shape[1:], size, strict=True)):
            if length <= wanted:
                start.append(-((wanted - length) // 2))
            elif centre is None:
                start.append(int(generator.integers(length - wanted + 1)))
            else:
                start.append(min(max(centre[axis] - wanted // 2, 0), length - wanted))
        return _Place(tuple(start), size)


def voxel(case: CachedCase, index: int, generator: np.random.Generator) -> tuple[int, ...]:
    """A voxel of a class of a case, each of them as likely as another.

    Args:
        case: which has the class.
        index: of the class; -1 for any voxel with a truth.
        generator: draws it.
    """
    label, counts = case.label, case.counts
    upto = np.cumsum(counts.sum(1) if index == _ANY else counts[:, index])
    number = int(generator.integers(int(upto[-1])))
    chunk = int(np.searchsorted(upto, number, side="right"))
    block = label.block(chunk)
    which = np.flatnonzero(block != IGNORE if index == _ANY else block == index)
    inside = np.unravel_index(which[number - (int(upto[chunk - 1]) if chunk else 0)], block.shape)
    return tuple(first + int(at) for first, at in zip(label.corner(chunk), inside, strict=True))


def _check(case: CachedCase, first: CachedCase, size: Sequence[int], axis: int | str | None) -> None:
    dims = len(case.shape) - 1
    if dims != len(size) + (axis is not None):
        what = f"{dims} spatial axes, but patches of {len(size)}: {tuple(size)}"
        fix = "set model.dims and patch.size to the images' own axes; a 2D model learns from volumes by patch.axis"
        raise InputError(what, fix, case=case.id)
    if case.shape[0] != first.shape[0]:
        what = f"{case.shape[0]} channels, but {first.id} has {first.shape[0]}"
        raise InputError(what, "give every case the same channels", case=case.id)
    if not case.labelled:
        raise InputError("no voxel has a truth: there is nothing to learn from", "leave it out", case=case.id)


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@lru_cache(maxsize=16)
def _order(seed: int, kind: int, epoch: int, turn: int, cases: int) -> list[int]:
    """A random order of the cases."""
    order: list[int] = _generator(seed, kind, epoch, turn).permutation(cases).tolist()
    return order
