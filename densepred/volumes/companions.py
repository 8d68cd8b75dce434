"""Files that belong to an image beside the one that names it: detached voxels, the slices of a DICOM series."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from densepred.errors import InputError
from densepred.volumes import itk_stream

_MOST = 1 << 20
"""Bytes of a header in which names of files are looked for."""


def companions(path: str | Path) -> list[Path]:
    """What else is read where `path` is: the voxels that an `.nhdr` or `.mhd` describes, the folder of a `.dcm`.

    Args:
        path: a file, without a part in brackets.

    Returns:
        Files, or the folder of slices; none of a file that cannot be read, which says so when it is opened.

    Example:
        >>> _ = Path("scan.mhd").write_text("NDims = 2\\nDimSize = 2 2\\nElementDataFile = scan.raw\\n")
        >>> companions("scan.mhd")
        [PosixPath('scan.raw')]
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".dcm" and path.is_file():
        return [path.parent]
    if suffix not in (".nrrd", ".nhdr", ".mha", ".mhd"):
        return []
    try:
        file = itk_stream.locate(path).file
        found = _named(path) if file is None else [file]
    except (InputError, OSError):
        return []
    return [one for one in found if one != path]


def _named(path: Path) -> list[Path]:
    """The files whose names stand in a header, one a line, or as a pattern such as `slice_%03d.raw 1 20 1`."""
    with open(path, "rb") as file:
        lines = file.read(_MOST).decode("latin-1").splitlines()
    found: set[Path] = set()
    for line in lines:
        name = re.split(r"[:=]", line, maxsplit=1)[-1].strip()
        if "%" in name:
            parts = (path.parent / name.split()[0]).parts
            first = next((at for at, part in enumerate(parts) if "%" in part), len(parts))
            pattern = re.sub(r"(?:%\d*[a-z])+", "*", "/".join(parts[first:]))
            with contextlib.suppress(ValueError, NotImplementedError):  # no pattern that files could match
                found.update(Path(*parts[:first]).glob(pattern))
        elif name and (path.parent / name).is_file():
            found.add(path.parent / name)
    return sorted(found)
