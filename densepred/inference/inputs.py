"""Which cases the files, folders and patterns of a command stand for."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from densepred.cases.case import Case, by_patterns, raise_all
from densepred.cases.patterns import id_of, is_store, split_pattern
from densepred.config import Config, DataConfig
from densepred.errors import InputError, NothingDoneError
from densepred.volumes import FORMATS, split_part


def find_inputs(inputs: Sequence[str], config: Config, channels: int) -> list[Case]:
    """The cases that files, folders and patterns stand for, sorted by id.

    The recipe's patterns tell which files of a folder belong together: channels, data-quality and weight planes. A file
    that they match comes with the others of its case. Files named `<id>_0000`, `<id>_0001`, ... make one case, as in
    nnU-Net, if the recipe has a list and the model as many channels. Any other file is a case.

    Args:
        inputs: files (with a part in brackets), folders, glob patterns.
        config: the recipe.
        channels: how many the images have.

    Raises:
        NothingDoneError: none is found.
        InputError: two cases have one id.
    """
    cases: list[Case] = []
    files: list[Path] = []
    for item in inputs:
        folder = Path(item)
        found = _in_folder(folder, config.data) if folder.is_dir() and not is_store(folder) else []
        cases += found
        files += [] if found else _matches(item)
    files = list(dict.fromkeys(files))
    numbered = _by_number(files, channels) if config.data.dataset is not None else []
    cases += numbered or _of_files(files, config.data)
    if not cases:
        fix = f"give files ending in {', '.join(FORMATS)}, or their folder"
        raise NothingDoneError(f"no inputs matched {', '.join(map(repr, inputs))}{_seen(inputs)}", fix)
    by_id: dict[str, Case] = {}
    for case in cases:
        if case.id in by_id and by_id[case.id].images != case.images:
            what = f"two inputs have the id {case.id}: {by_id[case.id].images[0]} and {case.images[0]}"
            raise InputError(what, "give the folder above them if the recipe has a pattern with {id}, or predict apart")
        by_id[case.id] = case
    return [by_id[key] for key in sorted(by_id)]


def _in_folder(folder: Path, data: DataConfig, whole: bool = True) -> list[Case]:
    """The cases of a folder by the recipe's patterns, whole or by their last part; none if they say nothing of it.

    Args:
        folder: where to look.
        data: has the patterns.
        whole: a case that lacks a file is an error; else it is left out.
    """
    patterns, planes = data.patterns(), data.planes()
    telling = len(patterns) > 1 or planes or any("{id}" in p or split_pattern(p)[1] for p in patterns.values())
    if not telling:
        return []
    for shorten in (str, _last):
        with contextlib.suppress(NothingDoneError):
            images = {name: shorten(pattern) for name, pattern in patterns.items()}
            found = by_patterns(images, None, folder, {name: shorten(pattern) for name, pattern in planes.items()})
            if whole:
                raise_all(found.problems)
            return found.cases
    return []


def _last(pattern: str) -> str:
    plain, part = split_pattern(pattern)
    return Path(plain).name + (f"[{part}]" if part else "")


def _of_files(files: Sequence[Path], data: DataConfig) -> list[Case]:
    """A case of each file, with its companions where the recipe's patterns match it."""
    known: dict[Path, dict[Path, Case]] = {}
    cases = []
    for file in files:
        path, part = split_part(file)
        if path.parent not in known:
            found = _in_folder(path.parent, data, whole=False)
            known[path.parent] = {split_part(one)[0]: case for case in found for one in case.images}
        case = known[path.parent].get(path)
        if case is None or (part is not None and file not in case.images):
            case = Case(path.name if path.is_dir() and path.suffix != ".zarr" else id_of(path), (file,))
        cases.append(case)
    return list(dict.fromkeys(cases))


def _by_number(files: Sequence[Path], channels: int) -> list[Case]:
    """Cases of files `<id>_0000`, ...; none if the files are not so named, or have other channels than the model."""
    parts = [(path, re.fullmatch(r"(.+)_(\d{4})", id_of(path))) for path in files]
    if not parts or any(match is None for _, match in parts):
        return []
    grouped: dict[str, dict[str, Path]] = {}
    for path, match in parts:
        if match is not None:
            grouped.setdefault(match[1], {})[match[2]] = path
    numbers = [f"{number:04d}" for number in range(channels)]
    if any(sorted(group) != numbers for group in grouped.values()):
        return []
    return [Case(case, tuple(group[number] for number in numbers)) for case, group in grouped.items()]


def _matches(item: str) -> list[Path]:
    """The files of an input; a store or a folder of DICOM slices is one."""
    path, part = split_part(item)
    if part is not None and path.exists():
        return [Path(item)]
    path = Path(item)
    if path.is_dir() and not is_store(path):
        entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return sorted(p for p in entries if is_store(p) or (p.is_file() and p.name.lower().endswith(tuple(FORMATS))))
    if path.exists() or not glob.has_magic(item):
        return [path]
    plain, part = split_pattern(item)
    found = sorted(Path(match) for match in glob.glob(plain, recursive=True))
    return [Path(f"{one}[{part}]") for one in found] if part else found


def _seen(inputs: Sequence[str]) -> str:
    """What the folders hold instead."""
    for item in inputs:
        folder = Path(item) if Path(item).is_dir() else Path(item).parent
        if folder.is_dir():
            count = sum(1 for entry in folder.iterdir() if entry.is_file())
            return f" (the folder {folder} holds {count} files)"
    return ""
