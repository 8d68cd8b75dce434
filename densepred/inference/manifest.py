"""The journal of a folder of predictions: what was written for each case, from what, and by which model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from densepred.files import atomic_write, needing_space, sha256, sync


class Manifest:
    """A line of JSON for each case; of several for one case the last holds, and one that cannot be read is dropped.

    `id`; `outputs`, every file that was written for the case and may still lie there, with its hash; what these were
    made from: `inputs` (the hashes of the files), `roles` (what each is for: role, number of the file, part), `model`
    and `config`; `begun`, the files that are just being put in their places; `failed`, why the case could not be
    done anew.

    Args:
        path: the file; its folder is that of the outputs.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.found = path, path.parent, path.exists()
        lines = path.read_text(errors="replace").splitlines(keepends=True) if self.found else []
        read = [entry for entry in map(_parsed, lines) if entry is not None]
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in read}

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

    def settle(self) -> None:
        """Take what was begun and not ended as written: the files as they are now."""
        for entry in [entry for entry in self.entries.values() if "begun" in entry]:
            there = [path for name in entry["begun"] if (path := self.folder / name).exists()]
            rest = {key: value for key, value in entry.items() if key != "begun"}
            self._append(rest | {"outputs": entry["outputs"] | self._hashes(there)})

    def add(self, entry: dict[str, Any], files: Iterable[Path]) -> None:
        """Record a case that is done; earlier outputs stay known where they are made from the same."""
        outputs = self.entries[entry["id"]]["outputs"] if self.holds(entry) else {}
        self._append(entry | {"outputs": outputs | self._hashes(files)})

    def note(self, case: str, failed: str | None) -> None:
        """Say of the outputs of a case that it could not be done anew, or no longer; written by `compact`."""
        if case in self.entries:
            self.entries[case].pop("failed", None)
            self.entries[case] |= {} if failed is None else {"failed": failed}

    def compact(self) -> None:
        """Write a line for each case, in the order in which they were done first."""
        text = "".join(map(_line, self.entries.values()))
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            atomic_write(self.path, text)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _hashes(self, files: Iterable[Path]) -> dict[str, str]:
        return {self._name(path): sha256(path) for path in files}

    def _append(self, entry: dict[str, Any]) -> None:
        self.entries[entry["id"]] = entry
        with needing_space(self.path), open(self.path, "a") as file:
            file.write(_line(entry))
        sync(self.path)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """The entry of a line; None if it is torn, or names files outside the folder."""
    try:
        entry: dict[str, Any] = json.loads(line)
        if "output" in entry:  # of versions that wrote one file a case
            entry["outputs"] = {entry.pop("output"): entry.pop("sha256")}
        paths = [Path(name) for name in [*dict(entry["outputs"]), *entry.get("begun", ())]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    inside = all(path.parts and not path.is_absolute() and ".." not in path.parts for path in paths)
    return entry if inside and isinstance(entry.get("id"), str) and line.endswith("\n") else None
