"""Cases from a list: `dataset.json` of the Medical Segmentation Decathlon or of nnU-Net, or a CSV of paths.

Paths in a list are relative to the folder of the list, or absolute.

References: http://medicaldecathlon.com (arXiv:1902.09063); nnU-Net v2, documentation/dataset_format.md.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from densepred.cases.case import Case, Found, Problem, by_patterns
from densepred.cases.patterns import id_of
from densepred.errors import InputError, NothingDoneError
from densepred.volumes import split_part

IMAGE, PLANES = "image", ("mask", "weight")
MAX_NAMED = 5
"""Files outside the list that a note names."""


def read_list(path: Path) -> Found:
    """The cases of a list; files beside those listed are noted.

    Raises:
        InputError: the list cannot be read, or has not the form it should.
        NothingDoneError: it lists no case.
    """
    if path.suffix.lower() == ".csv":
        found = _from_csv(path)
    else:
        content = read_json(path)
        if "training" not in content and ("channel_names" in content or "file_ending" in content):
            return _from_nnunet(content, path)
        found = _from_decathlon(content, path)
    if not found.cases and not found.problems:
        raise NothingDoneError("lists no training case", "add the cases, or use data.images and data.labels", path)
    _note_unlisted(found)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A `dataset.json`.

    Raises:
        InputError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "check data.root and data.dataset", path) from error
    except ValueError as error:
        raise InputError(f"no valid JSON: {error}", "correct it there", path) from error
    if not isinstance(content, dict):
        raise InputError("no JSON object", "give a dataset.json, or a CSV whose name ends in .csv", path)
    return content


def csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV, surrounding blanks removed."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot be read ({reason})", "check data.root and data.dataset", path) from error
    reader = csv.DictReader(text.splitlines(), restval="", skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or []]
    rows = [{k.strip(): v.strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
    return columns, rows


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


def _from_csv(path: Path) -> Found:
    columns, rows = csv_rows(path)
    channels = image_columns(columns, path)
    found = Found()
    for number, row in enumerate(rows, start=2):
        images = [row[name] for name in channels]
        case = row.get("id") or (id_of(images[0]) if images[0] else f"row {number}")
        empty = [name for name in (*channels, "label", *PLANES) if row.get(name) == ""]
        for name in empty:
            found.error(case, path, f"row {number} has no {name}", "fill the cell or remove the row")
        if not empty:
            label, mask, weight = (path.parent / row[name] if name in row else None for name in ("label", *PLANES))
            files = tuple(path.parent / cell for cell in images)
            found.cases.append(Case(case, files, label, row.get("group") or None, mask, weight))
    return found


def _from_nnunet(content: dict[str, Any], path: Path) -> Found:
    """nnU-Net v2: files are found by its naming, unless a `dataset` entry lists them."""
    if isinstance(content.get("dataset"), dict):
        listed = {case: entry for case, entry in content["dataset"].items() if isinstance(entry, dict)}
        entries = [{"id": case, "image": e.get("images"), "label": e.get("label")} for case, e in listed.items()]
        return _from_decathlon({"training": entries}, path)
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(f"file_ending is {ending!r}", 'write, say, "file_ending": ".nii.gz"', path)
    count = len(content.get("channel_names") or {"0": ""})
    channels = {f"{number:04d}": f"imagesTr/{{id}}_{number:04d}{ending}" for number in range(count)}
    return by_patterns(channels, f"labelsTr/{{id}}{ending}", path.parent)


def _from_decathlon(content: dict[str, Any], path: Path) -> Found:
    entries = content.get("training")
    if not isinstance(entries, list):
        raise InputError('no list "training"', 'list the cases: "training": [{"image": ..., "label": ...}]', path)
    found = Found()
    for number, entry in enumerate(entries):
        images = entry.get("image") if isinstance(entry, dict) else None
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
            found.error(f"training[{number}]", path, "names no image", 'write {"image": path, "label": path}')
            continue
        case = str(entry.get("id") or id_of(images[0]))
        label = entry.get("label")
        if not isinstance(label, str):
            found.error(case, path, f"training[{number}] names no label", 'write {"image": path, "label": path}')
            continue
        found.cases.append(Case(case, tuple(path.parent / name for name in images), path.parent / label))
    return found


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
