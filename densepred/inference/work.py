"""The cases of a batch, one after the other or several at a time: what is done, left alone and recorded for each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred import errors
from densepred.cases.case import Case
from densepred.device import needing_memory
from densepred.errors import (
    DensepredError,
    DiskFullError,
    InputError,
    ResourceError,
    StoppedError,
    UnsafeError,
    WorkersError,
)
from densepred.files import remove, sha256, stamps
from densepred.inference.ahead import Ahead
from densepred.inference.crew import Crew
from densepred.inference.engines import Worker
from densepred.inference.faults import LESS_MEMORY, fault_of, retried
from densepred.inference.layouts import Layout
from densepred.inference.manifest import Manifest
from densepred.inference.origin import Origin
from densepred.inference.predictor import Predictor
from densepred.inference.records import check_meaning, write_failures
from densepred.inference.shards import Shard
from densepred.progress import Advance, progress
from densepred.signals import StopSignals
from densepred.volumes import split_part


@dataclass
class BatchResult:
    """Ids of the cases done now, done before, and failed (with the reason)."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, DensepredError] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, 3 if some cases failed, 4 if all did, 6 if that was for want of memory or the like."""
        if not self.failed:
            return errors.DONE
        if self.done or self.skipped:
            return errors.SOME_FAILED
        exhausted = all(isinstance(error, ResourceError) for error in self.failed.values())
        return errors.RESOURCES if exhausted else errors.NOTHING_DONE

    def __str__(self) -> str:
        return f"{len(self.done)} done, {len(self.skipped)} done before, {len(self.failed)} failed"


@dataclass(frozen=True)
class Job:
    """A case, its name in the manifest, its results by kind, and these with the files that go with them."""

    case: Case
    key: str
    results: dict[str, Path]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Seen:
    """What the results of a case are made from, and the stamps of its files when that was looked up."""

    entry: dict[str, Any]
    stamps: list[tuple[str, int, int]]


