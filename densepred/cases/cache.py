"""Preprocessed cases on disk, in chunks of which patches are read.

A folder per case, named by its id and the start of its key: the hash of the contents of its files, of the settings and
of this module's version. It gets its name when all is in it, so a killed preparation leaves whole cases, and the next
one goes on with the others. `image` and `label` are Zarr arrays with a checksum for each chunk
(`densepred.cases.store`); `counts.npy` says how often each class stands in each chunk of the label, from which any
voxel of a class is found; `meta.json` says what the folder was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.preprocess import prepared
from densepred.cases.store import ArrayWriter, StoredArray
from densepred.errors import DensepredError, InputError, LockedError, ResourceError, StoppedError
from densepred.files import atomic_folder, atomic_write, locked, sha256, sweep_parts, writable_folder
from densepred.volumes import split_part

CACHE_VERSION = 4
"""Raised whenever the arrays would come out otherwise."""
MOST_AT_ONCE = 8
"""Cases that are prepared at a time, where there are as many cores."""
META, COUNTS, LOCK = "meta.json", "counts.npy", ".preparing"
_SETTINGS = {
    "dims",
    "label_map",
    "ignore",
    "spacing",
    "resampling",
    "slices",
    "normalize",
    "reading",
    "instances",
    "targets",
}

_SMALL = (".json", ".npy")  # files without checksums of their own
_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_Stamp = tuple[str, int, int, int | None]
"""Path, size, and the times of the last change of content and of anything, of which no program sets the second."""


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case. The arrays hold no file open, and of what is indexed only its chunks are read."""

    id: str
    folder: Path
    key: str
    shape: tuple[int, ...]
    """Of the image, `(C, *spatial)`."""
    spacing: tuple[float, ...]
    """Of its voxels."""
    classes: dict[int, int]
    """Foreground class -> its voxels."""
    labelled: int
    """Voxels with a truth."""

    @property
    def image(self) -> StoredArray:
        """Float32 `(C, *spatial)`, normalised; indexed as an array."""
        return self._open("image")

    @property
    def label(self) -> StoredArray:
        """Class indices `(*spatial)`, int8 or int16, -1 where there is no truth."""
        return self._open("label")

    @property
    def counts(self) -> np.ndarray:
        """int64 `(chunks of the label, classes)`: how often each class stands in each chunk."""
        path = self.folder / COUNTS
        try:
            counts: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            self._discard()
            fix = f"run again, and this case is prepared anew; if it happens again, remove {self.folder}"
            raise InputError(f"the cache is damaged ({error})", fix, path, self.id) from error
        return counts

    def _open(self, name: str) -> StoredArray:
        return StoredArray(self.folder / name, self._discard, self.id)

    def _discard(self) -> None:
        """Without it the case counts as absent, and is prepared anew the next time."""
        (self.folder / META).unlink(missing_ok=True)


def prepare(
    cases: Sequence[Case],
    plan: Plan,
    folder: str | Path,
    progress: Callable[[], None] | None = None,
    workers: int | None = None,
) -> list[CachedCase]:
    """Preprocess the cases that are not in the cache yet, several at a time, each plane by plane.

    A file whose path, size and time of change are known is not hashed again. One process at a time prepares in a
    folder; another waits, and then finds what it needs.

    Args:
        cases: with labels.
        plan: how to preprocess.
        folder: of the cache; several trainings may share it.
        progress: called after each case.
        workers: cases at a time; by default one for each core, at most `MOST_AT_ONCE`. What comes out does not depend
            on it. Each takes about a hundred megabytes.

    Returns:
        The cases in the given order.

    Raises:
        InputError: names every case that cannot be prepared, after the others have been.
        ResourceError: the disk or the memory is full; what is done stays.
    """
    folder = writable_folder(folder)
    with _alone(folder):
        return _prepare_all(cases, plan, folder, progress, workers)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder; waits while another process does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, LOCK))
        except LockedError as error:
            _LOG.warning("waiting: another run prepares cases in this folder (%s): %s", error.what, folder)
            stack.enter_context(locked(folder, LOCK, wait=True))
        yield


def _prepare_all(
    cases: Sequence[Case], plan: Plan, folder: Path, progress: Callable[[], None] | None, workers: int | None
) -> list[CachedCase]:
    known = _known_hashes(folder)
    sweep_parts(folder)
    done: list[CachedCase] = []
    faults: list[DensepredError] = []

    def make(case: Case, stop: Event) -> CachedCase | DensepredError:
        try:
            return _prepare(case, plan, folder, known, stop)
        except (ResourceError, StoppedError):
            raise
        except DensepredError as error:
            return error.of_case(case.id)

    workers = workers or min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)
    with contextlib.closing(_each(make, cases, workers)) as each:
        for found in each:
            if isinstance(found, DensepredError):
                faults.append(found)
            else:
                done.append(found)
            if progress is not None:
                progress()
    if len(faults) == 1:
        raise faults[0]
    if faults:
        rows = [f"{fault.case}: {fault.file}: {fault.what}" for fault in faults]
        fixes = list(dict.fromkeys(fault.fix for fault in faults))
        what = "\n  ".join([f"{len(faults)} of {len(cases)} cases cannot be prepared", *rows])
        raise InputError(what, "; ".join(fixes[:3]) or "look at them with densepred check")
    return done


