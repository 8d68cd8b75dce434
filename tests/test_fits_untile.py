"""Tiles decoded by ours: to the last bit what astropy and fitsio give; what is rare is left to astropy."""

from __future__ import annotations

import gzip
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes import fits_untile, open_volume
from densepred.volumes.fits_scan import scan
from densepred.volumes.fits_untile import TileReader, UnusualError

SHAPE = (37, 53)
RNG = np.random.default_rng(11)
VALUES = RNG.normal(50, 9, SHAPE)
VALUES[0, :9] = 0


def saved(path: Path, values: np.ndarray, kind: str, tile: tuple[int, ...] | None = None, **how: object) -> Path:
    fits.CompImageHDU(values, compression_type=kind, tile_shape=tile, **how).writeto(path, overwrite=True)
    return path


def decoded(path: Path, window: list[tuple[int, int]] | None = None) -> np.ndarray:
    """By ours alone."""
    with open(path, "rb") as file:
        hdu = scan(file, path).hdus[1]
        window = window or [(0, size) for size in hdu.shape]
        out = np.empty([stop - start for start, stop in window], TileReader(file, hdu)._stored)
        TileReader(file, hdu).read(out, window)
    return out


def by_astropy(path: Path) -> np.ndarray:
    with fits.open(path, memmap=False, do_not_scale_image_data=True) as hdus, warnings.catch_warnings(action="ignore"):
        return np.array(hdus[1].data)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got, expected)
    assert got.dtype.isnative
    assert got.dtype.itemsize == expected.dtype.itemsize


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2"])
@pytest.mark.parametrize("tile", [None, (8, 9), (8, 53), (37, 53)])
def test_whole_numbers_and_floats_without_loss(tmp_path: Path, kind: str, tile: tuple[int, int] | None) -> None:
    for code in ("u1", "i2", "i4", "f4", "f8"):
        if code[0] == "f" and kind == "RICE_1":
            continue
        values = (1000 * VALUES if code in ("i4", "f8") else VALUES).astype(code)
        path = saved(tmp_path / "x.fits", values, kind, tile, quantize_level=0)
        same(decoded(path), values)
        for window in ([(3, 30), (5, 50)], [(8, 9), (0, 53)], [(36, 37), (52, 53)]):
            same(decoded(path, window), values[tuple(slice(*ends) for ends in window)])


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2"])
@pytest.mark.parametrize("method", [-1, 1, 2])
@pytest.mark.parametrize("shape", [(37, 53), (3, 5, 40), (3, 12_000)])
def test_quantised_floats_to_the_last_bit(tmp_path: Path, kind: str, method: int, shape: tuple[int, ...]) -> None:
    """Rows of 12,000 pixels run through the 10,000 random numbers of the standard; seeds near their end begin anew."""
    values = RNG.normal(50, 9, shape)
    values[..., :9] = 0
    for code, seed in itertools.product(("f4", "f8"), (1, 9_999)):
        told = {"quantize_level": 16, "quantize_method": method, "dither_seed": seed}
        path = saved(tmp_path / "x.fits", values.astype(code), kind, **told)
        same(decoded(path), by_astropy(path))


@pytest.mark.parametrize("kind", ["RICE", "GZIP", "GZIP_2"])
def test_what_cfitsio_writes_with_nan_and_rows_without_noise(tmp_path: Path, kind: str) -> None:
    fitsio = pytest.importorskip("fitsio")
    values = RNG.normal(50, 9, (64, 200)).astype("f4")
    values[3:5, 7:20], values[10], values[9] = np.nan, np.nan, 5  # a row of one value is kept without quantising
    for method in (1, 2, -1):
        path = tmp_path / "x.fits"
        with fitsio.FITS(str(path), "rw", clobber=True) as file:
            file.write(values, compress=kind, qlevel=8, qmethod=method, dither_seed=7)
        got = decoded(path)
        same(got, by_astropy(path))
        assert np.isnan(got[3, 7:20]).all()
        assert (got[9] == 5).all()


