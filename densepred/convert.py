"""From one file format to another, slab by slab, saying what the new one cannot hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from densepred.errors import InputError
from densepred.volumes import GEOMETRY_TOLERANCE, Volume, corner_offset, open_volume, split_part, suffix_of
from densepred.volumes.arrays import AXES as ARRAY_AXES
from densepred.volumes.arrays import micrometres
from densepred.volumes.nifti_header import AXES as NIFTI_AXES
from densepred.volumes.volume import spacing_affine

_IN_MM = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Formats whose sizes are in mm, whatever the source has; a NIfTI header keeps its own unit in NIfTI."""
_SMALL_UNITS = {"angstrom": 1e-4, "nm": 1e-3}
_SAME_SIZE = 1e-4


def convert(
    source: str | Path,
    target: str | Path,
    axes: str | None = None,
    overwrite: bool = False,
    checksum: str = "verify",
) -> tuple[str, ...]:
    """Write an image in another format; integers stay integers, labels stay labels, whole or not at all.

    Geometry is kept where the target can hold it, in the target's unit. What it cannot hold is told by one warning;
    the target is opened again to find out.

    Args:
        source: the file, with a part in brackets where it holds several images.
        target: the new file; its suffix chooses the format. `image.zarr[labels/<name>]` adds labels to an image.
        axes: what the axes of the source hold, where that is not plain.
        overwrite: replace a target that is there.
        checksum: of a FITS source, as for `open_volume`.

    Returns:
        What was lost, a phrase each; empty where nothing was.

    Raises:
        InputError: the source cannot be read, the target is there already, or cannot hold the values.

    Example:
        >>> from densepred.volumes import Volume
        >>> Volume.from_array(np.ones((4, 5, 6), np.uint8), (2.0, 1.0, 1.0), labels=True).save("cells.nii.gz")
        >>> convert("cells.nii.gz", "cells.zarr", overwrite=True)
        ()
    """
    _check_target(source, target, overwrite)
    with open_volume(source, axes, checksum) as volume:
        like, assumed = _in_unit_of(volume, target)
        try:
            like.save(target)
        except ValueError as error:
            fix = "choose another format, such as .nii.gz, .fits or .zarr"
            raise InputError(f"{_suffix(target)} cannot hold this image: {error}", fix, target) from error
        lost = (*assumed, *_lost(like, target))
    if lost:
        warnings.warn(f"{target}: lost in the conversion from {source}: {'; '.join(lost)}", stacklevel=2)
    return lost


def _check_target(source: str | Path, target: str | Path, overwrite: bool) -> None:
    (source_path, _), (target_path, part) = split_part(source), split_part(target)
    suffix_of(target_path)
    if not target_path.exists() or part is not None:
        return
    if source_path.exists() and target_path.samefile(source_path):
        raise InputError("source and target are one file", "choose another target", target)
    if not overwrite:
        raise InputError("the target is there already", "remove it, choose another, or allow overwriting", target)


def _suffix(target: str | Path) -> str:
    return suffix_of(split_part(target)[0])


def _size_of_unit(volume: Volume) -> float | None:
    """The unit of the spacing in micrometres; None if it is not known."""
    return _SMALL_UNITS.get(str(getattr(volume.header, "unit", None)), micrometres(volume))


def _in_unit_of(volume: Volume, target: str | Path) -> tuple[Volume, tuple[str, ...]]:
    """The volume with its sizes in the unit of the target, and what had to be assumed."""
    keeps_unit = hasattr(volume.header, "get_xyzt_units") and _suffix(target).startswith(".nii")
    if _suffix(target) not in _IN_MM or keeps_unit:
        return volume, ()
    unit = _size_of_unit(volume)
    if unit is None and set(volume.spacing) != {1.0}:
        sizes = " x ".join(f"{size:.4g}" for size in volume.spacing)
        return volume, (f"that its voxels of {sizes} have no known unit (they now count as mm)",)
    if unit is None or unit == 1e3:
        return volume, ()
    factor = unit / 1e3
    affine = None if volume.affine is None else np.diag([factor, factor, factor, 1.0]) @ volume.affine
    if affine is not None and volume.dims == 2:
        affine[2, 2] = volume.affine[2, 2] if volume.affine is not None else 1.0
    spacing = [size * factor for size in volume.spacing]
    return Volume(volume.array, spacing, affine, None, volume.path, volume.labels), ()


def _lost(volume: Volume, target: str | Path) -> list[str]:
    """What of `volume` the file written from it does not hold."""
    back = _read_back(target, volume.shape)
    if back is None:
        return ["which of its axes hold channels (declare `axes` on reading)"]
    with back:
        lost = _lost_geometry(volume, back)
        if volume.labels and not back.labels:
            lost.append("that its values are labels")
        if volume.dtype.kind == "f" and back.dtype != volume.dtype and not np.can_cast(volume.dtype, back.dtype):
            lost.append(f"precision ({volume.dtype} became {back.dtype})")
    return lost


def _read_back(target: str | Path, shape: tuple[int, ...]) -> Volume | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for axes in (None, *ARRAY_AXES, *NIFTI_AXES):
            try:
                volume = open_volume(target, axes)
            except InputError:
                continue
            if volume.shape == shape:
                return volume
            volume.close()
    return None


def _lost_geometry(volume: Volume, back: Volume) -> list[str]:
    ours, theirs = (getattr(one.header, "has_wcs", None) for one in (volume, back))
    if ours and theirs is None:
        return ["its world coordinates (WCS)"]
    if theirs is not None:  # FITS keeps sizes and directions as world coordinates, without a unit
        unit_lost = ours is None and theirs and _size_of_unit(volume) is not None
        return ["the unit of its spacing"] if unit_lost else []
    lost = []
    units = _size_of_unit(volume), _size_of_unit(back)
    factor = 1.0 if None in units else units[1] / units[0]  # type: ignore[operator]
    sizes = [size * factor for size in back.spacing]
    if not np.allclose(sizes, volume.spacing, rtol=_SAME_SIZE):
        said = [" x ".join(f"{size:.4g}" for size in one) for one in (volume.spacing, sizes)]
        lost.append(f"its spacing ({said[0]} became {said[1]})")
    elif units[0] is not None and units[1] is None:
        lost.append("the unit of its spacing")
    if volume.affine is not None:
        lost += _lost_affine(volume, volume.affine, back, factor)
    return lost


def _lost_affine(volume: Volume, affine: np.ndarray, back: Volume, factor: float) -> list[str]:
    if back.affine is None:
        plain = np.allclose(affine, spacing_affine(volume.spacing), atol=1e-6)
        return [] if plain else ["its position and orientation (affine)"]
    scaled = np.diag([factor, factor, factor, 1.0]) @ back.affine
    if volume.dims == 2:
        scaled[2, 2] = affine[2, 2]
    offset = corner_offset(volume, Volume(back.array, volume.spacing, scaled))
    return [] if offset <= GEOMETRY_TOLERANCE else [f"its position (corners moved by {offset:.3g} voxels)"]
