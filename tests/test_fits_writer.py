"""What is written as FITS is what astropy and cfitsio read, with every card of the source that is still true."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.errors import DiskFullError, InputError, ResourceError
from densepred.volumes import Record, Volume, fits_writer, open_volume
from densepred.volumes import open_writer as open_any_writer
from densepred.volumes.fits_cards import stored_dtype
from densepred.volumes.fits_writer import Contents, open_writer
from densepred.volumes.grid import cutout
from tests.fits_files import TAN, pixels, save

SUFFIXES = (".fits", ".fits.gz", ".fits.fz")


def write(path: Path, like: Volume, values: np.ndarray, labels: bool = False, rows: int = 3, **more: Any) -> Path:
    """Write `(C, *spatial)` values by `rows` planes."""
    with open_writer(path, like, values.dtype, values.shape[0], labels, **more) as writer:
        for start in range(0, values.shape[1], rows):
            writer.write(values[:, start : start + rows])
    return path


def read(path: Path) -> list[tuple[str, np.ndarray, fits.Header]]:
    """Name, array and header of all images by astropy, with every checksum compared, as stored and decompressed."""
    with warnings.catch_warnings(action="error"):
        with fits.open(path, checksum=True, disable_image_compression=True) as raw:
            for hdu in raw:
                assert {"CHECKSUM", "DATASUM"} <= set(hdu.header)
                hdu.verify("exception")
                assert hdu.verify_checksum() == hdu.verify_datasum() == 1
        assert len(raw) > 0
        with fits.open(path, memmap=False) as file:
            return [(hdu.name, hdu.data, hdu.header) for hdu in file if hdu.is_image and hdu.data is not None]


def only(path: Path) -> tuple[np.ndarray, fits.Header]:
    ((_, values, header),) = read(path)
    return values, header


def plane(*shape: int) -> Volume:
    return Volume(np.zeros((1, *shape), np.float32), (1.0,) * len(shape))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_astropy_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"round{data.draw(st.sampled_from(SUFFIXES))}"
    kinds = ["?", "u1", "i1", "<i2", ">i2", "u2", ">u4", "i4", "f2", "f4", ">f8"]
    kinds += ["i8", "u8"] if path.suffix != ".fz" else []
    dtype = np.dtype(data.draw(st.sampled_from(kinds)))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    channels = data.draw(st.integers(1, 4))
    layout = data.draw(st.sampled_from(["hdus", "cube"]))
    noise = np.random.default_rng(data.draw(st.integers(0, 99))).bytes(channels * int(np.prod(shape)) * dtype.itemsize)
    values = np.frombuffer(noise, dtype if dtype.kind != "b" else "u1").reshape(channels, *shape)
    values = values > 127 if dtype.kind == "b" else values
    rows = data.draw(st.integers(1, 9))
    with warnings.catch_warnings(action="ignore"):  # casts of signalling NaN
        write(path, plane(*shape), values, rows=rows, contents=Contents(layout=layout))
        expected = values.astype(stored_dtype(dtype, False))
    arrays = read(path)
    assert len(arrays) == (channels if layout == "hdus" else 1)
    got = np.stack([array for _, array, _ in arrays]) if layout == "hdus" else arrays[0][1]
    assert got.dtype.newbyteorder("=") == expected.dtype
    assert np.array_equal(got.reshape(values.shape), expected, equal_nan=expected.dtype.kind == "f")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "f4", "f8"])
def test_cfitsio_reads_the_same(tmp_path: Path, suffix: str, dtype: str) -> None:
    fitsio = pytest.importorskip("fitsio")
    values = pixels((3, 70, 90), dtype)
    path = write(tmp_path / f"x{suffix}", plane(70, 90), values, contents=Contents(layout="hdus"))
    with fitsio.FITS(str(path)) as file:
        for channel in range(3):
            np.testing.assert_array_equal(file[channel + 1].read(), values[channel])
            np.testing.assert_array_equal(file[channel + 1][20:31, 5:9], values[channel, 20:31, 5:9])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_floats_keep_every_bit(tmp_path: Path, suffix: str) -> None:
    values = np.array([0.1, -0.0, np.inf, -np.inf, 1e-45, 3.4e38, np.nan, 1], np.float32).reshape(1, 2, 4)
    got, _ = only(write(tmp_path / f"x{suffix}", plane(2, 4), values))
    assert got.astype("<f4").tobytes() == values.tobytes()


def test_tiles_of_several_rows_and_large_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile_bytes, shape, channels in (
        (64, (7, 11, 5), 1),
        (100, (9, 11), 3),
        (1, (4, 3, 5), 2),
        (1 << 20, (5, 1), 2),
    ):
        monkeypatch.setattr("densepred.volumes.fits_tiles.TILE_BYTES", tile_bytes)
        values = pixels((channels, *shape), "i2")
        for rows in (1, 2, 100):
            got, _ = only(write(tmp_path / "x.fits.fz", plane(*shape), values, rows=rows))
            np.testing.assert_array_equal(got.reshape(values.shape), values)
    monkeypatch.setattr("densepred.volumes.fits_tiles._SHORT", 0)  # 64-bit offsets, as of a heap over 2 GB
    got, _ = only(write(tmp_path / "x.fits.fz", plane(*shape), values))
    np.testing.assert_array_equal(got, values)
    with fits.open(tmp_path / "x.fits.fz", disable_image_compression=True) as file:
        assert file[1].header["TFORM1"].startswith("1QB(")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_do_not_depend_on_the_slabs(tmp_path: Path, suffix: str) -> None:
    values = np.cumsum(pixels((2, 30, 700), "i4"), axis=-1, dtype=np.int32)
    paths = [write(tmp_path / f"{rows}{suffix}", plane(30, 700), values, rows=rows) for rows in (1, 7, 30)]
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.parametrize(
    ("dtype", "high", "bitpix"), [("?", 1, 8), ("i8", 255, 8), ("i8", 256, 16), ("u2", 40000, 32), ("u8", 1 << 30, 32)]
)
def test_labels_get_the_smallest_type_and_no_unit(tmp_path: Path, dtype: str, high: int, bitpix: int) -> None:
    source = open_volume(save(tmp_path / "in.fits", pixels((6, 7)), BUNIT="electron/s", **TAN))
    labels = np.zeros((6, 7), dtype)
    labels[2, 3] = high
    source.like(labels).save(tmp_path / "out.fits")
    got, header = only(tmp_path / "out.fits")
    np.testing.assert_array_equal(got, labels)
    assert (header["BITPIX"], header["BUNIT"], header["BTYPE"]) == (bitpix, "", "LABEL")
    assert "BZERO" not in header


def test_what_fits_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be an integer type for labels, got float32"):
        write(tmp_path / "x.fits", plane(4, 5), pixels((1, 4, 5)), True)
    with pytest.raises(ValueError, match="got complex64"):
        write(tmp_path / "x.fits", plane(4, 5), pixels((1, 4, 5), "c8"))
    with pytest.raises(ValueError, match="at most 32 bits in a compressed image, got int64"):
        write(tmp_path / "x.fits.fz", plane(4, 5), pixels((1, 4, 5), "i8"))
    with pytest.raises(InputError, match="not written with bzip2"):
        write(tmp_path / "x.fits.bz2", plane(4, 5), pixels((1, 4, 5)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_gives_back_other_bytes_is_noticed(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_volume(save(tmp_path / "in.fits", pixels((6, 7)), **TAN))
    path = write(tmp_path / f"x{suffix}", source, pixels((1, 6, 7)))
    size, before = path.stat().st_size, path.read_bytes()
    for place in (100, size // 2, size - 2900 if suffix != ".fits.gz" else size - 30):

        def rot(part: Path, place: int = place) -> None:
            if part.is_file():
                torn = bytearray(part.read_bytes())
                torn[place] ^= 1
                part.write_bytes(torn)

        with monkeypatch.context() as patch:
            patch.setattr("densepred.files.sync", rot)
            with pytest.raises(ResourceError, match="does not read back as it was written"):
                write(path, source, pixels((1, 6, 7)))
        assert path.read_bytes() == before


MOSAIC = """
import sys, psutil
import numpy as np
from densepred.volumes import Volume
from densepred.volumes.fits_writer import Legend, open_writer
import astropy.wcs
side, path = int(sys.argv[1]), sys.argv[2]
class Nothing:
    shape, dtype = (1, side, side), np.dtype(np.float32)
