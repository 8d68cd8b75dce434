"""Speed of reading and writing files against nibabel, SimpleITK, astropy, fitsio and zarr, in turn and in one run.

    python scripts/bench_files.py                        # all cases, a table in Markdown
    python scripts/bench_files.py --only nifti --rounds 31
    python scripts/bench_files.py --folder /dev/shm      # no disk: what it costs to force data to one drops out

Whole images are read into a numpy array in native byte order, files warm in the page cache; label maps are written
whole. The programs take turns within each round, so that a slow machine is slow for all. A line gives the medians of
wall clock and of processor time (all threads) in milliseconds, and the medians over the rounds of both over ours.

Programs do not all do the same, so peers appear twice where they do less by themselves:

- Reading, ours checks all that a file can be checked by: the CRC of gzip, DATASUM and CHECKSUM of FITS. "checked" marks
  a peer that was told to do so too.
- Writing, ours forces the file to disk, reads it back, compares it and only then gives it its name; into FITS it writes
  checksums. "safe" marks a peer around which the same was put. Without, the file may be torn or still be lost.

Needs the extras `itk` and `peers`; a program that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import zarr
from astropy.io import fits
from scipy.ndimage import gaussian_filter, zoom
from zarr.codecs import ZstdCodec

from densepred.files import sync
from densepred.volumes import Volume, open_volume, open_writer
from densepred.volumes.fits_tiles import tile_shape
from densepred.volumes.zarr_write import sharding

VOLUME = (128, 256, 256)
LABELS = (128, 512, 512)
IMAGE = (4096, 2048)
OURS = "densepred"

Read = Callable[[Path], np.ndarray]
Writing = Callable[..., None]


@dataclass
class Case:
    """A file or a way to write one. `programs` give its values, or write them; ours comes first."""

    title: str
    path: Path
    values: np.ndarray
    programs: dict[str, Any]
    reading: bool = True


# The images


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth random field of unit variance; its forms grow with the shape."""
    coarse = gaussian_filter(rng.standard_normal([32] * (len(shape) == 3) + [64, 64]), 4)
    factors = [size / old for size, old in zip(shape, coarse.shape, strict=True)]
    return zoom((coarse / coarse.std()).astype(np.float32), factors, order=1)