def _each(make: Callable[[Case, Event], T], cases: Sequence[Case], workers: int) -> Generator[T, None, None]:
    """make(case, stop) of each case in order, several at a time; `stop` is set when one breaks off."""
    stop = Event()
    broken: list[BaseException] = []

    def run(case: Case) -> T:
        try:
            return make(case, stop)
        except BaseException as error:
            broken.append(error)
            stop.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="densepred-prepare") as pool:
        futures = [pool.submit(run, case) for case in cases]
        try:
            for future in futures:
                yield future.result()
        except BaseException as error:
            cause = broken[0] if broken else error  # what else was raised only followed from it
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise cause from None


def _prepare(case: Case, plan: Plan, folder: Path, known: dict[_Stamp, str], stop: Event) -> CachedCase:
    if case.label is None and plan.classes:
        raise InputError("no label", "add the label or leave the case out", case.images[0], case.id)
    _go_on(stop)
    files = [_stamp(path, known) for path in case.files]
    divided = {role: split_part(path) for role, path in case.roles.items()}
    roles = [[role, case.files.index(path), part] for role, (path, part) in divided.items()]
    settings = plan.model_dump(mode="json", include=_SETTINGS)
    text = json.dumps([CACHE_VERSION, [file["sha256"] for file in files], roles, settings], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    entry = folder / f"{case.id}.{key[:16]}"
    meta = _read_meta(entry)
    if meta is None or meta["key"] != key:
        with atomic_folder(entry) as part:
            meta = _build(case, plan, part, stop) | {"key": key, "id": case.id, "files": files}
            atomic_write(part / META, json.dumps(meta, indent=1))
    elif meta["files"] != files:
        atomic_write(entry / META, json.dumps(meta | {"files": files}, indent=1))
    classes = {int(index): count for index, count in meta["classes"].items()}
    return CachedCase(case.id, entry, key, tuple(meta["shape"]), tuple(meta["spacing"]), classes, int(meta["labelled"]))


def _build(case: Case, plan: Plan, part: Path, stop: Event) -> dict[str, Any]:
    """Write the arrays; returns what `meta.json` says of them."""
    small = np.dtype(np.int8 if len(plan.classes) <= np.iinfo(np.int8).max else np.int16)
    with prepared(case, plan) as one:
        shape = one.shape
        with (
            ArrayWriter(part / "image", shape, np.dtype(np.float32), len(shape) - 1) as image,
            ArrayWriter(part / "label", shape[1:], small, len(shape) - 1) as label,
        ):

            def of_image(planes: np.ndarray) -> None:
                _go_on(stop)
                image.add(planes)

            one.write(of_image, lambda planes: label.add(planes.astype(small)))
    counts = _counts(StoredArray(part / "label", case=case.id), max(len(plan.classes), 1))
    content = io.BytesIO()
    np.save(content, counts, allow_pickle=False)
    (part / COUNTS).write_bytes(content.getvalue())  # to a path, numpy.save takes a full disk for a success
    found = counts.sum(0).tolist()
    return {
        "shape": list(shape),
        "spacing": list(one.spacing),
        "classes": {str(index): count for index, count in enumerate(found) if index and count},
        "labelled": sum(found),
        "sizes": {str(path.relative_to(part)): path.stat().st_size for path in _stored(part)},
        "sums": {str(path.relative_to(part)): sha256(path) for path in _stored(part) if path.suffix in _SMALL},
    }


def _go_on(stop: Event) -> None:
    if stop.is_set():
        raise StoppedError("stopped while cases were prepared", fix="run again to go on")


def _counts(label: StoredArray, classes: int) -> np.ndarray:
    """How often each class stands in each chunk, int64 `(chunks, classes)`."""
    rows = [
        np.bincount(label.block(number).reshape(-1) + 1, minlength=classes + 1)[1:]
        for number in range(int(np.prod(label.grid)))
    ]
    return np.stack(rows).astype(np.int64)


def _stored(entry: Path) -> list[Path]:
    return sorted(path for path in entry.rglob("*") if path.is_file() and path.name != META)


def _read_meta(entry: Path) -> dict[str, Any] | None:
    """What is said of an entry; None unless it is whole."""
    try:
        meta: dict[str, Any] = json.loads((entry / META).read_text())
        whole = all((entry / name).stat().st_size == size for name, size in meta["sizes"].items())
        whole = whole and all(sha256(entry / name) == digest for name, digest in meta["sums"].items())
        return meta if whole and {"key", "files", "shape", "spacing", "classes", "labelled"} <= meta.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _known_hashes(folder: Path) -> dict[_Stamp, str]:
    """Stamp -> hash, of all files that went into the cache."""
    metas = (_read_meta(entry) for entry in folder.iterdir() if entry.is_dir())
    files = [file for meta in metas if meta is not None for file in meta["files"]]
    return {(file["path"], file["size"], file["mtime_ns"], file.get("ctime_ns")): file["sha256"] for file in files}


def _stamp(path: Path, known: dict[_Stamp, str]) -> dict[str, Any]:
    try:
        stat = path.stat()
        where = str(path.resolve())  # a folder's own time says nothing of the files in it
        found = None if path.is_dir() else known.get((where, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        digest = found or sha256(path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "check the path and its permissions", path) from error
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"path": where, "size": stat.st_size, **times, "sha256": digest}
