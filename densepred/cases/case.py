"""A case: the files of one subject or image. `collect` finds all cases of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from densepred.cases.patterns import id_of, is_store, match, nothing_matched
from densepred.config import DataConfig
from densepred.config.data import TARGET
from densepred.errors import InputError, UnsafeError
from densepred.volumes import companions, paired, split_part

__all__ = ["Case", "Found", "Problem", "by_patterns", "check_ids", "collect", "find", "id_of", "raise_all"]

_SEVERAL = re.compile(r"\[(.+,\s*)?all\]$", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True)
class Problem:
    """A row of the report: an error stops training, a note does not."""

    case: str
    severity: Literal["error", "note"]
    file: str
    what: str
    fix: str = ""

    @property
    def error(self) -> InputError:
        """The same, to raise."""
        return InputError(self.what, self.fix, self.file or None, self.case or None)


@dataclass(frozen=True)
class Case:
    """The files of one case, each perhaps with a part in brackets behind it.

    Args:
        id: plain, and so the name of what is written.
        images: a file per channel, or one that holds them all.
        label: the truth.
        group: whose cases stay in one fold.
        mask: a data-quality plane.
        weight: a plane of weights or errors.
        maps: role, `target NAME` -> file of that target's truth; as pairs.
        fault: why it cannot be predicted, though it was asked for.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None
    mask: Path | None = None
    weight: Path | None = None
    fault: Problem | None = None
    maps: tuple[tuple[str, Path], ...] = ()

    @property
    def roles(self) -> dict[str, Path]:
        """What each path is for: "image 0", "image 1", ..., "mask", "weight", "label", "target NAME"."""
        named = {f"image {number}": path for number, path in enumerate(self.images)}
        others = {"mask": self.mask, "weight": self.weight, "label": self.label}
        return named | {role: path for role, path in others.items() if path is not None} | dict(self.maps)

    def check(self) -> None:
        """Raise what is known to be wrong with it.

        Raises:
            InputError: its fault.
        """
        if self.fault is not None:
            raise self.fault.error

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What a prediction reads, each file once, without parts: images and planes, and what belongs to them."""
        return _with_companions(path for role, path in self.roles.items() if not is_truth(role))

    @property
    def files(self) -> tuple[Path, ...]:
        """As `inputs`, with the files of label and targets."""
        return _with_companions(self.roles.values())


def is_truth(role: str) -> bool:
    """Whether a path is for training and scores alone: the label, and the maps of targets."""
    return role == "label" or role.startswith(TARGET)


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

        path = Path(data.root) / data.dataset
        found = read_list(path)
        _add_planes(found, data, path)
    elif data.images is not None:
        found = by_patterns(data.patterns(), data.labels, Path(data.root), data.planes() | data.maps())
    else:
        raise InputError("no images are named", "give data.images (a pattern) or data.dataset (a list)")
    check_ids(found)
    there = [case for case in sorted(found.cases, key=lambda case: case.id) if _files_exist(case, found)]
    found.cases = [one for case in there for one in _apart(case, data, found)]
    check_ids(found)
    return found


def _apart(case: Case, data: DataConfig, found: Found) -> list[Case]:
    """A case for each of the images where the files are said to hold several; they stay in one fold."""
    if data.axes != "xyzt" and not any(_SEVERAL.search(str(path)) for path in case.roles.values()):
        return [case]
    try:
        images = paired(case.roles, dict.fromkeys(case.roles, data.axes))
    except InputError as error:
        found.error(case.id, error.file or case.images[0], error.what, error.fix)
        return []
    cases = []
    for number, paths in enumerate(images):
        one = {role: Path(path) for role, path in paths.items()}
        channels = tuple(path for role, path in one.items() if role.startswith("image"))
        planes = (one.get("label"), case.group or case.id, one.get("mask"), one.get("weight"))
        maps = tuple((role, path) for role, path in one.items() if role.startswith(TARGET))
        cases.append(Case(f"{case.id}_{number}" if len(images) > 1 else case.id, channels, *planes, maps=maps))
    return cases


def by_patterns(
    channels: Mapping[str, str], labels: str | None, root: Path, planes: Mapping[str, str] | None = None
) -> Found:
    """The cases that patterns find.

    Args:
        channels: channel name -> pattern, in the order of the channels.
        labels: pattern of the labels; None leaves the cases without.
        root: the folder they are relative to.
        planes: "mask", "weight" and the roles of targets -> pattern.
    """
    roles = patterns_of(channels, planes or {}, labels)
    matched = dict(zip(roles, match(list(roles.values()), root), strict=True))
    images = list(matched.values())[: len(channels)]
    ids = sorted(set().union(*images))
    if not ids:
        raise nothing_matched(next(iter(channels.values())), root)
    found = Found()
    for case in ids:
        files = {role: by_id.get(case, []) for role, by_id in matched.items()}
        problems = [fault for role in roles if (fault := fault_of(case, files[role], role, roles[role]))]
        one = {role: paths[0] for role, paths in files.items() if paths}
        problems += [confusion(case, one, pair, roles) for pair in confused(one, roles)]
        found.problems += problems
        if not problems:
            image, rest = tuple(one.values())[: len(channels)], (one.get("mask"), one.get("weight"))
            maps = tuple((role, path) for role, path in one.items() if role.startswith(TARGET))
            found.cases.append(Case(case, image, one.get("label"), None, *rest, maps=maps))
    for case in sorted(set(matched.get("label", {})) - set(ids)):
        found.error(case, matched["label"][case][0], "a label without an image", "add the image or remove the label")
    return found


def patterns_of(channels: Mapping[str, str], planes: Mapping[str, str], labels: str | None) -> dict[str, str]:
    """Role -> pattern: "image" or "channel <name>" of each, then "mask" and "weight", then "label"."""
    images = {f"channel {name}" if len(channels) > 1 else "image": pattern for name, pattern in channels.items()}
    return {**images, **planes, **({"label": labels} if labels else {})}


def confused(files: Mapping[str, Path], patterns: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of roles that one file (and part) fills, though the recipe has a pattern of its own for each."""
    pairs = combinations(files, 2)
    return [(a, b) for a, b in pairs if files[a] == files[b] and patterns[a] != patterns[b]]


