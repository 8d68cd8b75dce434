"""Predicting many cases into one folder: a bad case stops no other, and a rerun does only what is missing."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred import errors
from densepred.cases.case import Case
from densepred.device import needing_memory
from densepred.errors import DensepredError, DiskFullError, InputError, StoppedError, UnsafeError
from densepred.files import locked, remove, sha256, sweep_parts, writable_folder
from densepred.inference.inputs import find_inputs
from densepred.inference.layouts import Bids, Layout, Plain
from densepred.inference.manifest import Manifest
from densepred.inference.predictor import Predictor, load
from densepred.inference.records import MANIFEST, write_failures, write_meaning
from densepred.inference.sliding_window import Progress
from densepred.progress import progress
from densepred.signals import StopSignals
from densepred.volumes import split_part
from densepred.volumes.region import parse_region

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


@dataclass(frozen=True)
class _Job:
    """A case, its name in the manifest, its results by kind, and these with the files that go with them."""

    case: Case
    key: str
    results: dict[str, Path]
    files: tuple[Path, ...]


def predict(
    run: str | Path | Sequence[str | Path],
    inputs: Sequence[str | Path],
    out: str | Path,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    bids: bool = False,
) -> BatchResult:
    """Segment files into `out/<id>` with the suffix of the images' format (`.nii.gz`, `.fits.fz`, `.tif` ...).

    Args:
        run: the run directory (its config, plan and weights are used), or several whose mean is predicted.
        inputs: files, folders or glob patterns. Where the model takes several channels from several files, folders, in
            which the recipe's image patterns are looked up.
        out: folder of the predictions, their manifest, the class names and, if cases failed, `failures.tsv`.
        overrides: `inference.key=value` texts.
        overwrite: replace files that were changed since they were written, or that some other program wrote; without
            it their cases fail.
        bids: name the results as BIDS derivatives, `out/derivatives/densepred-<model>/sub-...`, with side-car files.

    Raises:
        InputError: with `bids`, images without BIDS names.
        NothingDoneError: no input was found.
        UnsafeError: outputs would replace an input, or files of a folder in which nothing was predicted, or the
            folder's `labels.json` says something else of label maps that stay.
        DiskFullError: the disk is full; what is done stays, and a rerun goes on.
        StoppedError: a signal; likewise.
    """
    predictor = load(run, overrides=overrides)
    if predictor.config.inference.cutout is not None:
        parse_region(predictor.config.inference.cutout)  # a slip of the pen is found before anything is read
    cases = find_inputs([str(item) for item in inputs], predictor.config, len(predictor.plan.image_channels))
    settings = predictor.config.inference
    layout: Layout = Plain(Path(out), settings.outputs)
    if bids:
        layout = Bids(Path(out), cases[0].images[0], predictor.name, predictor.plan, settings)
    layout.prepare()
    with locked(layout.folder):
        sweep_parts(layout.folder)
        result, jobs = BatchResult(), []
        for case in cases:
            with _failing(case, result):
                case.check()
                results = layout.paths(case)
                files = (*results.values(), *layout.companions(results))
                jobs.append(_Job(case, layout.key(case), results, files))
        manifest = Manifest(layout.folder / MANIFEST)
        _check_safe(jobs, manifest, overwrite)
        for parent in {path.parent for job in jobs for path in job.files} - {layout.folder}:
            sweep_parts(writable_folder(parent))
        manifest.settle()
        write_meaning(predictor.plan, manifest, [job.key for job in jobs], overwrite)
        manifest.compact()
        return _Batch(predictor, layout, manifest, result, overwrite).run(jobs)


def _check_safe(jobs: Sequence[_Job], manifest: Manifest, overwrite: bool) -> None:
    """Refuse results that would replace an input, or the files of a folder that is no batch's.

    Raises:
        UnsafeError: as above.
    """
    inputs = {path.resolve() for job in jobs for path in job.case.inputs}
    for job in jobs:
        if inputs & {path.resolve() for path in (*job.files, *manifest.outputs(job.key))}:
            what = "the output would replace the input"
            raise UnsafeError(what, "choose another --out folder", job.case.images[0], job.case.id)
    there = [path for job in jobs for path in job.files if path.exists()]
    if there and not overwrite and not manifest.found:
        what = f"{len(there)} outputs would replace files that were not predicted here"
        raise UnsafeError(what, "choose another --out folder, or say --overwrite", there[0])


@dataclass
class _Batch:
    predictor: Predictor
    layout: Layout
    manifest: Manifest
    result: BatchResult
    overwrite: bool

    def run(self, jobs: Sequence[_Job]) -> BatchResult:
        """Do what is not done."""
        result = self.result
        total = len(jobs) + len(result.failed)
        with StopSignals() as stop, progress(len(jobs), "predicting") as advance:

            def watch(done: int, windows: int) -> None:
                if stop.signal is not None:
                    what = f"stopped by a signal: {result}, {total} in all"
                    raise StoppedError(what, stop.exit_code, "run the same command again to go on")
                if windows:
                    advance(0, windows=f"{done}/{windows}")

            try:
                for job in jobs:
                    watch(0, 0)
                    with _failing(job.case, result):
                        (result.done if self._do(job, watch) else result.skipped).append(job.case.id)
                    advance(1, case=job.case.id)
            finally:
                self._record(jobs)
        return result

    def _do(self, job: _Job, watch: Progress) -> bool:
        """Do a case; False if it was done before.

        Raises:
            UnsafeError: a file that it would replace is not as it was written.
        """
        manifest, entry = self.manifest, self._entry(job)
        valid = manifest.holds(entry)
        stale = [] if valid else [path for path in manifest.outputs(job.key) if path not in job.files]
        ours = {path for path in (*job.files, *stale) if manifest.wrote(job.key, path)}
        if not self.overwrite:
            self._refuse_other_part(job, entry)
            self._refuse_changed(job, [path for path in job.files if path.exists() and path not in ours])
            self._refuse_changed(job, [path for path in stale if path not in ours])
        if valid and ours.issuperset(job.files):
            manifest.note(job.key, None)
            return False
        try:
            if valid and ours.issuperset(job.results.values()):
                manifest.begin(entry, job.files)
            else:
                with needing_memory("lower inference.window or inference.batch"):
                    self.predictor.predict_file(job.case, job.results, watch, lambda: manifest.begin(entry, job.files))
            for path in stale:
                remove(path)
            self.layout.finish(job.case, job.results)
        except Exception:
            manifest.settle()
            raise
        manifest.add(entry, job.files)
        return True

    def _entry(self, job: _Job) -> dict[str, Any]:
        """What the results of a case are made from."""
        files = job.case.inputs
        divided = {role: split_part(path) for role, path in job.case.roles.items() if role != "label"}
        return {
            "id": job.key,
            "inputs": [sha256(path) for path in files],
            "roles": [[role, files.index(path), part] for role, (path, part) in divided.items()],
            "model": self.predictor.weights_hash,
            "config": self.predictor.config_hash,
        }

    def _refuse_other_part(self, job: _Job, entry: Mapping[str, Any]) -> None:
        """The same file gives the same name, whichever of its images was meant: one does not replace the other."""
        known = self.manifest.entries.get(job.key, {})
        there = [path for path in job.results.values() if path.exists()]
        if there and known.get("inputs") == entry["inputs"] and known.get("roles", entry["roles"]) != entry["roles"]:
            part = next((part for _, _, part in known["roles"] if part), None)
            what = f"holds the result of another image of the same file{f' [{part}]' if part else ''}"
            raise UnsafeError(what, "choose another --out folder, or say --overwrite", there[0])

    def _refuse_changed(self, job: _Job, changed: Sequence[Path]) -> None:
        if not changed:
            return
        what = "was not predicted here: left as it is"
        if changed[0] in self.manifest.outputs(job.key):
            what = "was changed since it was written: left as it is"
        if changed[0] not in job.files:
            what += ", but it would not go with the new result"
        raise UnsafeError(what, "move it away, or say --overwrite", changed[0])

    def _record(self, jobs: Sequence[_Job]) -> None:
        """Write which cases failed, and that what lies there of them is not of this run."""
        result = self.result
        for job in jobs:
            error = result.failed.get(job.case.id)
            if error is None:
                continue
            left = [path.name for path in job.results.values() if path.exists()]
            error.what += f"; not of this run: {', '.join(left)}" if left else ""
            self.manifest.note(job.key, error.what)
        write_failures(self.layout.folder, [*result.done, *result.skipped], result.failed)
        self.manifest.compact()


@contextlib.contextmanager
def _failing(case: Case, result: BatchResult) -> Iterator[None]:
    """Note the fault of a case; only a signal or a full disk ends the batch."""
    try:
        yield
    except StoppedError:
        raise
    except DensepredError as error:
        result.failed[case.id] = _bare(error.of_case(case.id))
        if isinstance(error, DiskFullError):
            raise
    except OSError as error:
        what, fix = f"cannot be read ({error.strerror})", "check the file and its permissions"
        result.failed[case.id] = InputError(what, fix, error.filename, case.id)
    except Exception as error:
        _LOG.error("case %s\n%s", case.id, traceback.format_exc())
        what, fix = f"{type(error).__name__}: {error}", "this may be a bug: please report it"
        result.failed[case.id] = DensepredError(what, fix, case.images[0], case.id)


def _bare(error: DensepredError) -> DensepredError:
    """The error without what led to it: its frames would hold arrays and open files for as long as it is kept."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
