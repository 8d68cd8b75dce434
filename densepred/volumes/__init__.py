"""Image files as `Volume`, one module a format, chosen by suffix.

A format is a module with two functions: `read(path, axes, part) -> Volume` and
`open_writer(path, like, dtype, channels, labels)`, a context manager giving a `SlabWriter`. `part` is what stands in
brackets behind the path: `mosaic.fits[SCI,2]`, `cells.h5[raw]`. One with `CHECKSUMS` also reads with a `checksum`; one
with `RECORDS` also writes a `record`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes.channels import stack
from densepred.volumes.companions import companions
from densepred.volumes.members import MembersWriter, members, open_members, open_members_writer, paired
from densepred.volumes.record import Provenance, Record
from densepred.volumes.validity import Flags, flag_plane, masked
from densepred.volumes.volume import GEOMETRY_TOLERANCE, SlabWriter, Volume, corner_offset, label_dtype

__all__ = [
    "FORMATS",
    "GEOMETRY_TOLERANCE",
    "Flags",
    "MembersWriter",
    "Provenance",
    "Record",
    "SlabWriter",
    "Volume",
    "companions",
    "corner_offset",
    "flag_plane",
    "label_dtype",
    "labels_suffix",
    "masked",
    "members",
    "open_members",
    "open_members_writer",
    "open_volume",
    "open_writer",
    "paired",
    "split_part",
    "stack",
    "suffix_of",
]

FORMATS = {
    ".fits": "densepred.volumes.fits",
    ".fit": "densepred.volumes.fits",
    ".fts": "densepred.volumes.fits",
    ".fits.gz": "densepred.volumes.fits",
    ".fit.gz": "densepred.volumes.fits",
    ".fts.gz": "densepred.volumes.fits",
    ".fits.bz2": "densepred.volumes.fits",
    ".fits.fz": "densepred.volumes.fits",
    ".fit.fz": "densepred.volumes.fits",
    ".nii": "densepred.volumes.nifti",
    ".nii.gz": "densepred.volumes.nifti",
    ".png": "densepred.volumes.image",
    ".jpg": "densepred.volumes.image",
    ".jpeg": "densepred.volumes.image",
    ".bmp": "densepred.volumes.image",
    ".tif": "densepred.volumes.tiff",
    ".tiff": "densepred.volumes.tiff",
    ".ome.tif": "densepred.volumes.tiff",
    ".ome.tiff": "densepred.volumes.tiff",
    ".npy": "densepred.volumes.npy",
    ".h5": "densepred.volumes.hdf5",
    ".hdf5": "densepred.volumes.hdf5",
    ".nrrd": "densepred.volumes.itk",
    ".nhdr": "densepred.volumes.itk",
    ".mha": "densepred.volumes.itk",
    ".mhd": "densepred.volumes.itk",
    ".dcm": "densepred.volumes.dicom",
    ".zarr": "densepred.volumes.zarr_store",
    ".ome.zarr": "densepred.volumes.zarr_store",
}
"""Suffix -> module; a module is imported when a file of its format is opened."""
_LABELS = {
    "fits": ".fits.fz",
    "tiff": ".tif",
    "image": ".png",
    "npy": ".npy",
    "hdf5": ".h5",
    "itk": ".nrrd",
    "zarr_store": ".zarr",
}
"""Format -> the suffix of its losslessly compressed files; NIfTI stands in for the others."""


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
    if name.endswith((".hdr", ".img")):
        what = "a pair of files (.hdr and .img) of NIfTI or Analyze is not read"
        raise InputError(what, "save it as one .nii or .nii.gz", path)
    parts = Path(name).suffixes
    suffix = "".join(parts[-2:]) if parts and parts[-1] == ".gz" else "".join(parts[-1:])
    near = difflib.get_close_matches(suffix, FORMATS, n=1, cutoff=0.5)
    fix = f"did you mean '{near[0]}'? " if near else ""
    what = f"unknown file type '{suffix}'" if suffix else "the file name has no suffix"
    raise InputError(what, f"{fix}convert it to one of {', '.join(FORMATS)}", path)


def labels_suffix(path: str | Path) -> str:
    """The suffix of label maps that belong to an image: of its own format, where that keeps its geometry.

    Example:
        >>> labels_suffix("mosaic.fits[SCI]"), labels_suffix("scan.nii")
        ('.fits.fz', '.nii.gz')
    """
    path, _ = split_part(path)
    if path.is_dir() and not path.name.lower().endswith(tuple(FORMATS)):  # the slices of a series
        return ".nii.gz"
    return _LABELS.get(FORMATS[suffix_of(path)].rpartition(".")[2], ".nii.gz")


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


def open_volume(path: str | Path, axes: str | None = None, checksum: str = "verify") -> Volume:
    """Open an image file; voxels are read when they are asked for.

    Args:
        path: the file; in brackets behind it which of its images, where it holds several.
        axes: what its axes hold, where that is not plain; for a NIfTI file "xyzc" if its fourth axis holds channels,
            "xyzt" if it holds times, of which the part in brackets chooses one.
        checksum: of FITS, whose checksums may be missing: "verify" those there are, "ignore" or "require" them.

    Returns:
        A `Volume` of `(C, *spatial)`, `spatial` = (Z, Y, X) or (Y, X).

    Raises:
        InputError: the file is missing, unreadable, of an unknown type, truncated, or its header makes no sense.
    """
    path, part = split_part(path)
    with reading(path):
        path.stat()
        module = _format(path)
        asked = {} if checksum == "verify" or not hasattr(module, "CHECKSUMS") else {"checksum": checksum}
        volume: Volume = module.read(path, axes, part, **asked)
        return volume


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError("no such file", "check the path", path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", "check the file's permissions", path) from error


def open_writer(
    path: str | Path,
    like: Volume,
    dtype: Any,
    channels: int = 1,
    labels: bool = False,
    record: Record | None = None,
) -> AbstractContextManager[SlabWriter]:
    """Write a file on the grid of `like` slab by slab: whole under its name, or not there at all.

    Args:
        path: the file; its suffix chooses the format.
        like: gives geometry and header.
        dtype: of the values; `writer.dtype` is what is stored for it.
        channels: how many of them.
        labels: the values are classes.
        record: what the values are and how they came about, kept as far as the format has room for it.

    Raises:
        InputError: the suffix is unknown, or there is no such folder.
        ValueError: the dtype cannot be stored; on leaving, not all planes were written.

    Example:
        >>> with open_writer("labels.nii.gz", volume, np.uint8, labels=True) as writer:  # doctest: +SKIP
        ...     for z0, z1, slab in volume.slabs(32):
        ...         writer.write((slab > 100).astype(np.uint8))
    """
    path, part = split_part(path)
    module = _format(path)
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", "make it first", path)
    if part is None:
        told = {"record": record} if hasattr(module, "RECORDS") else {}
        writer: AbstractContextManager[SlabWriter] = module.open_writer(
            path, like, np.dtype(dtype), channels, labels, **told
        )
        return writer
    if not hasattr(module, "open_part_writer"):
        raise InputError(f"into a {suffix_of(path)} no part [{part}] is written", "leave the brackets out", path)
    return module.open_part_writer(path, part, like, np.dtype(dtype), channels, labels)


def _format(path: Path) -> Any:
    if path.is_dir() and not path.name.lower().endswith(tuple(FORMATS)):  # a folder: an unnamed store, or slices
        store = any((path / mark).is_file() for mark in ("zarr.json", ".zgroup", ".zarray"))
        return import_module("densepred.volumes." + ("zarr_store" if store else "dicom"))
    return import_module(FORMATS[suffix_of(path)])
