"""Predictions of the cases by the models that did not see them, and their scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.targets import open_table, read_table
from densepred.crossval.judged import Judged, column, label_maps, maps
from densepred.crossval.recipe import Shared
from densepred.crossval.training import FoldState
from densepred.errors import DensepredError, NothingDoneError
from densepred.files import atomic_write, writable_folder
from densepred.inference.batch import predict
from densepred.inference.engines import Engine
from densepred.inference.layouts import Plain
from densepred.inference.tabular import TABLE

TRIALS = "trials"
_PLAIN = ("head=null", "cutout=null", "bin=1", "temperature=1", "keep_largest=[]")


@dataclass
class HeldOut:
    """Predictions of one kind, scored.

    Args:
        folder: of the trial, with its records.
        files: case id -> label map or map of numbers, of those that could be predicted.
        rows: case id -> its row of `predictions.csv`, of a model that predicts whole images.
        judged: the scores that decisions are made by: of the classes of voxels if these are learnt, else of the first
            map of numbers, else of the first column.
        beside: column -> its scores, of those that are not `judged`.
        failed: case id -> why it could not be predicted.
    """

    folder: Path
    files: dict[str, Path]
    rows: dict[str, dict[str, str]]
    judged: Judged
    beside: dict[str, Judged] = field(default_factory=dict)
    failed: dict[str, DensepredError] = field(default_factory=dict)


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

    @property
    def kind(self) -> str:
        """The kind of output that is judged: "labels", "regression", or "" where only whole images are predicted."""
        return "labels" if self.plan.classes else "regression" if self.plan.maps else ""

    @property
    def columns(self) -> list[str]:
        """The targets that are columns."""
        return [name for name in self.plan.targets if name not in self.plan.maps]

    @property
    def plain(self) -> list[str]:
        """Whole images as the networks predict them, as `inference.key=value` texts."""
        return [f"inference.{text}" for text in (f"outputs=[{self.kind or 'labels'}]", *_PLAIN)]

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
        settings: `inference.key=value` texts beyond those of `Setup.plain`.

    Raises:
        NothingDoneError: no case could be predicted.
    """
    folder = writable_folder(setup.out / TRIALS / (name + setup.suffix))
    files: dict[str, Path] = {}
    rows: dict[str, dict[str, str]] = {}
    failed: dict[str, DensepredError] = {}
    for one in setup.done:
        listed = folder.parent / f"fold-{one.fold}.csv"
        atomic_write(listed, case_list([setup.cases[case] for case in one.cases], setup.plan))
        result = predict(setup.runs(one), [listed], folder, [*setup.plain, *settings], engine=setup.engine)
        failed |= result.failed
        if setup.columns:
            rows |= {case: dict(row) for case, row in open_table(folder / TABLE).rows.items()}
        if setup.kind:
            layout = Plain(folder, [setup.kind])
            files |= {case: layout.paths(setup.cases[case])[setup.kind] for case in (*result.done, *result.skipped)}
    if not (files if setup.kind else rows):
        first = next((error.what for error in failed.values()), "there is none")
        fix = "look at the cases with densepred check"
        raise NothingDoneError(f"no held-out case could be predicted: {first}", fix)
    found = HeldOut(folder, files, rows, *scored(setup, files, rows), failed)
    if rows:
        atomic_write(folder / TABLE, table_of(found))
    return found


def scored(
    setup: Setup, files: Mapping[str, Path], rows: Mapping[str, Mapping[str, str]]
) -> tuple[Judged, dict[str, Judged]]:
    """The scores that are decided by, and those beside them."""
    table, targets = read_table(setup.shared.config.data), setup.plan.targets
    beside = {} if table is None else {name: column(name, targets[name], rows, table) for name in setup.columns}
    if setup.kind:
        judge = label_maps if setup.kind == "labels" else maps
        return judge(files, setup.cases, setup.plan), beside
    return beside.pop(setup.columns[0]), beside


def table_of(found: HeldOut) -> str:
    """The rows of all folds as a CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(next(iter(found.rows.values()))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows[case] for case in sorted(found.rows))
    return text.getvalue()


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
