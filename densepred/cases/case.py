"""A case: the files of one subject or image. `collect` finds all cases of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from densepred.cases.patterns import id_of, match, nothing_matched
from densepred.config import DataConfig
from densepred.errors import InputError, UnsafeError

__all__ = ["Case", "Found", "Problem", "by_patterns", "collect", "find", "id_of", "raise_all"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True)
class Case:
    """The files of one case: an image file per channel (or one that holds them all), its label, its group."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None


@dataclass(frozen=True)
class Problem:
    """A row of the report: an error stops training, a note does not."""

    case: str
    severity: Literal["error", "note"]
    file: str
    what: str
    fix: str = ""


@dataclass
class Found:
    """The cases of a data set that can be read, and what is wrong with it."""

    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def error(self, case: str, file: str | Path, what: str, fix: str) -> None:
        """Note an error."""
        self.problems.append(Problem(case, "error", str(file), what, fix))


def collect(data: DataConfig) -> list[Case]:
    """All cases, sorted by id; labels are demanded where the configuration or the list speaks of them.

    Raises:
        InputError: duplicate or impossible ids, missing files, images without labels, labels without images: all named.
        NothingDoneError: no image was found.
        UnsafeError: an id that is a path.
    """
    found = find(data)
    raise_all([problem for problem in found.problems if problem.severity == "error"])
    return found.cases


def find(data: DataConfig) -> Found:
    """As `collect`, but returns the problems beside the cases that have none."""
    if data.dataset is not None:
        from densepred.cases.lists import read_list

        found = read_list(Path(data.root) / data.dataset)
    elif data.images is not None:
        channels = data.images if isinstance(data.images, dict) else {"image": data.images}
        found = by_patterns(channels, data.labels, Path(data.root))
    else:
        raise InputError("no images are named", "give data.images (a pattern) or data.dataset (a list)")
    _check_ids(found)
    found.cases = [case for case in sorted(found.cases, key=lambda case: case.id) if _files_exist(case, found)]
    return found


def by_patterns(channels: dict[str, str], labels: str | None, root: Path) -> Found:
    """The cases that patterns find.

    Args:
        channels: channel name -> pattern, in the order of the channels.
        labels: pattern of the labels; None leaves the cases without.
        root: the folder they are relative to.
    """
    *images, truths = match([*channels.values(), *([labels] if labels else [])], root) + ([] if labels else [{}])
    ids = sorted(set().union(*images))
    if not ids:
        raise nothing_matched(next(iter(channels.values())), root)
    found = Found()
    for case in ids:
        files = [by_id.get(case, []) for by_id in images]
        for name, paths, pattern in zip(channels, files, channels.values(), strict=True):
            _one(found, case, paths, f"channel {name}" if len(channels) > 1 else "image", pattern)
        if labels:
            _one(found, case, truths.get(case, []), "label", labels)
        if all(len(paths) == 1 for paths in [*files, *([truths.get(case, [])] if labels else [])]):
            label = truths[case][0] if labels else None
            found.cases.append(Case(case, tuple(paths[0] for paths in files), label))
    for case in sorted(set(truths) - set(ids)):
        found.error(case, truths[case][0], "a label without an image", "add the image or remove the label")
    return found


def _one(found: Found, case: str, paths: list[Path], role: str, pattern: str) -> None:
    """Of each role a case has exactly one file."""
    if not paths:
        what = f"no {role}: nothing matches '{pattern.replace('{id}', case)}'"
        found.error(case, "", what, "add the file, or remove the other files of this case")
    elif len(paths) > 1:
        what = f"{len(paths)} files share this id: {', '.join(map(str, paths))}"
        found.error(case, paths[0], what, "put {id} into the pattern where the paths differ")


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise one `InputError` that names every problem, if there is any."""
    rows = list(problems)
    if not rows:
        return
    lines = [": ".join(part for part in (row.case, row.file, row.what) if part) for row in rows]
    fixes = list(dict.fromkeys(row.fix for row in rows if row.fix))
    if len(rows) == 1:
        raise InputError(rows[0].what, rows[0].fix, rows[0].file or None, rows[0].case or None)
    count = f"{len(rows)} problems with the cases"
    raise InputError("\n  ".join([count, *lines]), "; ".join(fixes[:3]))


def _check_ids(found: Found) -> None:
    """Ids become file names: they must be plain, and differ in more than case."""
    seen: dict[str, Case] = {}
    good: list[Case] = []
    for case in found.cases:
        file = case.images[0]
        if any(sign in case.id for sign in "/\\\0") or case.id in (".", ".."):
            raise UnsafeError(f"the id {case.id!r} is a path", "use letters, digits and . _ + -", file)
        twin = seen.setdefault(case.id.casefold(), case)
        if not _ID.fullmatch(case.id):
            what = f"impossible id {case.id[:60]!r}: 1 to 200 letters, digits and . _ + -, the first no sign"
            found.error(case.id[:60], file, what, "rename the file, or give an id in a CSV")
        elif twin is not case:
            same = "the same id" if twin.id == case.id else f"an id that differs from {twin.id} in case only"
            found.error(case.id, file, f"has {same} as {twin.images[0]}", "give every case an id of its own")
        else:
            good.append(case)
    found.cases = good


def _files_exist(case: Case, found: Found) -> bool:
    files = [*case.images, *([case.label] if case.label else [])]
    missing = [path for path in files if not path.is_file()]
    for path in missing:
        found.error(case.id, path, "no such file", "correct the list, or add the file")
    return not missing
