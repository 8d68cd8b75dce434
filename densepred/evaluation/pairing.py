"""Which files belong to which case, judged by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from densepred.cases.patterns import id_of, is_store, match
from densepred.errors import InputError, NothingDoneError
from densepred.volumes import FORMATS, split_part

Files: TypeAlias = "str | Path | Iterable[str | Path] | Mapping[str, str | Path]"


def find_files(files: Files, what: str) -> dict[str, Path]:
    """The files of a set by case id, sorted; the id is the name without its suffix.

    Args:
        files: a folder (the volumes in it, not those of folders within), a file, a pattern with `{id}`, several files,
            or ids with files.
        what: what these files are, for the messages.

    Raises:
        InputError: there is no such folder or file, or two files have one id.
        NothingDoneError: there are no files.

    Example:
        >>> find_files(["a/case_7.nii.gz"], "labels")
        {'case_7': PosixPath('a/case_7.nii.gz')}
    """
    if isinstance(files, Mapping):
        pairs = [(str(case), Path(path)) for case, path in files.items()]
    elif isinstance(files, (str, Path)) and "{id}" in str(files):
        pairs = [(case, path) for case, paths in match([str(files)], Path())[0].items() for path in paths]
    elif isinstance(files, (str, Path)):
        pairs = [(id_of(path), path) for path in _listed(Path(files), what)]
    else:
        pairs = [(id_of(path), Path(path)) for path in files]
    if not pairs:
        raise NothingDoneError(f"no {what} given", "name a folder or files")
    found: dict[str, Path] = {}
    for case, path in sorted(pairs):
        if case in found:
            raise InputError(f"two {what} of one case: {found[case]} and {path}", "rename or remove one", case=case)
        found[case] = path
    return found


def _listed(folder: Path, what: str) -> list[Path]:
    """The volumes of a folder, without hidden and unfinished files; a file, or a part of it, stands for itself."""
    file = split_part(folder)[0]
    if file.is_file() or is_store(file):
        return [folder]
    if not folder.is_dir():
        raise InputError(f"no such folder of {what}", "check the path", folder)
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = [path for path in names if path.is_file() or is_store(path)]
    volumes = [path for path in names if path.name.lower().endswith(tuple(FORMATS))]
    if not volumes:
        kinds = Counter(path.suffix or "other" for path in names).most_common(3)
        holds = ", ".join(f"{count} {suffix} files" for suffix, count in kinds) or "no files"
        message = f"no {what}: no file of a known format (.nii.gz, .fits, .tif ...) here, the folder holds {holds}"
        raise NothingDoneError(message, "check the path", folder)
    return volumes
