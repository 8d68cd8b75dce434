"""A server of predictions under limits: every one in a process forked from this one, which has no thread but its first.

A request is the arguments of `run`; the answer is what became of it.
"""

from __future__ import annotations

import functools
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from densepred.errors import DensepredError
from densepred.inference import batch, memory
from densepred.inference.predictor import load
from tests.disk_faults import attempt
from tests.trial_server import serve

LONGEST = 100
"""Seconds of the processor that a prediction may take, and a third of the clock's."""


@dataclass
class Outcome:
    """What became of a prediction.

    Attributes:
        status: its exit status, below 0 if it was killed.
        said: its log, its messages, and its tracebacks if there are any.
        struck: the change of the disk from which on the disk was full.
    """

    status: int
    said: str
    struck: str | None = None


@dataclass(frozen=True)
class Trial:
    """A prediction and its limits.

    Args:
        run: the run directory.
        inputs: of the batch.
        out: its folder.
        overrides: as for `batch.predict`.
        megabytes: that the process may have beyond those it has after a small image (RLIMIT_DATA).
        full_at: the change of what is in `out` from which on the disk is full, from 1.
        widest: lines of a band.
    """

    run: str
    inputs: Sequence[str]
    out: str
    overrides: Sequence[str] = ()
    megabytes: int | None = None
    full_at: int = 0
    widest: int | None = None


def in_use() -> int:
    """Bytes that count against RLIMIT_DATA."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def predict(trial: Trial) -> int:
    """Predict under the limits of memory; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST))
    signal.alarm(3 * LONGEST)
    if trial.widest is not None:
        most = trial.widest
        memory.widest = lambda *_: most  # type: ignore[assignment]
    if trial.megabytes is not None:
        limit = in_use() + trial.megabytes * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        result = batch.predict(trial.run, trial.inputs, trial.out, trial.overrides)
    except DensepredError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for error in result.failed.values():
        sys.stderr.write(f"{error}\n")
    return result.exit_code


@functools.cache
def warm(run: str) -> None:
    """Predict a small image, so that libraries are there."""
    load(run, ["inference.window=[16, 16]"]).predict(np.zeros((16, 16), np.float32))


def run(settings: dict[str, object]) -> Outcome:
    """Do a trial in a process of its own."""
    trial = Trial(**settings)  # type: ignore[arg-type]
    warm(trial.run)
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > 1:  # threads that were joined may be seen a little longer
        assert time.monotonic() < end
        time.sleep(0.01)
    with tempfile.TemporaryFile("w+") as log:
        work = functools.partial(_reported, trial, log.fileno())
        struck = None
        if trial.full_at:
            found = attempt(lambda: str(work()), Path(trial.out), trial.full_at, "full")
            struck, status = found.struck, int(found.said)
        else:
            if (pid := os.fork()) == 0:
                os._exit(work())
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.seek(0)
        return Outcome(status, log.read(), struck)


def _reported(trial: Trial, log: int) -> int:
    """Predict, and write what is said to a file."""
    os.dup2(log, 2)
    try:
        return predict(trial)
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve(lambda settings: asdict(run(settings)))
