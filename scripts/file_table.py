"""Open every image under a folder with densepred and with the library of its format, compare them, and make a table.

    python scripts/file_table.py --data FOLDER --out docs/files.md

Compared are shape, every value (and where there is none) and the geometry: the world coordinates of five points (FITS),
the affine (NIfTI, NRRD, MetaImage, DICOM) or the size of a voxel. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its own name in every example
import tifffile
from astropy.io import fits
from astropy.wcs import WCS

from densepred.errors import DensepredError
from densepred.files import atomic_write
from densepred.volumes import Volume, open_volume

FOLDERS = ("fits", "nifti_odd", "other_formats", "spinal_cord", "ct_mr", "cells")
LIBRARIES = ("astropy", "nibabel", "tifffile", "h5py", "SimpleITK")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From ITK's world (left, posterior, superior) to nibabel's, or back."""
COLUMNS = ("file", "part", "declared", "shape", "type", "values", "geometry", "by", "result")
HEAD = """# Files compared

Every image of a collection of public files, opened with densepred and with the library of its format. Equal means: the
same shape `(C, Z, Y, X)` or `(C, Y, X)`, every value the same and NaN at the same places, and the same geometry: the
world coordinates of the four corners and the centre (WCS; pixels where the header has none), the affine, or the size
of a voxel. Refused means that densepred stops with this message, for a fault that the library finds too. A type in
brackets is the library's where ours is smaller: its values are then compared as rounded to ours.

"""


@dataclass(frozen=True)
class Witness:
    """One image as the library of its format gives it.

    Args:
        library: which.
        values: `(C, *spatial)`; None where the library does not give it either.
        geometry: what `geometry_of` gives of the volume: its kind, and the numbers.
        part: what is written in brackets behind the path to mean this image, "" for nothing.
        axes: what has to be declared, "" for nothing.
        checksum: as `open_volume` takes it.
        fault: what the library itself says against reading this, "" for nothing.
    """

    library: str
    values: np.ndarray | None = None
    geometry: tuple[str, np.ndarray] = ("", np.empty(0))
    part: str = ""
    axes: str = ""
    checksum: str = "verify"
    fault: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table: `cells` in the order of `COLUMNS`; `ok` if the image is equal, or rightly refused."""

    cells: tuple[str, ...]
    ok: bool


def compare(root: Path) -> list[Row]:
    """A row for each image of each file in the folders `FOLDERS` of `root`."""
    return [row_of(path, witness, root) for path in files(root) for witness in witnesses(path)]


def files(root: Path) -> list[Path]:
    """The files, sorted; the slices of a series are their folder."""
    found = {path for name in FOLDERS for path in (root / name).rglob("*") if path.is_file()}
    return sorted({path.parent if path.suffix == ".dcm" else path for path in found})


def witnesses(path: Path) -> Iterator[Witness]:
    """Every image of a file by the library of its format.

    Raises:
        ValueError: no library is known for it.
    """
    if path.is_dir():
        yield _dicom(path)
    elif ".fit" in path.name:
        yield from _fits(path)
    elif re.search(r"\.(nii|nii\.gz|hdr)$", path.name):
        yield from _nifti(path)
    elif path.suffix in (".tif", ".tiff"):
        yield from _tiff(path)
    elif path.suffix == ".h5":
        yield from _hdf5(path)
    elif path.suffix in (".nrrd", ".mha"):
        yield _itk(sitk.ReadImage(str(path)))
    else:
        raise ValueError(f"no library is known for {path}")


def _fits(path: Path) -> Iterator[Witness]:
    """Every HDU with an array; the only image of a file is meant without brackets. A wrong checksum is a second row."""
    with warnings.catch_warnings(action="ignore"), fits.open(path, memmap=False) as file:
        arrays = [number for number, hdu in enumerate(file) if hdu.is_image and hdu.shape]
        images = [number for number in arrays if len(file[number].shape) > 1]
        for number in arrays:
            values, part = file[number].data, "" if images == [number] else str(number)
            if values.ndim < 2:
                yield Witness("astropy", part=part, fault="one axis")
                continue
            wcs = WCS(file[number].header, file)
            kind = "WCS" if any(wcs.wcs.ctype) else "pixels"
            geometry = (kind, wcs.all_pix2world(_points(values.shape), 0))
            axes = "zyx" if values.ndim == 3 else ""
            fault = _checksum_fault(path, number)
            if fault:
                yield Witness("astropy", part=part, axes=axes, fault=fault)
            checksum = "ignore" if fault else "verify"
            yield Witness("astropy", values[np.newaxis], geometry, part, axes, checksum)


def _checksum_fault(path: Path, number: int) -> str:
    """astropy's word on the checksums of an HDU, "" if it has none against them."""
    with warnings.catch_warnings(record=True, action="always") as said, fits.open(path, checksum=True) as file:
        hdu = file[number]
        name = f"({hdu.name!r}, {hdu.ver})"
    heard = [str(one.message).strip() for one in said]
    return next((text for text in heard if "verification failed" in text and name in text), "")


