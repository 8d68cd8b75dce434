"""File patterns with `{id}`: the files they match, and the id that each file gives."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from densepred.errors import NothingDoneError
from densepred.volumes import FORMATS, split_part

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".fz")
_TOKENS = re.compile(r"\{id\}|\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[{]+|.")
_PART = re.compile(rf"(.+(?:{'|'.join(map(re.escape, FORMATS))}))\[([^\[\]]+)\]", re.IGNORECASE)
_SPECIAL = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def id_of(path: str | Path) -> str:
    """The id a file gives by its name: without the suffix of its format and of a compression, or a part in brackets.

    A folder of slices gives its whole name, such as a UID.

    Example:
        >>> id_of("scans/sub-01_1.5T.nii.gz")
        'sub-01_1.5T'
        >>> id_of("cell_7.ome.tif")
        'cell_7'
    """
    file = split_part(path)[0]
    name = file.name
    if not name.lower().endswith(tuple(FORMATS)) and file.is_dir():
        return name
    if name.lower().endswith(COMPRESSED):
        name = name[: name.rfind(".")]
    stem, suffix = os.path.splitext(name)
    return stem.removesuffix(".ome") if suffix.lower() in (".tif", ".tiff", ".zarr") else stem


def split_pattern(pattern: str) -> tuple[str, str | None]:
    """A pattern and the part in brackets behind it, which chooses one image of the files it matches.

    Example:
        >>> split_pattern("{id}_flc.fits[SCI,1]"), split_pattern("scan[0-9].nii.gz")
        (('{id}_flc.fits', 'SCI,1'), ('scan[0-9].nii.gz', None))
    """
    found = _PART.fullmatch(pattern)
    return (found[1], found[2]) if found else (pattern, None)


def match(patterns: Sequence[str], root: Path) -> list[dict[str, list[Path]]]:
    """The files of each pattern by id.

    A pattern is relative to `root` or absolute; `*`, `**`, `?` and `[...]` are as in a shell, `{id}` stands for the id.
    Without `{id}` the file's name gives it. A file that several patterns match belongs to the most specific one (the
    one with the most fixed characters), so `{id}.nii.gz` and `{id}_seg.nii.gz` may lie in one folder; patterns that
    choose different parts of it share it. A part in brackets behind a pattern goes behind the paths it gives.
    """
    divided = [split_pattern(pattern) for pattern in patterns]
    patterns, parts = [os.path.normpath(pattern) for pattern, _ in divided], [part for _, part in divided]
    found = [_glob(pattern, root) for pattern in patterns]
    weight = [sum(len(token) for token in _TOKENS.findall(pattern) if not _is_special(token)) for pattern in patterns]
    best: dict[Path, int] = {}
    for files, fixed in zip(found, weight, strict=True):
        for path in files:
            best[path] = max(best.get(path, 0), fixed)
    out: list[dict[str, list[Path]]] = []
    for files, fixed, part in zip(found, weight, parts, strict=True):
        by_id: dict[str, list[Path]] = {}
        for path, case in files.items():
            if best[path] == fixed:
                by_id.setdefault(case, []).append(path if part is None else Path(f"{path}[{part}]"))
        out.append(by_id)
    return out


def is_store(path: Path) -> bool:
    """Whether a folder is one image: a Zarr store, or the slices of a DICOM series and no other images or folders."""
    if not path.is_dir():
        return False
    if path.name.lower().endswith(tuple(FORMATS)):
        return True
    try:
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    except PermissionError:  # such as lost+found
        return False
    images = [name for entry in entries if (name := entry.name.lower()).endswith(tuple(FORMATS))]
    series = bool(images) and all(name.endswith(".dcm") for name in images)
    return series and not any(entry.is_dir() for entry in entries)


def nothing_matched(pattern: str, root: Path) -> NothingDoneError:
    """The error for a pattern without any file; it tells what lies there instead."""
    fixed = os.path.normpath(re.split(r"[*?\[{]", pattern)[0] + "x")
    folder = (root / fixed).parent
    if not folder.is_dir():
        seen = f"there is no folder {folder}"
    else:
        suffixes = Counter("".join(_suffixes(path)) or "suffixless" for path in folder.iterdir() if path.is_file())
        held = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3))
        seen = f"the folder {folder} holds {held or 'no'} files"
    what = f"no images matched '{pattern}' under {root} ({seen})"
    return NothingDoneError(what, "correct data.root or the pattern", root)


def _suffixes(path: Path) -> list[str]:
    return path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:]


def _is_special(token: str) -> bool:
    return token in _SPECIAL or token == "{id}" or (token[0] == "[" and len(token) > 1)


def _glob(pattern: str, root: Path) -> dict[Path, str]:
    """File -> id, in the order of their names."""
    expression = _regex(pattern)
    out: dict[Path, str] = {}
    for name in sorted(glob.glob(pattern.replace("{id}", "*"), root_dir=root, recursive=True)):
        matched = expression.fullmatch(name)
        path = root / name
        if matched and (not path.is_dir() or is_store(path)):
            out[path] = matched["id"] if "{id}" in pattern else id_of(path)
    return out


def _regex(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression; a second `{id}` must repeat the first."""
    parts: list[str] = []
    for token in _TOKENS.findall(pattern):
        if token == "{id}":
            parts.append("(?P=id)" if any(part.startswith("(?P<id>") for part in parts) else "(?P<id>[^/]+)")
        elif token in _SPECIAL:
            parts.append(_SPECIAL[token])
        elif token[0] == "[" and len(token) > 1:
            parts.append(token.replace("[!", "[^", 1))
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts))
