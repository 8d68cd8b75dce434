"""Make the pictures of docs/formats.md: for each family of formats an image with outlines and coordinates on its axes.

    python scripts/format_pictures.py --data FOLDER --out docs/images

Each is drawn by what draws `densepred info FILE --picture P --labels L`; two stand side by side where that shows more.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from astropy.stats import sigma_clipped_stats
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from densepred.figures import COLORS, INK
from densepred.files import atomic_write, writable_folder
from densepred.info_figure import HOLE, Overlay, figure_of
from densepred.volumes import Volume, open_volume
from densepred.volumes.grid import cutout

NUCLEI = "ea94ba4b01d1bd5f7768d10e0ac547743791033df545c71fcec442d0cb5cb5e7.png"
LARGEST = 300_000  # bytes of a picture
COMMON, SHADES = 140, 6  # colours of the images, and of each outline mixed with black or white: at most 256
Panel = tuple[Volume, Overlay | None]


def opened(root: Path, image: str, labels: str = "", names: Mapping[int, str] | None = None) -> Panel:
    """An image with its labels."""
    overlay = Overlay(open_volume(root / labels), names or {}) if labels else None
    return open_volume(root / image), overlay


def fits(root: Path) -> list[Panel]:
    """A survey's cut-out (TPV) with what stands out of it and its data-quality mask; filaments in the Galaxy."""
    place = "fits/labelled/testcase4/c4d_170316_062107_{}_z_ls9.N2.fits"
    image, quality = (open_volume(root / place.format(kind)) for kind in ("ooi", "ood"))
    values = image.numpy()[0]
    _, median, sigma = sigma_clipped_stats(values)
    parts, _ = ndimage.label(values > median + 3 * sigma)
    bright = ndimage.binary_dilation(np.bincount(parts.ravel())[parts] * (parts > 0) >= 12)
    flagged = quality.numpy()[0] == 5
    labels = image.like(np.where(flagged, 2, (bright & ~ndimage.binary_dilation(flagged, iterations=3)) * 1))
    survey = (image, Overlay(labels, {1: "source, 3 sigma above the sky", 2: "cosmic ray (data quality 5)"}))
    folder = "fits/labelled/filfinder/"
    return [survey, opened(root, f"{folder}filaments_updatedhdr.fits", f"{folder}test1_mask.fits", {1: "filaments"})]


def nifti(root: Path) -> list[Panel]:
    """A sagittal slice with vertebral levels, an oblique axial one with two tissues."""
    levels = {number: f"level {number}" for number in range(1, 8)}
    sagittal = opened(root, "spinal_cord/t2.nii.gz", "spinal_cord/t2_seg-manual_labeled.nii.gz", levels)
    cord, grey = (open_volume(root / f"spinal_cord/{name}.nii.gz") for name in ("t2s_seg", "t2s_gmseg_manual"))
    both = cord.like((cord.numpy() > 0) * 1 + (grey.numpy() > 0) * 4)
    named = Overlay(both, {1: "white matter", 4: "grey matter outside", 5: "grey matter"})
    return [sagittal, (open_volume(root / "spinal_cord/t2s.nii.gz"), named)]


def tiff(root: Path) -> list[Panel]:
    """Nuclei in 2D and in 3D."""
    return [opened(root, f"cells/img{dims}.tif", f"cells/mask{dims}.tif") for dims in ("2d", "3d")]


def hdf5(root: Path) -> list[Panel]:
    """Two datasets of one file."""
    return [opened(root, "cells/1135_mini.h5[raw]", "cells/1135_mini.h5[label]")]


def zarr(root: Path, folder: Path) -> list[Panel]:
    """A part of the same file, as OME-Zarr with its labels inside."""
    box = ((0, 50), (5, 75), (5, 100))
    for part, target in (("raw", folder / "cells.zarr"), ("label", f"{folder}/cells.zarr[labels/nuclei]")):
        with open_volume(root / f"cells/1135_mini.h5[{part}]") as volume:
            whole = cutout(volume, box)
            Volume(whole.numpy(), whole.spacing, header=whole.header, labels=part == "label").save(target)
    return [opened(folder, "cells.zarr", "cells.zarr[labels/nuclei]")]


def medical(root: Path) -> list[Panel]:
    """A MetaImage with its mask, and a DICOM series."""
    name = "other_formats/CT_2D_head_fixed"
    return [opened(root, f"{name}.mha", f"{name}_mask.mha", {1: "mask"}), opened(root, "other_formats/dicom_series")]


def png(root: Path) -> list[Panel]:
    """Nuclei in colours, with instances."""
    return [opened(root, f"nuclei/images/{NUCLEI}", f"nuclei/labels/{NUCLEI}")]


def picture(panels: list[Panel]) -> bytes:
    """A PNG of one panel, or of several of one height side by side, in few colours to be small."""
    figures = [figure_of(*panel) for panel in panels]
    height = min(figure.get_figheight() for figure in figures)
    drawn = []
    for figure in figures:
        figure.set_size_inches(figure.get_figwidth() * height / figure.get_figheight(), height)
        whole = io.BytesIO()
        figure.savefig(whole, format="png")
        drawn.append(np.asarray(Image.open(whole).convert("RGB")))
    coloured = any(image.shape[0] > 1 for image, _ in panels)
    return in_few_colours(np.concatenate(drawn, axis=1), coloured)


def in_few_colours(pixels: np.ndarray, coloured: bool) -> bytes:
    """`(rows, columns, 3)` as PNG with a palette: the outlines' colours, and greys or those that fit best."""
    base = np.repeat(np.linspace(0, 255, COMMON).round()[:, None], 3, axis=1)
    if coloured:
        base = np.array(Image.fromarray(pixels).quantize(COMMON).getpalette(), float).reshape(-1, 3)
    own = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (*COLORS, HOLE, INK)], float)
    shares = np.linspace(0, 1, SHADES + 1)[1:]
    mixed = [own * share + end * (1 - share) for end in (0, 255) for share in shares]
    palette = np.unique(np.concatenate([base, *mixed]).round().astype(np.uint8), axis=0)
    found, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    nearest = cKDTree(palette.astype(float)).query(found.astype(float))[1].astype(np.uint8)
    image = Image.fromarray(nearest[where.reshape(pixels.shape[:2])], mode="P")
    image.putpalette(palette.reshape(-1).tolist())
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of real images")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    parser.add_argument("--only", help="one family, such as fits")
    given = parser.parse_args()
    out = writable_folder(given.out)
    with tempfile.TemporaryDirectory() as scratch:
        families: dict[str, Callable[[], list[Panel]]] = {
            "fits": lambda: fits(given.data),
            "nifti": lambda: nifti(given.data),
            "tiff": lambda: tiff(given.data),
            "hdf5": lambda: hdf5(given.data),
            "zarr": lambda: zarr(given.data, Path(scratch)),
            "medical": lambda: medical(given.data),
            "png": lambda: png(given.data),
        }
        for name, make in families.items():
            if given.only in (None, name):
                with warnings.catch_warnings(action="ignore"):
                    content = picture(make())
                if len(content) > LARGEST:
                    raise SystemExit(f"{name}: {len(content)} bytes are more than {LARGEST}")
                atomic_write(out / f"format_{name}.png", content)
                print(f"{out / f'format_{name}.png'}: {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
