"""Which cases the files, folders and patterns of a command stand for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from densepred.cases.case import Case, Problem, confused, confusion, fault_of, is_truth, patterns_of
from densepred.cases.patterns import id_of, is_store, match, split_pattern
from densepred.config import Config, DataConfig
from densepred.errors import InputError, NothingDoneError
from densepred.inference.listed import is_list, listed_cases
from densepred.volumes import FORMATS, split_part

_PLANES = ("mask", "weight")


def find_inputs(inputs: Sequence[str], config: Config, channels: Sequence[str]) -> list[Case]:
    """The cases that files, folders, patterns and lists stand for, sorted by id.

    The recipe's patterns tell which files belong together: channels, data-quality and weight planes, labels. They are
    looked up whole from the folder of the files and from those above it, then by their last parts in the folder. A file
    that they match as an image comes with the others of its case; labels and planes are no images where theirs is one.
    Files named `<id>_0000`, `<id>_0001`, ... make one case, as in nnU-Net, if the recipe has a list and the model as
    many channels. Any other file is a case, with the planes that have its id in its folder. A CSV or a `dataset.json`
    lists cases; planes that it does not name are looked up by the id, from its folder too.

    A case that lacks a file has no such plane, or a `fault`, so that it fails alone.

    Args:
        inputs: files (with a part in brackets), folders, glob patterns, lists.
        config: the recipe.
        channels: names of those that the images have.

    Raises:
        NothingDoneError: none is found.
        InputError: a folder or pattern gives none, a list is faulty, or two cases have one id.
    """
    around = Around(config.data)
    cases: list[Case] = []
    files: list[Path] = []
    empty: list[str] = []
    for item in inputs:
        folder = Path(os.path.abspath(item))
        there = around.look(folder) if folder.is_dir() and not is_store(folder) else Matched()
        rest = [] if there.cases and around.telling else [path for path in _matches(item) if path not in there.others]
        empty += [] if there.cases or rest else [item]
        cases += there.cases
        files += rest
    lists = [path for path in dict.fromkeys(files) if is_list(path)]
    listed = [
        around.with_planes(case, path.parent) for path in lists for case in listed_cases(path, config.data, channels)
    ]
    together, alone = around.of_files([path for path in dict.fromkeys(files) if path not in lists], len(channels))
    cases = [*listed, *(around.with_planes(case) for case in dict.fromkeys((*cases, *together, *alone)))]
    others, said = _beside(cases), _beside(listed)
    taken = {case.images for case in alone if case.images[0] in others}
    taken |= {case.images for case in cases[len(listed) :] if case.images[0] in said}
    cases = [replace(case, label=None) for case in cases if case.images not in taken]
    if not cases:
        fix = f"give files ending in {', '.join(FORMATS)}, or their folder"
        raise NothingDoneError(f"no inputs matched {', '.join(map(repr, inputs))}{_seen(inputs)}", fix)
    if empty:
        what = f"no inputs matched {', '.join(map(repr, empty))}{_seen(empty)}"
        raise InputError(what, "correct it or leave it out")
    return _by_id(cases)


@dataclass(frozen=True)
class Matched:
    """What the recipe's patterns find in a folder: cases with an image there, and labels and planes of cases."""

    cases: list[Case] = field(default_factory=list)
    others: set[Path] = field(default_factory=set)


