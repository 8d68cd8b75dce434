"""Is a data set sound? Every case is read to its end, and all problems of all cases come in one table."""

from __future__ import annotations

import hashlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from densepred.cases.case import Case, Problem, find
from densepred.cases.folds import folds
from densepred.cases.labels import LabelCounts, mapping_to_paste, unknown_labels
from densepred.cases.names import channel_names, class_names, ignored_values
from densepred.cases.preprocess import grid_fault, slab_thickness
from densepred.cases.reading import Reading
from densepred.cases.report import Facts, Report, row_of, summarize
from densepred.cases.targets import covariate, read_table
from densepred.config import DataConfig
from densepred.errors import DensepredError, InputError
from densepred.volumes import Volume

OUTLIER = 3.0
"""Spacings and lengths this many times above or below the median are noted."""


def check(data: DataConfig, dims: int, progress: Callable[[], None] | None = None) -> Report:
    """Read every case of a set.

    Args:
        data: which files, and what their labels mean.
        dims: spatial axes of the model, 2 or 3.
        progress: called after each case.

    Raises:
        NothingDoneError: no image was found.
        InputError: the list of cases or the names of the classes cannot be read.
    """
    names, found = class_names(data) if data.segments else {}, find(data)
    known, reading = {*names, *ignored_values(data)} if names else set(), Reading.of(data)
    facts: list[Facts] = []
    for case in found.cases:
        facts.append(_read_case(case, reading, dims, known, names, data.instances))
        if progress is not None:
            progress()
    rows = found.problems + [row for fact in facts for row in fact.rows] + _of_table(data, found.cases)
    whole = [fact for fact in facts if fact.shape]
    rows += _channels(whole, channel_names(data)) + _outliers(whole) + _classes(whole, names)
    rows += _folds_and_duplicates(whole, data)
    rows.sort(key=lambda row: (row.severity, row.case))
    return Report(rows, summarize(whole, names, channel_names(data)))


