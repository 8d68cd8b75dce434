"""Training all folds: a process for each, as many at a time as there are devices."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from densepred.children import environment, python
from densepred.config import TrainingConfig
from densepred.config.training import parse_duration
from densepred.crossval.fold import RECIPES_OWN
from densepred.crossval.recipe import RECIPE
from densepred.errors import DONE as CODE_DONE
from densepred.errors import SIGINT, SIGTERM, InputError, StoppedError
from densepred.files import sha256, writable_folder
from densepred.inference.folds import DONE, RECORD, read_record, write_record
from densepred.progress import Advance, progress
from densepred.signals import StopSignals

WAITING, RUNNING, STOPPED, FAILED = "waiting", "running", "stopped", "failed"
LOGS = "logs"
_WEIGHTS, _METRICS = "model.safetensors", "metrics.csv"
_POLL = 0.1
_TAIL = 4000  # bytes of a log in which the fault is looked for


@dataclass
class FoldState:
    """A fold and how far it is.

    Args:
        fold: its number.
        runs: its run directories, relative to the cross-validation.
        cases: ids of the cases that it does not see.
        state: `DONE`, "waiting", "running", "stopped" or "failed".
        why: of a fold that is not done.
        weights: SHA-256 of those of each run, when it was done.
        data: hash of what it learns from, see `Shared.told_of`; empty of earlier versions.
    """

    fold: int
    runs: list[str]
    cases: list[str]
    state: str = WAITING
    why: str = ""
    weights: list[str] = field(default_factory=list)
    data: str = ""

    def is_done(self, out: Path) -> bool:
        """Whether it was done and its weights are still those."""
        paths = [out / run / _WEIGHTS for run in self.runs]
        return self.state == DONE and all(map(Path.is_file, paths)) and [*map(sha256, paths)] == self.weights


class Record:
    """`crossval.json`: the folds and their states; written at each change.

    Args:
        out: the folder of the cross-validation.
        folds: all that were asked for now.

    Raises:
        InputError: what a finished one has learnt from has changed since.
    """

    def __init__(self, out: Path, folds: Sequence[FoldState]) -> None:
        self.out, self.folds = out, list(folds)
        before = {one.fold: one for one in read_states(out)}
        for index, one in enumerate(self.folds):
            known = before.pop(one.fold, None)
            if known is not None and known.cases == one.cases and known.runs == one.runs and known.is_done(out):
                if known.data and known.data != one.data:
                    what = f"what fold {one.fold} has learnt from has changed: labels, images or cells of the table"
                    raise InputError(what, "restore it, or choose another --out folder", out)
                self.folds[index] = known
        self.folds = sorted([*self.folds, *(one for one in before.values())], key=lambda one: one.fold)
        self.save()

    @property
    def done(self) -> list[FoldState]:
        """The folds that are."""
        return [one for one in self.folds if one.state == DONE]

    def save(self) -> None:
        """Write it, if it changed."""
        write_record(self.out / RECORD, {"folds": [vars(one) for one in self.folds]})

    def __str__(self) -> str:
        counts = {state: sum(one.state == state for one in self.folds) for state in (DONE, STOPPED, FAILED, WAITING)}
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def read_states(out: Path) -> list[FoldState]:
    """The folds that a folder knows; none if it is new.

    Raises:
        InputError: the record is damaged.
    """
    if not (out / RECORD).is_file():
        return []
    try:
        return [FoldState(**one) for one in read_record(out / RECORD)["folds"]]
    except (KeyError, TypeError) as error:
        what = f"damaged ({error!r})"
        raise InputError(what, "remove it: folds that are there are looked at anew", out / RECORD) from error


def train_folds(record: Record, asked: Sequence[int], devices: Sequence[str], training: TrainingConfig) -> None:
    """Train the folds that are not done; one that fails does not end the others.

    Args:
        record: says which are done, and is kept up to date.
        asked: numbers of the folds to train.
        devices: one for each process at a time; none: one process, on the device of the recipe.
        training: says how long each fold takes, for the progress.

    Raises:
        StoppedError: a signal; each process has saved its state, and the same command goes on.
    """
    folds = [one for one in record.folds if one.fold in asked and one.state != DONE]
    budget = training.budget and round(parse_duration(training.budget))
    each, unit = (budget, " (s)") if budget else (training.epochs, "")
    far = partial(_seconds if budget else _epochs, record.out, each)
    before = sum(map(far, folds))
    with StopSignals() as stop, progress(len(folds) * each, f"training folds{unit}", before) as advance:
        _Crew(record, folds, list(devices) or [RECIPES_OWN], stop, far).run(advance, before)
        if stop.signal is not None:
            fix = "run the same command again to go on"
            raise StoppedError(f"stopped by a signal: {record}", stop.exit_code, fix)


class _Crew:
    """The processes of several folds, one for each slot at a time."""

    def __init__(
        self,
        record: Record,
        folds: list[FoldState],
        slots: list[str],
        stop: StopSignals,
        far: Callable[[FoldState], int],
    ) -> None:
        self._record, self._folds, self._slots, self._stop, self._far = record, folds, slots, stop, far
        self._waiting = list(folds)
        self._running: dict[int, tuple[FoldState, subprocess.Popen[bytes]]] = {}
        self._asked: set[int] = set()  # processes that were asked to stop; a second signal would kill them

    def run(self, advance: Advance, done: int) -> None:
        """Until all folds have ended, or after a signal those that run."""
        try:
            while self._fill() or self._running:
                self._collect()
                if self._stop.signal is not None:
                    self._ask()
                now = sum(map(self._far, self._folds))
                if now > done:
                    advance(now - done)
                    done = now
                time.sleep(_POLL)
        finally:  # nothing is left running, whatever ends this
            self._ask()
            for one, process in self._running.values():
                _ended(self._record.out, one, process.wait())
            self._record.save()

    def _fill(self) -> bool:
        """Start waiting folds where nothing runs; whether one was started."""
        free = [slot for slot in range(len(self._slots)) if slot not in self._running]
        if self._stop.signal is not None or not self._waiting or not free:
            return False
        for slot in free[: len(self._waiting)]:
            one = self._waiting.pop(0)
            one.state, one.why = RUNNING, ""
            self._running[slot] = (one, _started(self._record.out, one, self._slots[slot], self._slots))
        self._record.save()
        return True

    def _collect(self) -> None:
        """Note which have ended."""
        for slot, (one, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                _ended(self._record.out, one, process.returncode)
                self._record.save()

    def _ask(self) -> None:
        """Ask those that run to save their state and end."""
        for _, process in self._running.values():
            if process.pid not in self._asked:
                self._asked.add(process.pid)
                process.send_signal(signal.SIGTERM)


def _started(out: Path, one: FoldState, device: str, slots: Sequence[str]) -> subprocess.Popen[bytes]:
    """The process of a fold; a signal of the terminal goes to this program alone, which hands it on."""
    (run,) = one.runs
    command = python("-m", "densepred.crossval.fold", out / RECIPE, out / run, one.fold, device, os.getpid())
    log = os.open(writable_folder(out / LOGS) / f"{run}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(device, slots),
            start_new_session=True,
        )
    finally:
        os.close(log)


def _environment(device: str, slots: Sequence[str]) -> dict[str, str]:
    """Processes that share the cores have their share of threads, unless OMP_NUM_THREADS says how many."""
    env = environment()
    sharing = slots.count("cpu")
    if device == "cpu" and sharing > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        env.setdefault("OMP_NUM_THREADS", str(max(cores // sharing, 1)))
    return env


def _ended(out: Path, one: FoldState, code: int) -> None:
    """Note what became of a fold."""
    if code == CODE_DONE:
        one.state, one.weights = DONE, [sha256(out / run / _WEIGHTS) for run in one.runs]
        return
    one.state = STOPPED if code in (SIGINT, SIGTERM, -signal.SIGINT, -signal.SIGTERM) else FAILED
    killed = f"killed by signal {-code}" + (" (is the memory exhausted?)" if code == -signal.SIGKILL else "")
    one.why = killed if code < 0 else _fault(out / LOGS / f"{one.runs[0]}.log") or f"exit code {code}"


def _fault(log: Path) -> str:
    """The last error of a log."""
    text = log.read_bytes()[-_TAIL:].decode(errors="replace")
    found = re.findall(r"^ERROR (.+)$|^(\w+Error: .+)$", text, re.MULTILINE)
    return next(filter(None, found[-1]), "") if found else ""


def _epochs(out: Path, each: int, one: FoldState) -> int:
    """Epochs of `each` that a fold has done, by its metrics; all if it is done."""
    return each if one.state == DONE else min(max(len(_metrics(out, one)) - 1, 0), each)


def _seconds(out: Path, each: int, one: FoldState) -> int:
    """Seconds of `each` that a fold has trained, likewise; the time of validations is not among them."""
    header, *rows = _metrics(out, one) or [b""]
    at = header.split(b",").index(b"seconds") if rows else 0
    return each if one.state == DONE else min(int(float(rows[-1].split(b",")[at])) if rows else 0, each)


def _metrics(out: Path, one: FoldState) -> list[bytes]:
    """The whole lines of the table of a fold."""
    path = out / one.runs[0] / _METRICS
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