class Around:
    """Looks up the recipe's patterns around folders, each folder once.

    Args:
        data: has the patterns.
    """

    def __init__(self, data: DataConfig) -> None:
        images, planes = data.patterns() if data.images is not None else {}, data.planes() | data.maps()
        self.telling = len(images) > 1 or bool(planes and images)
        self.telling |= any("{id}" in p or split_pattern(p)[1] for p in images.values())
        """A folder holds no other images than those the patterns match."""
        self._listed = data.dataset is not None
        roles = patterns_of(images, planes, data.labels)
        self._patterns = dict(zip(roles, _tails(list(roles.values()), data.root), strict=True))
        self._channels = tuple(roles)[: len(images)]
        self._seen: dict[Path, Matched] = {}
        self._owners: dict[Path, dict[Path, Case]] = {}
        self._planes: dict[tuple[Path, str], list[dict[str, list[Path]]]] = {}

    def look(self, folder: Path) -> Matched:
        """What lies in a folder, by the first place of the patterns that says something of it."""
        if folder not in self._seen:
            places = self._places(folder) if self._channels else ()
            found = (self._match(folder, root, patterns) for root, patterns in places)
            self._seen[folder] = next((one for one in found if one.cases or one.others), Matched())
        return self._seen[folder]

    def of_files(self, files: Sequence[Path], channels: int) -> tuple[list[Case], list[Case]]:
        """The cases whose images are among files, and one for each of the other files."""
        cases, rest = _by_number(files, channels) if self._listed else ([], files)
        alone: list[Case] = []
        for file in rest:
            path, part = split_part(file)
            case = self._owner(path)
            if case is not None and part and file not in case.images:
                case = _of_version(case, part)
            if (
                case is None
                or (part and _plain(file) not in map(_plain, case.images))
                or (case.fault and not self.telling)
            ):
                alone.append(Case(id_of(path), (file,)))
            else:
                cases.append(case)
        return cases, alone

    def _owner(self, path: Path) -> Case | None:
        """The case that has a file as an image."""
        if path.parent not in self._owners:
            cases = self.look(path.parent).cases
            pairs = ((split_part(image)[0], case) for case in reversed(cases) for image in case.images)
            self._owners[path.parent] = dict(pairs)  # the first of several
        return self._owners[path.parent].get(path)

    def with_planes(self, case: Case, folder: Path | None = None) -> Case:
        """A case with those of its planes that have its id in a folder or else in that of its image."""
        image, part = split_part(case.images[0])
        found: dict[str, Path] = {}
        for role in _PLANES:
            if role in self._patterns and getattr(case, role) is None and case.fault is None:
                folders = [image.parent] if folder is None else [folder, image.parent]
                tried = [by_id for one in folders for by_id in self._planes_in(one, role)]
                there = [[path for path in by_id.get(case.id, []) if _goes_with(path, image, part)] for by_id in tried]
                found |= next(({role: paths[0]} for paths in there if len(paths) == 1), {})
        if confused(found, self._patterns):
            found = {}
        return replace(case, mask=case.mask or found.get("mask"), weight=case.weight or found.get("weight"))

    def _planes_in(self, folder: Path, role: str) -> list[dict[str, list[Path]]]:
        """Id -> files of a plane, by its whole pattern in the folder and by the last part of that."""
        if (folder, role) not in self._planes:
            pattern = self._patterns[role]
            tried = dict.fromkeys((pattern, _last(pattern)))
            self._planes[folder, role] = [match([one], folder)[0] for one in tried]
        return self._planes[folder, role]

    def _places(self, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
        """Where patterns are looked up for a folder, and which: whole from it and from above, then their last parts."""
        depth = max(pattern.partition("**")[0].count("/") for pattern in self._patterns.values())
        for root in (folder, *folder.parents[:depth]):
            yield root, self._patterns
        yield folder, {role: _last(pattern) for role, pattern in self._patterns.items()}

    def _match(self, folder: Path, root: Path, patterns: Mapping[str, str]) -> Matched:
        found = dict(zip(patterns, match(list(patterns.values()), root), strict=True))
        for by_id in found.values():
            for name, paths in by_id.items():
                by_id[name] = [path for path in paths if path.is_relative_to(folder)] or paths
        images = [found[role] for role in self._channels]
        ids = {name for by_id in images for name, paths in by_id.items() if paths[0].is_relative_to(folder)}
        cases = [self._case(name, {role: found[role].get(name, []) for role in found}) for name in sorted(ids)]
        if cases or root == folder:
            return Matched(cases)
        rest = (paths for role, by_id in found.items() if role not in self._channels for paths in by_id.values())
        others = {split_part(path)[0] for paths in rest for path in paths if path.is_relative_to(folder)}
        return Matched([], others)

    def _case(self, name: str, files: Mapping[str, list[Path]]) -> Case:
        """A case of what was found; what is missing or ambiguous is left out, of an image it is a fault."""
        faults: list[Problem] = []
        for role, paths in files.items():
            fault = fault_of(name, paths, role, self._patterns[role])
            if fault is not None and not is_truth(role) and (paths or role in self._channels):
                faults.append(fault)
        one = {role: paths[0] for role, paths in files.items() if paths}
        for pair in confused(one, self._patterns):
            if pair[1] in self._channels:
                faults.append(confusion(name, one, pair, self._patterns))
            one = {role: path for role, path in one.items() if role not in pair or role in self._channels}
        images = tuple(path for role, path in one.items() if role in self._channels)
        fault = next(iter(faults), None)
        return Case(name, images, one.get("label"), None, one.get("mask"), one.get("weight"), fault)


def _beside(cases: Sequence[Case]) -> set[Path]:
    """What is not an image of theirs."""
    return {path for case in cases for path in (case.mask, case.weight, case.label) if path is not None}


def _tails(patterns: Sequence[str], root: str) -> list[str]:
    """Patterns relative to the recipe's root or, where some lead out of it, to the folder that holds all."""
    divided = [split_pattern(pattern) for pattern in patterns]
    start = os.path.abspath(root)
    whole = [os.path.normpath(os.path.join(start, pattern)) for pattern, _ in divided]
    if any(not Path(pattern).is_relative_to(start) for pattern in whole):
        start = os.path.commonpath([os.path.dirname(re.split(r"[*?\[{]", pattern)[0]) for pattern in whole])
    tails = [os.path.relpath(pattern, start) for pattern in whole]
    return [f"{tail}[{part}]" if part else tail for tail, (_, part) in zip(tails, divided, strict=True)]


def _last(pattern: str) -> str:
    plain, part = split_pattern(pattern)
    return Path(plain).name + (f"[{part}]" if part else "")


def _of_version(case: Case, part: str) -> Case | None:
    """A case with other versions of its HDUs, `SCI,2` or `SCI,all` for `SCI,1` and likewise of its planes; or None."""
    name, _, wanted = part.rpartition(",")
    own, _, version = (split_part(case.images[0])[1] or "").rpartition(",")
    if not name or name.strip().lower() != own.strip().lower():
        return None

    def other(path: Path | None) -> Path | None:
        file, held = (None, None) if path is None else split_part(path)
        plane, _, its = (held or "").rpartition(",")
        return Path(f"{file}[{plane},{wanted.strip()}]") if plane and its.strip() == version.strip() else path

    images = tuple(image for image in map(other, case.images) if image is not None)
    return replace(case, images=images, mask=other(case.mask), weight=other(case.weight), label=None)


def _plain(path: Path) -> str:
    return re.sub(r"\s*,\s*", ",", str(path)).lower()


def _goes_with(plane: Path, image: Path, part: str | None) -> bool:
    """Another file than the image's; or another part of it, of the same version."""
    path, own = split_part(plane)
    if path != image:
        return True
    if not part or not own or part == own or part.isdecimal() or own.isdecimal():
        return False
    return part.partition(",")[2].strip().lower() == own.partition(",")[2].strip().lower()


def _by_number(files: Sequence[Path], channels: int) -> tuple[list[Case], Sequence[Path]]:
    """Cases of files `<id>_0000`, ..., and the other files; all are others if no case has each of the channels.

    A case that lacks some has a fault.
    """
    numbers = [f"{number:04d}" for number in range(channels)]
    grouped: dict[str, dict[str, Path]] = {}
    rest: list[Path] = []
    for path in files:
        named = re.fullmatch(r"(.+)_(\d{4})", id_of(path))
        if named is None:
            rest.append(path)
        elif named[2] in numbers:
            grouped.setdefault(named[1], {})[named[2]] = path
        else:
            return [], files
    if not any(len(group) == channels for group in grouped.values()):
        return [], files
    cases = []
    for case, group in grouped.items():
        images = tuple(group[number] for number in sorted(group))
        lacking = next((number for number in numbers if number not in group), None)
        what, fix = f"no channel {lacking}: there is no file {case}_{lacking}", "add the file"
        cases.append(Case(case, images, fault=Problem(case, "error", str(images[0]), what, fix) if lacking else None))
    return cases, rest


def _by_id(cases: Sequence[Case]) -> list[Case]:
    """Sorted.

    Raises:
        InputError: two have one id.
    """
    by_id: dict[str, Case] = {}
    for case in cases:
        twin = by_id.setdefault(case.id, case)
        if (twin.images, twin.mask, twin.weight) != (case.images, case.mask, case.weight):
            what = f"two inputs have the id {case.id}: {twin.images[0]} and {case.images[0]}"
            raise InputError(what, "give the folder above them if the recipe has a pattern with {id}, or predict apart")
    return [by_id[key] for key in sorted(by_id)]


def _matches(item: str) -> list[Path]:
    """The files of an input, absolute; a store or a folder of DICOM slices is one, and so is what is not there."""
    path = Path(item)
    plain, part = split_pattern(item)
    if path.is_dir() and not is_store(path):
        entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        found = [p for p in entries if is_store(p) or (p.is_file() and p.name.lower().endswith(tuple(FORMATS)))]
    elif path.exists() or split_part(item)[0].exists() or not glob.has_magic(plain):
        found = [path]
    else:
        names = glob.glob(plain, recursive=True)
        found = [Path(f"{name}[{part}]" if part else name) for name in names]
    return [Path(os.path.abspath(one)) for one in sorted(found)]


def _seen(inputs: Sequence[str]) -> str:
    """What the folders hold instead."""
    for item in inputs:
        folder = Path(item) if Path(item).is_dir() else Path(item).parent
        if folder.is_dir():
            count = sum(1 for entry in folder.iterdir() if entry.is_file())
            return f" (the folder {folder} holds {count} files)"
    return ""
