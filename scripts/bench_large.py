"""Images that fit no memory: a FITS mosaic and a NIfTI volume, made sparse on disk, predicted with a small network.

    python scripts/bench_large.py --side 20000 --depth 1024

Says the peak memory of the whole process and the time, and opens the results in astropy and nibabel: the world
coordinates at five points and the affine must be those of the input.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from bench_memory import make_run, peak_of

AFFINE = np.array([[-0.5, 0.02, 0.0, 90.0], [0.02, 0.5, 0.01, -126.0], [0.0, -0.01, 0.5, -72.0], [0, 0, 0, 1]])
PIECE = 256  # a quarter of it is noise, rows or planes, at both ends; the rest is a hole


def sparse(path: Path, header: bytes, shape: tuple[int, ...], dtype: str, padding: int = 1) -> None:
    """A file with noise at the beginning and at the end and nothing between."""
    count, rng = int(np.prod(shape)), np.random.default_rng(0)
    noise = rng.normal(100, 10, (min(PIECE, shape[0]) // 4, *shape[1:])).astype(dtype)
    size = count * noise.dtype.itemsize
    with path.open("wb") as file:
        file.write(header)
        noise.tofile(file)
        file.seek(len(header) + size - noise.nbytes)
        noise.tofile(file)
        file.truncate(-(-(len(header) + size) // padding) * padding)


def mosaic(path: Path, side: int) -> None:
    """`(side, side)` float32 with a distorted world coordinate system."""
    header = fits.Header([("SIMPLE", True), ("BITPIX", -32), ("NAXIS", 2), ("NAXIS1", side), ("NAXIS2", side)])
    header.update(CTYPE1="RA---TAN-SIP", CTYPE2="DEC--TAN-SIP", CRVAL1=150.1, CRVAL2=2.2, OBJECT="mosaic")
    header.update(CRPIX1=side / 2, CRPIX2=side / 2, CD1_1=-7e-5, CD1_2=1e-6, CD2_1=1e-6, CD2_2=7e-5)
    header.update(A_ORDER=2, B_ORDER=2, A_2_0=1e-8, B_0_2=-2e-8)
    text = header.tostring().encode("ascii")
    sparse(path, text, (side, side), ">f4", padding=2880)


def volume(path: Path, depth: int) -> None:
    """`(depth, depth, depth)` int16, oblique."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((depth,) * 3)
    header.set_sform(AFFINE, 1)
    header.set_qform(AFFINE, 1, strip_shears=True)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    sparse(path, header.binaryblock + bytes(4), (depth,) * 3, "<i2")


def check_mosaic(source: Path, result: Path) -> str:
    """Pixels by which the sky of the result is off, by astropy."""
    with fits.open(source, memmap=True) as image, fits.open(result) as labels:
        found = next(hdu for hdu in labels if hdu.is_image and hdu.header["NAXIS"] == 2)
        y, x = (size - 1 for size in found.shape)
        points = np.array([[0, 0], [x, 0], [0, y], [x, y], [x / 2, y / 2]], float)
        theirs, ours = WCS(image[0].header), WCS(found.header)
        off = np.abs(theirs.all_world2pix(ours.all_pix2world(points, 0), 0) - points).max()
        assert found.shape == image[0].shape
        assert off < 1e-6
        return f"{found.shape[1]} x {found.shape[0]} in astropy, sky within {off:.0e} pixel"


def check_volume(source: Path, result: Path) -> str:
    """That the grid of the result is the source's, by nibabel."""
    image, labels = nib.load(source), nib.load(result)
    assert labels.shape == image.shape
    assert np.array_equal(labels.affine, image.affine)
    last = np.asanyarray(labels.dataobj[:, :, -1])
    return f"{' x '.join(map(str, labels.shape))} {last.dtype} in nibabel, the same affine"


def main() -> None:
    """Parse the command line, predict and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="of the mosaic; 0 leaves it out")
    parser.add_argument("--depth", type=int, default=1024, help="of the volume; 0 leaves it out")
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--overlap", type=float, default=0.125)
    parser.add_argument("--folder", type=Path, help="for the files, some GB; by default a temporary one")
    arguments = parser.parse_args()
    print("| image | on disk | peak memory | time | result |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, channels = Path(name), tuple(arguments.channels)
        if arguments.side:
            image, run = folder / "mosaic.fits", make_run(folder / "run2d", (512, 512), channels)
            mosaic(image, arguments.side)
            report(image, run, folder / "out2d", arguments.overlap, check_mosaic)
        if arguments.depth:
            image, run = folder / "volume.nii", make_run(folder / "run3d", (64, 64, 64), channels)
            volume(image, arguments.depth)
            report(image, run, folder / "out3d", arguments.overlap, check_volume)


def report(image: Path, run: Path, out: Path, overlap: float, check: object) -> None:
    """Predict in a process of its own, and print a row."""
    assert callable(check)
    started = time.monotonic()
    peak = peak_of("predict", run, image, "--out", out, "inference.device=cpu", f"inference.overlap={overlap}")
    seconds = time.monotonic() - started
    result = next(path for path in out.iterdir() if path.name.startswith(image.name.split(".")[0]))
    size = image.stat().st_size
    print(
        f"| {image.name} | {size / 1e9:.2f} GB | {peak:,.0f} MB | {seconds:,.0f} s | {check(image, result)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
