"""The scores of held-out cases, per fold and pooled, with intervals; as files and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.crossval.held_out import HeldOut, Setup
from densepred.evaluation.scores import CaseResult
from densepred.files import atomic_write
from densepred.inference.folds import write_record
from densepred.metrics import METRICS, dice
from densepred.metrics.bootstrap import DRAWS, SEED, Floats, Interval, interval, resampled

if TYPE_CHECKING:
    from rich.table import Table

SCORES, SUMMARY = "scores.csv", "summary.json"
MEAN = "mean"
"""Beside the names of the classes."""


def summarized(found: HeldOut, setup: Setup) -> dict[str, Any]:
    """Dice with 95 % intervals: `folds` (number -> class -> interval), `all` and `pooled` (class -> interval).

    `all` is the mean over cases, and over classes for "mean"; `pooled` that of all voxels taken together.
    """
    cases, values = found.table
    groups, folds = setup.groups(cases), np.array([setup.fold_of[case] for case in cases])
    names = [name for value, name in found.scores.classes.items() if value != 0]
    parts = {int(fold): np.flatnonzero(folds == fold) for fold in np.unique(folds)}
    return {
        "cases": len(cases),
        "groups": len(set(groups)),
        "bootstrap": {"draws": DRAWS, "seed": SEED, "level": 0.95, "over": "groups of cases"},
        "classes": names,
        "folds": {fold: _of(values[at], [groups[i] for i in at], names) for fold, at in parts.items()},
        "all": _of(values, groups, names),
        "pooled": _pooled(found.scores.results, groups, found.scores.classes),
        "failed": {case: error.what for case, error in found.failed.items()}
        | {failure.case: failure.what for failure in found.scores.failures},
    }


def _of(values: Floats, groups: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    every = {name: interval(values[:, [index]], groups) for index, name in enumerate(names)}
    return {name: one.to_dict() for name, one in (every | {MEAN: interval(values, groups)}).items()}


def _pooled(
    results: Sequence[CaseResult], groups: Sequence[str], classes: dict[int, str] | Any
) -> dict[str, dict[str, float]]:
    """The Dice of the summed counts."""
    if not results:
        return {}
    counts = np.stack([one.confusion for one in results])
    weights = resampled(groups)
    size = len(classes)
    drawn = np.stack([dice(total) for total in (weights @ counts.reshape(len(counts), -1)).reshape(-1, size, size)])
    value = dice(counts.sum(0))
    found = {}
    for index, (label, name) in enumerate(classes.items()):
        finite = drawn[:, index][~np.isnan(drawn[:, index])]
        if label != 0:
            low, high = np.percentile(finite, (2.5, 97.5)) if finite.size else (math.nan, math.nan)
            found[name] = Interval(float(value[index]), float(low), float(high), len(results)).to_dict()
    return found


def save(found: HeldOut, setup: Setup, summary: dict[str, Any], out: Path) -> None:
    """Write `scores.csv`, a row for each case and class, and `summary.json`."""
    text = io.StringIO()
    columns = ["fold", "case", "class", "value", *METRICS, "truth_voxels", "prediction_voxels", "unpredicted_voxels"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    rows = [{"fold": setup.fold_of[row["case"]], **row} for row in found.scores.cases]
    for row in sorted(rows, key=lambda row: (row["fold"], row["case"], row["value"])):
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    atomic_write(out / SCORES, text.getvalue())
    write_record(out / SUMMARY, summary)


def scores_table(summary: dict[str, Any]) -> Table:
    """A row for each fold and for all, a column for each class."""
    from rich.markup import escape
    from rich.table import Table

    title = f"Dice of {summary['cases']} held-out cases, with 95 % intervals over {summary['groups']} groups of them"
    table = Table(title=title)
    table.add_column("fold")
    columns = [*summary["classes"], MEAN]
    for name in columns:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("n", justify="right")
    rows = {**{str(fold): one for fold, one in summary["folds"].items()}, "all": summary["all"]}
    for name, one in rows.items():
        table.add_row(name, *(_cell(one[column]) for column in columns), str(one[MEAN]["n"]))
    pooled = [_cell(summary["pooled"][column]) if column in summary["pooled"] else "" for column in columns]
    table.add_row("pooled voxels", *pooled, "")
    return table


def _cell(one: dict[str, float]) -> str:
    return f"{one['value']:.4f} ({one['low']:.3f}-{one['high']:.3f})"