def segmented(seed: int, least: float, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The labels 1 to 8 of organs within a body, and the body; the higher `least`, the less of it is organs."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32) for size in shape], indexing="ij")
    body = (y / 0.75) ** 2 + (x / 0.9) ** 2 < 1
    best = np.full(shape, least, np.float32)
    labels = np.zeros(shape, np.uint8)
    for number in range(1, 9):
        organ = smooth(rng, shape)
        labels[(organ > best) & body] = number
        np.maximum(best, organ, out=best)
    return labels, body


def scan(seed: int) -> np.ndarray:
    """A body in air, int16 in Hounsfield units with noise."""
    labels, body = segmented(seed, 1.2, VOLUME)
    values = np.array([-1000, 60, 40, -80, 120, 300, 30, -700, 90], np.float32)[labels]
    values[(labels == 0) & body] = 20
    values += np.random.default_rng(seed).normal(0, 12, VOLUME)
    return np.clip(np.rint(values), -1024, 3071).astype(np.int16)


def sky(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 with a background, clouds and noise, as a telescope's pipeline leaves it."""
    rng = np.random.default_rng(seed)
    return (rng.normal(100, 5, shape) + 20 * np.exp(smooth(rng, shape))).astype(np.float32)


# Reading


def ours(path: Path) -> np.ndarray:
    with open_volume(path, axes="zyx" if ".cube.fits" in path.name else None) as volume:
        return volume.numpy()[0]


def native(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def by_nibabel(path: Path) -> np.ndarray:
    image: Any = nibabel.load(path, mmap=False)  # with a map nothing would be read yet
    return native(np.asanyarray(image.dataobj).T)


def by_nibabel_float32(path: Path) -> np.ndarray:
    image: Any = nibabel.load(path, mmap=False)
    return native(image.get_fdata(dtype=np.float32, caching="unchanged").T)


def by_sitk(path: Path) -> np.ndarray:
    import SimpleITK

    values: np.ndarray = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    return values


def by_astropy(path: Path, checksum: bool = False) -> np.ndarray:
    with fits.open(path, memmap=False, checksum=checksum) as hdus:
        return native(next(hdu.data for hdu in hdus if hdu.header["NAXIS"]))


def by_fitsio(path: Path, checksum: bool = False) -> np.ndarray:
    import fitsio

    with fitsio.FITS(str(path)) as hdus:
        hdu = next(hdu for hdu in hdus if hdu.has_data())
        if checksum:
            hdu.verify_checksum()  # raises
        return native(hdu.read())


def by_zarr(path: Path) -> np.ndarray:
    stored: Any = zarr.open(str(path), mode="r")
    return native(np.asarray((stored if isinstance(stored, zarr.Array) else stored["0"])[:]))


def nifti_reading(folder: Path) -> Iterator[Case]:
    image = scan(1)
    stored = {"int16": image, "float32": sky(2, VOLUME), "labels": segmented(1, 1.2, LABELS)[0]}
    for suffix in (".nii", ".nii.gz"):
        for name, values in stored.items():
            path = folder / f"{name}{suffix}"
            write_nibabel(path, values)
            yield Case(f"`{suffix}`, {name}", path, values, {OURS: ours, "nibabel": by_nibabel, "SimpleITK": by_sitk})
        path, scaled = folder / f"scaled{suffix}", image.astype(np.float32) * np.float32(0.5) - 10
        header = nibabel.Nifti1Image(image.T, np.eye(4)).header
        header["vox_offset"] = 352
        header.set_slope_inter(0.5, -10)
        with nibabel.openers.Opener(str(path), "wb") as file:
            file.write(header.binaryblock + bytes(4) + image.tobytes())
        peers = {"nibabel": by_nibabel_float32, "SimpleITK": by_sitk}
        yield Case(f"`{suffix}`, int16 scaled", path, scaled, {OURS: ours, **peers})


def fits_reading(folder: Path) -> Iterator[Case]:
    real, cube = sky(2, IMAGE), scan(1)
    image = np.rint(10 * real).astype(np.int16)
    peers: dict[str, Read] = {"astropy": by_astropy, "fitsio": by_fitsio}
    checked = {**peers, "astropy, checked": partial(by_astropy, checksum=True)}
    for suffix in (".fits", ".fits.gz"):
        for sums in (False, True):
            path = folder / f"float{sums}{suffix}"
            fits.PrimaryHDU(real).writeto(path, checksum=sums)
            title = f"`{suffix}`, float32{', with sums' if sums else ''}"
            yield Case(title, path, real, {OURS: ours, **(checked if sums else peers)})
    for name, kind, values, rows, sums in (
        ("int16", "RICE_1", image, 1, False),
        ("int16", "RICE_1", image, 1, True),
        ("int16", "RICE_1", image, 32, False),
        ("int16 volume", "RICE_1", cube, 1, False),
        ("float32 quantised", "RICE_1", real, 1, False),
        ("float32", "GZIP_2", real, 1, False),
        ("float32", "GZIP_2", real, 16, False),
        ("int16", "HCOMPRESS_1", image, 16, False),
    ):
        path = folder / f"{kind}{rows}{sums}{'.cube' if values is cube else ''}.fits.fz"
        tile, level = (*[1] * (values.ndim - 2), rows, values.shape[-1]), 16 if "quantised" in name else 0
        hdu = fits.CompImageHDU(values, compression_type=kind, tile_shape=tile, quantize_level=level)
        hdu.writeto(path, checksum=sums)
        title = f"`.fits.fz`, {name}, {kind}, tiles of {rows} x {tile[-1]}{', with sums' if sums else ''}"
        expected = by_astropy(path) if level else values
        yield Case(title, path, expected, {OURS: ours, **(checked if sums else peers)})


def zarr_reading(folder: Path) -> Iterator[Case]:
    image = scan(1)
    sharded = folder / "sharded.zarr"
    Volume.from_array(image, (1.0,) * 3).save(sharded)
    yield Case("Zarr, int16, sharded by ours", sharded, image, {OURS: ours, "zarr": by_zarr})
    for name, compressors in (("Zstandard", ZstdCodec(level=3)), ("no compression", None)):
        path = folder / f"{name[:4]}.zarr"
        zarr.create_array(str(path), data=image, chunks=(64,) * 3, compressors=compressors)
        yield Case(f"Zarr, int16, 64x64x64, {name}", path, image, {OURS: ours, "zarr": by_zarr})


# Writing


def write_ours(path: Path, values: np.ndarray) -> None:
    like = Volume(np.broadcast_to(np.uint8(0), (1, *values.shape)), (1.0,) * 3, np.eye(4))
    with open_writer(path, like, values.dtype, labels=True) as writer:
        writer.write(values[np.newaxis])


def write_nibabel(path: Path, values: np.ndarray) -> None:
    nibabel.Nifti1Image(values.T, np.eye(4)).to_filename(path)


def write_sitk(path: Path, values: np.ndarray) -> None:
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), path, useCompression=path.suffix == ".gz")


def write_astropy(path: Path, values: np.ndarray, kind: str = "", sums: bool = False) -> None:
    tile = tile_shape(values.shape, values.itemsize)
    hdu: Any = fits.CompImageHDU(values, compression_type=kind, tile_shape=tile) if kind else fits.PrimaryHDU(values)
    hdu.writeto(path, checksum=sums)


def write_fitsio(path: Path, values: np.ndarray, kind: str = "", sums: bool = False) -> None:
    import fitsio

    tiles = {"compress": kind, "tile_dims": tile_shape(values.shape, values.itemsize)} if kind else {}
    with fitsio.FITS(str(path), "rw", clobber=True) as file:
        file.write(values, **tiles)
        if sums:
            file[-1].write_checksum()


def write_zarr(path: Path, values: np.ndarray) -> None:
    chunks, shards = sharding(1, values.shape, values.itemsize)
    zstd = ZstdCodec(level=3, checksum=True)
    stored = zarr.create_array(
        str(path), shape=values.shape, dtype=values.dtype, chunks=chunks, shards=shards, compressors=zstd
    )
    stored[:] = values


def safe(write: Writing, read: Read) -> Writing:
    """What ours does, around a peer: under another name, forced to disk, read back, compared, renamed."""

    def run(path: Path, values: np.ndarray) -> None:
        part = path.with_name(f"part.{path.name}")
        write(part, values)
        for file in [part, *part.rglob("*")]:
            sync(file)
        if not np.array_equal(read(part), values):
            raise OSError(f"{part} does not read back")
        os.replace(part, path)
        sync(path.parent)

    return run


def label_writing(folder: Path) -> Iterator[Case]:
    checked: Read = partial(by_astropy, checksum=True)
    sums: Read = partial(by_fitsio, checksum=True)
    nifti: dict[str, tuple[Writing, Writing, Read]] = {
        "nibabel": (write_nibabel, write_nibabel, by_nibabel),
        "SimpleITK": (write_sitk, write_sitk, by_sitk),
    }
    plain_fits: dict[str, tuple[Writing, Writing, Read]] = {
        "astropy": (write_astropy, partial(write_astropy, sums=True), checked),
        "fitsio": (write_fitsio, partial(write_fitsio, sums=True), sums),
    }
    formats = {".nii": nifti, ".nii.gz": nifti}
    formats |= {".fits": plain_fits, ".fits.gz": plain_fits}
    formats[".fits.fz"] = {
        f"{name}, {kind}": (partial(write, kind=kind), partial(write, kind=kind, sums=True), read)
        for name, kind, write, read in (
            ("astropy", "GZIP_2", write_astropy, checked),
            ("astropy", "RICE_1", write_astropy, checked),
            ("fitsio", "GZIP_2", write_fitsio, sums),
            ("fitsio", "RICE_1", write_fitsio, sums),
        )
    }
    formats[".zarr"] = {"zarr": (write_zarr, write_zarr, by_zarr)}
    for (title, least), shape in itertools.product((("organs", 1.2), ("lesions", 2.0)), (VOLUME, LABELS)):
        labels = segmented(1, least, shape)[0]
        for suffix, peers in formats.items():
            programs: dict[str, Writing] = {OURS: write_ours}
            for name, (plain, summed, read) in peers.items():
                programs |= {name: plain, f"{name}, safe": safe(summed, read)}
            runs = {name: partial(write, values=labels) for name, write in programs.items()}
            yield Case(f"`{suffix}`, {title} {shape}", folder / f"written.cube{suffix}", labels, runs, reading=False)


# Measuring

GROUPS = {"nifti": nifti_reading, "fits": fits_reading, "zarr": zarr_reading, "labels": label_writing}


def missing() -> list[str]:
    """Peers that are not installed; a line says so."""
    gone = [name for name in ("SimpleITK", "fitsio") if find_spec(name) is None]
    for name in gone:
        print(f"Without {name}, which is not installed.\n")
    return gone


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)


