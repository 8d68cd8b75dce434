"""Predictions of the cases by the models that did not see them, and their scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.crossval.recipe import Shared
from densepred.crossval.training import FoldState
from densepred.errors import DensepredError
from densepred.evaluation import Scores, evaluate
from densepred.files import atomic_write, writable_folder
from densepred.inference.batch import predict
from densepred.inference.engines import Engine
from densepred.inference.layouts import Plain
from densepred.metrics import dice

TRIALS = "trials"
PLAIN = tuple(
    f"inference.{text}"
    for text in ("outputs=[labels]", "head=null", "cutout=null", "bin=1", "temperature=1", "keep_largest=[]")
)
"""Whole label maps as the networks give them."""


@dataclass
class HeldOut:
    """Predictions of one kind, scored.

    Args:
        files: case id -> label map, of those that could be predicted.
        scores: against the labels.
        failed: case id -> why it could not be predicted.
    """

    files: dict[str, Path]
    scores: Scores
    failed: dict[str, DensepredError] = field(default_factory=dict)

    @property
    def table(self) -> tuple[list[str], NDArray[np.float64]]:
        """Case ids, and the Dice `(n, classes)` of each class but the background."""
        kept = [index for index, value in enumerate(self.scores.classes) if value != 0]
        rows = {one.case: dice(one.confusion)[kept] for one in self.scores.results}
        return list(rows), np.array(list(rows.values())).reshape(len(rows), len(kept))


@dataclass(frozen=True)
class Setup:
    """What predicts held-out cases.

    Args:
        out: folder of the cross-validation.
        shared: recipe, cases and folds.
        plan: of the folds.
        done: the folds whose models are there.
        engine: what computes.
        suffix: of the folders in which trials are kept, where other models make them.
    """

    out: Path
    shared: Shared
    plan: Plan
    done: Sequence[FoldState]
    engine: Engine
    suffix: str = ""

    @property
    def cases(self) -> dict[str, Case]:
        """The held-out cases of these folds."""
        return {case: self.shared.cases[case] for one in self.done for case in one.cases}

    @property
    def fold_of(self) -> dict[str, int]:
        """Case id -> the fold that did not see it."""
        return {case: one.fold for one in self.done for case in one.cases}

    def groups(self, cases: Sequence[str]) -> list[str]:
        """The groups of cases."""
        return [self.shared.groups[case] for case in cases]

    def runs(self, one: FoldState) -> list[Path]:
        """The run directories of a fold."""
        return [self.out / run for run in one.runs]


def predict_held_out(setup: Setup, name: str, settings: Sequence[str]) -> HeldOut:
    """Predict every held-out case by its fold into `trials/<name>`; what is done already stays.

    Args:
        setup: models and cases.
        name: of the trial.
        settings: `inference.key=value` texts beyond those of `PLAIN`.
    """
    folder = writable_folder(setup.out / TRIALS / (name + setup.suffix))
    files: dict[str, Path] = {}
    failed: dict[str, DensepredError] = {}
    for one in setup.done:
        listed = folder.parent / f"fold-{one.fold}.csv"
        atomic_write(listed, case_list([setup.cases[case] for case in one.cases], setup.plan))
        result = predict(setup.runs(one), [listed], folder, [*PLAIN, *settings], engine=setup.engine)
        failed |= result.failed
        layout = Plain(folder, ["labels"])
        files |= {case: layout.paths(setup.cases[case])["labels"] for case in (*result.done, *result.skipped)}
    return HeldOut(files, scored(setup, files), failed)


def scored(setup: Setup, files: Mapping[str, Path]) -> Scores:
    """The scores of label maps against the labels of their cases."""
    truths = {case: setup.cases[case].label for case in files}
    names = dict(zip(setup.plan.values, setup.plan.classes, strict=True))
    labels = {case: path for case, path in truths.items() if path is not None}
    reading, ignore = setup.plan.reading, setup.plan.ignore
    return evaluate(
        dict(files),
        labels,
        classes=names,
        ignore=ignore,
        axes=reading.plane_axes,
        checksum=reading.checksum,
        instances=setup.plan.instances,
    )


def case_list(cases: Sequence[Case], plan: Plan) -> str:
    """A CSV of cases with absolute paths, as `densepred predict` reads it."""
    several = max((len(case.images) for case in cases), default=1) > 1
    channels = [f"image:{name}" for name in plan.image_channels] if several else ["image"]
    planes = [role for role in ("mask", "weight") if any(getattr(case, role) is not None for case in cases)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *channels, *planes])
    for case in cases:
        paths = [*case.images, *(getattr(case, role) for role in planes)]
        writer.writerow([case.id, *("" if path is None else path.absolute() for path in paths)])
    return text.getvalue()
