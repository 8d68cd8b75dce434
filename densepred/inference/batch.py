"""Predicting many cases into one folder: a bad case stops no other, and a rerun does only what is missing."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred import errors
from densepred.cases.case import Case, collect
from densepred.cases.patterns import id_of
from densepred.config import Config
from densepred.errors import DensepredError, InputError, NothingDoneError, ResourceError, StoppedError, UnsafeError
from densepred.files import atomic_write, locked, sha256, sweep_parts, writable_folder
from densepred.inference.predictor import Predictor, load
from densepred.progress import progress
from densepred.signals import StopSignals
from densepred.volumes import FORMATS

MANIFEST, FAILURES, LABELS = "manifest.jsonl", "failures.tsv", "labels.json"
_LOG = logging.getLogger(__name__)


@dataclass
class BatchResult:
    """Ids of the cases done now, done before, and failed (with the reason)."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, DensepredError] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, 3 if some cases failed, 4 if all did."""
        if not self.failed:
            return errors.DONE
        return errors.SOME_FAILED if self.done or self.skipped else errors.NOTHING_DONE

    def __str__(self) -> str:
        return f"{len(self.done)} done, {len(self.skipped)} done before, {len(self.failed)} failed"


class Manifest:
    """What is done: one line of JSON a case, in the order of completion; a line torn by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            atomic_write(path, whole)
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in map(json.loads, whole.splitlines())}

    def holds(self, entry: dict[str, Any]) -> bool:
        """Was this case done from these inputs by this model, and is its output still what was written?"""
        known = self.entries.get(entry["id"])
        if known is None or any(known.get(key) != value for key, value in entry.items()):
            return False
        output = self.path.parent / known["output"]
        return output.is_file() and sha256(output) == known["sha256"]

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished case; a case done anew replaces its line."""
        again = entry["id"] in self.entries
        self.entries[entry["id"]] = entry
        if again:
            atomic_write(self.path, "".join(json.dumps(e) + "\n" for e in self.entries.values()))
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()


def predict(
    run: str | Path, inputs: Sequence[str | Path], out: str | Path, overrides: Sequence[str] = ()
) -> BatchResult:
    """Segment files into `out/<id>.nii.gz`.

    Args:
        run: the run directory (its config, plan and weights are used).
        inputs: files, folders or glob patterns. Where the model takes several channels from several files, folders, in
            which the recipe's image patterns are looked up.
        out: folder of the predictions, their manifest, the class names and, if cases failed, `failures.tsv`.
        overrides: `inference.key=value` texts.

    Raises:
        NothingDoneError: no input was found.
        ResourceError: the disk is full; what is done stays, and a rerun goes on.
        StoppedError: a signal; likewise.
    """
    folder = writable_folder(out)
    predictor = load(run, overrides=overrides)
    cases = find_inputs([str(item) for item in inputs], predictor.config)
    for case in cases:
        if _output(folder, case).resolve() in {path.resolve() for path in case.images}:
            raise UnsafeError(
                "the output would replace the input", "choose another --out folder", case.images[0], case.id
            )
    with locked(folder):
        sweep_parts(folder)
        names = dict(zip(map(str, predictor.plan.values), predictor.plan.classes, strict=True))
        atomic_write(folder / LABELS, json.dumps(names, indent=1))
        return _run_all(predictor, cases, folder)


def _run_all(predictor: Predictor, cases: list[Case], folder: Path) -> BatchResult:
    manifest, result = Manifest(folder / MANIFEST), BatchResult()
    made_by = {"model": predictor.weights_hash, "config": _recipe_hash(predictor)}
    with StopSignals() as stop, progress(len(cases), "predicting") as advance:

        def watch(done: int, total: int) -> None:
            if stop.signal is not None:
                what = f"stopped by a signal: {result}, {len(cases)} in all"
                raise StoppedError(what, stop.exit_code, "run the same command again to go on")
            if total:
                advance(0, windows=f"{done}/{total}")

        try:
            for case in cases:
                watch(0, 0)
                _run_one(predictor, case, folder, manifest, made_by, result, watch)
                advance(1, case=case.id)
        finally:
            _write_failures(folder, result)
    return result


