"""Predicting many cases into one folder: a bad case stops no other, and a rerun does only what is missing."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred import errors
from densepred.cases.case import Case, by_patterns, raise_all
from densepred.cases.patterns import id_of
from densepred.cases.plan import Plan
from densepred.config import Config, DataConfig
from densepred.device import needing_memory
from densepred.errors import DensepredError, DiskFullError, InputError, NothingDoneError, StoppedError, UnsafeError
from densepred.files import atomic_write, locked, sha256, sweep_parts, writable_folder
from densepred.inference.predictor import Predictor, load
from densepred.progress import progress
from densepred.signals import StopSignals
from densepred.volumes import FORMATS, labels_suffix

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
    """What is done: one line of JSON a case, in the order of completion; a line that cannot be read is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        self.entries: dict[str, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if line.endswith("\n") and {"output", "sha256"} <= entry.keys():
                    self.entries[entry["id"]] = entry
        if len(self.entries) != len(lines) or not path.exists():
            self._rewrite()

    def holds(self, entry: dict[str, Any]) -> bool:
        """Was this case done from these inputs by this model?"""
        known = self.entries.get(entry["id"], {})
        return bool(known) and all(known.get(key) == value for key, value in entry.items())

    def untouched(self, case: str) -> bool:
        """Is the output of a case that was done still what was written?"""
        known = self.entries[case]
        return sha256(self.path.parent / known["output"]) == known["sha256"]

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
) -> BatchResult:
    """Segment files into `out/<id>` with the suffix of the images' format (`.nii.gz`, `.fits.fz`, `.tif` ...).

    Args:
        run: the run directory (its config, plan and weights are used).
        inputs: files, folders or glob patterns. Where the model takes several channels from several files, folders, in
            which the recipe's image patterns are looked up.
        out: folder of the predictions, their manifest, the class names and, if cases failed, `failures.tsv`.
        overrides: `inference.key=value` texts.
        overwrite: replace outputs that were changed since they were written, or that some other program wrote.

    Raises:
        NothingDoneError: no input was found.
        UnsafeError: outputs would replace files that were not predicted here.
        DiskFullError: the disk is full; what is done stays, and a rerun goes on.
        StoppedError: a signal; likewise.
    """
    folder = writable_folder(out)
    predictor = load(run, overrides=overrides)
    cases = find_inputs([str(item) for item in inputs], predictor.config, len(predictor.plan.channels))
    for case in cases:
        if _output(folder, case).resolve() in {path.resolve() for path in case.images}:
            raise UnsafeError(
                "the output would replace the input", "choose another --out folder", case.images[0], case.id
            )
    with locked(folder):
        sweep_parts(folder)
        foreign = [] if overwrite or (folder / MANIFEST).exists() else [c for c in cases if _output(folder, c).exists()]
        if foreign:
            what = f"{len(foreign)} outputs would replace files that were not predicted here"
            raise UnsafeError(what, "choose another --out folder, or say --overwrite", _output(folder, foreign[0]))
        atomic_write(folder / LABELS, json.dumps(_meaning(predictor.plan), indent=1))
        return _run_all(predictor, cases, folder, overwrite)


def _meaning(plan: Plan) -> dict[str, Any]:
    """What the predicted values mean, and which values of a truth mean the same or nothing."""
    merged = {str(value): plan.values[index] for value, index in plan.label_map.items() if value != plan.values[index]}
    names = dict(zip(map(str, plan.values), plan.classes, strict=True))
    return {"classes": names, "merged": merged, "ignore": list(plan.ignore)}


def _run_all(predictor: Predictor, cases: list[Case], folder: Path, overwrite: bool) -> BatchResult:
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
                with _failing(case, result):
                    entry = {"id": case.id, "inputs": [sha256(path) for path in case.images], **made_by}
                    if _is_done(manifest, entry, _output(folder, case), overwrite):
                        result.skipped.append(case.id)
                    else:
                        _run_one(predictor, case, folder, manifest, entry, watch)
                        result.done.append(case.id)
                advance(1, case=case.id)
        finally:
            _write_failures(folder, result)
    return result


def _is_done(manifest: Manifest, entry: dict[str, Any], output: Path, overwrite: bool) -> bool:
    """Is there nothing to do for this case?

    Raises:
        InputError: its output was changed since it was written.
    """
    if entry["id"] not in manifest.entries or not output.exists():
        return False
    if manifest.untouched(entry["id"]):
        return manifest.holds(entry)
    if not overwrite:
        raise InputError("was changed since it was written: left as it is", "move it away, or say --overwrite", output)
    return False


