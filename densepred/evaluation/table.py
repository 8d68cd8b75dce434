"""The scores as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from densepred.evaluation.measures import DISTANCES, MEASURES
from densepred.evaluation.scores import Scores
from densepred.evaluation.values import ValueScores

_COLUMNS = ("Dice", "95 %", "median", "pooled", "IoU", "prec.", "recall", "n")
_MEASURES = ("mean", "95 %", "worst", "pooled", "n", "none")
_NAMED = 10
_TINY = 0.01  # share of a class below which it is not said that it was left out


def scores_table(scores: Scores) -> Table:
    """A row per class and one for their mean; 80 columns are enough.

    Dice has its mean, the 95 % interval of the mean (bootstrap over cases) and its median over the n cases that have
    one, and its value for all voxels pooled; the others are means over cases. Below: the worst, and what was left out.
    """
    table = Table(title="Scores over cases", caption=_caption(scores), show_footer=True, caption_justify="left")
    table.add_column("class", footer="mean", overflow="fold")
    overall = {"Dice": _number(scores.mean_dice)}
    for name in _COLUMNS:
        table.add_column(name, footer=overall.get(name, ""), justify="right")
    for name, metrics in scores.summary.items():
        dice = metrics["dice"]
        numbers = [dice["median"], dice["pooled"], *(metrics[of]["mean"] for of in ("iou", "precision", "recall"))]
        table.add_row(escape(name), _number(dice["mean"]), _interval(dice), *map(_number, numbers), str(dice["n"]))
    return table


def measures_table(scores: Scores) -> Table:
    """A row per class and metric beside those of overlap: over the n cases that have it; `none` of the others have."""
    unit = f", in {scores.distance_unit}" if scores.distance_unit else ""
    notes = [f"{name}: {MEASURES[name]}{unit if name in DISTANCES else ''}" for name in scores.wanted.metrics]
    if scores.wanted.tolerance is not None:
        notes.append(f"tolerance: {scores.wanted.tolerance:g} {scores.distance_unit}".rstrip())
    notes.append("none: neither there, or for distances and sq one without the other")
    table = Table(title="Surfaces and objects over cases", caption="\n".join(notes), caption_justify="left")
    table.add_column("class", overflow="fold")
    table.add_column("metric")
    for name in _MEASURES:
        table.add_column(name, justify="right")
    for name, metrics in scores.summary.items():
        for metric in scores.wanted.metrics:
            of = metrics[metric]
            worst = of["highest" if metric in DISTANCES else "lowest"]
            numbers = map(_number, (worst, of["pooled"]))
            counts = (str(of["n"]), str(of["n_nan"]))
            table.add_row(escape(name), metric, _number(of["mean"]), _interval(of), *numbers, *counts)
    return table


def values_table(scores: ValueScores) -> Table:
    """A row for what is scored and each metric that it has: over the n cases that have it, and of all values pooled."""
    notes = [f"{len(scores.sums)} cases scored"]
    if scores.failures:
        notes.append(f"{len(scores.failures)} failed (failures.tsv)")
    if scores.unlabelled:
        notes.append(f"{len(scores.unlabelled)} predictions have no truth")
    if scores.unpredicted:
        notes.append(f"{len(scores.unpredicted)} truths have no prediction")
    table = Table(title="Scores over cases", caption="; ".join(notes), caption_justify="left")
    table.add_column("of", overflow="fold")
    table.add_column("metric")
    for name in ("mean", "95 %", "median", "pooled", "n"):
        table.add_column(name, justify="right")
    for name, metrics in scores.summary.items():
        for metric, of in metrics.items():
            if of["n"]:
                bounds = "-" if math.isnan(of["low"]) else f"{of['low']:.4g} to {of['high']:.4g}"
                numbers = (f"{of[key]:.4g}" for key in ("median", "pooled"))
                table.add_row(escape(name), metric, f"{of['mean']:.4g}", bounds, *numbers, str(of["n"]))
    return table


def _lowest(scores: Scores) -> list[str]:
    """Where each of the first classes is worst."""
    lines = []
    for name in list(scores.summary)[:_NAMED]:
        rows = [(row["dice"], row["case"]) for row in scores.cases if row["class"] == name]
        known = [row for row in rows if not math.isnan(row[0])]
        lines += [f"lowest Dice of {escape(name)}: {min(known)[0]:.3f} in {escape(min(known)[1])}"] if known else []
    return lines


def _caption(scores: Scores) -> str:
    notes = [f"{len(scores.results)} cases scored"]
    if scores.failures:
        notes.append(f"{len(scores.failures)} failed (failures.tsv)")
    if scores.unlabelled:
        notes.append(f"{len(scores.unlabelled)} predictions have no label")
    if scores.unpredicted:
        notes.append(f"{len(scores.unpredicted)} labels have no prediction")
    invalid = sum(result.unpredicted for result in scores.results)
    if invalid:
        notes.append(f"{invalid} voxels marked as invalid were not scored")
    lost = sum(of["cases"] for of in scores.left_out.values())
    if lost:
        notes.append(f"{lost} times all of a class lay where nothing was predicted: no score")
    absent = sum(metrics["dice"]["n_nan"] for metrics in scores.summary.values()) - lost
    if absent:
        notes.append(f"{absent} times a class was in neither truth nor prediction: no score")
    return "\n".join([*_lowest(scores), *_left_out(scores), "; ".join(notes)])


def _left_out(scores: Scores) -> list[str]:
    """The classes of which more than a little was not predicted, the first of them."""
    shares = [(name, of["share"]) for name, of in scores.left_out.items() if of["share"] >= _TINY]
    return [f"not predicted, so not scored: {share:.1%} of {escape(name)}" for name, share in shares[:_NAMED]]


def _interval(of: Mapping[str, float]) -> str:
    return "-" if math.isnan(of["low"]) else f"{of['low']:.3f}-{of['high']:.3f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
