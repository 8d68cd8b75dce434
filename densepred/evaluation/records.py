"""What lies beside predictions: a file that says what their values mean, and a table of the cases that failed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from densepred.bids import sources_of
from densepred.cases.patterns import id_of
from densepred.errors import InputError, UnsafeError
from densepred.evaluation.scores import Failure
from densepred.volumes import split_part

MEANING_FILE = "labels.json"
"""{"classes": {value: name}, "merged": {value: value it counts as}, "ignore": [values], "invalid": the value of pixels
that were not predicted, "axes": what the files' axes hold}; all but the first if needed."""
FAILURES_FILE = "failures.tsv"
"""A row per case that could not be predicted."""
_FOLDERS = 4  # <data set>/sub-01/ses-a/anat/ is as deep as BIDS goes
_FIX = 'write {"classes": {"1": "name", ...}}'


@dataclass(frozen=True)
class Meaning:
    """What `labels.json` says of the values of label maps."""

    classes: dict[int, str] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()
    invalid: int | None = None
    axes: str | None = None


def folder_of(file: str | Path) -> Path:
    """The folder of the records that a label map belongs to.

    That is its own; where this has no `labels.json`, the nearest of the three above that has one that maps `classes`.

    Raises:
        InputError: such a file is no JSON.
    """
    own, *above = split_part(file)[0].absolute().parents[:_FOLDERS]
    if not (own / MEANING_FILE).is_file():
        for folder in above:
            path = folder / MEANING_FILE
            content = _content(path) if path.is_file() else None
            if isinstance(content, dict) and isinstance(content.get("classes"), dict):  # else another program's
                return folder
    return own


def meaning_of(files: Iterable[str | Path]) -> Meaning:
    """What the values of label maps mean, which must be the same for all; see `folder_of`.

    Raises:
        InputError: a `labels.json` cannot be read, or two say different things.
    """
    folders = sorted({folder_of(file) for file in files})
    meanings = [_read(folder / MEANING_FILE) for folder in folders]
    for folder, meaning in zip(folders, meanings, strict=True):
        if meaning != meanings[0]:
            what = f"label values do not mean the same in {folders[0]} and {folder}, by {MEANING_FILE} there"
            raise InputError(what, "give them one after the other", folder)
    return meanings[0] if meanings else Meaning()


def failed_before(predicted: Mapping[str, Path], truths: Mapping[str, Path]) -> dict[str, Failure]:
    """The labelled cases whose prediction failed; a file that is there for one is left of an earlier run.

    Args:
        predicted: the predictions by case. A row of the table means the case of its name, the file of its name, or the
            file that was made from an image of its name, as BIDS's side-car files tell.
        truths: the label files by case.
    """
    folders = {case: folder_of(path) for case, path in predicted.items()}
    rows = {folder: _failures(folder / FAILURES_FILE) for folder in sorted(set(folders.values()))}
    found = {case: row for listed in rows.values() for case, row in listed.items() if case not in predicted}
    for case, folder in folders.items():
        if listed := rows[folder]:
            for name in (case, id_of(predicted[case]), *map(id_of, sources_of(predicted[case]))):
                if name in listed:
                    found[case] = replace(listed[name], case=case)
    return {case: failure for case, failure in found.items() if case in truths}


def check_out(out: str | Path, predicted: Iterable[Path]) -> None:
    """Refuse a folder for scores whose `failures.tsv` would be taken for that of the predictions.

    Raises:
        UnsafeError: as above.
    """
    if Path(out).resolve() in {folder_of(path).resolve() for path in predicted}:
        what = f"the scores' {FAILURES_FILE} would pass for that of the predictions"
        raise UnsafeError(what, "choose another folder for the scores", out)


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"does not say what the values mean ({error})", _FIX, path) from error


def _read(path: Path) -> Meaning:
    if not path.is_file():
        return Meaning()
    content = _content(path)
    try:
        names = {int(value): str(name) for value, name in content["classes"].items()}
        merged = {int(value): int(other) for value, other in content.get("merged", {}).items()}
        ignore, invalid, axes = content.get("ignore", ()), content.get("invalid"), content.get("axes")
        invalid = None if invalid is None else int(invalid)
        return Meaning(names, merged, tuple(int(value) for value in ignore), invalid, axes)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"does not say what the values mean ({error})", _FIX, path) from error


def _failures(path: Path) -> dict[str, Failure]:
    """The rows of a `failures.tsv` by case."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        case: Failure(case, str(row.get("file")), f"its prediction failed: {row.get('what')}", str(row.get("fix")))
        for row in rows
        for case in [str(row.get("case"))]
    }