before = psutil.Process().memory_info().rss
with open_writer(path, Volume(Nothing(), (1, 1)), np.dtype("u1"), 1, True) as writer:
    for start in range(0, side, 250):
        slab = np.zeros((1, 250, side), np.uint8)
        slab[:, ::7, start // 50 :: 11] = start // 250
        writer.write(slab)
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print((int(high.split()[1]) * 1024 - before) / 1e6)
"""


@pytest.mark.parametrize("suffix", [".fits", ".fits.fz"])
def test_memory_does_not_grow_with_a_mosaic(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for side in (3000, 12000):
        path = tmp_path / f"{side}{suffix}"
        command = [sys.executable, "-c", MOSAIC, str(side), str(path)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 150 / 3
    assert peaks[1] - peaks[0] < 25  # the slab of the test itself grows by 2
    with fits.open(path, memmap=False) as file:
        image = file[-1]
        assert image.shape == (12000, 12000)
        row = image.section[11_500:11_501]
        assert row.max() == 46
        assert (row[0, 230::11] == 46).all()
        assert not (image.section[11_501:11_502]).any()


def test_a_copy_keeps_its_unit_and_other_values_do_not(tmp_path: Path):
    fits.PrimaryHDU(pixels((5, 6)), fits.Header({**TAN, "BUNIT": "electron/s"})).writeto(tmp_path / "a.fits")
    with open_volume(tmp_path / "a.fits") as volume:
        volume.save(tmp_path / "copy.fits")
        cutout(volume, [(1, 4), (2, 5)]).save(tmp_path / "part.fits")
        volume.like(np.zeros((5, 6), np.float32)).save(tmp_path / "other.fits")
        volume.like(np.zeros((5, 6), np.uint8)).save(tmp_path / "labels.fits")
    units = {
        name: fits.getheader(tmp_path / f"{name}.fits").get("BUNIT") for name in ("copy", "part", "other", "labels")
    }
    assert units == {"copy": "electron/s", "part": "electron/s", "other": "", "labels": ""}


def test_a_mosaic_that_will_not_fit_is_refused_before_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=14000)
    monkeypatch.setattr(fits_writer.shutil, "disk_usage", lambda path: usage)
    like = Volume(np.zeros((1, 60, 60), np.float32), (1, 1))
    entered = []
    with pytest.raises(DiskFullError, match=r"0 MB free"), open_writer(tmp_path / "x.fits", like, np.dtype("f4")):
        entered.append(True)
    assert not entered
    assert not list(tmp_path.iterdir())


def test_a_copy_of_labels_keeps_their_legend_and_the_name_of_the_hdu(tmp_path: Path):
    labels = np.array([[0, 1], [1, 255]], np.uint8)
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(labels, fits.Header(TAN), name="SEG", ver=2)]).writeto(
        tmp_path / "a.fits"
    )
    names = {0: "sky", 1: "source", 255: "invalid"}
    with open_volume(tmp_path / "a.fits") as source:
        told = Record(names=names)
        with open_any_writer(tmp_path / "b.fits.fz", source, labels.dtype, labels=True, record=told) as writer:
            writer.write(source[:, :])
    with open_volume(tmp_path / "b.fits.fz") as volume:
        assert (volume.labels, volume.classes) == (True, names)
        volume.save(tmp_path / "c.fits")
    with fits.open(tmp_path / "c.fits", checksum=True) as file:
        assert (file["SEG", 2].header["CLASS255"], file["SEG", 2].header["EXTVER"]) == ("invalid", 2)
        assert dict(zip(file["LABELS"].data["id"], file["LABELS"].data["npix"], strict=True)) == {0: 1, 1: 2, 255: 1}
        assert np.array_equal(file["SEG", 2].data, labels)
