"""Cases from a list: `dataset.json` of the Medical Segmentation Decathlon or of nnU-Net, or a CSV of paths.

Paths in a list are relative to the folder of the list, or absolute.

References: http://medicaldecathlon.com (arXiv:1902.09063); nnU-Net v2, documentation/dataset_format.md.
"""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

from densepred.cases.case import Case, Found, Problem, by_patterns
from densepred.cases.patterns import id_of
from densepred.errors import InputError, NothingDoneError
from densepred.volumes import split_part

_LOG = logging.getLogger(__name__)
IMAGE, PLANES = "image", ("mask", "weight")
_WHERE = "check the path of the list (in a recipe data.root and data.dataset)"
MAX_NAMED = 5
"""Files outside the list that a note names."""


def read_list(path: Path) -> Found:
    """The cases of a list; files beside those listed are noted.

    Raises:
        InputError: the list cannot be read, or has not the form it should.
        NothingDoneError: it lists no case.
    """
    if path.suffix.lower() == ".csv":
        found = _from_csv(path, labelled=True)
    else:
        content = read_json(path)
        if "training" not in content and ("channel_names" in content or "file_ending" in content):
            return _from_nnunet(content, path)
        found = _from_decathlon(content, path)
    if not found.cases and not found.problems:
        raise NothingDoneError("lists no training case", "add the cases, or use data.images and data.labels", path)
    _note_unlisted(found)
    return found


def read_inputs(path: Path) -> Found:
    """The cases that a list names for prediction: of a `dataset.json` those to test, if there are any.

    A label need not be there.

    Raises:
        InputError: as `read_list`; or a `dataset.json` of nnU-Net that lists no files.
        NothingDoneError: it lists no case.
    """
    if path.suffix.lower() == ".csv":
        found, which = _from_csv(path, labelled=False), "rows"
    else:
        content = read_json(path)
        if isinstance(content.get("dataset"), dict):
            content = _listed_by_nnunet(content)
        elif "training" not in content and ("channel_names" in content or "file_ending" in content):
            raise InputError("lists no files (a dataset.json of nnU-Net)", "give the folder, such as imagesTs", path)
        key = "test" if content.get("test") else "training"
        found, which = _from_decathlon(content, path, key, labelled=False), f'list "{key}"'
    if not found.cases and not found.problems:
        raise NothingDoneError("lists no case", "add the cases, or give files", path)
    _LOG.info("%s: the %d cases of its %s", path, len(found.cases), which)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A `dataset.json`.

    Raises:
        InputError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", _WHERE, path) from error
    except ValueError as error:
        raise InputError(f"no valid JSON: {error}", "correct it there", path) from error
    if not isinstance(content, dict):
        raise InputError("no JSON object", "give a dataset.json, or a CSV whose name ends in .csv", path)
    return content


def csv_rows(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Columns, and number of the line -> row, of a CSV; surrounding blanks removed.

    Raises:
        InputError: it cannot be read, or is no CSV: a name of a column twice, more cells than columns, an open quote.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot be read ({reason})", _WHERE, path) from error
    reader = csv.reader(text.splitlines(), skipinitialspace=True, strict=True)
    rows: dict[int, list[str]] = {}
    try:
        for cells in reader:
            if cells:
                rows[reader.line_num] = [cell.strip() for cell in cells]
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} cannot be read: {error}", "correct it there", path) from error
    columns = rows.pop(next(iter(rows))) if rows else []
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise InputError(f"two columns are called {twice[0]}", "name them apart", path)
    for line, cells in rows.items():
        if any(cells[len(columns) :]):
            what = f"line {line} has {len(cells)} cells, there are {len(columns)} columns"
            raise InputError(what, "put what holds commas in double quotes", path)
        cells += [""] * (len(columns) - len(cells))
    return columns, {line: dict(zip(columns, cells, strict=False)) for line, cells in rows.items()}


def image_columns(columns: list[str], path: Path) -> list[str]:
    """`image`, or `image:<channel>` for each channel."""
    named = [name for name in columns if name.startswith(f"{IMAGE}:")]
    chosen = named or [name for name in columns if name == IMAGE]
    if not chosen:
        what = f"no column of images among {', '.join(columns) or 'none'}"
        raise InputError(
            what, "name the columns id, image (or image:<channel> for each channel), label, group, mask, weight", path
        )
    return chosen


