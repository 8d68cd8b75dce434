"""`Scores`: what an evaluation found, per case and over the set, as tables and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.errors import DONE, NOTHING_DONE, SOME_FAILED
from densepred.evaluation.counting import Voxel
from densepred.evaluation.measures import Measured, Wanted, pooled
from densepred.evaluation.summaries import (
    Failure,
    delimited,
    mean_of,
    save_failures,
    statistics_of,
    version_of,
    without_nan,
)
from densepred.files import atomic_write, writable_folder
from densepred.metrics import METRICS, dice
from densepred.metrics.bootstrap import resampled

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CaseResult:
    """The counts of one case.

    Args:
        case: its id.
        truth: the label file.
        prediction: the predicted labels.
        confusion: (K, K) int64 in the order of `Scores.classes`, truth in rows.
        left_out: (K,) int64, true voxels of each class that are not in it: the prediction marks them as invalid.
        voxel: its size and unit.
        measured: class value -> the metrics that need more than counts, of the classes that the case has.
        unit: of distances: "mm", "um", or "" where the files do not say.
    """

    case: str
    truth: Path
    prediction: Path
    confusion: np.ndarray
    left_out: np.ndarray
    voxel: Voxel
    measured: Mapping[int, Measured] = field(default_factory=dict)
    unit: str = ""

    @property
    def unpredicted(self) -> int:
        """The voxels of all classes that were left out."""
        return int(self.left_out.sum())


@dataclass(frozen=True)
class Scores:
    """The scores of a set.

    Background (value 0) has none; a class that a case lacks in both truth and prediction gives nan there.

    Args:
        classes: label value -> name, in rising order, with the background.
        results: the counts per case.
        failures: what could not be scored.
        unlabelled: ids of predictions that have no label.
        unpredicted: ids of labels that have no prediction.
        axes: what the axes of the files hold, where that was open.
        checksum: what was done with those of FITS files.
        wanted: the metrics beside those of overlap.
        instances: values are numbers of objects.
    """

    classes: Mapping[int, str]
    results: Sequence[CaseResult]
    failures: Sequence[Failure] = ()
    unlabelled: Sequence[str] = field(default=())
    unpredicted: Sequence[str] = field(default=())
    axes: str | None = None
    checksum: str = "verify"
    wanted: Wanted = field(default_factory=Wanted)
    instances: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics."""
        return (*METRICS, *self.wanted.metrics)

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """A row per case and class: the metrics, the scored voxels of truth and prediction, their size and its unit.

        `unpredicted_voxels` are those of the truth that are not scored, as they lie where nothing was predicted. The
        size is that of the scored voxels; nan, and the unit "", where the label file names no unit of length.
        """
        return [row for result in self.results for row in self._rows(result)]

    def _of(self, result: CaseResult, metric: str) -> list[float]:
        """A metric of a case for each class; nan where it has none."""
        if metric in METRICS:
            return [float(value) for value in METRICS[metric](result.confusion)]
        none = Measured(dict.fromkeys(self.wanted.metrics, math.nan))
        return [result.measured.get(value, none).values[metric] for value in self.classes]

    def _rows(self, result: CaseResult) -> list[dict[str, Any]]:
        metrics = {name: self._of(result, name) for name in self.metrics}
        voxels = {"truth": result.confusion.sum(1), "prediction": result.confusion.sum(0)}
        return [
            {
                "case": result.case,
                "class": self.classes[value],
                "value": value,
                **{name: scores[index] for name, scores in metrics.items()},
                **{f"{side}_voxels": int(count[index]) for side, count in voxels.items()},
                "unpredicted_voxels": int(result.left_out[index]),
                **{f"{side}_size": float(count[index] * result.voxel.size) for side, count in voxels.items()},
                "unit": result.voxel.unit,
            }
            for index, value in enumerate(self.classes)
            if value != 0
        ]

    @cached_property
    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """class -> metric -> mean, low, high, std (n - 1), median, lowest and highest over the cases, pooled, n, n_nan.

        `low` and `high` bound the 95 % interval of the mean: percentiles over cases drawn anew (bootstrap), always with
        the same draws. `pooled` is the metric of all cases taken together; nan for hd and hd95, which do not add up.
        """
        total = sum((result.confusion for result in self.results), np.zeros((len(self.classes),) * 2, np.int64))
        per_case = {name: np.array([self._of(result, name) for result in self.results]) for name in self.metrics}
        drawn = resampled([result.case for result in self.results]) if self.results else None
        found: dict[str, dict[str, dict[str, float]]] = {}
        for index, (value, name) in enumerate(self.classes.items()):
            if value == 0:
                continue
            found[name] = {}
            for metric, scores in per_case.items():
                one = scores[:, index] if len(scores) else np.empty(0)
                measured = [result.measured[value] for result in self.results if value in result.measured]
                whole = float(METRICS[metric](total)[index]) if metric in METRICS else pooled(measured, metric)
                found[name][metric] = {**statistics_of(one, drawn), "pooled": whole}
        return found

    @cached_property
    def left_out(self) -> dict[str, dict[str, float]]:
        """class -> what of it lay in pixels that were not predicted.

        `voxels` of the truth, their `share` of all its voxels (nan if it has none), and the number of `cases` that have
        no score since nothing of the class is left to find.
        """
        none = np.zeros(len(self.classes), np.int64)
        voxels = sum((result.left_out for result in self.results), none)
        whole = voxels + sum((result.confusion.sum(1) for result in self.results), none)
        cases = sum(((result.left_out > 0) & np.isnan(dice(result.confusion)) for result in self.results), none)
        return {
            name: {
                "voxels": int(voxels[index]),
                "share": float(voxels[index] / whole[index]) if whole[index] else math.nan,
                "cases": int(cases[index]),
            }
            for index, (value, name) in enumerate(self.classes.items())
            if value != 0
        }

    @property
    def mean(self) -> dict[str, dict[str, float]]:
        """class -> metric -> mean over the cases that have a score."""
        return self._statistic("mean")

    @property
    def pooled(self) -> dict[str, dict[str, float]]:
        """class -> metric -> the score of all cases' voxels taken together."""
        return self._statistic("pooled")

    def _statistic(self, name: str) -> dict[str, dict[str, float]]:
        return {of: {metric: row[name] for metric, row in metrics.items()} for of, metrics in self.summary.items()}

    @property
    def mean_dice(self) -> float:
        """The mean over the classes of their mean Dice; nan if there is none."""
        return mean_of([metrics["dice"] for metrics in self.mean.values()])

    @property
    def case_dice(self) -> dict[str, float]:
        """case -> mean Dice over its classes; nan for a case without any."""
        foreground = [index for index, value in enumerate(self.classes) if value != 0]
        return {result.case: mean_of(dice(result.confusion)[foreground].tolist()) for result in self.results}

    def ranked(self) -> list[CaseResult]:
        """The cases that have a score, the worst first."""
        means = self.case_dice
        known = [result for result in self.results if not math.isnan(means[result.case])]
        return sorted(known, key=lambda result: (means[result.case], result.case))

    @property
    def exit_code(self) -> int:
        """0 if every pair was scored, 3 if some were not, 4 if none was."""
        if not self.results:
            return NOTHING_DONE
        return SOME_FAILED if self.failures else DONE

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: nan is None."""
        return without_nan(
            {
                "densepred": version_of(),
                "scored": len(self.results),
                "mean_dice": self.mean_dice,
                "classes": {str(value): name for value, name in self.classes.items()},
                "summary": self.summary,
                "left_out": self.left_out,
                "cases": self.cases,
                "failures": [vars(failure) for failure in self.failures],
                "predictions_without_label": list(self.unlabelled),
                "labels_without_prediction": list(self.unpredicted),
                "tolerance": self.wanted.tolerance,
                "distance_unit": self.distance_unit,
                "unpredicted_voxels": {result.case: result.unpredicted for result in self.results},
            }
        )

    def save(self, folder: str | Path) -> None:
        """Write scores.csv (a row per case and class), scores.json (everything) and failures.tsv into `folder`.

        Raises:
            InputError: the folder cannot be written to.
        """
        folder = writable_folder(folder)
        voxels = [f"{side}_voxels" for side in ("truth", "prediction", "unpredicted")]
        columns = ["case", "class", "value", *self.metrics, *voxels, "truth_size", "prediction_size", "unit"]
        atomic_write(folder / "scores.csv", delimited(columns, without_nan(self.cases), ","))
        atomic_write(folder / "scores.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        save_failures(self.failures, folder)

    def table(self) -> Table:
        """The classes with their means and worst cases, for the terminal."""
        from densepred.evaluation.table import scores_table

        return scores_table(self)

    def tables(self) -> list[Table]:
        """`table`, and one of the metrics beside those of overlap if there are any."""
        from densepred.evaluation.table import measures_table

        return [self.table(), measures_table(self)] if self.wanted.metrics else [self.table()]

    @property
    def distance_unit(self) -> str:
        """The unit of distances; "" where the files do not say."""
        return next((result.unit for result in self.results if result.measured), "")
