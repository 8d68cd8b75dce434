"""What held-out predictions are judged by: label maps by their Dice, numbers and classes by their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.targets import Table, Target
from densepred.config.data import TARGET
from densepred.evaluation import Scores, evaluate
from densepred.evaluation.summaries import Failure
from densepred.evaluation.values import OF_MAPS, evaluate_values
from densepred.metrics import METRICS, dice
from densepred.metrics.bootstrap import Interval

Floats = NDArray[np.float64]
SMALLEST = 1e-12
"""Of a probability, in logarithms of it."""


@dataclass(frozen=True)
class Metric:
    """A score of one case.

    Args:
        name: in sentences.
        sign: 1 if more of it is better, -1 if less.
        form: of its numbers.
    """

    name: str
    sign: int = -1
    form: str = ".4g"

    def of(self, one: Interval) -> str:
        """A value with its interval, in short; a value alone where there is none."""
        value = f"{one.value:{self.form}}"
        return value if math.isnan(one.low) else f"{value} ({one.low:{self.form}}-{one.high:{self.form}})"

    def change(self, gained: Interval) -> str:
        """A gain, which is positive where it got better, as a change of the metric."""
        low, high = sorted((self.sign * gained.low, self.sign * gained.high))
        form = f"+{self.form}"
        value = self.sign * gained.value
        return f"{value + 0.0:{form}} ({low + 0.0:{form}} to {high + 0.0:{form}}, n = {gained.n})"


DICE = Metric("Dice", 1, ".4f")
SQUARED_ERROR, LOG_LOSS = Metric("squared error"), Metric("log loss")


@dataclass(frozen=True)
class Judged:
    """Scores of held-out cases.

    Args:
        metric: what is compared.
        names: of the K things that it is given for: classes, a map, a column.
        cases: ids of those that were scored.
        values: `(n, K)`, nan where a case has no score.
        columns, rows: of `scores.csv`, everything that was measured.
        failures: what could not be scored.
        pooled: of weights of the cases `(D, n)`, the metric of all voxels together, `(D, K)`.
        overlaps: of label maps all that was counted.
    """

    metric: Metric
    names: Sequence[str]
    cases: Sequence[str]
    values: Floats
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    failures: Sequence[Failure] = ()
    pooled: Callable[[Floats], Floats] | None = None
    overlaps: Scores | None = None

    @property
    def better(self) -> Floats:
        """The values, `(n, K)`, turned so that more is better."""
        return self.metric.sign * self.values


def label_maps(files: Mapping[str, Path], cases: Mapping[str, Case], plan: Plan) -> Judged:
    """By the Dice of each class but the background."""
    found = evaluate(
        dict(files),
        {case: path for case in files if (path := cases[case].label) is not None},
        classes=dict(zip(plan.values, plan.classes, strict=True)),
        ignore=plan.ignore,
        axes=plan.reading.plane_axes,
        checksum=plan.reading.checksum,
        instances=plan.instances,
    )
    kept = [index for index, value in enumerate(found.classes) if value != 0]
    names = [name for value, name in found.classes.items() if value != 0]
    counts = np.array([one.confusion for one in found.results]).reshape(-1, len(found.classes), len(found.classes))
    values = np.array([dice(one)[kept] for one in counts]).reshape(len(counts), len(kept))

    def pooled(weights: Floats) -> Floats:
        sums = (weights @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:])
        return np.stack([dice(total)[kept] for total in sums])

    columns = ["class", "value", *METRICS, "truth_voxels", "prediction_voxels", "unpredicted_voxels"]
    ids = [one.case for one in found.results]
    return Judged(DICE, names, ids, values, columns, found.cases, found.failures, pooled, found)


def maps(files: Mapping[str, Path], cases: Mapping[str, Case], plan: Plan) -> Judged:
    """By the mean squared error of the first target that is a map, in the square of its unit."""
    name = plan.maps[0]
    truths = {case: dict(cases[case].maps)[f"{TARGET}{name}"] for case in files}
    found = evaluate_values(dict(files), truths, OF_MAPS, axes=plan.reading.plane_axes, checksum=plan.reading.checksum)
    (of,) = {of for named in found.sums.values() for of in named} or {name}
    errors = [named[of] for named in found.sums.values()]
    sums = np.array([(one.squares, one.count) for one in errors]).reshape(-1, 2)  # type: ignore[union-attr]
    with np.errstate(invalid="ignore"):
        values = sums[:, :1] / sums[:, 1:]

    def pooled(weights: Floats) -> Floats:
        squares, counts = (weights @ sums).T
        with np.errstate(invalid="ignore"):
            return np.asarray(squares / counts)[:, None]

    rows = [{**row, "of": name} for row in found.cases]
    return Judged(SQUARED_ERROR, [name], list(found.sums), values, ["of", *OF_MAPS], rows, found.failures, pooled)


def column(name: str, target: Target, predicted: Mapping[str, Mapping[str, str]], table: Table) -> Judged:
    """By the log loss of classes, or the squared error of numbers.

    Args:
        name: of the target.
        target: as it was learnt.
        predicted: case id -> the row of `predictions.csv`.
        table: has the truth.
    """
    measured = partial(_of_class if target.classes else _of_number, name, target, table)
    rows = [{"case": case, "of": name, **measured(case, row)} for case, row in predicted.items()]
    metric, key = (LOG_LOSS, "log_loss") if target.classes else (SQUARED_ERROR, "squared_error")
    values = np.array([[row[key]] for row in rows], np.float64).reshape(len(rows), 1)
    columns = list(rows[0])[1:] if rows else []
    return Judged(metric, [name], list(predicted), values, columns, rows)


def _of_class(name: str, target: Target, table: Table, case: str, row: Mapping[str, str]) -> dict[str, Any]:
    """Whether it is right, and the negative logarithm of the truth's probability, in nats."""
    truth = table.cell(case, target.column)
    known = {"truth": truth, "prediction": row[name], "right": int(row[name] == truth)}
    if not truth:
        return known | {"right": "", "log_loss": math.nan}
    return known | {"log_loss": -math.log(max(float(row[f"{name}:{truth}"]), SMALLEST))}


def _of_number(name: str, target: Target, table: Table, case: str, row: Mapping[str, str]) -> dict[str, Any]:
    """The error, in the unit, and its square."""
    truth, prediction = table.number(case, target.column), float(row[name])
    error = prediction - truth
    return {"truth": truth, "prediction": prediction, "error": error, "squared_error": error**2}
