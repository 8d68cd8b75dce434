"""OME-Zarr metadata: axes, scales and labels of an array, read from versions 0.1 to 0.5 and written as 0.5.

Reference: https://ngff.openmicroscopy.org/0.5/ (sections "axes", "coordinateTransformations", "multiscales", "labels").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes.arrays import assumed, declared, micrometres
from densepred.volumes.nifti_header import voxel_sizes
from densepred.volumes.volume import Volume

VERSION = "0.5"
OURS = "densepred"
"""The attribute under which our own stores keep what OME-Zarr has no place for."""
_ORDER = "tczyx"
_KINDS = {"t": "time", "c": "channel"}
UNITS = {"angstrom": "angstrom", "nanometer": "nm", "micrometer": "um", "millimeter": "mm", "meter": "meter"}
"""OME's names and ours; another unit is kept under its own name."""
_FIX = "mend the metadata of the store, or write it again"


@dataclass(frozen=True)
class ZarrHeader:
    """What a store says of an array besides its values.

    Attributes:
        letters: what each axis of the array holds: t, c, z, y, x, or "1" for an axis of size 1 that was dropped.
        unit: of the spacing, "um" for one; None if there is none.
        translation: of the first voxel, in the order of the spacing.
        attributes: of the group of resolutions, or of the array itself where it stands alone.
    """

    letters: str
    unit: str | None = None
    translation: tuple[float, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


def metadata(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The OME part of a group's attributes: under "ome" since 0.5, beside the others before."""
    ome = attributes.get("ome", attributes)
    return ome if isinstance(ome, Mapping) else {}


def multiscale(attributes: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """The first image of a group, None where it describes none.

    Raises:
        InputError: it describes one that has no resolutions.
    """
    listed = metadata(attributes).get("multiscales")
    if not listed:
        return None
    try:
        first = listed[0]
        if [str(dataset["path"]) for dataset in first["datasets"]]:
            return first
    except (KeyError, IndexError, TypeError):
        pass
    raise InputError("its `multiscales` name no array", _FIX, path)


def axes_of(multi: Mapping[str, Any], count: int, path: Path) -> tuple[str, str | None]:
    """Letters of the axes and the unit of the spatial ones.

    Raises:
        InputError: as many axes are not described, or the spatial ones have several units.
    """
    listed = multi.get("axes") or list(_ORDER)  # up to version 0.2 the five axes were fixed
    letters, units = "", set()
    for axis in listed:
        axis = {"name": axis} if isinstance(axis, str) else axis
        name = str(axis.get("name", "?")).lower()
        kind = axis.get("type")
        letter = next((letter for letter, known in _KINDS.items() if kind == known), name)
        letters += letter if letter in _ORDER else "?"
        if letters[-1] in "zyx":
            units.add(axis.get("unit"))
    if len(letters) != count or len(set(letters) & set(_ORDER)) != len(letters.replace("?", "")):
        raise InputError(f"its metadata describe the axes '{letters}' and its array has {count}", _FIX, path)
    if len(units) > 1:
        raise InputError(f"its axes have several units: {', '.join(map(str, units))}", _FIX, path)
    unit = units.pop() if units else None
    return letters, UNITS.get(unit, unit) if unit else None


def transform(multi: Mapping[str, Any], level: int, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scale and translation of each axis of a resolution: its own transformations, then those of the image.

    Raises:
        InputError: a transformation is of another kind, or makes no sense.
    """
    scale, shift = np.ones(count), np.zeros(count)
    steps = [
        *multi["datasets"][level].get("coordinateTransformations", ()),
        *multi.get("coordinateTransformations", ()),
    ]
    for step in steps:
        kind = step.get("type")
        values = np.asarray(step.get(kind, np.ones(count)), np.float64)
        if kind not in ("identity", "scale", "translation") or values.shape != (count,):
            raise InputError(f"its coordinate transformation {dict(step)} is not known for {count} axes", _FIX, path)
        if kind == "scale":
            scale, shift = scale * values, shift * values
        elif kind == "translation":
            shift = shift + values
    if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(shift).all()):
        raise InputError(f"impossible scale or translation: {scale.tolist()}, {shift.tolist()}", _FIX, path)
    return scale, shift


def arrange(known: str | None, shape: tuple[int, ...], axes: str | None, path: Path) -> str:
    """What each axis of an array holds: c, z, y, x, or "1" for one of size 1 that is dropped.

    Args:
        known: the letters from metadata; None if there are none, and then `arrays.assumed` tells.
        shape: of the array.
        axes: what the user declares, see `arrays.declared`.
        path: for messages.

    Raises:
        InputError: an axis is neither known nor declared, or what is declared does not fit.

    Example:
        >>> arrange("tczyx", (1, 2, 5, 6, 7), None, Path("x.zarr"))
        '1czyx'
    """
    if axes is not None:
        return declared(shape, axes, path)
    if known is None:
        return assumed(shape, path)
    pairs = list(zip(known, shape, strict=True))
    letters = "".join("1" if letter not in "czyx" and size == 1 else letter for letter, size in pairs)
    strange = [f"'{letter}' of {size}" for letter, size in pairs if letter not in "czyx" and size > 1]
    if strange:
        word = "".join(letter for letter, size in pairs if letter in "zyx")
        room = "c" not in known or dict(pairs)["c"] == 1
        fix = f"add `axes: c{word}` to take it as channels, or split the array" if room else "split the array"
        what = f"axes '{known}' of sizes {shape}: {strange[0]} is neither space nor channel"
        raise InputError(what, fix, path)
    if not {"y", "x"} <= set(letters):
        raise InputError(f"axes '{known}' without y and x", "choose another array", path)
    return letters


def ome_unit(volume: Volume) -> str | None:
    """The OME name of the unit of a volume's spacing, None where nothing says what it is.

    Example:
        >>> ome_unit(Volume.from_array(np.zeros((4, 5)), (1.0, 1.0))) is None
        True
    """
    name = getattr(volume.header, "unit", None)
    if isinstance(name, str) and name in UNITS.values():
        return next(long for long, short in UNITS.items() if short == name)
    size = micrometres(volume)
    return None if size is None else {1.0: "micrometer", 1e3: "millimeter", 1e6: "meter"}[size]


def group_attributes(like: Volume, name: str, letters: str, labels: bool) -> dict[str, Any]:
    """The attributes of a group that holds one resolution, "0", on the grid of `like`."""
    unit = ome_unit(like)
    axes = [{"name": letter, "type": _KINDS.get(letter, "space")} for letter in letters]
    for axis in axes:
        if unit is not None and axis["type"] == "space":
            axis["unit"] = unit
    lead = len(letters) - like.dims
    steps = [{"type": "scale", "scale": [1.0] * lead + list(like.spacing)}]
    if any(shift := translation_of(like)):
        steps.append({"type": "translation", "translation": [0.0] * lead + list(shift)})
    datasets = [{"path": "0", "coordinateTransformations": steps}]
    ome: dict[str, Any] = {"version": VERSION, "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}
    if labels:
        ome["image-label"] = {}
    attributes: dict[str, Any] = {"ome": ome}
    if like.affine is not None:
        attributes[OURS] = {"affine": like.affine.tolist()}
    return attributes


def translation_of(volume: Volume) -> tuple[float, ...]:
    """The position of the first voxel along each spatial axis, zeros where the axes are turned or nothing is known."""
    if volume.affine is None or not np.allclose(volume.affine[:3, :3], np.diag(voxel_sizes(volume.affine)), atol=1e-9):
        return (0.0,) * volume.dims
    return tuple(reversed(volume.affine[: volume.dims, 3].tolist()))


def affine_from(attributes: Mapping[str, Any], spacing: Sequence[float], shift: Sequence[float]) -> np.ndarray | None:
    """The affine that our writer stored, else that of a translation, else None."""
    ours = attributes.get(OURS)
    stored = ours.get("affine") if isinstance(ours, Mapping) else None
    if stored is not None and np.shape(stored) == (4, 4):
        affine = np.asarray(stored, np.float64)
        if np.allclose(voxel_sizes(affine)[: len(spacing)], list(reversed(spacing)), rtol=1e-6):
            return affine
    if not any(shift):
        return None
    affine = np.diag([*reversed(spacing), *[1.0] * (4 - len(spacing))])
    affine[: len(shift), 3] = list(reversed(shift))
    return affine