def _read_case(
    case: Case, reading: Reading, dims: int, known: set[int], names: dict[int, str], instances: bool
) -> Facts:
    facts = Facts(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _noting(facts), reading.open_case(case) as image:
            if image.dims != dims:
                what = f"{image.dims} spatial axes, but the model has {dims}"
                facts.add("error", case.images[0], what, "set model.dims to the images' own axes")
            if case.label is not None:
                with _noting(facts):
                    _read_label(facts, reading.open_plane(case.label), image, known, names, instances)
            for _, path in case.maps:
                with _noting(facts), reading.open_plane(path) as plane:
                    fault = grid_fault(image, plane)
                    if fault is not None:
                        facts.add("error", path, *(text.replace("label", "map") for text in fault))
            _read_image(facts, image, reading.validity.least)
            facts.shape, facts.spacing = image.shape, image.spacing
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            facts.add("note", "", str(warning.message))
    return facts


def _of_table(data: DataConfig, cases: list[Case]) -> list[Problem]:
    """Rows and cells that the recipe asks for and the table has not."""
    table, rows = read_table(data), []
    for case in cases if table is not None else ():
        assert table is not None
        try:
            for target in data.targets.values():
                if target.column is not None:
                    (table.cell if target.classes else table.number)(case.id, target.column)
            for name in data.covariates:
                covariate(table, case.id, name)
        except InputError as error:
            rows.append(Problem(case.id, "error", str(table.path), error.what, error.fix))
    return rows


@contextmanager
def _noting(facts: Facts) -> Iterator[None]:
    """What cannot be read becomes a row."""
    try:
        yield
    except DensepredError as error:
        facts.add("error", error.file or "", error.what, error.fix)


def _read_image(facts: Facts, image: Volume, least: float) -> None:
    """Count what is not finite, look for constant channels, and hash the voxels."""
    channels, voxels = image.shape[0], int(np.prod(image.shape[1:]))
    nan, infinite = np.zeros(channels, int), np.zeros(channels, int)
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    digest = hashlib.sha256(f"{image.shape} {image.dtype}".encode())
    for _, _, slab in image.slabs(slab_thickness(image.shape)):
        digest.update(np.ascontiguousarray(slab).data)
        flat = slab.reshape(channels, -1)
        if flat.dtype.kind == "f":
            nan += np.isnan(flat).sum(1)
            infinite += np.isinf(flat).sum(1)
            finite = np.isfinite(flat)
            low = np.minimum(low, flat.min(1, where=finite, initial=np.inf))
            high = np.maximum(high, flat.max(1, where=finite, initial=-np.inf))
        else:
            low, high = np.minimum(low, flat.min(1)), np.maximum(high, flat.max(1))
    facts.digest = digest.hexdigest()
    for channel in range(channels):
        file = facts.case.images[min(channel, len(facts.case.images) - 1)]
        invalid, of = nan[channel] + infinite[channel], f"of {voxels} voxels of channel {channel}"
        if invalid:
            severity: Literal["error", "note"] = "error" if invalid > (1 - least) * voxels else "note"
            fix = "cut the image to its valid part, or leave it out" if severity == "error" else "they count nowhere"
            facts.add(severity, file, f"{nan[channel]} NaN or masked and {infinite[channel]} infinite {of}", fix)
        if low[channel] == high[channel]:
            facts.add("note", file, f"constant: every voxel of channel {channel} is {low[channel]:g}", "look at it")


def _read_label(
    facts: Facts, label: Volume, image: Volume, known: set[int], names: dict[int, str], instances: bool = False
) -> None:
    path = facts.case.label
    assert path is not None
    with label:
        fault = grid_fault(image, label)
        if fault is not None:
            facts.add("error", path, *fault)
        counts, rounded = LabelCounts(), False
        for _, _, slab in label.slabs(slab_thickness(label.shape)):
            counts.add(np.where(slab > 0, slab.dtype.type(1), slab) if instances else slab)
            with np.errstate(invalid="ignore"):
                rounded = rounded or bool((np.abs(slab - np.rint(slab)) > 0).any())
    if fault is None:
        facts.labels = counts
    if counts.odd or (names and counts.unknown(known)):
        error = unknown_labels(counts, known, names, facts.case)
        facts.add("error", path, error.what, error.fix)
    elif names and not any(_is_foreground(value, names) for value in counts.values):
        facts.add("note", path, f"empty: no foreground among {sum(counts.values.values())} voxels")
    if rounded and not counts.odd:
        facts.add("note", path, "values are up to 0.001 from integers, and are rounded")
    if counts.missing:
        facts.add("note", path, f"{counts.missing} voxels are NaN", "they count as ignored")


def _is_foreground(value: int, names: dict[int, str]) -> bool:
    return value in names and names[value] != next(iter(names.values()))


def _channels(facts: list[Facts], names: tuple[str, ...]) -> list[Problem]:
    """Cases whose number of channels differs from the names', or from the usual one."""
    if not facts:
        return []
    usual = len(names) or statistics.mode(fact.shape[0] for fact in facts)
    source = f"{usual} are named" if names else f"most cases have {usual}"
    fix = "give every case the same channels"
    return [
        Problem(fact.case.id, "error", str(fact.case.images[0]), f"{fact.shape[0]} channels, but {source}", fix)
        for fact in facts
        if fact.shape[0] != usual
    ]


def _outliers(facts: list[Facts]) -> list[Problem]:
    rows: list[Problem] = []
    alike = [fact for fact in facts if len(fact.shape) == len(facts[0].shape)]
    for what in ("shape", "spacing"):
        values = [fact.shape[1:] if what == "shape" else fact.spacing for fact in alike]
        middle = tuple(statistics.median(axis) for axis in zip(*values, strict=True))
        for fact, value in zip(alike, values, strict=True):
            if any(not 1 / OUTLIER <= v / m <= OUTLIER for v, m in zip(value, middle, strict=True)):
                text = f"{what} {row_of(value)} is far from the median {row_of(middle)}"
                rows.append(Problem(fact.case.id, "note", str(fact.case.images[0]), text, "is it of this set?"))
    return rows


def _classes(facts: list[Facts], names: dict[int, str]) -> list[Problem]:
    """Faults of all labels together: nobody names their values, or none holds foreground."""
    labelled = [fact for fact in facts if fact.labels.values]
    if not labelled or any(_is_foreground(value, names) for fact in labelled for value in fact.labels.values):
        return []
    if names:
        what = f"no label of {len(labelled)} holds foreground: there is nothing to learn"
        return [Problem("", "error", "", what, "check the labels and data.classes")]
    counts = LabelCounts()
    for fact in labelled:
        counts.values += fact.labels.values
    fix = f"name them in the data section:  {mapping_to_paste(counts.values, {})}"
    return [Problem("", "error", "", f"the classes are not named; the labels hold {counts.unknown(())}", fix)]


def _folds_and_duplicates(facts: list[Facts], data: DataConfig) -> list[Problem]:
    """Faults of the folds, and equal images; equal images on both sides of a fold are a leak."""
    cases, rows, made = [fact.case for fact in facts], [], []
    if data.fold != "all":
        try:
            made = folds(cases, data)
        except InputError as error:
            rows.append(Problem("", "error", str(error.file or ""), error.what, error.fix))
    first: dict[str, Facts] = {}
    for fact in facts:
        twin = first.setdefault(fact.digest, fact)
        if twin is fact:
            continue
        a, b = twin.case.id, fact.case.id
        leak = any((a in train and b in val) or (b in train and a in val) for train, val in made)
        what = f"the same image as {a} ({twin.case.images[0]})"
        what += ", and a fold trains on one and validates on the other" if leak else ""
        fix = "remove one, or give both one group (data.group, or the column group of a CSV)"
        rows.append(Problem(b, "error" if leak else "note", str(fact.case.images[0]), what, fix))
    return rows
