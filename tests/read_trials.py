"""A server that reads files which may be damaged, each request in a process forked from it, and tells what came of it.

A request is the arguments of `run`. A crash, an endless loop and the memory taken are those of the forked process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from densepred.errors import DensepredError
from densepred.volumes import Volume, open_volume
from tests.trial_server import serve, serving

LONGEST = 20
"""Seconds that one read may take."""
MOST_MEGABYTES = 200
"""By which memory may grow."""
_MOST_ADDRESSES = 4 << 30
"""Bytes beyond its own that a process may map, lest a fault fill the machine: more than the tests allow."""


@dataclass
class Answer:
    """What came of the reads of a request.

    Attributes:
        reads: one of "same", "geometry" (the same values on another grid), "other" (other values), "refused <why>",
            "nameless <why>" (an error of ours that does not name the file) and "escaped <traceback>".
        status: of the process: 0, or the negative number of the signal that ended it; then the last read is missing.
        megabytes: by which its memory grew at the most.
        seconds: that the longest read took.
    """

    reads: list[str]
    status: int
    megabytes: float
    seconds: float


@contextmanager
def reader() -> Iterator[Callable[..., Answer]]:
    """Asks a server: `(path, axes=None, part=path, flips=())`, see `run`."""
    with serving("tests.read_trials") as ask:

        def read(path: Path, axes: str | None = None, part: Path | None = None, flips: Sequence[int] = ()) -> Answer:
            return Answer(**ask(str(path), axes, str(part or path), list(flips)))

        yield read


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one bit changed, counted from the lowest of the first byte."""
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def run(path: str, axes: str | None, part: str, flips: Sequence[int]) -> Answer:
    """Read `path` once for each flip of a bit in `part`, a file of it; once as it is if there is none."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open(send, "w") as out:
            _reads(out, Path(path), axes, Path(part), flips)
            out.flush()
            os._exit(0)
    os.close(send)
    with open(receive) as lines:
        reads = [json.loads(line) for line in lines if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    memory = max([growth for _, growth, _ in reads], default=0.0)
    return Answer([read for read, _, _ in reads], status, memory, max([took for *_, took in reads], default=0.0))


def _reads(out: IO[str], path: Path, axes: str | None, part: Path, flips: Sequence[int]) -> None:
    before = _status("VmRSS")
    mapped = int(_status("VmSize") * 1e6)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_ADDRESSES, resource.RLIM_INFINITY))
    sound = part.read_bytes() if flips else b""
    first = _read(path, axes) if flips else None
    for content in _damaged(sound, flips):
        if flips:
            part.write_bytes(content)
        signal.alarm(LONGEST)
        started = time.monotonic()
        said = _tried(path, axes, first)
        took = time.monotonic() - started
        signal.alarm(0)
        out.write(json.dumps([said, _status("VmHWM") - before, took]) + "\n")
        out.flush()
    if flips:
        part.write_bytes(sound)


def _damaged(sound: bytes, flips: Sequence[int]) -> Iterator[bytes]:
    yield from (flipped(sound, bit) for bit in flips) if flips else (sound,)


def _read(path: Path, axes: str | None) -> tuple[Volume, np.ndarray]:
    with warnings.catch_warnings(action="ignore"), open_volume(path, axes) as volume:
        return volume, volume.numpy()


def _tried(path: Path, axes: str | None, first: tuple[Volume, np.ndarray] | None) -> str:
    try:
        volume, values = _read(path, axes)
    except DensepredError as error:
        named = error.file == path and error.fix and "\n" not in error.what
        return f"{'refused' if named else 'nameless'} {error}"
    except BaseException:
        return f"escaped {traceback.format_exc()}"
    if first is None or values.dtype != first[1].dtype or not np.array_equal(values, first[1], equal_nan=True):
        return "other"
    sound = first[0]
    same = volume.spacing == sound.spacing and np.array_equal(volume.affine, sound.affine)  # type: ignore[arg-type]
    return "same" if same and volume.labels == sound.labels else "geometry"


def _status(name: str) -> float:
    """A line of this process's own status, in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(name))


if __name__ == "__main__":
    serve(lambda *request: asdict(run(*request)))
