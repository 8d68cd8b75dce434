"""The journal of a folder of predictions: what was written for each case, from what, and by which model."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from densepred.files import append, atomic_write, sha256
from densepred.inference.shards import Shard, record_of, records_of

MANIFEST = "manifest.jsonl"


class Manifest:
    """A line of JSON for each case; of several for one case the last holds, and one that cannot be read is dropped.

    `id`; `outputs`, every file that was written for the case and may still lie there, with its hash; what these were
    made from: `inputs` (the hashes of the files), `roles` (what each is for: role, number of the file, part), `model`
    and `config`; `begun`, the files that are just being put in their places; `failed`, why the case could not be
    done anew.

    A shard knows the lines of all manifests of the folder and writes its own; `turn` counts how often a case went from
    one manifest to another, and the highest holds. A run without shards takes all over.

    Args:
        folder: that of the outputs.
        shard: whose manifest it is; that of a run without shards if None.
    """

    def __init__(self, folder: Path, shard: Shard | None = None) -> None:
        self.folder, self._shard, self.path = folder, shard, folder / record_of(MANIFEST, shard)
        self.found = bool(records_of(MANIFEST, folder))
        self.entries: dict[str, dict[str, Any]] = _read(self.path)
        self._own = set(self.entries)
        self._lock = threading.Lock()
        self.look_again()
        if shard is None:
            self._own = set(self.entries)
            for entry in self.entries.values():
                entry.pop("turn", None)

    def look_again(self) -> None:
        """Take in what others have recorded since."""
        for path in records_of(MANIFEST, self.folder):
            for case, entry in _read(path).items() if path != self.path else ():
                known = self.entries.get(case)
                newer = known is None or _turn(entry) > _turn(known)
                if newer or (case not in self._own and _turn(entry) == _turn(known or {})):
                    self.entries[case] = entry
                    self._own.discard(case)

    def holds(self, entry: dict[str, Any]) -> bool:
        """Are the outputs of this case made from these inputs by this model?"""
        known = self.entries.get(entry["id"], {})
        return all(known.get(key) == value for key, value in entry.items())

    def outputs(self, case: str) -> list[Path]:
        """The files that were written for a case and still lie there, changed or not."""
        paths = (self.folder / name for name in self.entries.get(case, {}).get("outputs", {}))
        return [path for path in paths if path.exists()]

    def wrote(self, case: str, path: Path) -> bool:
        """Does a file lie there as it was written for this case?"""
        digest = self.entries.get(case, {}).get("outputs", {}).get(self._name(path))
        return digest is not None and path.exists() and sha256(path) == digest

    def begin(self, entry: dict[str, Any], files: Iterable[Path]) -> None:
        """Note that files are about to be put in their places, so that a run that is killed there knows them again."""
        case = entry["id"]
        known = self.entries.get(case, {}) if self.holds(entry) else {}
        outputs = self.entries.get(case, {}).get("outputs", {})
        self._append(known | {"id": case, "outputs": outputs, "begun": [self._name(path) for path in files]})

    def settle(self, cases: Collection[str] | None = None) -> None:
        """Take what was begun and not ended as written: the files as they are now.

        Args:
            cases: for which; all if None.
        """
        entries = list(self.entries.items())  # other threads may add to them
        begun = [entry for case, entry in entries if "begun" in entry and (cases is None or case in cases)]
        for entry in begun:
            there = [path for name in entry["begun"] if (path := self.folder / name).exists()]
            rest = {key: value for key, value in entry.items() if key != "begun"}
            self._append(rest | {"outputs": entry["outputs"] | self._hashes(there)})

    def add(self, entry: dict[str, Any], files: Iterable[Path]) -> None:
        """Record a case that is done; earlier outputs stay known where they are made from the same."""
        outputs = self.entries[entry["id"]]["outputs"] if self.holds(entry) else {}
        self._append(entry | {"outputs": outputs | self._hashes(files)})

    def note(self, case: str, failed: str | None) -> None:
        """Say of the outputs of a case that it could not be done anew, or no longer; written by `compact`."""
        known = self.entries.get(case, {})
        if known and known.get("failed") != failed:
            rest = {key: value for key, value in known.items() if key != "failed"}
            self._take(rest | ({} if failed is None else {"failed": failed}))

    def compact(self) -> None:
        """Write a line for each case, in the order of the ids; without shards, in the place of all manifests."""
        with self._lock:
            text = "".join(_line(self.entries[case]) for case in sorted(self._own))
            if not self.path.exists() or self.path.read_bytes() != text.encode():
                atomic_write(self.path, text)
        if self._shard is None:
            for path in records_of(MANIFEST, self.folder):
                if path != self.path:
                    path.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _hashes(self, files: Iterable[Path]) -> dict[str, str]:
        return {self._name(path): sha256(path) for path in files}

    def _take(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Have an entry as one of this manifest's; returns it with its turn."""
        case = entry["id"]
        known = self.entries.get(case)
        turn = 0 if known is None else _turn(known) + (case not in self._own)
        entry = {key: value for key, value in entry.items() if key != "turn"} | ({"turn": turn} if turn else {})
        self.entries[case] = entry
        self._own.add(case)
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            append(self.path, _line(self._take(entry)))


def _turn(entry: dict[str, Any]) -> int:
    return int(entry.get("turn", 0))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each case of a file that need not be there."""
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    return {entry["id"]: entry for entry in map(_parsed, lines) if entry is not None}


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """The entry of a line; None if it is torn, or names files outside the folder."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if "output" in entry:  # of versions that wrote one file a case
            entry["outputs"] = {entry.pop("output"): entry.pop("sha256")}
        paths = [Path(name) for name in [*dict(entry["outputs"]), *entry.get("begun", ())]]
        _turn(entry)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    inside = all(path.parts and not path.is_absolute() and ".." not in path.parts for path in paths)
    return entry if inside and isinstance(entry.get("id"), str) and line.endswith("\n") else None