def test_scattered_tiles_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits_untile, "_SLACK", 0)
    path = saved(tmp_path / "x.fits", VALUES.astype("i2"), "RICE_1", (4, 4))
    same(decoded(path, [(0, 37), (0, 4)]), VALUES.astype("i2")[:, :4])  # every 14th tile of the heap


def test_a_volume_is_read_without_astropys_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.fits.fz", VALUES.astype("u2") + 40_000, "RICE_1")
    monkeypatch.delattr("astropy.io.fits.hdu.compressed.section.CompImageSection.__getitem__")
    np.testing.assert_array_equal(open_volume(path).numpy()[0], VALUES.astype("u2") + 40_000)


def test_rare_images_are_left_to_astropy(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.fits.fz", VALUES.astype("i2"), "HCOMPRESS_1", (37, 53))
    with pytest.raises(UnusualError):
        decoded(path)
    np.testing.assert_array_equal(open_volume(path).numpy()[0], VALUES.astype("i2"))


def flips(path: Path, count: int) -> Iterator[bytes]:
    """Files with one bit of the heap turned over."""
    sound = path.read_bytes()
    with open(path, "rb") as file:
        hdu = scan(file, path).hdus[1]
    start = hdu.data + hdu.header["NAXIS1"] * hdu.header["NAXIS2"]
    for bit in RNG.choice(8 * (hdu.data + hdu.size - start), count, replace=False).tolist():
        torn = bytearray(sound)
        torn[start + bit // 8] ^= 1 << bit % 8
        yield bytes(torn)


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2"])
def test_damaged_tiles_are_refused_or_read_as_astropy_reads_them(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "x.fits.fz", VALUES.astype("i4"), kind, (8, 53))
    refused = 0
    for torn in flips(path, 60):
        path.write_bytes(torn)
        try:
            got = open_volume(path).numpy()[0]
        except InputError:
            refused += 1
            continue
        np.testing.assert_array_equal(got, by_astropy(path) if kind == "RICE_1" else VALUES.astype("i4"))
    assert refused > (0 if kind == "RICE_1" else 45)  # RICE has no checksum; gzip's header has bits without meaning


@pytest.mark.parametrize("places", [(1 << 30, 0), (5, 1 << 30), (-5, 0), (5, -5)])
def test_tiles_beyond_the_heap_are_refused(tmp_path: Path, places: tuple[int, int]) -> None:
    path = saved(tmp_path / "x.fits.fz", VALUES.astype("i2"), "RICE_1", (8, 53))
    with open(path, "rb") as file:
        at = scan(file, path).hdus[1].data
    torn = bytearray(path.read_bytes())
    torn[at : at + 8] = np.array(places, ">i4").tobytes()
    path.write_bytes(torn)
    with pytest.raises(UnusualError):
        decoded(path)
    with pytest.raises(InputError, match=r"HDU 1: "):
        open_volume(path).numpy()


def test_a_tile_that_expands_too_far_is_not_decoded(tmp_path: Path) -> None:
    """A tile of 106 kB that would give 100 MB instead of 16 kB."""
    values = RNG.integers(-(1 << 30), 1 << 30, (1, 40_000)).astype("i4")
    path = saved(tmp_path / "x.fits.fz", values, "GZIP_1")
    with open(path, "rb") as file:
        hdu = scan(file, path).hdus[1]
    bomb = gzip.compress(bytes(100 << 20), 9)
    start = hdu.data + hdu.header["NAXIS1"]
    assert len(bomb) < hdu.header["PCOUNT"]
    torn = bytearray(path.read_bytes())
    torn[start : start + len(bomb)] = bomb
    torn[hdu.data : hdu.data + 4] = len(bomb).to_bytes(4, "big")
    path.write_bytes(torn)
    with pytest.raises(UnusualError):
        decoded(path)
    with pytest.raises(InputError):
        open_volume(path).numpy()
