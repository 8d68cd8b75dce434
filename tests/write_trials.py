"""A server of trials of writing: every one a process forked from this one, which has no thread but its first.

A request is the arguments of `run`; the answer is the list of trials.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from densepred.errors import DensepredError
from densepred.volumes import FORMATS, Volume, open_writer
from tests.disk_faults import Fault, Trial, attempt
from tests.trial_server import serve

_OF_IMAGES = "densepred.volumes.image"
_THREADED = (".zarr",)
"""A forked process has no thread but its own, so these are not written before."""
MOST = 400
"""Trials of one request."""


def values_for(suffix: str, seed: int) -> np.ndarray:
    """`(C, *spatial)` that the format of a suffix can hold; more than fits into one write."""
    noise = np.random.default_rng(seed)
    if FORMATS[suffix] == _OF_IMAGES:
        return noise.integers(0, 256, (3, 70, 90)).astype(np.uint8)
    return noise.normal(0, 1, (2, 6, 50, 50)).astype(np.float32)


def write(path: Path, values: np.ndarray) -> None:
    """Slab by slab."""
    like = Volume(values[:1], (1.0,) * (values.ndim - 1))
    with open_writer(path, like, values.dtype, channels=values.shape[0]) as writer:
        for start in range(0, values.shape[1], 4):
            writer.write(values[:, start : start + 4])


def digest(path: Path) -> str:
    """What is at `path`: a file, or a folder with all that is in it."""
    found = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        content = part.read_bytes() if part.is_file() else b""
        found.update(f"{part.relative_to(path)} {len(content)} ".encode() + content)
    return found.hexdigest()


@dataclass
class Outcome(Trial):
    """A trial and what it left.

    Attributes:
        digest: of what is at the path.
        others: what else is in the folder.
    """

    digest: str
    others: list[str]


def _put(source: Path, path: Path) -> None:
    shutil.copytree(source, path, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(suffix: str, folder: Path, fault: Fault) -> list[Outcome]:
    """Replace `folder/work/x<suffix>` by other values, struck at each change of the disk in turn, until one is not.

    `folder/<digest>/x<suffix>` keeps one of each state that was found; the old one is put back before every trial.
    """
    path = folder / "work" / f"x{suffix}"
    first = digest(path)
    values = values_for(suffix, 2)
    if suffix not in _THREADED:
        write(folder / path.name, values)  # what libraries load at the first time they have then, and not in each trial
    assert len(os.listdir("/proc/self/task")) == 1

    def work() -> str:
        try:
            write(path, values)
        except DensepredError as error:
            return f"{error.exit_code} {error.file}"
        return ""

    found: list[Outcome] = []
    for last in itertools.count(1):
        trial = attempt(work, path.parent, last, fault)
        state = digest(path)
        others = sorted(entry.name for entry in path.parent.iterdir() if entry != path)
        found.append(Outcome(**asdict(trial), digest=state, others=others))
        if not (folder / state).exists():
            (folder / state).mkdir()
            _put(path, folder / state / path.name)
        if trial.struck is None or last == MOST:
            return found
        if state != first:
            _remove(path)
            _put(folder / first / path.name, path)
    raise AssertionError


if __name__ == "__main__":
    serve(lambda suffix, folder, fault: [asdict(outcome) for outcome in run(suffix, Path(folder), fault)])
