"""What a batch writes beside its results: which cases failed, and what the label values mean."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from densepred.cases.plan import Plan
from densepred.errors import DensepredError, UnsafeError
from densepred.files import atomic_write, locked
from densepred.inference.manifest import MANIFEST, Manifest
from densepred.inference.shards import Shard, record_of, records_of

FAILURES, LABELS = "failures.tsv", "labels.json"
RECORDS = (MANIFEST, FAILURES, LABELS, "manifest-*-of-*.jsonl", "failures-*-of-*.tsv")
"""What is done, what failed, and what the label values mean; the first two also of shards."""
_COLUMNS = ("case", "file", "what", "fix")


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
    if not plan.classes:  # maps of numbers alone
        return
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


def check_meaning(plan: Plan, folder: Path) -> None:
    """Hold a result back that others of the same folder would not go with.

    Raises:
        UnsafeError: `labels.json` says something else: another run has replaced it.
    """
    if plan.classes and _said(folder / LABELS) != _meaning(plan):
        what = "was replaced during the run, and says something else of the label values than this model"
        raise UnsafeError(what, "predict with each model into a folder of its own", folder / LABELS)


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


def write_failures(
    folder: Path, shard: Shard | None, succeeded: Collection[str], failed: Mapping[str, DensepredError]
) -> None:
    """Write `failures.tsv`, or that of a shard; rows of earlier runs stay for cases that this run did not touch.

    The rows are in the order of the cases. Without shards it takes the place of those of all shards.
    """
    own, touched = folder / record_of(FAILURES, shard), {*succeeded, *failed}
    rows: dict[str, tuple[str, ...]] = {case: (case, str(e.file or ""), e.what, e.fix) for case, e in failed.items()}
    with contextlib.nullcontext() if shard is None else locked(folder, ".lock-failures", wait=True):
        kept = {
            path: {case: row for case, row in read_failures(path).items() if case not in touched}
            for path in records_of(FAILURES, folder)
        }
        for path in kept if shard is None else [own]:
            rows = kept.get(path, {}) | rows
        _write_rows(own, rows)
        for path in kept.keys() - {own}:
            _write_rows(path, {} if shard is None else kept[path])


def read_failures(path: Path) -> dict[str, tuple[str, ...]]:
    """The rows of a `failures.tsv` by case: case, file, what, fix."""
    with path.open(newline="", encoding="utf-8") as file:
        read = csv.DictReader(file, delimiter="\t")
        return {str(row.get("case")): tuple(str(row.get(column) or "") for column in _COLUMNS) for row in read}


def _write_rows(path: Path, rows: Mapping[str, tuple[str, ...]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    ordered = (_COLUMNS, *(rows[case] for case in sorted(rows)))
    lines = ("\t".join(" ".join(cell.split()) for cell in row) for row in ordered)
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        atomic_write(path, text)
