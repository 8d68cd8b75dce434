"""Labels that seem to lie beside what they mark: whole voxels off, as a slip of an annotation program leaves them.

A model that did not see a case draws its structures where the image has them. If its prediction fits the label far
better once it is moved by whole voxels, the label is moved. No score is changed by this: it is said, for a person to
look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepred.cases.labels import map_labels
from densepred.crossval.held_out import HeldOut, Setup
from densepred.evaluation.pictures import draw_case
from densepred.metrics import dice

FURTHEST, LEAST, DRAWN = 4, 0.05, 10
"""Voxels along an axis that are tried, by how much the Dice must rise to be told, and how many are drawn."""


@dataclass(frozen=True)
class Misplaced:
    """A label that seems to be moved.

    Args:
        case: its id.
        voxels: by how many along each axis, slowest first.
        dice: of the prediction that did not see the case, mean over the classes.
        moved: the same once the prediction is moved as the label is.
    """

    case: str
    voxels: tuple[int, ...]
    dice: float
    moved: float

    def __str__(self) -> str:
        more = " or more" if max(map(abs, self.voxels)) == FURTHEST else ""
        return (
            f"{self.case}: its label seems to be moved by {self.voxels}{more} voxels (slowest axis first), "
            f"Dice {self.dice:.4f} as it is, {self.moved:.4f} moved likewise"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def misplaced(setup: Setup, found: HeldOut) -> list[Misplaced]:
    """The cases whose labels seem to be moved, by id.

    Once moved, a prediction must fit its label as well as the median case's does: a poor model fits by chance.
    """
    values, every, plan, scored = found.judged.values, [], setup.plan, set(found.judged.cases)
    usual = np.median(np.nanmean(values[~np.isnan(values).all(1)], 1))
    for case, path in sorted(found.files.items()):
        label = setup.cases[case].label
        if label is None or case not in scored:
            continue
        with plan.reading.open_plane(label) as truth, plan.reading.open_plane(path) as predicted:
            ours, theirs = (map_labels(volume.numpy()[0], plan, setup.cases[case]) for volume in (truth, predicted))
        voxels, before, after = displacement(ours, theirs, len(plan.classes))
        if after - before > LEAST and after >= usual:
            every.append(Misplaced(case, voxels, before, after))
    return every


def draw_misplaced(every: Sequence[Misplaced], setup: Setup, found: HeldOut) -> None:
    """Draw the first of them as `misplaced_<id>.png`; pictures of an earlier run go."""
    for path in setup.out.glob("misplaced_*.png"):
        path.unlink()
    scores = found.judged.overlaps
    if scores is None:
        return
    results = {one.case: one for one in scores.results}
    for one in every[:DRAWN]:
        draw_case(scores, results[one.case], "misplaced", setup.out, setup.cases[one.case].images[0])


def displacement(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int
) -> tuple[tuple[int, ...], float, float]:
    """How a prediction has to be moved to fit best, going uphill along the axes.

    Args:
        truth: class indices of any shape, negative where they are not known.
        predicted: likewise.
        classes: how many, with the background, which is 0.

    Returns:
        Voxels along each axis, the mean Dice as it is, and moved.

    Example:
        >>> label = np.zeros((9, 9), int)
        >>> label[2:5, 3:7] = 1
        >>> displacement(label, np.roll(label, 2, 1), 2)
        ((0, -2), 0.5, 1.0)
    """
    marked = (truth > 0) | (predicted > 0)
    if not marked.any():
        return (0,) * truth.ndim, float("nan"), float("nan")
    axes = range(truth.ndim)
    sides = [np.flatnonzero(marked.any(tuple(other for other in axes if other != axis))) for axis in axes]
    box = tuple(slice(int(at[0]), int(at[-1]) + 1) for at in sides)
    truth, predicted = (np.pad(side[box], FURTHEST) for side in (truth, predicted))
    scores: dict[tuple[int, ...], float] = {}

    def score(shift: tuple[int, ...]) -> float:
        if shift not in scores:
            counts = np.zeros(classes**2, np.int64)
            for at, plane in enumerate(truth):  # the padding, which is background, is what comes round the edges
                moved = np.roll(predicted[(at - shift[0]) % len(truth)], shift[1:], tuple(range(truth.ndim - 1)))
                known = (plane >= 0) & (moved >= 0)
                counts += np.bincount(plane[known].astype(np.int64) * classes + moved[known], minlength=classes**2)
            of_class = dice(counts.reshape(classes, classes))[1:]
            there = ~np.isnan(of_class)
            scores[shift] = float(of_class[there].mean()) if there.any() else 0.0
        return scores[shift]

    best = start = (0,) * truth.ndim
    while True:
        near = [(*best[:axis], best[axis] + step, *best[axis + 1 :]) for axis in axes for step in (-1, 1)]
        nearest = max((one for one in near if max(map(abs, one)) <= FURTHEST), key=score)
        if score(nearest) <= score(best):
            return best, score(start), score(best)
        best = nearest
