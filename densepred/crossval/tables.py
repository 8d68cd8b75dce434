"""The scores of held-out cases, per fold and pooled, with intervals; as files and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.crossval.held_out import HeldOut, Setup
from densepred.crossval.judged import Judged, Metric
from densepred.files import atomic_write
from densepred.inference.folds import write_record
from densepred.metrics.bootstrap import DRAWS, SEED, Floats, Interval, bounded, interval, resampled

if TYPE_CHECKING:
    from rich.table import Table

SCORES, SUMMARY = "scores.csv", "summary.json"
MEAN = "mean"
"""Beside the names of the classes."""


def summarized(found: HeldOut, setup: Setup) -> dict[str, Any]:
    """What is judged, with 95 % intervals: `folds` (number -> name -> interval), `all` and `pooled` (name -> interval).

    Names are those of classes, of a map or a column. `all` is the mean over cases, and over the names for "mean";
    `pooled` is of all voxels taken together. `beside` has the columns that decide on nothing.
    """
    judged = found.judged
    return {
        **_summary(judged, setup),
        "beside": {name: _summary(one, setup) for name, one in found.beside.items()},
        "failed": {case: error.what for case, error in found.failed.items()}
        | {failure.case: failure.what for failure in judged.failures},
    }


def _summary(judged: Judged, setup: Setup) -> dict[str, Any]:
    known = [index for index, row in enumerate(judged.values) if not np.isnan(row).all()]
    cases, values, names = [judged.cases[index] for index in known], judged.values[known], list(judged.names)
    groups, folds = setup.groups(cases), np.array([setup.fold_of[case] for case in cases])
    parts = {int(fold): np.flatnonzero(folds == fold) for fold in np.unique(folds)}
    return {
        "metric": judged.metric.name,
        "cases": len(cases),
        "groups": len(set(groups)),
        "bootstrap": {"draws": DRAWS, "seed": SEED, "level": 0.95, "over": "groups of cases"},
        "names": names,
        "folds": {fold: _of(values[at], [groups[i] for i in at], names) for fold, at in parts.items()},
        "all": _of(values, groups, names),
        "pooled": _pooled(judged, setup.groups(judged.cases)),
    }


def _of(values: Floats, groups: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    every = {name: interval(values[:, [index]], groups) for index, name in enumerate(names)}
    return {name: one.to_dict() for name, one in (every | {MEAN: interval(values, groups)}).items()}


def _pooled(judged: Judged, groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metric of all voxels, where it is of voxels."""
    if judged.pooled is None or not len(judged.cases):
        return {}
    drawn, value = judged.pooled(resampled(groups)), judged.pooled(np.ones((1, len(judged.cases))))[0]
    found = {}
    for index, name in enumerate(judged.names):
        one = bounded(value[index], drawn[:, index], judged.values[:, [index]], groups)
        found[name] = replace(one, n=len(judged.cases)).to_dict()
    return found


def save(found: HeldOut, setup: Setup, summary: dict[str, Any], out: Path) -> None:
    """Write `scores.csv`, a row for each case and class, map or column; those beside it; and `summary.json`."""
    _save_rows(found.judged, setup, out / SCORES)
    for name, one in found.beside.items():
        _save_rows(one, setup, out / f"scores_{name}.csv")
    write_record(out / SUMMARY, summary)


def _save_rows(judged: Judged, setup: Setup, path: Path) -> None:
    text = io.StringIO()
    columns = ["fold", "case", *judged.columns]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    rows = [{"fold": setup.fold_of[row["case"]], **row} for row in judged.rows]
    for row in sorted(rows, key=lambda row: (row["fold"], row["case"], row.get("value", 0))):
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    atomic_write(path, text.getvalue())


def scores_tables(found: HeldOut, summary: dict[str, Any]) -> list[Table]:
    """For what is judged, and each column beside it, a row for each fold and for all, a column for each name."""
    shown = [_shown(found.judged.metric, summary)]
    return shown + [_shown(one.metric, summary["beside"][name]) for name, one in found.beside.items()]


def _shown(metric: Metric, summary: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    title = f"{metric.name} of {summary['cases']} held-out cases, with 95 % intervals over {summary['groups']} groups"
    table = Table(title=title[0].upper() + title[1:] + " of them")
    table.add_column("fold")
    columns = [*summary["names"], *([MEAN] if len(summary["names"]) > 1 else [])]
    for name in columns:
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_column("n", justify="right")
    rows = {**{str(fold): one for fold, one in summary["folds"].items()}, "all": summary["all"]}
    for name, one in rows.items():
        table.add_row(name, *(metric.of(Interval(**one[column])) for column in columns), str(one[MEAN]["n"]))
    if summary["pooled"]:
        pooled = [Interval(**summary["pooled"][name]) if name in summary["pooled"] else None for name in columns]
        table.add_row("pooled voxels", *("" if one is None else metric.of(one) for one in pooled), "")
    return table
