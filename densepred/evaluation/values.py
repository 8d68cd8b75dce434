"""Scores of predicted numbers and of probabilities: errors of maps, ROC curves, calibration; a slab at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from densepred.errors import DONE, NOTHING_DONE, SOME_FAILED, InputError
from densepred.evaluation.compare import both_sides, each_scored
from densepred.evaluation.counting import UNKNOWN, Reading, check_single, each_pair, integers, slabs
from densepred.evaluation.pairing import Files
from densepred.evaluation.records import Meaning, meaning_of
from densepred.evaluation.summaries import (
    Failure,
    delimited,
    save_failures,
    statistics_of,
    version_of,
    without_nan,
)
from densepred.files import atomic_write, writable_folder
from densepred.metrics import Calibration, MapErrors, Ranking
from densepred.metrics.bootstrap import resampled
from densepred.registry import lookup

if TYPE_CHECKING:
    from rich.table import Table

BINS = 4096
"""Of the log-odds of probabilities, for ROC curves; by how much their areas are off at most is written."""
_ODDS = 16.0  # beyond exp(-16) to 1, about 1e-7, probabilities are not told apart
OF_MAPS = ("mse", "rmse", "mae", "bias", "pearson", "r2")
OF_PROBABILITIES = ("auc", "average_precision", "tpr@FPR", "ece", "brier")
ALL = "all classes"
Sums = MapErrors | Ranking | Calibration


@dataclass(frozen=True)
class ValueScores:
    """Scores of numbers or probabilities, per case and of all.

    Args:
        metrics: their names.
        sums: case -> what is scored (a channel, a class, all classes) -> the sums its metrics follow from.
        failures: what could not be scored.
        unlabelled: ids of predictions without a truth.
        unpredicted: ids of truths without a prediction.
    """

    metrics: tuple[str, ...]
    sums: Mapping[str, Mapping[str, Sums]]
    failures: Sequence[Failure] = ()
    unlabelled: Sequence[str] = ()
    unpredicted: Sequence[str] = ()

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """A row per case and what is scored, with its metrics; nan where it has none."""
        return [
            {"case": case, "of": name, **{metric: _value(of, metric) for metric in self.metrics}}
            for case, named in self.sums.items()
            for name, of in named.items()
        ]

    @cached_property
    def pooled(self) -> dict[str, Sums]:
        """What is scored -> the sums of all cases."""
        total: dict[str, Any] = {}
        for named in self.sums.values():
            for name, of in named.items():
                total[name] = total[name] + of if name in total else of
        return total

    @cached_property
    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """What is scored -> metric -> statistics over the cases, as `Scores.summary`, and of all values pooled."""
        drawn = resampled(list(self.sums)) if self.sums else None
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, total in self.pooled.items():
            every = [self.sums[case].get(name) for case in self.sums]
            found[name] = {}
            for metric in self.metrics:
                values = np.array([math.nan if of is None else _value(of, metric) for of in every])
                found[name][metric] = {**statistics_of(values, drawn), "pooled": _value(total, metric)}
        return found

    @property
    def exit_code(self) -> int:
        """0 if every pair was scored, 3 if some were not, 4 if none was."""
        return NOTHING_DONE if not self.sums else SOME_FAILED if self.failures else DONE

    def save(self, folder: str | Path) -> None:
        """Write scores.csv, scores.json and failures.tsv, and the pooled curves of probabilities as curves.csv.

        Raises:
            InputError: the folder cannot be written to.
        """
        folder = writable_folder(folder)
        rows = without_nan(self.cases)
        atomic_write(folder / "scores.csv", delimited(["case", "of", *self.metrics], rows, ","))
        content = {"densepred": version_of(), "scored": len(self.sums), "summary": self.summary, "cases": self.cases}
        content["auc_error"] = {name: of.auc_error for name, of in self.pooled.items() if isinstance(of, Ranking)}
        content["failures"] = [vars(failure) for failure in self.failures]
        content |= {"unlabelled": list(self.unlabelled), "unpredicted": list(self.unpredicted)}
        atomic_write(folder / "scores.json", json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")
        save_failures(self.failures, folder)
        ranked = {name: of for name, of in self.pooled.items() if isinstance(of, Ranking)}
        curves = [row for name, of in ranked.items() for row in _curve(name, of)]
        if curves:
            columns = ["of", "threshold", "fpr", "tpr", "precision"]
            atomic_write(folder / "curves.csv", delimited(columns, without_nan(curves), ","))

    def tables(self) -> list[Table]:
        """A table for the terminal, as a list."""
        from densepred.evaluation.table import values_table

        return [values_table(self)]


def is_of_values(metrics: Sequence[str]) -> bool:
    """Are these metrics of numbers or probabilities, rather than of label maps?

    Raises:
        InputError: some are and some are not, or some are of numbers and some of probabilities.
    """
    kinds = {
        "numbers" if name in OF_MAPS else "probabilities" if _plain(name) in OF_PROBABILITIES else "labels"
        for name in metrics
    }
    if len(kinds) > 1:
        what = f"metrics of {' and of '.join(sorted(kinds))} do not go together: {', '.join(metrics)}"
        raise InputError(what, "give them one kind after the other")
    return bool(kinds - {"labels"})


def evaluate_values(
    predictions: Files,
    truths: Files,
    metrics: Sequence[str],
    out: str | Path | None = None,
    axes: str | None = None,
    checksum: str = "verify",
) -> ValueScores:
    """Score predicted maps of numbers, or of probabilities, case by case and over the set.

    Args:
        predictions: a folder, a pattern with `{id}`, files, or ids with their files: maps of numbers, or probabilities
            with a channel for each class, as `inference.outputs: [probabilities]` writes them.
        truths: the same of the true numbers, with as many channels and NaN where they are not known; or label maps.
            Which values are classes, merged or ignored is said by the `labels.json` of the predictions.
        metrics: of numbers "mse", "rmse", "mae", "bias", "pearson", "r2"; or of probabilities "auc",
            "average_precision" and "tpr@0.01" (at a false positive rate of 0.01), of each class but the background
            against the rest, "ece" and "brier" of all classes.
        out: where to write scores.csv, scores.json, failures.tsv, and for probabilities curves.csv.
        axes: what the axes of the files hold, where that is open; the fourth of NIfTI files is taken for channels.
        checksum: of FITS files, as for `open_volume`.

    Raises:
        InputError: a metric is unknown or of another kind, or as `evaluate`.
        UnsafeError, NothingDoneError: as `evaluate`.

    Example:
        >>> scores = evaluate_values("predictions/", "truths/", ["mse", "pearson"])  # doctest: +SKIP
        >>> scores.summary["value"]["mse"]["mean"]  # doctest: +SKIP
        0.00021
    """
    if not metrics or not is_of_values(metrics):
        raise InputError(f"no metrics of numbers or probabilities: {', '.join(metrics)}", "`evaluate` scores labels")
    for name in metrics:
        _rate(name)
    predicted, expected = both_sides(predictions, truths, "truths", out)
    meaning = meaning_of(predicted.values(), axes)
    reading = Reading(frozenset(meaning.ignore), meaning.invalid, axes or meaning.axes, checksum)
    count = _map_sums if _plain(metrics[0]) in OF_MAPS else _probability_sums

    def sums_of(case: str, truth: Path, prediction: Path) -> dict[str, Sums]:
        return count(truth, prediction, _with_channels(reading, prediction), meaning)

    sums, failures = each_scored(predicted, expected, sums_of)
    unpredicted = sorted(expected.keys() - predicted.keys() - {failure.case for failure in failures})
    scores = ValueScores(tuple(metrics), sums, failures, sorted(predicted.keys() - expected.keys()), unpredicted)
    if out is not None:
        scores.save(out)
    return scores


def _with_channels(reading: Reading, path: Path) -> Reading:
    """The fourth axis of a NIfTI file holds channels, where nothing else is said."""
    if reading.axes is None and path.name.endswith((".nii", ".nii.gz")):
        with contextlib.suppress(nib.filebasedimages.ImageFileError, OSError):  # said where the voxels are read
            if len(getattr(nib.load(path), "shape", ())) > 3:
                return reading._replace(axes="xyzc")
    return reading


def _map_sums(truth: Path, prediction: Path, reading: Reading, meaning: Meaning) -> dict[str, Sums]:
    found: dict[str, MapErrors] = {}
    for expected, got in each_pair(truth, prediction, reading, wide=True):
        if expected.shape[0] != got.shape[0]:
            what = f"the prediction has {got.shape[0]} channels, its truth {expected.shape[0]}"
            raise InputError(what, "give maps of the same numbers", prediction)
        for ours, theirs in slabs(expected, got):
            for channel in range(len(ours)):
                name = f"channel {channel}" if len(ours) > 1 else "value"
                found[name] = found.get(name, MapErrors()) + MapErrors.of(ours[channel], theirs[channel])
    return dict(found)


def _probability_sums(truth: Path, prediction: Path, reading: Reading, meaning: Meaning) -> dict[str, Sums]:
    found: dict[str, Any] = {}
    for expected, got in each_pair(truth, prediction, reading, wide=True):
        check_single(expected)
        names = _classes(meaning, got.shape[0], prediction)
        for ours, theirs in slabs(expected, got):
            index = _indices(integers(ours[0], truth, UNKNOWN), list(names), meaning, truth)
            shares = theirs.astype(np.float64)
            try:
                parts: dict[str, Any] = {ALL: Calibration.of(shares, index)}
                for channel, name in enumerate(names.values()):
                    if channel or len(names) == 1:
                        inside = np.where(index < 0, -1, index == channel)
                        parts[name] = Ranking.of(_spread(shares[channel]), inside, BINS)
            except ValueError as error:
                fix = "give what inference.outputs: [probabilities] wrote"
                raise InputError(f"no probabilities: {error}", fix, prediction) from error
            found = {name: found[name] + of if name in found else of for name, of in parts.items()}
    return found


def _spread(probabilities: np.ndarray) -> np.ndarray:
    """Their log-odds, scaled to 0..1: confident networks put nearly all voxels beside 0 and 1."""
    with np.errstate(divide="ignore"):
        odds = np.log(probabilities) - np.log1p(-np.minimum(probabilities, 1))
    return np.asarray(np.clip((odds / _ODDS + 1) / 2, 0, 1))


def _probability(spread: np.ndarray) -> np.ndarray:
    """The probability of which `_spread` gives these edges of bins; the first is 0, and inf stays."""
    found = 1 / (1 + np.exp(-_ODDS * (2 * spread - 1)))
    return np.where(np.isinf(spread), np.inf, np.where(spread == 0, 0, found))


def _curve(name: str, of: Ranking) -> list[dict[str, Any]]:
    """The points of the ROC and precision-recall curves, by falling threshold; none without both sides."""
    false, true, thresholds = of.roc
    if math.isnan(of.auc):
        return []
    right, wrong = true * of.positive.sum(), false * of.negative.sum()
    called = right + wrong
    precision = np.divide(right, called, out=np.full(len(right), np.nan), where=called > 0)
    columns = (_probability(thresholds).tolist(), false.tolist(), true.tolist(), precision.tolist())
    names = ("threshold", "fpr", "tpr", "precision")
    return [{"of": name, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)]


def _classes(meaning: Meaning, channels: int, path: Path) -> dict[int, str]:
    """The label value and the name of each channel."""
    known = meaning.classes or {value: str(value) for value in range(channels)}
    named = dict.fromkeys(name for value, name in known.items() if value not in meaning.merged)
    found = {next(value for value, other in known.items() if other == name): name for name in named}
    if len(found) != channels:
        what = f"{channels} channels, but labels.json beside it names {len(found)} classes"
        raise InputError(what, "give a labels.json with the classes in the order of the channels", path)
    return found


def _indices(labels: np.ndarray, values: list[int], meaning: Meaning, path: Path) -> np.ndarray:
    """The channel of each label; -1 where it does not count."""
    index = np.full(labels.shape, -2, np.int64)
    for channel, value in enumerate(values):
        index[labels == value] = channel
    for value, other in meaning.merged.items():
        index[labels == value] = values.index(other)
    index[np.isin(labels, [*meaning.ignore, UNKNOWN])] = -1
    if (index == -2).any():
        wrong = np.unique(labels[index == -2]).tolist()
        raise InputError(f"values that are no classes of the prediction: {wrong[:5]}", "ignore or merge them", path)
    return index


def _plain(metric: str) -> str:
    return "tpr@FPR" if metric.startswith("tpr@") else metric


def _rate(metric: str) -> float:
    """The false positive rate of "tpr@0.01"; nan of other metrics.

    Raises:
        InputError: it is no number within 0..1, or there is no such metric.
    """
    try:
        lookup(dict.fromkeys((*OF_MAPS, *OF_PROBABILITIES)), _plain(metric), "a metric")
        rate = float(metric[4:]) if metric.startswith("tpr@") else math.nan
    except ValueError as error:
        raise InputError(str(error), "write, say, tpr@0.01") from error
    if metric.startswith("tpr@") and not 0 <= rate <= 1:
        raise InputError(f"{metric}: a false positive rate lies within 0..1", "write, say, tpr@0.01")
    return rate


def _value(of: Sums, metric: str) -> float:
    """A metric; nan where these sums do not have it."""
    if isinstance(of, MapErrors):
        return float(getattr(of, metric))
    if isinstance(of, Calibration):
        return {"ece": of.error, "brier": of.brier}.get(metric, math.nan)
    if metric.startswith("tpr@"):
        return of.tpr_at(_rate(metric))
    return {"auc": of.auc, "average_precision": of.average_precision}.get(metric, math.nan)