def _run_one(
    predictor: Predictor,
    case: Case,
    folder: Path,
    manifest: Manifest,
    made_by: dict[str, str],
    result: BatchResult,
    watch: Callable[[int, int], None],
) -> None:
    output = _output(folder, case)
    try:
        entry: dict[str, Any] = {"id": case.id, "inputs": [sha256(path) for path in case.images], **made_by}
        if manifest.holds(entry):
            result.skipped.append(case.id)
            return
        predictor.predict_file(case, output, watch)
        manifest.add(entry | {"output": output.name, "sha256": sha256(output)})
        result.done.append(case.id)
    except (StoppedError, ResourceError) as error:
        if isinstance(error, ResourceError):
            result.failed[case.id] = error.of_case(case.id)
        raise
    except DensepredError as error:
        result.failed[case.id] = error.of_case(case.id)
    except OSError as error:
        result.failed[case.id] = InputError(
            f"cannot be read ({error.strerror})", "check the file and its permissions", error.filename, case.id
        )
    except Exception as error:
        _LOG.error("case %s\n%s", case.id, traceback.format_exc())
        result.failed[case.id] = DensepredError(
            f"{type(error).__name__}: {error}", "this may be a bug: please report it", case.images[0], case.id
        )


def find_inputs(inputs: Sequence[str], config: Config) -> list[Case]:
    """The cases that files, folders and patterns stand for, sorted by id.

    Raises:
        NothingDoneError: none is found.
        InputError: two cases have one id.
    """
    if isinstance(config.data.images, dict) and len(config.data.images) > 1:
        folders = [Path(item) for item in inputs]
        data = config.data.model_copy(update={"labels": None, "dataset": None})
        cases = [case for root in folders for case in collect(data.model_copy(update={"root": str(root)}))]
    else:
        cases = [Case(id_of(path), (path,), None, None) for item in inputs for path in _matches(item)]
    if not cases:
        raise NothingDoneError(
            f"no inputs matched {', '.join(map(repr, inputs))}{_seen(inputs)}",
            f"give files ending in {', '.join(FORMATS)}, or their folder",
        )
    by_id: dict[str, Case] = {}
    for case in cases:
        if case.id in by_id and by_id[case.id].images != case.images:
            raise InputError(
                f"two inputs have the id {case.id}: {by_id[case.id].images[0]} and {case.images[0]}",
                "predict them into separate folders",
            )
        by_id[case.id] = case
    return [by_id[key] for key in sorted(by_id)]


def _matches(item: str) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.name.endswith(tuple(FORMATS)) and not p.name.startswith("."))
    if path.exists() or not glob.has_magic(item):
        return [path]
    return sorted(Path(match) for match in glob.glob(item, recursive=True))


def _seen(inputs: Sequence[str]) -> str:
    """What the folders hold instead."""
    for item in inputs:
        folder = Path(item) if Path(item).is_dir() else Path(item).parent
        if folder.is_dir():
            count = sum(1 for entry in folder.iterdir() if entry.is_file())
            return f" (the folder {folder} holds {count} files)"
    return ""


def _output(folder: Path, case: Case) -> Path:
    return folder / f"{case.id}.nii.gz"


def _recipe_hash(predictor: Predictor) -> str:
    settings = predictor.config.inference.model_dump(mode="json", exclude={"device"})
    text = json.dumps(
        [settings, predictor.config.model.model_dump(mode="json"), predictor.plan.model_dump(mode="json")],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _write_failures(folder: Path, result: BatchResult) -> None:
    if not result.failed:
        (folder / FAILURES).unlink(missing_ok=True)
        return
    rows = [("case", "file", "what", "fix")]
    rows += [(case, str(e.file or ""), e.what, e.fix) for case, e in result.failed.items()]
    atomic_write(
        folder / FAILURES,
        "".join("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row) + "\n" for row in rows),
    )
