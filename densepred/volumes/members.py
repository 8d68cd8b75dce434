"""Several images of one file, its members: HDUs of a FITS file, frames of a 4D NIfTI; read and written in order."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from densepred.errors import InputError
from densepred.volumes.record import Record
from densepred.volumes.volume import SlabWriter, Volume

_MODULES = {"fits": "densepred.volumes.fits_members", "nifti": "densepred.volumes.nifti_frames"}
"""Format -> what knows its members: `members(path, part, axes)` and `open_writer(path, count, dtype, ...)`."""


class MembersWriter(Protocol):
    """What `open_members_writer` gives."""

    dtype: np.dtype
    """The type that is stored."""

    def member(self, like: Volume) -> SlabWriter:
        """Begin the next image, on the grid and with the header of `like`; the one before must be whole."""


def members(path: str | Path, axes: str | None = None) -> list[str]:
    """The images that a path stands for, each as a path of its own.

    Args:
        path: "x.fits[all]" for every image of a FITS file, "x.fits[SCI,all]" for those of one name, or a file.
        axes: "xyzt" for the frames of a 4D NIfTI; see `open_volume`.

    Returns:
        Paths for `open_volume`, in the order of the file; `path` alone where it stands for one image.

    Raises:
        InputError: the file is missing, unreadable, or holds no such images.

    Example:
        >>> from astropy.io import fits
        >>> images = [fits.ImageHDU(np.eye(3), name="SCI", ver=version) for version in (1, 2)]
        >>> fits.HDUList([fits.PrimaryHDU(), *images]).writeto("eyes.fits", overwrite=True)
        >>> members("eyes.fits[SCI,all]")
        ['eyes.fits[SCI,1]', 'eyes.fits[SCI,2]']
    """
    from densepred.volumes import reading, split_part

    file, part = split_part(path)
    with reading(file):
        file.stat()
        module = _module(file)
        parts = None if module is None else module.members(file, part, axes)
    return [str(path)] if parts is None else [f"{file}[{name}]" for name in parts]


def paired(paths: Mapping[str, str | Path], axes: Mapping[str, str | None] | None = None) -> list[dict[str, str]]:
    """The images of several paths that belong together, as `members` lists them.

    Images called NAME,VER on both sides belong together by NAME and VER if the names are the same, else by VER alone;
    others by their place in the file. What stands for one image without "all" goes with each.

    Args:
        paths: role -> path.
        axes: role -> as for `members`; None where it is not there.

    Returns:
        For each image of the first path with several, role -> path.

    Raises:
        InputError: as `members`; the paths stand for other numbers of images, or for other versions.

    Example:
        >>> from astropy.io import fits
        >>> hdus = [fits.ImageHDU(np.eye(3), name=n, ver=v) for n, v in (("SCI", 1), ("SCI", 2), ("DQ", 2), ("DQ", 1))]
        >>> fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto("chips.fits", overwrite=True)
        >>> paired({"image": "chips.fits[SCI,all]", "mask": "chips.fits[DQ,all]"})[0]
        {'image': 'chips.fits[SCI,1]', 'mask': 'chips.fits[DQ,1]'}
    """
    listed = {role: members(path, (axes or {}).get(role)) for role, path in paths.items()}
    several = {role: found for role, found in listed.items() if found != [str(paths[role])]}
    if not several:
        return [{role: found[0] for role, found in listed.items()}]
    lead = max(several, key=lambda role: len(several[role]))
    joined = {role: _joined(several[lead], paths[lead], found, paths[role]) for role, found in several.items()}
    count = len(several[lead])
    return [{role: joined[role][n] if role in joined else listed[role][0] for role in paths} for n in range(count)]


def _joined(lead: Sequence[str], of: str | Path, others: Sequence[str], path: str | Path) -> list[str]:
    """Those of `others` that belong to each image of `lead`."""
    ours, theirs = [_name_of(one) for one in lead], [_name_of(one) for one in others]
    named = None not in ours + theirs
    if len(others) not in (1, len(lead)) or (named and len(others) != len(lead)):
        what = f"stands for {len(others)} images, and {of} for {len(lead)}"
        raise InputError(what, "choose as many of each, with the same versions", path)
    if not named:
        return list(others) * (len(lead) // len(others))
    whole = set(ours) == set(theirs)
    keys, found = ([name if whole else name[1:] for name in names if name] for names in (ours, theirs))
    if sorted(keys) != sorted(found):
        versions = [", ".join(sorted({name[1] for name in names if name})) for names in (theirs, ours)]
        what = f"its images have the versions {versions[0]}, those of {of} have {versions[1]}"
        raise InputError(what, "give images that belong together the same EXTVER", path)
    if len(set(keys)) == len(keys):
        return [others[found.index(key)] for key in keys]
    if keys != found:  # versions that stand twice, in another order
        what = f"which of its images belongs to which of {of} cannot be told from their versions"
        raise InputError(what, "choose the images of one name, as in x.fits[SCI,all]", path)
    return list(others)


def _name_of(path: str) -> tuple[str, str] | None:
    """NAME and VER in the brackets; None where a number stands there."""
    name, comma, version = path[path.rindex("[") + 1 : -1].rpartition(",") if path.endswith("]") else ("", "", "")
    return (name.upper(), version) if comma else None


def open_members(path: str | Path, axes: str | None = None, checksum: str = "verify") -> Iterator[Volume]:
    """The images that a path stands for, one after the other; the frames of a NIfTI file are read in one go.

    Frames share their file: the whole of it is verified before the first is given, each pass over a frame goes on where
    that over the frame before ended, and it is closed after the last. Other images are files of their own to close.

    Args:
        path: as for `members`.
        axes: likewise.
        checksum: as for `open_volume`.

    Raises:
        InputError: as `members` and `open_volume`.
    """
    from densepred.volumes import open_volume, reading, split_part

    parts, file = members(path, axes), split_part(path)[0]
    if len(parts) > 1 and hasattr(_module(file), "open_frames"):
        with reading(file):
            yield from _module(file).open_frames(file)
        return
    for name in parts:
        yield open_volume(name, axes, checksum)


def open_each(
    path: str | Path, names: Sequence[str], axes: str | None = None, checksum: str = "verify"
) -> Generator[Volume, None, None]:
    """Images of one file in a given order; in one go where that is the order of the file.

    Args:
        path: as for `members`.
        names: some of what it stands for, as `paired` gives them.
        axes: as for `members`.
        checksum: as for `open_volume`.

    Raises:
        InputError: as `open_members`.
    """
    from densepred.volumes import open_volume

    if len(names) > 1 and list(names) == members(path, axes):
        yield from open_members(path, axes, checksum)
        return
    for name in names:
        yield open_volume(name, axes, checksum)


@contextmanager
def open_members_writer(
    path: str | Path,
    count: int,
    dtype: Any,
    channels: int = 1,
    labels: bool = False,
    record: Record | None = None,
) -> Iterator[MembersWriter]:
    """Write several images into one file slab by slab: whole under its name, or not there at all.

    FITS gets an HDU for each, or one for each class of probabilities, with EXTNAME and EXTVER of its source, and one
    table LABELS that counts the pixels of all. NIfTI gets a fourth axis, and a fifth for channels; the frames must lie
    on one grid. Other formats take one image.

    Args:
        path: the file; its suffix chooses the format.
        count: of the images, as many as `member` is called.
        dtype: of the values; `writer.dtype` is what is stored for it.
        channels: how many of them each image has.
        labels: the values are classes.
        record: what the values are and how they came about.

    Raises:
        InputError: as `open_writer`; the format takes one image, or the frames do not lie on one grid.
        ValueError: the dtype cannot be stored; on leaving, not all images or planes were written.

    Example:
        >>> with open_members_writer("labels.fits.fz", 2, np.uint8, labels=True) as writer:  # doctest: +SKIP
        ...     for volume in open_members("mosaic.fits[SCI,all]"):
        ...         image = writer.member(volume)
        ...         for z0, z1, slab in volume.slabs(256):
        ...             image.write((slab > 100).astype(np.uint8))
    """
    path = Path(path)
    module = _module(path)
    if module is None:
        what = f"such a file holds one image, and {count} are to be written"
        raise InputError(what, "choose .fits, .fits.fz, .nii or .nii.gz", path)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}", "make it first", path)
    opened: AbstractContextManager[MembersWriter] = module.open_writer(
        path, count, np.dtype(dtype), channels, labels, record
    )
    with opened as writer:
        yield writer


def _module(path: Path) -> Any:
    """What knows the members of a format; None where a file of it is one image."""
    from densepred.volumes import FORMATS, suffix_of

    if path.is_dir():
        return None
    name = _MODULES.get(FORMATS[suffix_of(path)].rpartition(".")[2])
    return None if name is None else import_module(name)