def run_once(case: Case, program: Callable[[Path], Any]) -> tuple[float, float, Any]:
    """Seconds of wall clock and processor, and what came of it."""
    if not case.reading:
        remove(case.path)
    start, worked = time.perf_counter(), time.process_time()
    result = program(case.path)
    return time.perf_counter() - start, time.process_time() - worked, result


def measure(case: Case, rounds: int) -> None:
    """Check each program once, which also warms up, then let them take turns; prints the lines of the table."""
    sizes: dict[str, int] = {}
    for name, program in case.programs.items():
        got = run_once(case, program)[2]
        values = got if case.reading else ours(case.path)
        if not np.allclose(values, case.values, rtol=1e-6, atol=0) or not values.dtype.isnative:
            raise SystemExit(f"{case.title}: {name} gives other values")
        sizes[name] = size_of(case.path)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in case.programs}
    order = list(case.programs)
    for _ in range(rounds):
        for name in order:
            taken[name].append(run_once(case, case.programs[name])[:2])
        order.append(order.pop(0))  # none has always the same one before it
    for name, times in taken.items():
        wall, worked = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
        slower = [[its / our for its, our in zip(*pair, strict=True)] for pair in zip(times, taken[OURS], strict=True)]
        ratios = [statistics.median(column) for column in zip(*slower, strict=True)]
        cells = (
            f"{'read' if case.reading else 'write'} {case.title}",
            name,
            *(f"{time:.1f}" for time in (wall, worked)),
            f"{case.values.nbytes / wall / 1e3:,.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{sizes[name] / 1e3:,.0f}",
        )
        print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=list(GROUPS))
    parser.add_argument("--match", default="", help="only cases whose title holds this")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are put")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    gone = missing()
    packages = ("nibabel", "SimpleITK", "astropy", "fitsio", "zarr", "isal")
    print(platform.platform(), *[f"{name} {version(name)}" for name in packages if name not in gone], sep=", ")
    print("\n| file | program | ms | processor | MB/s | over ours | processor over ours | kB |" + "\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for group in arguments.only:
            for case in GROUPS[group](Path(name)):
                if arguments.match in case.title:
                    for peer in [name for name in case.programs if any(name.startswith(part) for part in gone)]:
                        del case.programs[peer]
                    measure(case, arguments.rounds)
                remove(case.path)


if __name__ == "__main__":
    main()
