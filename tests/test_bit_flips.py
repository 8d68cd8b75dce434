"""Single bits of files flipped: what a format can notice is never returned as data, and nothing crashes or escapes."""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its own name
import tifffile
import zarr
from astropy.io import fits
from PIL import Image

from densepred.volumes import FORMATS, Volume
from tests.nifti_files import save_nib
from tests.read_trials import LONGEST, MOST_MEGABYTES, Answer, flipped, reader

NOISE = np.random.default_rng(0).normal(100, 30, (6, 12, 13)).astype("i2")
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 25)).astype("u1")

Ask: TypeAlias = "Callable[..., Answer]"


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with reader() as read:
        yield read


def spread(size: int, count: int) -> list[int]:
    """`count` bits of `size` bytes, evenly."""
    return sorted(set(np.linspace(0, 8 * size - 1, count).astype(int).tolist()))


MEANINGLESS = {8 * 3, *range(8 * 4, 8 * 10)}
"""Bits of a gzip file, by RFC 1952: the flag TEXT; the time; hints on compression and system."""


def the_same_to_zlib(sound: bytes, bit: int) -> bool:
    """Whether a flip within the compressed stream changes nothing of what it says, such as which of two equal earlier
    strings is repeated; length and CRC are right then.
    """
    try:
        return gzip.decompress(flipped(sound, bit)) == gzip.decompress(sound)
    except (OSError, EOFError, zlib.error):
        return False


def returned_by_nibabel(path: Path, sound: bytes, bit: int) -> bool:
    """Whether nibabel gives other values than were stored, without a word."""
    path.write_bytes(flipped(sound, bit))
    try:
        with warnings.catch_warnings(action="ignore"):
            found = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    except Exception:
        return False
    return found.shape == NOISE.T.shape and not np.array_equal(found, NOISE.T)


def test_none_of_a_thousand_flips_in_nii_gz_is_returned_as_data(tmp_path: Path, ask: Ask) -> None:
    path = tmp_path / "x.nii.gz"
    raw = save_nib(tmp_path / "x.nii", NOISE.T).read_bytes()
    path.write_bytes(gzip.compress(raw, 6, mtime=0))
    sound = path.read_bytes()
    flips = sorted({*spread(len(sound), 1200), *range(8 * 10), *range(8 * (len(sound) - 9), 8 * len(sound))})
    found = ask(path, None, None, flips)
    check(found, len(flips))
    assert path.read_bytes() == sound
    unseen = {bit for bit, said in zip(flips, found.reads, strict=True) if said == "same"}
    assert not [said for said in found.reads if not said.startswith(("refused", "same"))]
    assert unseen >= MEANINGLESS
    inside = unseen - MEANINGLESS
    assert len(inside) < 0.01 * len(flips)
    assert all(10 <= bit // 8 < len(sound) - 8 and the_same_to_zlib(sound, bit) for bit in inside)
    theirs = sum(returned_by_nibabel(path, sound, bit) for bit in flips[::4])
    assert theirs > 0.5 * len(flips[::4]), "nibabel returns most of them as data"


def check(found: Answer, count: int) -> None:
    """All was read, without a crash, a hang, or an error that is not ours, in little memory."""
    assert found.status == 0
    assert len(found.reads) == count
    assert not [said for said in found.reads if said.startswith(("escaped", "nameless"))]
    assert found.megabytes < MOST_MEGABYTES
    assert found.seconds < LONGEST / 2


def ours(path: Path) -> None:
    image = FORMATS["".join(path.suffixes[-2:]) if path.suffix in (".gz", ".fz") else path.suffix].endswith("image")
    Volume(IMAGE[None] if image else NOISE[None], (1.0,) * (2 if image else 3)).save(path)


def tiled(codec: str, checksum: bool) -> Callable[[Path], object]:
    image = np.abs(NOISE[0])
    return lambda path: fits.HDUList(
        [fits.PrimaryHDU(), fits.CompImageHDU(image, compression_type=codec, tile_shape=(12, 13))]
    ).writeto(path, checksum=checksum)


def gzipped_fits(path: Path) -> None:
    fits.PrimaryHDU(NOISE).writeto(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes(), mtime=0))


def by_h5py(**options: object) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with h5py.File(path, "w", libver=options.pop("libver", "earliest")) as part:
            part.create_dataset("raw", data=NOISE, **options)

    return make


def by_itk(compressed: bool) -> Callable[[Path], object]:
    return lambda path: sitk.WriteImage(sitk.GetImageFromArray(NOISE), str(path), compressed)


def by_tifffile(**options: object) -> Callable[[Path], object]:
    return lambda path: tifffile.imwrite(path, IMAGE, **options)


