"""`evaluate`: score the predictions of a set against its labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from densepred.errors import DensepredError, InputError
from densepred.evaluation.counting import Pairs, Reading, Voxel, count_pairs
from densepred.evaluation.measures import Measured, Wanted, measure
from densepred.evaluation.pairing import Files, find_files
from densepred.evaluation.records import Meaning, check_out, failed_before, meaning_of
from densepred.evaluation.scores import CaseResult, Scores
from densepred.evaluation.summaries import Failure
from densepred.files import writable_folder
from densepred.volumes import members, split_part, suffix_of

T = TypeVar("T")
OBJECTS = "objects"
"""The class of all objects."""
_SHOWN = 5


@dataclass(frozen=True)
class _Counted:
    case: str
    truth: Path
    prediction: Path
    pairs: Pairs
    unpredicted: Counter[int]
    voxel: Voxel
    measured: Mapping[int, Measured] = field(default_factory=dict)
    unit: str = ""

    @property
    def values(self) -> set[int]:
        return {*self.unpredicted, *(value for pair in self.pairs for value in pair)}


def evaluate(
    predictions: Files,
    labels: Files,
    out: str | Path | None = None,
    classes: Mapping[int, str] | None = None,
    ignore: Collection[int] = (),
    axes: str | None = None,
    checksum: str = "verify",
    metrics: Sequence[str] = (),
    tolerance: float | None = None,
    instances: bool = False,
) -> Scores:
    """Score predicted label maps, case by case and over the set.

    A prediction belongs to the label of the same name (suffix apart). A case that cannot be scored (another grid, a
    damaged file, a prediction that failed by the predictions' own `failures.tsv`) is listed in `failures` and others go
    on. Voxels that a prediction marks as invalid are not scored, but counted by true class. Labels without a prediction
    are counted in `unpredicted`: scoring a part of a set is usual. Files are read slab by slab, unless for `metrics`.

    Args:
        predictions: a folder, a pattern with `{id}`, files, or ids with their files. A `labels.json` beside them, or up
            to three folders above, names the values and says which of the truth are merged or ignored, else a FITS
            file's own legend. Several images of a file ("out/{id}.fits[SCI,all]", axes "xyzt") are one case.
        labels: the same for the truth.
        out: where to write scores.csv, scores.json and failures.tsv; nothing is written without it.
        classes: label value -> name; a file with another value fails. By default all values found are classes.
        ignore: values of the truth that mean "not known": their voxels are not scored.
        axes: what the axes of the label files hold, where that is open ("zyx" for FITS cubes).
        checksum: of FITS files, as for `open_volume`.
        metrics: more than the overlaps, of `densepred.evaluation.MEASURES`; these hold a case in memory.
        tolerance: of the metric surface_dice, in the unit of the distances: mm, um where the files' unit is smaller, or
            that of the spacing where this is not one of length.
        instances: the values are numbers of objects, all of one class. Where the predictions' `labels.json` or legend
            names classes, theirs are classes: a predicted object is a connected part of what is no background.

    Raises:
        InputError: a metric is unknown or lacks its tolerance, a folder is missing or cannot be written to, two files
            have one id, `labels.json` cannot be read, or the predictions have several that differ.
        UnsafeError, NothingDoneError: `out` is the folder of the predictions; there are no predictions or no labels.

    Example:
        >>> dice = evaluate("predictions/", "labelsTr/", out="scores/").mean["anterior"]["dice"]  # doctest: +SKIP
    """
    wanted = Wanted(tuple(metrics), tolerance)
    predicted, truths = both_sides(predictions, labels, "labels", out)
    meaning = meaning_of(predicted.values(), axes)
    ignored, parts = frozenset({*ignore, *meaning.ignore}), instances and bool(meaning.classes)
    reading = Reading(ignored, meaning.invalid, axes or meaning.axes, checksum, instances, parts)
    meaning = replace(meaning, classes={1: OBJECTS}, merged={}) if instances else meaning
    names, allowed = (meaning.classes, None) if classes is None else (dict(classes), dict(classes))
    counted, failures = each_scored(predicted, truths, partial(_count_case, reading, meaning, allowed, wanted))
    failures += _of_other_units(counted) if wanted.surfaces else []
    known = _names({value for of in counted.values() for value in of.values}, names)
    results = [_result(of, list(known)) for of in counted.values()]
    unlabelled = sorted(predicted.keys() - truths.keys())
    unpredicted = sorted(truths.keys() - predicted.keys() - {failure.case for failure in failures})
    scores = Scores(known, results, failures, unlabelled, unpredicted, reading.axes, checksum, wanted, instances)
    if out is not None:
        scores.save(out)
    return scores


def _of_other_units(counted: dict[str, _Counted]) -> list[Failure]:
    """Take out the cases whose distances are in another unit than most have: one mean, and one tolerance, is of one."""
    units = Counter(one.unit for one in counted.values() if one.measured)
    most = max(units, key=lambda unit: units[unit], default="")
    others = [case for case, one in counted.items() if one.measured and one.unit != most]
    found = []
    for one in map(counted.pop, others):
        what = f"its distances are in {one.unit or 'no known unit'}, those of most cases in {most or 'no known unit'}"
        found.append(Failure(one.case, str(one.truth), what, "score the cases of each unit apart"))
    return found


def both_sides(
    predictions: Files, truths: Files, what: str, out: str | Path | None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of predictions and truths by case; and the folder for scores is there and may be written to."""
    predicted, expected = find_files(predictions, "predictions"), find_files(truths, what)
    if out is not None:
        check_out(out, predicted.values())
        writable_folder(out)
    return predicted, expected


def each_scored(
    predicted: Mapping[str, Path], truths: Mapping[str, Path], score: Callable[[str, Path, Path], T]
) -> tuple[dict[str, T], list[Failure]]:
    """What `score(case, truth, prediction)` gives for each case; the cases that could not be predicted or scored."""
    found: dict[str, T] = {}
    failed = failed_before(predicted, truths)
    failures = list(failed.values())
    wanted = predicted.keys() - failed.keys()
    for case, truth in [pair for pair in truths.items() if pair[0] in wanted]:
        try:
            found[case] = score(case, truth, predicted[case])
        except (DensepredError, OSError) as error:
            failures.append(failure_of(case, truth, predicted[case], error))
    return found, failures


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


def _count_case(
    reading: Reading,
    meaning: Meaning,
    allowed: Mapping[int, str] | None,
    wanted: Wanted,
    case: str,
    truth: Path,
    prediction: Path,
) -> _Counted:
    """The counts of a case, and the metrics that need more."""
    one = _meant(case, truth, prediction, count_pairs(truth, prediction, reading), allowed, meaning)
    return _measured(one, meaning, wanted, reading) if wanted.metrics else one


def _meant(
    case: str,
    truth: Path,
    prediction: Path,
    found: tuple[Pairs, Voxel],
    allowed: Mapping[int, str] | None,
    meaning: Meaning,
) -> _Counted:
    """The counts with merged values joined, and without the voxels that were not predicted."""
    pairs: Pairs = Counter()
    unpredicted: Counter[int] = Counter()
    for (expected, got), count in found[0].items():
        expected = meaning.merged.get(expected, expected)
        if got == meaning.invalid:
            unpredicted[expected] += count
        else:
            pairs[expected, meaning.merged.get(got, got)] += count
    if allowed is not None:
        held = ({*unpredicted, *(value for value, _ in pairs)}, {value for _, value in pairs})
        for values, path in zip(held, (truth, prediction), strict=True):
            _check_values(sorted(values - {0, *allowed}), list(allowed), path)
    return _Counted(case, truth, prediction, pairs, unpredicted, found[1])


def _measured(of: _Counted, meaning: Meaning, wanted: Wanted, reading: Reading) -> _Counted:
    """The counts, with the metrics that need more."""
    values = sorted(of.values - {0})
    if not values:
        return of
    measured, unit = measure(of.truth, of.prediction, values, meaning.merged, wanted, reading)
    return replace(of, measured=measured, unit=unit)


def _check_values(unknown: list[int], allowed: list[int], path: Path) -> None:
    if unknown:
        listed = ", ".join(map(str, unknown[:_SHOWN])) + (", ..." if len(unknown) > _SHOWN else "")
        what = f"{len(unknown)} values are not among the classes {allowed}: {listed}"
        raise InputError(what, "add them to the classes, or to the values to ignore", path)


def _result(of: _Counted, values: list[int]) -> CaseResult:
    """The counts as arrays in the order of `values`."""
    index = {value: at for at, value in enumerate(values)}
    matrix = np.zeros((len(values), len(values)), np.int64)
    for (truth, prediction), count in of.pairs.items():
        matrix[index[truth], index[prediction]] = count
    left_out = np.array([of.unpredicted[value] for value in values], np.int64)
    return CaseResult(of.case, of.truth, of.prediction, matrix, left_out, of.voxel, of.measured, of.unit)


def failure_of(case: str, truth: Path, prediction: Path, error: DensepredError | OSError) -> Failure:
    """What is said of a case that could not be scored."""
    if isinstance(error, DensepredError):
        pattern = next(filter(None, map(_pattern, {prediction, truth} & {error.file})), None)
        fix = f"give a pattern that says which, such as '{pattern}'" if pattern else error.fix
        return Failure(case, str(error.file or truth), error.what, fix)
    return Failure(case, str(error.filename or truth), error.strerror or str(error), "check the file")


def _pattern(path: Path) -> str | None:
    """A pattern that stands for all images of a file and of those beside it; None where it holds one."""
    file, part = split_part(path)
    try:
        images = members(f"{file}[all]") if part is None else []
    except InputError:
        return None
    if len(images) < 2:
        return None
    name, comma, _ = images[0][images[0].rindex("[") + 1 : -1].rpartition(",")
    return f"{file.parent / '{id}'}{suffix_of(file)}[{name}{comma}all]"
