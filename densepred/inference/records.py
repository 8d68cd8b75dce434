"""What a batch writes beside its results: which cases failed, and what the label values mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from densepred.cases.plan import Plan
from densepred.errors import DensepredError, UnsafeError
from densepred.files import atomic_write
from densepred.inference.manifest import Manifest

RECORDS = ("manifest.jsonl", "failures.tsv", "labels.json")
"""What is done, what failed, and what the label values mean."""
MANIFEST, FAILURES, LABELS = RECORDS


def write_meaning(plan: Plan, manifest: Manifest, redone: Collection[str], overwrite: bool) -> None:
    """Write `labels.json`, which goes for all maps of the folder.

    Args:
        plan: knows the meaning.
        manifest: knows the maps of the folder.
        redone: those of them that are made anew.
        overwrite: replace it in any case.

    Raises:
        UnsafeError: it says something else, and holds for maps that stay.
    """
    path, meaning = manifest.folder / LABELS, _meaning(plan)
    said = _said(path)
    if said == meaning:
        return
    staying = [
        case
        for case in manifest.entries
        if any(case not in redone or not manifest.wrote(case, path) for path in manifest.outputs(case))
    ]
    if path.exists() and not overwrite and (staying or not manifest.found):
        for_whom = f"for {len(staying)} cases that stay, such as {staying[0]}" if staying else "and is not of a batch"
        what = f"says something else of the label values than this model ({_names(said)}; {_names(meaning)}) {for_whom}"
        raise UnsafeError(what, "choose another --out folder, predict all its cases anew, or say --overwrite", path)
    atomic_write(path, json.dumps(meaning, indent=1))


def _meaning(plan: Plan) -> dict[str, Any]:
    """What the predicted values mean, and which values of a truth mean the same or nothing."""
    merged = {str(value): plan.values[index] for value, index in plan.label_map.items() if value != plan.values[index]}
    names = dict(zip(map(str, plan.values), plan.classes, strict=True))
    meaning = {"classes": names, "merged": merged, "ignore": list(plan.ignore)}
    apart = {} if plan.invalid in plan.values else {"invalid": plan.invalid}
    return meaning | apart | ({"axes": plan.reading.plane_axes} if plan.reading.plane_axes else {})


def _said(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _names(meaning: Any) -> str:
    classes = meaning.get("classes") if isinstance(meaning, dict) else None
    return (
        ", ".join(f"{value} {name}" for value, name in classes.items()) if isinstance(classes, dict) else "no classes"
    )


def write_failures(folder: Path, succeeded: Collection[str], failed: Mapping[str, DensepredError]) -> None:
    """Write `failures.tsv`; rows of earlier runs stay for cases that this run did not touch."""
    path, columns = folder / FAILURES, ("case", "file", "what", "fix")
    kept: dict[str, tuple[str, ...]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                kept[str(row.get("case"))] = tuple(str(row.get(column) or "") for column in columns)
    for case in succeeded:
        kept.pop(case, None)
    kept |= {case: (case, str(e.file or ""), e.what, e.fix) for case, e in failed.items()}
    if not kept:
        path.unlink(missing_ok=True)
        return
    lines = ("\t".join(" ".join(cell.split()) for cell in row) for row in (columns, *kept.values()))
    atomic_write(path, "\n".join(lines) + "\n")