def confusion(case: str, files: Mapping[str, Path], pair: Sequence[str], patterns: Mapping[str, str]) -> Problem:
    """The problem of a pair that `confused` gives."""
    what = f"one file for {pair[0]} and {pair[1]}, which the recipe tells apart by their folders or names "
    what += f"({patterns[pair[0]]}, {patterns[pair[1]]})"
    return Problem(case, "error", str(files[pair[0]]), what, "give the folder above these, or correct the patterns")


def _add_planes(found: Found, data: DataConfig, path: Path) -> None:
    """Give listed cases, where the list does not name them, the planes that patterns find by their ids.

    Planes that the list names and the recipe does not are refused: prediction would do without them. Targets that are
    maps are found likewise.
    """
    planes = data.planes() | data.maps()
    for role in ("mask", "weight"):
        if role not in planes and any(getattr(case, role) is not None for case in found.cases):
            what = f"the list has a {role}, and the recipe has no data.validity.{role}, by which prediction finds one"
            found.error("", path, what, f"add data.validity.{role}: a pattern with {{id}}, or take the column out")
    matched = dict(zip(planes, match(list(planes.values()), Path(data.root)), strict=True))
    whole: list[Case] = []
    for case in found.cases:
        wanted = [role for role in planes if role not in case.roles]
        paths = {role: matched[role].get(case.id, []) for role in wanted}
        problems = [fault for role in wanted if (fault := fault_of(case.id, paths[role], role, planes[role]))]
        found.problems += problems
        if not problems:
            mask, weight = (paths[role][0] if role in paths else getattr(case, role) for role in ("mask", "weight"))
            maps = tuple((role, found_paths[0]) for role, found_paths in paths.items() if role.startswith(TARGET))
            whole.append(replace(case, mask=mask, weight=weight, maps=maps))
    found.cases = whole


def fault_of(case: str, paths: Sequence[Path], role: str, pattern: str) -> Problem | None:
    """Of each role a case has exactly one file."""
    if not paths:
        what = f"no {role}: nothing matches '{pattern.replace('{id}', case)}'"
        return Problem(case, "error", "", what, "add the file, or remove the other files of this case")
    if len(paths) > 1:
        what = f"{len(paths)} files share this id: {', '.join(map(str, paths))}"
        return Problem(case, "error", str(paths[0]), what, "put {id} into the pattern where the paths differ")
    return None


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise one `InputError` that names every problem, if there is any."""
    rows = list(problems)
    if not rows:
        return
    lines = [": ".join(part for part in (row.case, row.file, row.what) if part) for row in rows]
    fixes = list(dict.fromkeys(row.fix for row in rows if row.fix))
    if len(rows) == 1:
        raise rows[0].error
    count = f"{len(rows)} problems with the cases"
    raise InputError("\n  ".join([count, *lines]), "; ".join(fixes[:3]))


def check_ids(found: Found) -> None:
    """Ids become file names: they must be plain, and differ in more than case; the cases with others are left out.

    Raises:
        UnsafeError: one is a path.
    """
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
    missing = missing_files(case)
    found.problems += missing
    return not missing


def missing_files(case: Case, label: bool = True) -> list[Problem]:
    """A problem for each of the files of a case that is not there.

    Args:
        case: its files.
        label: look for that and for targets too.
    """
    files = dict.fromkeys(split_part(path)[0] for role, path in case.roles.items() if label or not is_truth(role))
    gone = [path for path in files if not (path.is_file() or is_store(path))]
    return [Problem(case.id, "error", str(path), "no such file", "correct the list, or add the file") for path in gone]


def _with_companions(paths: Iterable[Path]) -> tuple[Path, ...]:
    files = dict.fromkeys(split_part(path)[0] for path in paths)
    return tuple(dict.fromkeys(one for file in files for one in (file, *companions(file))))