def _points(shape: Sequence[int]) -> np.ndarray:
    """`(5, axes)`: four corners and the centre, x first, from 0."""
    ends = np.array([size - 1.0 for size in reversed(shape)])
    corners = [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0), (0.5, 0.5, 0.5)]
    return np.array(corners)[:, : len(ends)] * ends


def _nifti(path: Path) -> Iterator[Witness]:
    """The file, and its last frame where there are several."""
    try:
        image: Any = nibabel.load(path)
        values = np.asanyarray(image.dataobj).T
    except FileNotFoundError as error:  # a header without its voxels
        yield Witness("nibabel", fault=str(error))
        return
    geometry = ("affine", image.affine)
    if values.ndim == 3:
        yield Witness("nibabel", values[np.newaxis], geometry)
    else:
        yield Witness("nibabel", values, geometry, axes="xyzc")
        yield Witness("nibabel", values[-1:], geometry, str(len(values) - 1), "xyzt")


def _tiff(path: Path) -> Iterator[Witness]:
    """Every image of the file; those here have neither colours nor channels, and no sizes."""
    with tifffile.TiffFile(path) as file:
        if file.is_ome or file.is_imagej or any(set(series.axes) - set("QZYX") for series in file.series):
            raise ValueError(f"{path}: sizes and channels of such a file are not compared yet")
        for number, series in enumerate(file.series):
            part = str(number) if len(file.series) > 1 else ""
            yield Witness("tifffile", series.asarray()[np.newaxis], ("spacing", np.ones(len(series.shape))), part)


def _hdf5(path: Path) -> Iterator[Witness]:
    with h5py.File(path) as file:
        names: list[str] = []
        file.visititems(lambda name, entry: names.append(name) if isinstance(entry, h5py.Dataset) else None)
        for name in names:
            size = np.asarray(file[name].attrs.get("element_size_um", np.ones(file[name].ndim)), np.float64)
            yield Witness("h5py", file[name][()][np.newaxis], ("spacing", size), name)


def _dicom(folder: Path) -> Witness:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return _itk(reader.Execute())


def _itk(image: Any) -> Witness:
    dims = image.GetDimension()
    affine = np.eye(4)
    affine[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) @ np.diag(image.GetSpacing())
    affine[:dims, 3] = image.GetOrigin()
    return Witness("SimpleITK", sitk.GetArrayFromImage(image)[np.newaxis], ("affine", LPS @ affine))


def geometry_of(volume: Volume, kind: str) -> np.ndarray:
    """The numbers to compare with a witness's: coordinates of five points, an affine or a spacing."""
    if kind == "affine":
        return np.empty(0) if volume.affine is None else volume.affine
    if kind == "spacing":
        return np.array(volume.spacing)
    header: Any = volume.header
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(header.wcs.all_pix2world(_points(header.shape), 0))