def _run_one(
    predictor: Predictor,
    case: Case,
    folder: Path,
    manifest: Manifest,
    entry: dict[str, Any],
    watch: Callable[[int, int], None],
) -> None:
    output = _output(folder, case)
    manifest.drop(case.id)
    with needing_memory("lower inference.window or inference.batch"):
        predictor.predict_file(case, output, watch)
    manifest.add(entry | {"output": output.name, "sha256": sha256(output)})


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


def find_inputs(inputs: Sequence[str], config: Config, channels: int) -> list[Case]:
    """The cases that files, folders and patterns stand for, sorted by id.

    In folders, the recipe's image patterns are looked for first, where they name the id or several channels. Files
    named `<id>_0000`, `<id>_0001`, ... make one case, as in nnU-Net, if the recipe has a list and the model as many
    channels. Any other file is a case.

    Raises:
        NothingDoneError: none is found.
        InputError: two cases have one id.
    """
    cases = [case for item in inputs for case in _by_recipe(Path(item), config.data)]
    if not cases:
        files = list(dict.fromkeys(path for item in inputs for path in _matches(item)))
        cases = _by_number(files, channels) if config.data.dataset is not None else []
        cases = cases or [Case(id_of(path), (path,)) for path in files]
    if not cases:
        fix = f"give files ending in {', '.join(FORMATS)}, or their folder"
        raise NothingDoneError(f"no inputs matched {', '.join(map(repr, inputs))}{_seen(inputs)}", fix)
    by_id: dict[str, Case] = {}
    for case in cases:
        if case.id in by_id and by_id[case.id].images != case.images:
            what = f"two inputs have the id {case.id}: {by_id[case.id].images[0]} and {case.images[0]}"
            raise InputError(what, "give the folder above them if the recipe has a pattern with {id}, or predict apart")
        by_id[case.id] = case
    return [by_id[key] for key in sorted(by_id)]


def _by_recipe(folder: Path, data: DataConfig) -> list[Case]:
    """The cases of a folder by the recipe's patterns, whole or by their last part."""
    patterns = data.images if isinstance(data.images, dict) else {"image": data.images or ""}
    if not folder.is_dir() or not (len(patterns) > 1 or any("{id}" in pattern for pattern in patterns.values())):
        return []
    for tried in (patterns, {name: Path(pattern).name for name, pattern in patterns.items()}):
        with contextlib.suppress(NothingDoneError):
            found = by_patterns(tried, None, folder)
            raise_all(found.problems)
            return found.cases
    return []


def _by_number(files: Sequence[Path], channels: int) -> list[Case]:
    """Cases of files `<id>_0000`, ...; none if the files are not so named, or have other channels than the model."""
    parts = [(path, re.fullmatch(r"(.+)_(\d{4})", id_of(path))) for path in files]
    if not parts or any(match is None for _, match in parts):
        return []
    grouped: dict[str, dict[str, Path]] = {}
    for path, match in parts:
        if match is not None:
            grouped.setdefault(match[1], {})[match[2]] = path
    numbers = [f"{number:04d}" for number in range(channels)]
    if any(sorted(group) != numbers for group in grouped.values()):
        return []
    return [Case(case, tuple(group[number] for number in numbers)) for case, group in grouped.items()]


def _matches(item: str) -> list[Path]:
    path = Path(item)
    if path.is_dir() and path.suffix != ".zarr":
        names = (p for p in path.iterdir() if p.name.lower().endswith(tuple(FORMATS)) and not p.name.startswith("."))
        found = sorted(names)
    elif path.exists() or not glob.has_magic(item):
        found = [path]
    else:
        found = sorted(Path(match) for match in glob.glob(item, recursive=True))
    for one in found:
        if one.is_dir() or one.suffix.lower() == ".dcm":  # many files an image, whose record a manifest cannot keep yet
            kind, source = ("a Zarr store", one) if one.is_dir() else ("of a DICOM series", one.parent)
            raise InputError(f"is {kind}, which batches do not take", f"densepred convert {source} CASE.nii.gz", one)
    return found


def _seen(inputs: Sequence[str]) -> str:
    """What the folders hold instead."""
    for item in inputs:
        folder = Path(item) if Path(item).is_dir() else Path(item).parent
        if folder.is_dir():
            count = sum(1 for entry in folder.iterdir() if entry.is_file())
            return f" (the folder {folder} holds {count} files)"
    return ""


def _output(folder: Path, case: Case) -> Path:
    return folder / f"{case.id}{labels_suffix(case.images[0])}"


def _recipe_hash(predictor: Predictor) -> str:
    settings = predictor.config.inference.model_dump(mode="json", exclude={"device"})
    text = json.dumps(
        [settings, predictor.config.model.model_dump(mode="json"), predictor.plan.model_dump(mode="json")],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


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
