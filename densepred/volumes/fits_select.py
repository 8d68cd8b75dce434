"""Which HDU of a FITS file is meant: the one image there is, or the one in brackets; and what its axes hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NoReturn

from densepred.errors import InputError
from densepred.volumes.fits_scan import Hdu, Structure

AXES = ("yx", "cyx", "zyx", "czyx")
"""How the axes of an image may be declared, in the order of the array (NAXIS1 last)."""


def select(structure: Structure, part: str | None, path: Path) -> Hdu:
    """The HDU that `part` names; without one, the only image.

    Args:
        part: an index ("1"), a name ("SCI") or a name and version ("SCI,2"); names in any case. Of several HDUs with
            one name the first is taken, with a warning.

    Raises:
        InputError: there is no such HDU, it holds no image, or there are several to choose from.
    """
    _warn_of_rest(structure, path)
    if part is None:
        return _only_image(structure, path)
    found = _named(structure, part.strip(), path)
    if not found.is_image:
        kind = "a table" if found.kind == "table" else f"no image of two axes or more: its shape is {found.shape}"
        raise InputError(f"HDU [{part}] holds {kind}", _choice(structure, path), path)
    return found


def select_all(structure: Structure, part: str, path: Path) -> list[Hdu] | None:
    """The images that "all", or "SCI,all" for those of one name, stands for, in order; None where `part` is neither.

    Raises:
        InputError: there are none.
    """
    found = _all_named(structure, part)
    if found == []:
        _missing(structure, part, path)
    return found


def _all_named(structure: Structure, part: str) -> list[Hdu] | None:
    name, comma, version = part.rpartition(",")
    if version.strip().lower() != "all":
        return None
    wanted = name.strip().upper()
    return [hdu for hdu in structure.hdus if hdu.is_image and (not comma or hdu.name.strip().upper() == wanted)]


def _warn_of_rest(structure: Structure, path: Path) -> None:
    if structure.rest:
        after = len(structure.hdus) - 1
        warnings.warn(f"{path}: the {structure.rest} bytes behind HDU {after} are no FITS; left out", stacklevel=4)


def _only_image(structure: Structure, path: Path) -> Hdu:
    images = [hdu for hdu in structure.hdus if hdu.is_image]
    if len(images) == 1:
        return images[0]
    what = f"holds {len(images)} images, and none is chosen" if images else "holds no image of two axes or more"
    raise InputError(f"{what} (HDUs {_listed(structure)})", _choice(structure, path), path)


def _named(structure: Structure, part: str, path: Path) -> Hdu:
    if part.isdecimal():
        if int(part) < len(structure.hdus):
            return structure.hdus[int(part)]
        _missing(structure, part, path)
    name, comma, number = part.rpartition(",")
    versioned = bool(comma) and number.strip().isdecimal()
    wanted = (name if versioned else part).strip().upper()
    found = [hdu for hdu in structure.hdus if hdu.name.strip().upper() == wanted]
    if versioned:
        found = [hdu for hdu in found if hdu.version == int(number)]
    if not found:
        _missing(structure, part, path)
    if len(found) > 1:
        others = ", ".join(f"[{hdu.index}]" for hdu in found[1:])
        what = f"{len(found)} HDUs are called [{part}]; the first is read, version {found[0].version}"
        warnings.warn(f"{path}: {what}; the others are {others}", stacklevel=5)
    return found[0]


def _missing(structure: Structure, part: str, path: Path) -> NoReturn:
    if several := _all_named(structure, part):
        what = f"[{part}] stands for {len(several)} images, and one is wanted here (HDUs {_listed(structure)})"
        raise InputError(what, _choice(structure, path), path)
    last = structure.hdus[-1]
    cut = f"; HDU {last.index} is cut off, the file is truncated" if last.held < last.size else ""
    what = f"there is no HDU [{part}] (HDUs {_listed(structure)}{cut})"
    raise InputError(what, _choice(structure, path), path)


def _listed(structure: Structure, most: int = 40) -> str:
    shown = "; ".join(str(hdu) for hdu in structure.hdus[:most])
    return shown if len(structure.hdus) <= most else f"{shown}; and {len(structure.hdus) - most} more"


def _choice(structure: Structure, path: Path) -> str:
    images = [hdu for hdu in structure.hdus if hdu.is_image]
    if not images:
        return "choose another file"
    choices = [f"{path.name}[{hdu.index}]" for hdu in images[:8]]
    named = next((hdu for hdu in images if hdu.name and not hdu.name.isdecimal()), None)
    hint = f" (or by name, {path.name}[{named.name},{named.version}])" if named else ""
    return f"write {', '.join(choices[:-1])} or {choices[-1]}{hint}" if choices[1:] else f"write {choices[0]}{hint}"


def layout(hdu: Hdu, axes: str | None, path: Path) -> tuple[tuple[int, ...], int | None]:
    """What the axes of an image hold.

    Axes of length 1 are dropped, never the last two, until as many are left as are declared; None stands for "yx".

    Args:
        axes: one of `AXES`.

    Returns:
        The dropped axes, and the axis of channels or None.

    Raises:
        InputError: the axes that are left are not declared, or are not as many as declared.
    """
    if axes is not None and axes not in AXES:
        raise InputError(f"axes '{axes}' are not known for FITS", f"choose one of {', '.join(AXES)}", path)
    wanted = len(axes or "yx")
    ones = [axis for axis, size in enumerate(hdu.shape[:-2]) if size == 1]
    dropped = tuple(ones[: max(0, len(hdu.shape) - wanted)])
    left = tuple(size for axis, size in enumerate(hdu.shape) if axis not in dropped)
    if axes is None and len(left) > 2:
        choices = [choice for choice in AXES if len(choice) == len(left)]
        if not choices:
            raise InputError(f"HDU {hdu.index} has {len(left)} axes {left}", "split the file", path)
        fix = " or ".join(f"`axes: {choice}`" for choice in reversed(choices))
        what = f"HDU {hdu.index} has {len(left)} axes {left}, and what the first holds is not declared"
        raise InputError(what, f"add {fix} (c: channels, z: depth; the order is the array's, NAXIS1 last)", path)
    if len(left) == 2 and axes == "cyx":
        return dropped, None
    if len(left) != wanted:
        what = f"HDU {hdu.index} has {len(left)} axes {left}, and axes '{axes}' were declared"
        raise InputError(what, "declare as many axes as there are", path)
    channels = next(axis for axis in range(len(hdu.shape)) if axis not in dropped) if wanted != 2 else None
    return dropped, channels if axes and axes.startswith("c") else None
