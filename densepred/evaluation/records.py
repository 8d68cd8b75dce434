"""What lies beside predictions: a file that says what their values mean, and a table of the cases that failed."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from densepred.bids import sources_of
from densepred.cases.patterns import id_of
from densepred.config.inference import Output
from densepred.errors import InputError, UnsafeError
from densepred.evaluation.summaries import Failure
from densepred.volumes import FORMATS, Volume, members, open_volume, split_part, suffix_of
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.record import INVALID

MEANING_FILE = "labels.json"
"""{"classes": {value: name}, "merged": {value: value it counts as}, "ignore": [values], "invalid": the value of pixels
that were not predicted, "axes": what the files' axes hold}; all but the first if needed."""
FAILURES_FILE = "failures.tsv"
"""A row per case that could not be predicted."""
_MANIFESTS = "manifest*.jsonl"
_KINDS = get_args(Output)
_FOLDERS = 4  # <data set>/sub-01/ses-a/anat/ is as deep as BIDS goes
_FITS = FORMATS[".fits"]
_FIX = 'write {"classes": {"1": "name", ...}}'


@dataclass(frozen=True)
class Meaning:
    """What `labels.json`, or the legend of a FITS file, says of the values of label maps."""

    classes: dict[int, str] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    ignore: tuple[int, ...] = ()
    invalid: int | None = None
    axes: str | None = None


def folders_of(files: Iterable[str | Path]) -> dict[str | Path, Path]:
    """The folder of the records that each file belongs to.

    That is its own; where this has no `labels.json`, the nearest of the three above that has one that maps `classes`;
    where none has, as of maps of numbers, the one above if it has the record of a batch that made such a folder.

    Raises:
        InputError: such a file is no JSON.
    """
    parents = {file: split_part(file)[0].absolute().parent for file in files}
    found = {parent: _records_of(parent) for parent in set(parents.values())}
    return {file: found[parent] for file, parent in parents.items()}


def _records_of(own: Path) -> Path:
    above = own.parents[: _FOLDERS - 1]
    if (own / MEANING_FILE).is_file():
        return own
    for folder in above:
        path = folder / MEANING_FILE
        content = _content(path) if path.is_file() else None
        if isinstance(content, dict) and isinstance(content.get("classes"), dict):  # else another program's
            return folder
    return above[0] if own.name in _KINDS and any(above[0].glob(_MANIFESTS)) else own


def meaning_of(files: Iterable[str | Path], axes: str | None = None) -> Meaning:
    """What the values of label maps mean, which must be the same for all.

    That is what the `labels.json` of their folder says, see `folders_of`; where there is none, the legends that
    densepred wrote into FITS files.

    Args:
        files: the label maps.
        axes: what their axes hold, where that is open.

    Raises:
        InputError: a `labels.json` or a legend cannot be read, or two say different things.
    """
    folders: dict[Path, list[str]] = {}
    for file, folder in folders_of(sorted(map(str, files))).items():
        folders.setdefault(folder, []).append(str(file))
    found = [pair for folder in sorted(folders) for pair in _meanings(folder, folders[folder], axes)]
    for place, meaning in found:
        if meaning != found[0][1]:
            of = f"{MEANING_FILE} or the legend"
            what = f"label values do not mean the same in {found[0][0]} and {place}, by {of} there"
            raise InputError(what, "give them one after the other", place)
    return found[0][1] if found else Meaning()


def legend_of(labels: Volume) -> dict[int, str]:
    """The names in a label map's FITS file: its table LABELS (`id`, `name`), else its cards CLASS0, CLASS1, ...

    Raises:
        InputError: the table cannot be read.
    """
    header = labels.header
    if not isinstance(header, FitsHeader):
        return {}
    if header.path is not None:
        from astropy.io import fits

        try:
            with warnings.catch_warnings(action="ignore"), fits.open(header.path, memmap=False) as file:
                table = next((hdu for hdu in file if hdu.name == "LABELS" and isinstance(hdu, fits.BinTableHDU)), None)
                if table is not None and {"id", "name"} <= {name.lower() for name in table.columns.names}:
                    rows = table.data
                    return {int(value): str(name).strip() for value, name in zip(rows["id"], rows["name"], strict=True)}
        except (OSError, ValueError, TypeError) as error:  # astropy's, of a damaged table
            raise InputError(f"its table LABELS cannot be read ({error})", "get the file again", header.path) from error
    numbered = [key for key in header.header if key.startswith("CLASS") and key[5:].isdigit()]  # others may be damaged
    return {int(key[5:]): str(header.header[key]) for key in numbered}


def failed_before(predicted: Mapping[str, Path], truths: Mapping[str, Path]) -> dict[str, Failure]:
    """The labelled cases whose prediction failed; a file that is there for one is left of an earlier run.

    Args:
        predicted: the predictions by case. A row of the table means the case of its name, the file of its name, or the
            file that was made from an image of its name, as BIDS's side-car files tell.
        truths: the label files by case.
    """
    of = folders_of(predicted.values())
    folders = {case: of[path] for case, path in predicted.items()}
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
    if Path(out).resolve() in {folder.resolve() for folder in set(folders_of(predicted).values())}:
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


def _meanings(folder: Path, files: Iterable[str], axes: str | None) -> list[tuple[Path, Meaning]]:
    """What is said of the files of one folder, and where."""
    path = folder / MEANING_FILE
    if path.is_file():
        return [(folder, _read(path))]
    told = {Path(file): meaning for file in files if (meaning := _told(file, axes)) is not None}
    legends = [(file, meaning) for file, meaning in told.items() if meaning != Meaning()]
    return legends or ([(folder, Meaning())] if told else [])


def _told(file: str, axes: str | None) -> Meaning | None:
    """What the legend says that densepred wrote into a FITS label map; None of a file that cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"):  # they come again where the pixels are read
            if FORMATS[suffix_of(split_part(file)[0])] != _FITS:
                return Meaning()
            volume = open_volume(members(file, axes)[0], axes)
    except InputError:  # said where the pixels are read
        return None
    with volume:
        header = volume.header
        if not (volume.labels and isinstance(header, FitsHeader) and "DPVERS" in header.header):
            return Meaning()
        names = {value: name for value, name in legend_of(volume).items() if name}
    invalid = next((value for value, name in names.items() if name == INVALID), None)
    return Meaning({value: name for value, name in names.items() if value != invalid}, invalid=invalid)


def _failures(path: Path) -> dict[str, Failure]:
    """The rows of a `failures.tsv` by case, and of those of shards beside it."""
    rows: list[dict[str, str]] = []
    for one in (path, *sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))):
        if one.is_file():
            with one.open(encoding="utf-8", newline="") as file:
                rows += csv.DictReader(file, delimiter="\t")
    return {
        case: Failure(case, str(row.get("file")), f"its prediction failed: {row.get('what')}", str(row.get("fix")))
        for row in rows
        for case in [str(row.get("case"))]
    }
