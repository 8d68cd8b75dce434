"""`evaluate`: score the predictions of a set against its labels."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from densepred.errors import DensepredError, InputError
from densepred.evaluation.counting import Pairs, count_pairs
from densepred.evaluation.pairing import Files, find_files
from densepred.evaluation.scores import CaseResult, Failure, Scores
from densepred.files import writable_folder

MEANING_FILE = "labels.json"
"""A file beside predictions: {"classes": {value: name}, "merged": {value: value it counts as}, "ignore": [values],
"invalid": the value of pixels that were not predicted, "axes": what the files' axes hold}; the last two if needed."""
FAILURES_FILE = "failures.tsv"
"""A file beside predictions with a row per case that could not be predicted."""
_SHOWN = 5


@dataclass(frozen=True)
class Meaning:
    """What `labels.json` says of the values beside it."""

    classes: dict[int, str] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()
    invalid: int | None = None
    axes: str | None = None


@dataclass(frozen=True)
class _Counted:
    case: str
    truth: Path
    prediction: Path
    pairs: Pairs
    voxel_volume: float
    unpredicted: int


def evaluate(
    predictions: Files,
    labels: Files,
    out: str | Path | None = None,
    classes: Mapping[int, str] | None = None,
    ignore: Collection[int] = (),
    axes: str | None = None,
) -> Scores:
    """Score predicted label maps, case by case and over the set.

    A prediction belongs to the label of the same name (suffix apart). Both are read slab by slab and once. A case that
    cannot be scored (another grid, a damaged file, a prediction that failed by the predictions' own `failures.tsv`) is
    listed in `failures` and the others go on. Voxels that a prediction marks as invalid are not scored, but counted.
    Other labels without a prediction are counted in `unpredicted`: scoring a part of a labelled set is usual.

    Args:
        predictions: a folder, files, or ids with their files. A `labels.json` in the folder, as `densepred predict`
            writes it, names the values and says which values of the truth are merged or ignored.
        labels: the same for the truth, or a pattern with `{id}`.
        out: where to write scores.csv, scores.json and failures.tsv; nothing is written without it.
        classes: label value -> name; a file with another value fails. By default all values found are classes.
        ignore: values of the truth that mean "not known": their voxels are not scored.
        axes: what the axes of the label files hold, where that is open ("zyx" for FITS cubes).

    Raises:
        InputError: a folder is missing or cannot be written to, two files have one id, or `labels.json` cannot be read.
        NothingDoneError: there are no predictions or no labels at all.

    Example:
        >>> scores = evaluate("predictions/", "labelsTr/", out="scores/")  # doctest: +SKIP
        >>> scores.mean["anterior"]["dice"]  # doctest: +SKIP
        0.8812
    """
    if out is not None:
        writable_folder(out)
    predicted, truths = find_files(predictions, "predictions"), find_files(labels, "labels")
    meaning = meaning_beside(predictions)
    axes, ignore = axes or meaning.axes, {*ignore, *meaning.ignore}
    names, allowed = (meaning.classes, None) if classes is None else (dict(classes), dict(classes))
    counted: list[_Counted] = []
    failures = _failed_before(predictions, truths)
    unpredicted = sorted(truths.keys() - predicted.keys() - {failure.case for failure in failures})
    for case, truth in truths.items():
        if case not in predicted:
            continue
        try:
            found = count_pairs(truth, predicted[case], ignore, meaning.invalid, axes)
            counted.append(_meant(case, truth, predicted[case], found, allowed, meaning))
        except (DensepredError, OSError) as error:
            failures.append(_failure(case, truth, error))
    known = _names({value for result in counted for pair in result.pairs for value in pair}, names)
    results = [
        CaseResult(of.case, of.truth, of.prediction, _matrix(of.pairs, list(known)), of.voxel_volume, of.unpredicted)
        for of in counted
    ]
    scores = Scores(known, results, failures, sorted(predicted.keys() - truths.keys()), unpredicted, axes)
    if out is not None:
        scores.save(out)
    return scores


def _names(values: set[int], names: Mapping[int, str]) -> dict[int, str]:
    """Names of all values, in rising order: the background and those without one get their own.

    Raises:
        InputError: two values have one name.
    """
    every = sorted({0, *names, *values})
    known = {value: names.get(value, "background" if value == 0 else str(value)) for value in every}
    if len(set(known.values())) < len(known):
        raise InputError(f"two label values have one name: {known}", "name each class differently")
    return known


def _meant(
    case: str,
    truth: Path,
    prediction: Path,
    found: tuple[Pairs, float],
    allowed: Mapping[int, str] | None,
    meaning: Meaning,
) -> _Counted:
    """The counts with merged values joined, and without the voxels that were not predicted."""
    pairs: Pairs = Counter()
    unpredicted = 0
    for (expected, got), count in found[0].items():
        if got == meaning.invalid:
            unpredicted += count
        else:
            pairs[meaning.merged.get(expected, expected), meaning.merged.get(got, got)] += count
    if allowed is not None:
        for side, path in enumerate((truth, prediction)):
            _check_values(sorted({pair[side] for pair in pairs} - {0, *allowed}), list(allowed), path)
    return _Counted(case, truth, prediction, pairs, found[1], unpredicted)


def _check_values(unknown: list[int], allowed: list[int], path: Path) -> None:
    if unknown:
        listed = ", ".join(map(str, unknown[:_SHOWN])) + (", ..." if len(unknown) > _SHOWN else "")
        what = f"{len(unknown)} values are not among the classes {allowed}: {listed}"
        raise InputError(what, "add them to the classes, or to the values to ignore", path)


def _matrix(pairs: Pairs, values: list[int]) -> np.ndarray:
    """The counts as (K, K) int64, truth in rows."""
    index = {value: at for at, value in enumerate(values)}
    matrix = np.zeros((len(values), len(values)), np.int64)
    for (truth, prediction), count in pairs.items():
        matrix[index[truth], index[prediction]] = count
    return matrix


def meaning_beside(predictions: Files) -> Meaning:
    """What the predictions' folder says of its values."""
    if not isinstance(predictions, (str, Path)) or not (path := Path(predictions) / MEANING_FILE).is_file():
        return Meaning()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {int(value): str(name) for value, name in content["classes"].items()}
        merged = {int(value): int(other) for value, other in content.get("merged", {}).items()}
        ignore, invalid, axes = content.get("ignore", ()), content.get("invalid"), content.get("axes")
        invalid = None if invalid is None else int(invalid)
        return Meaning(names, merged, tuple(int(value) for value in ignore), invalid, axes)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        fix = 'write {"classes": {"1": "name", ...}}'
        raise InputError(f"does not say what the values mean ({error})", fix, path) from error


def _failed_before(predictions: Files, truths: Mapping[str, Path]) -> list[Failure]:
    """The labelled cases whose prediction failed, as its `failures.tsv` tells."""
    path = Path(predictions) / FAILURES_FILE if isinstance(predictions, (str, Path)) else None
    if path is None or not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    cases = [str(row.get("case")) for row in rows]
    return [
        Failure(case, str(row.get("file")), f"its prediction failed: {row.get('what')}", str(row.get("fix")))
        for case, row in zip(cases, rows, strict=True)
        if case in truths
    ]


def _failure(case: str, truth: Path, error: DensepredError | OSError) -> Failure:
    if isinstance(error, DensepredError):
        return Failure(case, str(error.file or truth), error.what, error.fix)
    return Failure(case, str(error.filename or truth), error.strerror or str(error), "check the file")
