"""What a file holds: its geometry, statistics of its values by one pass over it, and a picture of its middle slice."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.files import writable_folder
from densepred.info_statistics import Statistics, gather
from densepred.volumes import Volume, open_volume, split_part

_POOLED_FROM = 9  # channels from which on their values are counted together
_BAR = 40


@dataclass(frozen=True)
class Info:
    """What `info` found.

    Attributes:
        path: the file, with its part.
        shape: `(C, *spatial)`.
        dtype: of the values as they are read.
        labels: the file says that its values are classes.
        spacing: size of a voxel along each spatial axis, in `unit`.
        unit: "mm", "um" ..., None where the file names none.
        affine: 4x4 from index (x, y, z) to world (RAS), or None.
        orientation: where x, y and z lead, "RAS" for one; None without an affine.
        pixel_scale: of FITS, size and unit of a pixel along each spatial axis.
        corners: of FITS with world coordinates, those of the first and the last pixel's centre, x first.
        statistics: one for each channel; a single one of all where there are very many.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    labels: bool
    spacing: tuple[float, ...]
    unit: str | None
    affine: np.ndarray | None
    orientation: str | None
    pixel_scale: tuple[tuple[float, str], ...]
    corners: tuple[tuple[str, ...], ...]
    statistics: tuple[Statistics, ...]

    def table(self) -> str:
        """All of it as text, a line for each fact, with a histogram of each channel."""
        axes = "(" + ", ".join(["C", "Z", "Y", "X"][-len(self.shape) :] if len(self.shape) == 4 else "CYX") + ")"
        rows = [("file", self.path), ("shape", f"{axes} = {self.shape}"), ("type", self.dtype)]
        if self.labels:
            rows.append(("values", "labels"))
        if self.pixel_scale:
            rows.append(("pixel", " x ".join(f"{size:g} {unit}".strip() for size, unit in self.pixel_scale)))
        else:
            rows.append(
                ("spacing", " x ".join(f"{size:.4g}" for size in self.spacing) + f" {self.unit or ''}".rstrip())
            )
        if self.affine is not None:
            rows.append(("orientation", f"{self.orientation} (where x, y, z lead)"))
            lines = ["  ".join(f"{number:10.4g}" for number in line) for line in self.affine[:3]]
            rows += [("affine" if number == 0 else "", line) for number, line in enumerate(lines)]
        names = ("first pixel", "last pixel")
        rows += [(name, ", ".join(corner)) for name, corner in zip(names, self.corners, strict=False)]
        for number, channel in enumerate(self.statistics):
            if len(self.statistics) > 1:
                rows.append((f"channel {number}", ""))
            rows += channel.rows(_BAR)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows)


def info(path: str | Path, axes: str | None = None, checksum: str = "verify") -> Info:
    """Read a file once, slab by slab, and describe it.

    Args:
        path: the file, with a part in brackets where it holds several images.
        axes: what its axes hold, where that is not plain.
        checksum: of FITS files, as for `open_volume`.

    Raises:
        InputError: it cannot be read, or is damaged.

    Example:
        >>> Volume.from_array(np.arange(24).reshape(2, 3, 4), (2.0, 1.0, 1.0)).save("steps.nii.gz")
        >>> found = info("steps.nii.gz")
        >>> found.orientation, found.statistics[0].mean
        ('RAS', 11.5)
    """
    with open_volume(path, axes, checksum) as volume:
        statistics = gather(volume, pooled=volume.shape[0] >= _POOLED_FROM)
        scale, corners = _world(volume)
        return Info(
            path=str(path),
            shape=volume.shape,
            dtype=str(volume.dtype),
            labels=volume.labels,
            spacing=volume.spacing,
            unit=unit_of(volume),
            affine=volume.affine,
            orientation=orientation_of(volume),
            pixel_scale=scale,
            corners=corners,
            statistics=statistics,
        )


def draw(
    path: str | Path,
    png: str | Path,
    axes: str | None = None,
    labels: str | Path | None = None,
    checksum: str = "verify",
) -> None:
    """Write a picture of the middle slice, with physical coordinates along its axes; see `info_figure.figure_of`.

    Args:
        path, axes, checksum: as for `info`.
        png: the picture, replaced in one step.
        labels: a label map on the same grid, to outline.

    Raises:
        InputError: a file cannot be read or would be replaced, or the labels lie on another grid.

    Example:
        >>> draw("mosaic.fits[SCI]", "mosaic.png", labels="sources.fits")  # doctest: +SKIP
    """
    from densepred.info_figure import Overlay, draw_volume

    check_picture(png, path, labels)
    with ExitStack() as stack:
        volume = stack.enter_context(open_volume(path, axes, checksum))
        overlay = None
        if labels is not None:
            spatial = None if axes is None else axes.replace("c", "").replace("t", "")
            overlay = Overlay(stack.enter_context(open_volume(labels, spatial, checksum)))
        draw_volume(volume, png, overlay)


def check_picture(png: str | Path, path: str | Path, labels: str | Path | None = None) -> None:
    """Make the folder of a picture, which must replace none of the files that it shows.

    Raises:
        InputError: it would, or the folder cannot be made.
    """
    writable_folder(Path(png).absolute().parent)
    for file in (split_part(one)[0] for one in (path, labels) if one is not None):
        if Path(png).exists() and file.exists() and file.samefile(png):
            raise InputError("the picture would replace what it shows", "choose another file", png)


def unit_of(volume: Volume) -> str | None:
    """The unit of the spacing, None where the file names none."""
    if hasattr(volume.header, "get_xyzt_units"):
        name = str(volume.header.get_xyzt_units()[0])
        return {"mm": "mm", "micron": "um", "meter": "m"}.get(name)
    unit = getattr(volume.header, "unit", None)
    return str(unit) if unit else None


def orientation_of(volume: Volume) -> str | None:
    """Where the axes x, y, z of the index lead, a letter each: R or L, A or P, S or I."""
    if volume.affine is None:
        return None
    from nibabel.orientations import aff2axcodes

    return "".join(code or "?" for code in aff2axcodes(volume.affine)[: volume.dims])


def _world(volume: Volume) -> tuple[tuple[tuple[float, str], ...], tuple[tuple[str, ...], ...]]:
    """Pixel scale and the world coordinates of two opposite corners, where the header is of FITS and has them."""
    header: Any = volume.header
    if not getattr(header, "has_wcs", False):
        return (), ()
    wcs, scale = header.spatial_wcs, header.pixel_scale
    if wcs.naxis != volume.dims:
        return scale, ()
    last = [size - 1 for size in reversed(volume.shape[1:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = wcs.all_pix2world(np.array([[0.0] * volume.dims, last], np.float64), 0)
    if wcs.wcs.lng >= 0:  # right ascension from 0 to 360 degrees, other longitudes from -180 to 180
        start = 0.0 if str(wcs.wcs.ctype[wcs.wcs.lng]).startswith("RA") else -180.0
        found[:, wcs.wcs.lng] = (found[:, wcs.wcs.lng] - start) % 360 + start  # wcslib gives celestial axes in degrees
    names = [str(name).split("-")[0] or f"axis {number + 1}" for number, name in enumerate(wcs.wcs.ctype)]
    units = [str(unit) for unit in wcs.wcs.cunit]
    said = tuple(
        tuple(f"{name} {value:.8g} {unit}".rstrip() for name, value, unit in zip(names, point, units, strict=True))
        for point in found.tolist()
    )
    return scale, said