class Work:
    """Does what is not done of a batch.

    Args:
        predictor: knows the model and its hashes.
        layout: where results go.
        manifest: what is done.
        result: filled with what becomes of the cases.
        overwrite: replace files that are not as they were written.
        shard: the share of the batch this is.
    """

    _stop: StopSignals
    _advance: Advance
    _total: int

    def __init__(
        self,
        predictor: Predictor,
        layout: Layout,
        manifest: Manifest,
        result: BatchResult,
        overwrite: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.predictor, self.layout, self.manifest, self.result = predictor, layout, manifest, result
        self.overwrite, self.shard = overwrite, shard
        self._lock = threading.Lock()
        self._fault: BaseException | None = None

    def run(self, jobs: Sequence[Job], workers: Sequence[Worker]) -> BatchResult:
        """Do the jobs, one at a time by each of the workers; the files of the next ones are hashed meanwhile."""
        self._total = len(jobs) + len(self.result.failed)
        ahead = Ahead(jobs, self._look, len(workers))
        self._new = {job.key for job in jobs if self._looks_new(job)}
        self._crew = Crew(workers, len(self._new))
        with StopSignals() as stop, progress(len(jobs), "predicting") as advance, ahead.running():
            self._stop, self._advance = stop, advance
            try:
                if len(workers) == 1:
                    self._serve(ahead)
                else:
                    self._serve_all(len(workers), ahead)
            except BaseException:
                with contextlib.suppress(DiskFullError):  # which says less than what ends the batch
                    self._record(jobs)
                raise
            self._record(jobs)
        return self.result

    _crew: Crew
    _new: set[str]

    def _looks_new(self, job: Job) -> bool:
        """Whether there is something to do, as far as can be told without looking into its files."""
        known, origin = self.manifest.entries.get(job.key, {}), self.predictor.origin
        if (known.get("model"), known.get("config")) != (origin.weights_hash, origin.config_hash):
            return True
        return not self.manifest.outputs(job.key) or not all(path.exists() for path in job.files)

    def _serve_all(self, count: int, ahead: Ahead[Job, Seen]) -> None:
        """A thread for each worker; this one waits, and so receives the signals. The first fault ends all of them."""

        def serve() -> None:
            try:
                self._serve(ahead)
            except BaseException as error:
                with self._lock:
                    if self._fault is None or isinstance(self._fault, StoppedError):
                        self._fault = error

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.02)
        except BaseException as error:
            self._fault = error
            raise
        if self._fault is not None:
            raise self._stopped() if isinstance(self._fault, StoppedError) else self._fault

    def _serve(self, ahead: Ahead[Job, Seen]) -> None:
        while (taken := ahead.take(self._watch)) is not None:
            job, seen = taken
            if job.key in self._new:
                self._crew.begun()
            with failing(job.case, self.result):
                done = self._do(job, seen)
                (self.result.done if done else self.result.skipped).append(job.case.id)
            del seen, taken  # a fault among them holds frames
            with self._lock:
                self._advance(1, case=job.case.id)

    def _watch(self, done: int = 0, windows: int = 0) -> None:
        """Go on, unless the batch is stopped or at its end."""
        if self._fault is not None or self._stop.signal is not None:
            raise self._stopped()
        if windows:
            with self._lock:
                self._advance(0, windows=f"{done}/{windows}")

    def _stopped(self) -> StoppedError:
        what = f"stopped by a signal: {self.result}, {self._total} in all"
        return StoppedError(what, self._stop.exit_code, "run the same command again to go on")

    def _do(self, job: Job, seen: Future[Seen]) -> bool:
        """Do a case; False if it was done before.

        Raises:
            UnsafeError: a file that it would replace is not as it was written.
        """
        manifest, entry = self.manifest, seen.result().entry
        valid, stale, ours = self._known(job, entry)
        if self.shard is not None and not ours.issuperset(path for path in job.files if path.exists()):
            manifest.look_again()  # another shard may have been given the case too
            valid, stale, ours = self._known(job, entry)
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
                begin = self._begins(job, seen.result())
                with needing_memory(LESS_MEMORY), self._crew.team() as (worker, others):
                    self._watch(0, 0)
                    retried(lambda: worker.predict_file(job.case, job.results, self._watch, begin, others), job.case)
            for path in stale:
                remove(path)
            self.layout.finish(job.case, job.results)
        except Exception:
            manifest.settle([job.key])
            raise
        manifest.add(entry, job.files)
        return True

    def _known(self, job: Job, entry: Mapping[str, Any]) -> tuple[bool, list[Path], set[Path]]:
        """Whether the results are recorded as of this entry; results of another; those of both that are as written."""
        manifest = self.manifest
        valid = manifest.holds(dict(entry))
        stale = [] if valid else [path for path in manifest.outputs(job.key) if path not in job.files]
        return valid, stale, {path for path in (*job.files, *stale) if manifest.wrote(job.key, path)}

    def _begins(self, job: Job, seen: Seen) -> Callable[[], None]:
        """What is done before the files of a case are put in their places."""

        def begin() -> None:
            if _stamps(job.case) != seen.stamps:
                raise InputError("was changed while it was predicted", "run again", job.case.images[0])
            if self.shard is not None:
                check_meaning(self.predictor.plan, self.layout.folder)
            self.manifest.begin(seen.entry, job.files)

        return begin

    def _look(self, job: Job) -> Seen:
        """What the results of a case are made from."""
        before = _stamps(job.case)
        return Seen({"id": job.key, **made_from(job.case, self.predictor.origin)}, before)

    def _refuse_other_part(self, job: Job, entry: Mapping[str, Any]) -> None:
        """The same file gives the same name, whichever of its images was meant: one does not replace the other."""
        known = self.manifest.entries.get(job.key, {})
        there = [path for path in job.results.values() if path.exists()]
        if there and known.get("inputs") == entry["inputs"] and known.get("roles", entry["roles"]) != entry["roles"]:
            part = next((part for _, _, part in known["roles"] if part), None)
            what = f"holds the result of another image of the same file{f' [{part}]' if part else ''}"
            raise UnsafeError(what, "choose another --out folder, or say --overwrite", there[0])

    def _refuse_changed(self, job: Job, changed: Sequence[Path]) -> None:
        if not changed:
            return
        what = "was not predicted here: left as it is"
        if changed[0] in self.manifest.outputs(job.key):
            what = "was changed since it was written: left as it is"
        if changed[0] not in job.files:
            what += ", but it would not go with the new result"
        raise UnsafeError(what, "move it away, or say --overwrite", changed[0])

    def _record(self, jobs: Sequence[Job]) -> None:
        """Write which cases failed, and that what lies there of them is not of this run."""
        result = self.result
        result.done.sort()
        made = {*result.done, *result.skipped}  # of which the table of whole images alone has a fault
        for job in jobs:
            error = result.failed.get(job.case.id)
            if error is None or job.case.id in made:
                continue
            left = [path.name for path in job.results.values() if path.exists()]
            error.what += f"; not of this run: {', '.join(left)}" if left else ""
            self.manifest.note(job.key, error.what)
        write_failures(self.layout.folder, self.shard, [*result.done, *result.skipped], result.failed)
        self.manifest.compact()


def made_from(case: Case, origin: Origin) -> dict[str, Any]:
    """What a result is made from: the hashes of its files and what each is for, of the weights and the settings."""
    files = case.inputs
    divided = {role: split_part(path) for role, path in case.roles.items() if role != "label"}
    return {
        "inputs": retried(lambda: [sha256(path) for path in files], case),
        "roles": [[role, files.index(path), part] for role, (path, part) in divided.items()],
        "model": origin.weights_hash,
        "config": origin.config_hash,
    }


@contextlib.contextmanager
def failing(case: Case, result: BatchResult) -> Iterator[None]:
    """Note the fault of a case; only a signal, a full disk or the loss of the workers ends the batch."""
    try:
        yield
    except (StoppedError, WorkersError):
        raise
    except Exception as error:
        result.failed[case.id] = fault_of(error, case)
        if isinstance(error, DiskFullError):
            raise


def _stamps(case: Case) -> list[tuple[str, int, int]]:
    return [stamp for path in case.inputs for stamp in stamps(path)]
