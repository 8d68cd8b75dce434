"""Preprocessed cases on disk, as plain .npy files that are read through memory maps.

A folder per case, named by its id and the start of its key: the hash of the contents of its files, of the settings and
of this module's version. `meta.json` is written last, so a folder without it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.preprocess import preprocess
from densepred.errors import DensepredError, InputError, ResourceError, StoppedError
from densepred.files import atomic_path, atomic_write, sha256, sweep_parts, writable_folder
from densepred.volumes import split_part

CACHE_VERSION = 2
"""Raised whenever the arrays would come out otherwise."""
MAX_LOCATIONS = 10_000
"""Voxels kept per class to centre patches on."""
META, ARRAYS = "meta.json", ("image", "label", "locations")
_SETTINGS = {"dims", "label_map", "ignore", "spacing", "normalize", "reading", "instances", "targets"}


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case. The arrays are opened at each access and hold no file open; keep them while you use them."""

    id: str
    folder: Path
    key: str
    shape: tuple[int, ...]
    """Of the image, `(C, *spatial)`."""
    classes: dict[int, tuple[int, int]]
    """Foreground class -> its rows in `locations`."""

    @property
    def image(self) -> np.ndarray:
        """Float32 `(C, *spatial)`, normalised."""
        return self._open("image")

    @property
    def label(self) -> np.ndarray:
        """Class indices `(*spatial)`, int8 or int16, -1 where there is no truth."""
        return self._open("label")

    @property
    def locations(self) -> np.ndarray:
        """int32 `(n, 1 + dims)`: class index and position of voxels, sorted by class."""
        return self._open("locations")

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"the cache is damaged ({error})", f"remove {self.folder}", path, self.id) from error
        return array


def prepare(
    cases: Sequence[Case], plan: Plan, folder: str | Path, progress: Callable[[], None] | None = None
) -> list[CachedCase]:
    """Preprocess the cases that are not in the cache yet.

    A file whose path, size and time of change are known is not hashed again.

    Args:
        cases: with labels.
        plan: how to preprocess.
        folder: of the cache; several trainings may share it.
        progress: called after each case.

    Returns:
        The cases in the given order.

    Raises:
        InputError: names every case that cannot be prepared, after the others have been.
        ResourceError: the disk or the memory is full; what is done stays.
    """
    folder = writable_folder(folder)
    known = _known_hashes(folder)
    done: list[CachedCase] = []
    faults: list[DensepredError] = []
    for case in cases:
        try:
            done.append(_prepare(case, plan, folder, known))
        except (ResourceError, StoppedError):
            raise
        except DensepredError as error:
            faults.append(error.of_case(case.id))
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


def _prepare(case: Case, plan: Plan, folder: Path, known: dict[tuple[str, int, int], str]) -> CachedCase:
    if case.label is None and plan.classes:
        raise InputError("no label", "add the label or leave the case out", case.images[0], case.id)
    files = [_stamp(path, known) for path in case.files]
    divided = {role: split_part(path) for role, path in case.roles.items()}
    roles = [[role, case.files.index(path), part] for role, (path, part) in divided.items()]
    settings = plan.model_dump(mode="json", include=_SETTINGS)
    text = json.dumps([CACHE_VERSION, [file["sha256"] for file in files], roles, settings], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    entry = folder / f"{case.id}.{key[:16]}"
    meta = _read_meta(entry)
    if meta is None or meta["key"] != key:
        meta = _build(case, plan, entry, key) | {"files": files}
        atomic_write(entry / META, json.dumps(meta, indent=1))
    elif meta["files"] != files:
        atomic_write(entry / META, json.dumps(meta | {"files": files}, indent=1))
    rows = {int(index): (start, stop) for index, (start, stop) in meta["classes"].items()}
    return CachedCase(case.id, entry, key, tuple(meta["shape"]), rows)


def _build(case: Case, plan: Plan, entry: Path, key: str) -> dict[str, Any]:
    """Write the arrays; returns what `meta.json` says of them."""
    image, label = preprocess(case, plan)
    if label is None:  # nothing to tell apart
        label = np.zeros(image.shape[1:], np.int16)
    locations = _locations(label, key)
    entry.mkdir(exist_ok=True)
    sweep_parts(entry)
    small = np.int8 if len(plan.classes) <= np.iinfo(np.int8).max else np.int16
    sizes: dict[str, int] = {}
    for name, array in zip(ARRAYS, (image, label.astype(small), locations), strict=True):
        path = entry / f"{name}.npy"
        with atomic_path(path) as part:
            np.save(part, array, allow_pickle=False)
        sizes[name] = path.stat().st_size
    present, first, counts = np.unique(locations[:, 0], return_index=True, return_counts=True)
    rows = {str(c): [int(at), int(at + n)] for c, at, n in zip(present, first, counts, strict=True)}
    return {"key": key, "id": case.id, "shape": list(image.shape), "classes": rows, "sizes": sizes}


def _locations(label: np.ndarray, key: str) -> np.ndarray:
    """Up to `MAX_LOCATIONS` voxels of each foreground class, drawn by a generator that the key seeds."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(int(key, 16))))
    rows = [np.empty((0, 1 + label.ndim), np.int32)]
    for index in np.unique(label[label > 0]):
        at = np.flatnonzero(label == index)
        if len(at) > MAX_LOCATIONS:
            at = np.sort(generator.choice(at, MAX_LOCATIONS, replace=False))
        rows.append(np.column_stack([np.full(len(at), index), *np.unravel_index(at, label.shape)]).astype(np.int32))
    return np.concatenate(rows)


def _read_meta(entry: Path) -> dict[str, Any] | None:
    """What is said of an entry; None unless it is whole."""
    try:
        meta: dict[str, Any] = json.loads((entry / META).read_text())
        whole = all((entry / f"{name}.npy").stat().st_size == meta["sizes"][name] for name in ARRAYS)
        return meta if whole and {"key", "files", "shape", "classes"} <= meta.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _known_hashes(folder: Path) -> dict[tuple[str, int, int], str]:
    """(path, size, time of change) -> hash, of all files that went into the cache."""
    metas = (_read_meta(entry) for entry in folder.iterdir() if entry.is_dir())
    files = [file for meta in metas if meta is not None for file in meta["files"]]
    return {(file["path"], file["size"], file["mtime_ns"]): file["sha256"] for file in files}


def _stamp(path: Path, known: dict[tuple[str, int, int], str]) -> dict[str, Any]:
    try:
        stat = path.stat()
        where = str(path.resolve())  # a folder's own time says nothing of the files in it
        found = None if path.is_dir() else known.get((where, stat.st_size, stat.st_mtime_ns))
        digest = found or sha256(path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "check the path and its permissions", path) from error
    return {"path": where, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
