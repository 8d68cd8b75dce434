"""The coordinates along the axes of a picture of one slice: on the sky, in millimetres, micrometres or pixels.

A picture keeps the order of the pixels: columns run to the right. Rows run upwards where the file's convention says so
(FITS), or where that puts the patient's right, front or head above; else downwards.

World coordinates of FITS: Greisen & Calabretta 2002, A&A 395, 1061. Directions of the patient's axes: nibabel's, RAS+.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.figures import INK
from densepred.info import unit_of
from densepred.info_sky import aspect_of, sky_axes
from densepred.volumes import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
"""What lies at small and at large x, y and z in the world of nibabel."""
_SLANT = 0.5  # pixels by which a world coordinate may change along the other axis and still be written on this one
_LONGEST = 48  # characters of a file's name in a title
_EDGES = ((0.0, 0.5, "left", "center"), (1.0, 0.5, "right", "center"), (0.5, 0.0, "center", "bottom"),
          (0.5, 1.0, "center", "top"))  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Where the pixels of a slice lie along the two axes of its picture.

    Args:
        x: coordinate of the first column's centre, and the step to the next.
        y: likewise of the rows.
        names: of the two axes, with unit.
        upward: the first row is the lowest.
        sides: letters for the left, right, lower and upper edge: where these lead in the patient.
        where: of a volume, the position of the slice, such as "z = 12 mm".
        aspect: height of a pixel over its width, in units of the axes.

    Example:
        >>> Frame((0.0, 2.0), (10.0, -1.0), ("x / mm", "y / mm")).extent(4, 3)
        (-1.0, 5.0, 6.5, 10.5)
    """

    x: tuple[float, float]
    y: tuple[float, float]
    names: tuple[str, str]
    upward: bool = False
    sides: tuple[str, str, str, str] | None = None
    where: str = ""
    aspect: float = 1.0

    def extent(self, rows: float, columns: float) -> tuple[float, float, float, float]:
        """The outer edges of the first and last pixels: left, right, lower, upper."""
        left, right = self.x[0] - self.x[1] / 2, self.x[0] + (columns - 0.5) * self.x[1]
        first, last = self.y[0] - self.y[1] / 2, self.y[0] + (rows - 0.5) * self.y[1]
        return (left, right, first, last) if self.upward else (left, right, last, first)

    def at(self, points: np.ndarray) -> np.ndarray:
        """Points `(..., 2)`, as column and row from 0, as coordinates along the axes."""
        out: np.ndarray = points * [self.x[1], self.y[1]] + [self.x[0], self.y[0]]
        return out


def frame_of(volume: Volume, index: int) -> Frame:
    """The coordinates of slice `index` across the first axis, or of a 2D image.

    Of FITS these are pixels from 0, and the axes of `add_axes` write what lies there on the sky. Else they are world
    coordinates where the file has them and each belongs to one axis of the slice, up to half a pixel over its whole
    extent; of other slices, such as oblique ones, they are distances from the centre of the first pixel.

    Example:
        >>> volume = Volume(np.zeros((1, 4, 5, 6)), (2.0, 1.0, 1.0))
        >>> frame_of(volume, 2).extent(5, 6)
        (-0.5, 5.5, 4.5, -0.5)
    """
    header: Any = volume.header
    if hasattr(header, "has_wcs"):
        return Frame((0.0, 1.0), (0.0, 1.0), ("x / pixels from 0", "y / pixels from 0"), True, aspect=aspect_of(header))
    if volume.affine is not None and (volume.dims == 3 or _in_patient(volume)):
        return _placed(volume, volume.affine, index)
    unit, plain = _unit(volume), set(volume.spacing) == {1.0}
    down, right = volume.spacing[-2:]
    where = f"z = {_number(index * volume.spacing[0])}{unit}" if volume.dims == 3 and not plain else ""
    names = [f"{name} / {'pixels' if plain and not unit else unit.strip() or 'unknown unit'}" for name in "xy"]
    return Frame((0.0, right), (0.0, down), (names[0], names[1]), where=where)


def _unit(volume: Volume) -> str:
    """The unit of a volume's spacing with a blank before it, "" where nothing names one; a NIfTI's is mm by default."""
    unit = unit_of(volume) or ("mm" if hasattr(volume.header, "get_xyzt_units") else "")
    return f" {unit.replace('um', 'µm')}" if unit else ""


def _number(value: float) -> str:
    return f"{round(value, 6) + 0.0:.4g}"  # no -0


