"""Image files as `Volume`, one module a format, chosen by suffix.

A format is a module with two functions: `read(path, axes, part) -> Volume` and
`open_writer(path, like, dtype, channels, labels)`, a context manager giving a `SlabWriter`. `part` is what stands in
brackets behind the path: `mosaic.fits[SCI,2]`, `cells.h5[raw]`.
"""

from __future__ import annotations

import difflib
import re
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes.channels import stack
from densepred.volumes.volume import GEOMETRY_TOLERANCE, SlabWriter, Volume, corner_offset, label_dtype

__all__ = [
    "FORMATS",
    "GEOMETRY_TOLERANCE",
    "SlabWriter",
    "Volume",
    "corner_offset",
    "label_dtype",
    "open_volume",
    "open_writer",
    "split_part",
    "stack",
    "suffix_of",
]

FORMATS = {
    ".nii": "densepred.volumes.nifti",
    ".nii.gz": "densepred.volumes.nifti",
}
"""Suffix -> module; a module is imported when a file of its format is opened."""


def suffix_of(path: str | Path) -> str:
    """The suffix by which a format is chosen, in lower case.

    Raises:
        InputError: no known format has it.

    Example:
        >>> suffix_of("scan.v2.nii.gz")
        '.nii.gz'
    """
    name = Path(path).name.lower()
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(suffix):
            return suffix
    parts = Path(name).suffixes
    suffix = "".join(parts[-2:]) if parts and parts[-1] == ".gz" else "".join(parts[-1:])
    near = difflib.get_close_matches(suffix, FORMATS, n=1, cutoff=0.5)
    fix = f"did you mean '{near[0]}'? " if near else ""
    what = f"unknown file type '{suffix}'" if suffix else "the file name has no suffix"
    raise InputError(what, f"{fix}convert it to one of {', '.join(FORMATS)}", path)


def split_part(path: str | Path) -> tuple[Path, str | None]:
    """A path and what stands in brackets behind it, where that is not part of an existing file's name.

    Example:
        >>> split_part("mosaic.fits[SCI,2]")
        (PosixPath('mosaic.fits'), 'SCI,2')
    """
    found = re.fullmatch(r"(.+?)\[([^\[\]]+)\]", str(path))
    if found is None or Path(path).exists():
        return Path(path), None
    return Path(found[1]), found[2]


def open_volume(path: str | Path, axes: str | None = None) -> Volume:
    """Open an image file; voxels are read when they are asked for.

    Args:
        path: the file; in brackets behind it which of its images, where it holds several.
        axes: what its axes hold, where that is not plain; "xyzc" for a NIfTI file with channels along its fourth axis.

    Returns:
        A `Volume` of `(C, *spatial)`, `spatial` = (Z, Y, X) or (Y, X).

    Raises:
        InputError: the file is missing, unreadable, of an unknown type, truncated, or its header makes no sense.
    """
    path, part = split_part(path)
    try:
        path.stat()
        return _format(path).read(path, axes, part)
    except FileNotFoundError:
        raise InputError("no such file", "check the path", path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", "check the file's permissions", path) from error


def open_writer(
    path: str | Path, like: Volume, dtype: Any, channels: int = 1, labels: bool = False
) -> AbstractContextManager[SlabWriter]:
    """Write a file on the grid of `like` slab by slab: whole under its name, or not there at all.

    Args:
        path: the file; its suffix chooses the format.
        like: gives geometry and header.
        dtype: of the values; `writer.dtype` is what is stored for it.
        channels: how many of them.
        labels: the values are classes.

    Raises:
        InputError: the suffix is unknown, or there is no such folder.
        ValueError: the dtype cannot be stored; on leaving, not all planes were written.

    Example:
        >>> with open_writer("labels.nii.gz", volume, np.uint8, labels=True) as writer:  # doctest: +SKIP
        ...     for z0, z1, slab in volume.slabs(32):
        ...         writer.write((slab > 100).astype(np.uint8))
    """
    path = Path(path)
    module = _format(path)
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", "make it first", path)
    return module.open_writer(path, like, np.dtype(dtype), channels, labels)


def _format(path: Path) -> Any:
    return import_module(FORMATS[suffix_of(path)])
