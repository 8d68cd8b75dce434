"""Predicting many cases into one folder: a bad case stops no other, and a rerun does only what is missing."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred import errors
from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.device import needing_memory
from densepred.errors import DensepredError, DiskFullError, InputError, StoppedError, UnsafeError
from densepred.files import atomic_write, locked, sha256, sweep_parts, writable_folder
from densepred.inference.inputs import find_inputs
from densepred.inference.layouts import RECORDS, Bids, Layout, Plain
from densepred.inference.predictor import Predictor, load
from densepred.progress import progress
from densepred.signals import StopSignals

MANIFEST, FAILURES, LABELS = RECORDS
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
    """What is done: one line of JSON a case, in the order of completion; a line that cannot be read is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        self.entries: dict[str, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if line.endswith("\n") and isinstance(entry.get("outputs"), dict):
                    self.entries[entry["id"]] = entry
        if len(self.entries) != len(lines) or not path.exists():
            self._rewrite()

    def holds(self, entry: dict[str, Any]) -> bool:
        """Was this case done from these inputs by this model?"""
        known = self.entries.get(entry["id"], {})
        return bool(known) and all(known.get(key) == value for key, value in entry.items())

    def written(self, case: str) -> dict[Path, str]:
        """The outputs of a case that was done, with their hashes."""
        outputs = self.entries.get(case, {}).get("outputs", {})
        return {self.path.parent / name: digest for name, digest in outputs.items()}

    def drop(self, case: str) -> None:
        """Forget a case that is to be done anew."""
        if self.entries.pop(case, None) is not None:
            self._rewrite()

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished case."""
        self.entries[entry["id"]] = entry
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()

    def _rewrite(self) -> None:
        atomic_write(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries.values()))


def predict(
    run: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    bids: bool = False,
) -> BatchResult:
    """Segment files into `out/<id>` with the suffix of the images' format (`.nii.gz`, `.fits.fz`, `.tif` ...).

    Args:
        run: the run directory (its config, plan and weights are used).
        inputs: files, folders or glob patterns. Where the model takes several channels from several files, folders, in
            which the recipe's image patterns are looked up.
        out: folder of the predictions, their manifest, the class names and, if cases failed, `failures.tsv`.
        overrides: `inference.key=value` texts.
        overwrite: replace outputs that were changed since they were written, or that some other program wrote.
        bids: name the results as BIDS derivatives, `out/derivatives/densepred-<model>/sub-...`, with side-car files.

    Raises:
        InputError: with `bids`, images without BIDS names.
        NothingDoneError: no input was found.
        UnsafeError: outputs would replace files that were not predicted here.
        DiskFullError: the disk is full; what is done stays, and a rerun goes on.
        StoppedError: a signal; likewise.
    """
    predictor = load(run, overrides=overrides)
    cases = find_inputs([str(item) for item in inputs], predictor.config, len(predictor.plan.channels))
    outputs = predictor.config.inference.outputs
    layout: Layout = Plain(Path(out), outputs)
    if bids:
        layout = Bids(Path(out), cases[0].images[0], predictor.name, predictor.plan, outputs)
    layout.prepare()
    with locked(layout.folder):
        sweep_parts(layout.folder)
        result = BatchResult()
        paths: dict[str, dict[str, Path]] = {}
        for case in cases:
            with _failing(case, result):
                paths[case.id] = layout.paths(case)
        _check_safe([case for case in cases if case.id in paths], paths, layout.folder, overwrite)
        for parent in {path.parent for files in paths.values() for path in files.values()} - {layout.folder}:
            sweep_parts(writable_folder(parent))
        atomic_write(layout.folder / LABELS, json.dumps(_meaning(predictor.plan), indent=1))
        return _run_all(predictor, cases, paths, layout, result, overwrite)


def _check_safe(cases: Sequence[Case], paths: Mapping[str, Mapping[str, Path]], folder: Path, overwrite: bool) -> None:
    """Refuse results that would replace an input, or what some other program wrote.

    Raises:
        UnsafeError: as above.
    """
    for case in cases:
        inputs = {path.resolve() for path in case.inputs}
        if inputs & {path.resolve() for path in paths[case.id].values()}:
            what = "the output would replace the input"
            raise UnsafeError(what, "choose another --out folder", case.images[0], case.id)
    there = [path for files in paths.values() for path in files.values() if path.exists()]
    if there and not overwrite and not (folder / MANIFEST).exists():
        what = f"{len(there)} outputs would replace files that were not predicted here"
        raise UnsafeError(what, "choose another --out folder, or say --overwrite", there[0])


def _meaning(plan: Plan) -> dict[str, Any]:
    """What the predicted values mean, and which values of a truth mean the same or nothing."""
    merged = {str(value): plan.values[index] for value, index in plan.label_map.items() if value != plan.values[index]}
    names = dict(zip(map(str, plan.values), plan.classes, strict=True))
    meaning = {"classes": names, "merged": merged, "ignore": list(plan.ignore)}
    apart = {} if plan.invalid in plan.values else {"invalid": plan.invalid}
    return meaning | apart | ({"axes": plan.reading.plane_axes} if plan.reading.plane_axes else {})


def _run_all(
    predictor: Predictor,
    cases: list[Case],
    paths: Mapping[str, Mapping[str, Path]],
    layout: Layout,
    result: BatchResult,
    overwrite: bool,
) -> BatchResult:
    manifest = Manifest(layout.folder / MANIFEST)
    made_by = {"model": predictor.weights_hash, "config": predictor.config_hash}
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
                if case.id in result.failed:
                    continue
                with _failing(case, result):
                    entry = {"id": case.id, "inputs": [sha256(path) for path in case.inputs], **made_by}
                    if _is_done(manifest, entry, paths[case.id], overwrite):
                        result.skipped.append(case.id)
                    else:
                        manifest.drop(case.id)
                        _run_one(predictor, case, paths[case.id], layout, watch)
                        manifest.add(entry | {"outputs": _hashes(paths[case.id], layout.folder)})
                        result.done.append(case.id)
                advance(1, case=case.id)
        finally:
            _write_failures(layout.folder, result)
    return result


def _hashes(paths: Mapping[str, Path], folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in paths.values()}


def _is_done(manifest: Manifest, entry: dict[str, Any], outputs: Mapping[str, Path], overwrite: bool) -> bool:
    """Is there nothing to do for this case?

    Raises:
        InputError: an output was changed since it was written.
    """
    known = manifest.written(entry["id"])
    kept = [path for path in outputs.values() if path.exists() and path in known]
    changed = [path for path in kept if sha256(path) != known[path]]
    if changed and not overwrite:
        what = "was changed since it was written: left as it is"
        raise InputError(what, "move it away, or say --overwrite", changed[0])
    return not changed and len(kept) == len(outputs) and manifest.holds(entry)


def _run_one(
    predictor: Predictor, case: Case, paths: Mapping[str, Path], layout: Layout, watch: Callable[[int, int], None]
) -> None:
    with needing_memory("lower inference.window or inference.batch"):
        predictor.predict_file(case, paths, watch)
    layout.finish(case, paths)


@contextlib.contextmanager
def _failing(case: Case, result: BatchResult) -> Iterator[None]:
    """Note the fault of a case; only a signal or a full disk ends the batch."""
    try:
        yield
    except StoppedError:
        raise
    except DensepredError as error:
        result.failed[case.id] = error.of_case(case.id)
        if isinstance(error, DiskFullError):
            raise
    except OSError as error:
        what, fix = f"cannot be read ({error.strerror})", "check the file and its permissions"
        result.failed[case.id] = InputError(what, fix, error.filename, case.id)
    except Exception as error:
        _LOG.error("case %s\n%s", case.id, traceback.format_exc())
        what, fix = f"{type(error).__name__}: {error}", "this may be a bug: please report it"
        result.failed[case.id] = DensepredError(what, fix, case.images[0], case.id)


def _write_failures(folder: Path, result: BatchResult) -> None:
    """Write `failures.tsv`; rows of earlier runs stay for cases that this run did not touch."""
    path, columns = folder / FAILURES, ("case", "file", "what", "fix")
    kept: dict[str, tuple[str, ...]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                kept[str(row.get("case"))] = tuple(str(row.get(column) or "") for column in columns)
    for case in (*result.done, *result.skipped):
        kept.pop(case, None)
    kept |= {case: (case, str(e.file or ""), e.what, e.fix) for case, e in result.failed.items()}
    if not kept:
        path.unlink(missing_ok=True)
        return
    lines = ("\t".join(" ".join(cell.split()) for cell in row) for row in (columns, *kept.values()))
    atomic_write(path, "\n".join(lines) + "\n")