def _placed(volume: Volume, affine: np.ndarray, index: int) -> Frame:
    """The frame of a slice by its affine."""
    steps = affine[:3, :3]
    rows, columns = volume.shape[-2:]
    first = affine[:3, 3] + steps[:, 2] * index
    across, along, through = (int(np.abs(steps[:, axis]).argmax()) for axis in range(3))
    patient, unit = _in_patient(volume), _unit(volume)
    counted = unit.strip() or "unknown unit"
    upward = bool(patient and steps[along, 1] > 0)
    sides = _letters(steps, across, along, upward) if patient else None
    if _is_slanted(steps, rows, columns) or len({across, along, through}) < 3:
        ends = [_SIDES[axis][int(steps[axis, number] > 0)] for number, axis in enumerate((across, along))]
        names = [f"{counted} from the first voxel, towards {end}" if patient else f"{name} / {counted}"
                 for name, end in zip("xy", ends, strict=True)]  # fmt: skip
        down, right = volume.spacing[-2:]
        return Frame((0.0, right), (0.0, down), (names[0], names[1]), upward, sides)
    names = [f"{'xyz'[axis]} / {counted}" + (f" (+ {_SIDES[axis][1]})" if patient else "") for axis in (across, along)]
    middle = first + steps[:, 0] * (columns - 1) / 2 + steps[:, 1] * (rows - 1) / 2
    where = f"{'xyz'[through]} = {_number(middle[through])}{unit}" if volume.dims == 3 else ""
    x = (float(middle[across] - steps[across, 0] * (columns - 1) / 2), float(steps[across, 0]))
    y = (float(middle[along] - steps[along, 1] * (rows - 1) / 2), float(steps[along, 1]))
    return Frame(x, y, (names[0], names[1]), upward, sides, where)


def _is_slanted(steps: np.ndarray, rows: int, columns: int) -> bool:
    """Whether the columns and rows of a slice leave their world axes by more than `_SLANT` of the smaller pixel."""
    size = min(np.linalg.norm(steps[:, axis]) for axis in (0, 1))
    strays = [np.delete(steps[:, axis], np.abs(steps[:, axis]).argmax()) for axis in (0, 1)]
    lengths = [(count - 1) * float(np.linalg.norm(off)) for count, off in zip((columns, rows), strays, strict=True)]
    return bool(max(lengths) > _SLANT * size)


def _letters(steps: np.ndarray, across: int, along: int, upward: bool) -> tuple[str, str, str, str]:
    right = int(steps[across, 0] > 0)
    top = int((steps[along, 1] > 0) == upward)
    left_right = [_SIDES[across][end][0].upper() for end in (1 - right, right)]
    low_high = [_SIDES[along][end][0].upper() for end in (1 - top, top)]
    return (left_right[0], left_right[1], low_high[0], low_high[1])


def _in_patient(volume: Volume) -> bool:
    """Whether the world of a file is a patient's: that of NIfTI and DICOM, and of volumes in ITK's formats."""
    header: Any = volume.header
    if hasattr(header, "get_xyzt_units"):
        return bool(header["sform_code"] or header["qform_code"])
    return type(header).__name__ == "DicomHeader" or (type(header).__name__ == "ItkHeader" and volume.dims == 3)


def add_axes(figure: Figure, volume: Volume, frame: Frame, index: int) -> Axes:
    """Empty axes for a slice, with names, ticks and the letters of its edges; of FITS, those and a grid on the sky."""
    header: Any = volume.header
    if getattr(header, "has_wcs", False):
        return sky_axes(figure, header, index)
    axes = figure.add_subplot()
    axes.set_xlabel(frame.names[0], color=INK, fontsize=9)
    axes.set_ylabel(frame.names[1], color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.locator_params(nbins=6)
    for letter, (x, y, across, along) in zip(frame.sides or (), _EDGES, strict=False):
        inset = (x + (0.5 - x) * 0.03, y + (0.5 - y) * 0.03)
        axes.text(*inset, letter, transform=axes.transAxes, ha=across, va=along, **_letter_style())
    return axes


def _letter_style() -> dict[str, Any]:
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2.5, foreground="black")
    return {"color": "white", "fontsize": 11, "fontweight": "bold", "path_effects": [halo], "zorder": 5}


def slice_title(volume: Volume, index: int, frame: Frame) -> str:
    """The name of the file and its part, and of a volume which slice this is and where."""
    name, header = "" if volume.path is None else volume.path.name, volume.header
    part = str(getattr(header, "dataset", "")).strip("/")
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 4 :]}"
    if getattr(header, "index", 0):  # an extension of FITS
        part = str(getattr(header, "name", "") or getattr(header, "index", ""))
    parts = [f"{name}[{part}]" if part and part != "COMPRESSED_IMAGE" else name]
    if volume.dims == 3:
        parts += [f"slice {index + 1} of {volume.shape[1]}", frame.where]
    return ",  ".join(part for part in parts if part)