def by_zarr(version: int, codec: object) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        options = {"shape": NOISE.shape, "chunks": NOISE.shape, "dtype": NOISE.dtype, "compressors": codec}
        zarr.create_array(str(path), zarr_format=version, **options)[...] = NOISE  # type: ignore[arg-type]

    return make


WHOLE = {
    "x.fits": (ours, "zyx"),
    "x.fits.fz": (ours, "zyx"),
    "x.fits.gz": (gzipped_fits, "zyx"),
    "rice.fits.fz": (tiled("RICE_1", True), None),
    "x.png": (ours, None),
    "x.h5": (ours, None),
    "x.zarr": (ours, None),
}
"""What has a checksum of all that matters: name -> what writes it, its axes."""
PARTLY = {
    "bare.fits": (lambda path: fits.PrimaryHDU(NOISE).writeto(path), "zyx"),
    "hcompress.fits.fz": (tiled("HCOMPRESS_1", False), None),
    "plio.fits.fz": (tiled("PLIO_1", False), None),
    "gzip.fits.fz": (tiled("GZIP_2", False), None),
    "x.nii": (ours, None),
    "x.jpg": (lambda path: Image.fromarray(IMAGE).save(path), None),
    "x.bmp": (ours, None),
    "x.tif": (ours, None),
    "plain.tif": (by_tifffile(), None),
    "lzw.tif": (by_tifffile(compression="lzw"), None),
    "jpeg.tif": (by_tifffile(compression="jpeg"), None),
    "jpeg2000.tif": (by_tifffile(compression="jpeg2000"), None),
    "plain.h5": (by_h5py(), None),
    "latest.h5": (by_h5py(libver="latest", chunks=(3, 12, 13), compression="gzip", fletcher32=True), None),
    "lzf.h5": (by_h5py(chunks=(3, 12, 13), compression="lzf"), None),
    "x.npy": (ours, None),
    "x.nrrd": (ours, None),
    "plain.nrrd": (by_itk(False), None),
    "x.mha": (ours, None),
    "plain.mha": (by_itk(False), None),
    "gzip.zarr": (by_zarr(3, zarr.codecs.GzipCodec()), None),
    "blosc.zarr": (by_zarr(3, zarr.codecs.BloscCodec()), None),
    "v2.zarr": (by_zarr(2, None), None),
}
"""What has none, or of its compressed values alone: much goes unseen, which no reader can help."""
NOT_MEANT = {".dcm": "read by GDCM, which allocates what a broken element declares", ".nhdr": ".nrrd", ".mhd": ".mha"}
"""Formats that are left out here, and why."""


def flips_of(path: Path) -> list[tuple[Path, list[int]]]:
    """The files of a path, with 300 flips in all."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(file, spread(file.stat().st_size, 300 // len(files))) for file in files]


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_a_checksum_notices_every_flip_that_matters(tmp_path: Path, ask: Ask, name: str) -> None:
    make, axes = WHOLE[name]
    make(tmp_path / name)
    for part, flips in flips_of(tmp_path / name):
        found = ask(tmp_path / name, axes, part, flips)
        check(found, len(flips))
        kinds = Counter(said.split()[0] for said in found.reads)
        assert kinds["other"] == 0
        if part.name != "zarr.json":  # text without a checksum: a digit of the spacing may change
            assert kinds["geometry"] == 0
            assert kinds["refused"] >= (0.6 if name.endswith(".fz") else 0.95) * len(flips)  # two HDUs, one is empty


@pytest.mark.parametrize("name", PARTLY)
def test_flips_elsewhere_crash_nothing_and_raise_errors_of_ours(tmp_path: Path, ask: Ask, name: str) -> None:
    make, axes = PARTLY[name]
    make(tmp_path / name)
    for part, flips in flips_of(tmp_path / name):
        found = ask(tmp_path / name, axes, part, flips)
        check(found, len(flips))
    first = list(range(8 * min(8, part.stat().st_size)))
    check(ask(tmp_path / name, axes, part, first), len(first))


def test_sizes_within_tiles_are_not_believed(tmp_path: Path, ask: Ask) -> None:
    """astropy's decoder of HCOMPRESS writes past its buffer where they are wrong, which ends the interpreter."""
    path = tmp_path / "x.fits.fz"
    tiled("HCOMPRESS_1", False)(path)
    at = path.read_bytes().index(b"\xdd\x99\0\0\0")
    found = ask(path, None, None, list(range(8 * at, 8 * (at + 10))))
    check(found, 80)
    assert all(said.startswith("refused") and "pixels says that it has" in said for said in found.reads)


def test_every_format_is_flipped() -> None:
    modules = {module for suffix, module in FORMATS.items() if any(name.endswith(suffix) for name in {*WHOLE, *PARTLY})}
    assert modules == {module for suffix, module in FORMATS.items() if suffix not in NOT_MEANT}