class _Listing:
    """Collects the cases of a list, whose ids must differ."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, Found()
        self._places: dict[str, str] = {}

    def add(self, case: Case, place: str) -> None:
        """A case, and where in the list it is."""
        first = self._places.setdefault(case.id, place)
        if first == place:
            self.found.cases.append(case)
        else:
            what = f"{place} has the same id as {first}"
            self.found.error(case.id, self.path, what, "give every case an id of its own")


def _from_csv(path: Path, labelled: bool) -> Found:
    """Where labels are not asked for, their cells may be empty."""
    columns, rows = csv_rows(path)
    channels = image_columns(columns, path)
    listing = _Listing(path)
    for line, row in rows.items():
        images = [row[name] for name in channels]
        case = row.get("id") or (id_of(path.parent / images[0]) if images[0] else f"line {line}")
        empty = [name for name in (*channels, *(["label"] if labelled else []), *PLANES) if row.get(name) == ""]
        for name in empty:
            listing.found.error(case, path, f"line {line} has no {name}", "fill the cell or remove the row")
        if not empty:
            label, mask, weight = (path.parent / row[name] if row.get(name) else None for name in ("label", *PLANES))
            files = tuple(path.parent / cell for cell in images)
            listing.add(Case(case, files, label, row.get("group") or None, mask, weight), f"line {line}")
    return listing.found


def _from_nnunet(content: dict[str, Any], path: Path) -> Found:
    """nnU-Net v2: files are found by its naming, unless a `dataset` entry lists them."""
    if isinstance(content.get("dataset"), dict):
        return _from_decathlon(_listed_by_nnunet(content), path)
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(f"file_ending is {ending!r}", 'write, say, "file_ending": ".nii.gz"', path)
    count = len(content.get("channel_names") or {"0": ""})
    channels = {f"{number:04d}": f"imagesTr/{{id}}_{number:04d}{ending}" for number in range(count)}
    return by_patterns(channels, f"labelsTr/{{id}}{ending}", path.parent)


def _listed_by_nnunet(content: dict[str, Any]) -> dict[str, Any]:
    """Its `dataset` entry in the Decathlon's form."""
    listed = {case: entry for case, entry in content["dataset"].items() if isinstance(entry, dict)}
    return {"training": [{"id": case, "image": e.get("images"), "label": e.get("label")} for case, e in listed.items()]}


def _from_decathlon(content: dict[str, Any], path: Path, key: str = "training", labelled: bool = True) -> Found:
    """Entries are `{"image": path, "label": path}`; where labels are not asked for, a path alone will do."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f'no list "{key}"', f'list the cases: "{key}": [{{"image": ..., "label": ...}}]', path)
    listing = _Listing(path)
    for number, entry in enumerate(entries):
        images = entry.get("image") if isinstance(entry, dict) else entry if not labelled else None
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
            fix = 'write {"image": path, "label": path}' if labelled else 'write {"image": path}'
            listing.found.error(f"{key}[{number}]", path, "names no image", fix)
            continue
        named = entry if isinstance(entry, dict) else {}
        case, label = str(named.get("id") or id_of(path.parent / images[0])), named.get("label")
        if labelled and not isinstance(label, str):
            fix = 'write {"image": path, "label": path}'
            listing.found.error(case, path, f"{key}[{number}] names no label", fix)
            continue
        truth = path.parent / label if isinstance(label, str) else None
        listing.add(Case(case, tuple(path.parent / name for name in images), truth), f"{key}[{number}]")
    return listing.found


def _note_unlisted(found: Found) -> None:
    """One note per folder for files of the same kind that lie beside the listed ones."""
    files = [split_part(path)[0] for case in found.cases for path in case.roles.values()]
    listed = {path.resolve() for path in files}
    for folder in sorted({path.parent for path in files}):
        endings = tuple({path.name[len(id_of(path)) :] for path in files if path.parent == folder})
        others = sorted(p for p in folder.glob("[!.]*") if p.name.endswith(endings) and p.resolve() not in listed)
        if others:
            names = ", ".join(path.name for path in others[:MAX_NAMED]) + (", ..." if len(others) > MAX_NAMED else "")
            what = f"{len(others)} files here are not in the list: {names}"
            found.problems.append(Problem("", "note", str(folder), what, "add them if they belong to the set"))