def faults(volume: Volume, values: np.ndarray, witness: Witness) -> list[str]:
    """What differs between a volume, with all its values, and its witness."""
    assert witness.values is not None
    expected = witness.values
    if values.shape != expected.shape:
        return [f"shape {values.shape} instead of {expected.shape}"]
    found = []
    ours, theirs = values.dtype, expected.dtype.newbyteorder("=")
    if ours != theirs and (ours, theirs) != (np.dtype(np.float32), np.dtype(np.float64)):
        found.append(f"type {ours} instead of {theirs}")
    with np.errstate(invalid="ignore"):  # NaN as an integer
        expected = expected.astype(values.dtype)
    same = (values == expected) | ((values != values) & (witness.values != witness.values))
    if not same.all():
        found.append(f"{same.size - same.sum()} of {same.size} values differ")
    kind, numbers = witness.geometry
    places = geometry_of(volume, kind)
    if places.shape != numbers.shape or not np.allclose(places, numbers, rtol=1e-12, atol=1e-12, equal_nan=True):
        found.append(f"the geometry ({kind}) differs")
    return found


def row_of(path: Path, witness: Witness, root: Path) -> Row:
    """Open an image with densepred and compare it."""
    declared = [f"axes: {witness.axes}"] * bool(witness.axes)
    declared += [f"checksum: {witness.checksum}"] * (witness.checksum != "verify")
    start = (path.relative_to(root).as_posix(), witness.part, ", ".join(declared))
    name = f"{path}[{witness.part}]" if witness.part else path
    try:
        with (
            warnings.catch_warnings(record=True, action="always") as said,
            open_volume(name, witness.axes or None, witness.checksum) as volume,
        ):
            values = volume.numpy()
    except DensepredError as error:
        told = _short(f"refused: {error.what}; {error.fix}", root)
        return Row((*start, *[""] * 4, witness.library, told), bool(witness.fault and error.what and error.fix))
    if witness.values is None:
        return Row((*start, *[""] * 4, witness.library, f"read, against: {witness.fault}"), False)
    wrong = faults(volume, values, witness)
    result = "; ".join([", ".join(wrong) or "equal", *dict.fromkeys(f"warns: {one.message}" for one in said)])
    cells = (" x ".join(map(str, values.shape)), *_types(values, witness.values), witness.geometry[0])
    return Row((*start, *cells, witness.library, _short(result, root)), not wrong)


def _types(values: np.ndarray, expected: np.ndarray) -> tuple[str, str]:
    """The cells of type and values."""
    theirs = expected.dtype.newbyteorder("=")
    kind = f"{values.dtype}" if values.dtype == theirs else f"{values.dtype} ({theirs})"
    holes = int((values != values).sum())
    return kind, f"{values.size:,}".replace(",", " ") + (f" ({holes} NaN)" if holes else "")


def _short(text: str, root: Path) -> str:
    return text.replace(f"{root}/", "").replace("\n", " ")


def page(rows: Sequence[Row]) -> str:
    """The page of the documentation."""
    equal = sum(row.cells[-1].startswith("equal") for row in rows)
    refused = sum(row.cells[-1].startswith("refused") for row in rows)
    count = len({row.cells[0] for row in rows})
    wrong = sum(not row.ok for row in rows)
    told = f"{count} files, {len(rows)} readings: {equal} equal, {refused} refused, {wrong} wrong."
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS))]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows]
    return f"{HEAD}{told}\n\n{made_with()}\n\n" + "\n".join(lines) + "\n"


def made_with() -> str:
    """The line of the page that changes with the libraries."""
    return "Made by `scripts/file_table.py` with " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES) + "."


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with " + ", ".join(FOLDERS))
    parser.add_argument("--out", type=Path, default=Path("docs/files.md"), help="the page to write")
    given = parser.parse_args()
    rows = compare(given.data)
    atomic_write(given.out, page(rows))
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        print("WRONG", *row.cells, sep=" | ")
    print(f"{len(rows)} images, {len(wrong)} wrong: {given.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
