"""FITS read; astropy is the witness for what a file holds."""

from __future__ import annotations

import bz2
import gzip
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densepred.errors import InputError, ResourceError
from densepred.volumes import fits as ours
from densepred.volumes import fits_pixels, fits_scratch, open_volume
from tests.fits_files import RNG, astropy_values, image, patched, pixels, raw, save, save_many

INTEGERS_ONLY = ("RICE_1", "HCOMPRESS_1", "PLIO_1")
AXES = {2: None, 3: "zyx", 4: "czyx"}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["u1", "i2", "i4", "i8", "f4", "f8"]),
    scale=st.sampled_from([1.0, 0.01, -2.5, 1e-7, 3e4]),
    zero=st.sampled_from([0.0, -128.0, 32768.0, 2147483648.0, -1024.5, 1e9, 9223372036854775808.0]),
    blank=st.sampled_from([None, 0, 7, 255]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scaling_and_blank_are_exact_in_float64_or_as_fine_as_what_is_stored(
    tmp_path: Path, kind: str, scale: float, zero: float, blank: int | None, packed: bool, seed: int
) -> None:
    stored = np.random.default_rng(seed).integers(0, 256, (7, 9)).astype(kind)
    blank = None if kind[0] == "f" else blank
    cards = {"BSCALE": scale, "BZERO": int(zero) if zero.is_integer() else zero}
    cards |= {} if blank is None else {"BLANK": blank}
    path = raw(tmp_path / "in.fits", stored, **cards)
    if packed and kind[0] != "f":
        packing = "GZIP_2" if kind == "i8" else "RICE_1"
        path = save_many(tmp_path / "packed.fits", fits.CompImageHDU(stored, compression_type=packing))
        patched(path, 1, **cards)
    read = open_volume(path)
    expected = stored.astype(np.longdouble) * np.longdouble(scale) + np.longdouble(zero)
    if blank is not None:
        expected[stored == blank] = np.nan
    got = read.numpy()[0]
    if got.dtype.kind in "iu":
        assert blank is None
        assert got.tolist() == [[int(value) for value in row] for row in expected]
        np.testing.assert_array_equal(got, astropy_values(path, read.header.index))
    else:
        unit = np.finfo(got.dtype).eps * (abs(zero) + 255 * abs(scale))
        np.testing.assert_allclose(got, expected.astype(np.float64), rtol=0, atol=float(unit))
        if kind[0] != "f":
            assert unit <= max(abs(scale), np.finfo(np.float64).eps * 4 * abs(zero))  # steps of the file are kept
    if blank is not None and (kind, scale, zero) == ("u1", 1, -128):
        return  # signed bytes with BLANK: astropy fails on them
    theirs = astropy_values(path, read.header.index)
    if theirs.dtype == got.dtype:
        masked = np.where(np.isnan(got), got, theirs)  # a BLANK of 0 is none to astropy
        np.testing.assert_array_equal(got, masked)


def test_unsigned_with_blank_is_masked_and_its_bound_is_kept(tmp_path: Path) -> None:
    stored = np.array([[-32768, 0, 32767], [5, 6, 7]], "i2")
    path = raw(tmp_path / "x.fits", stored, BSCALE=1, BZERO=32768, BLANK=-32768)
    assert astropy_values(path).dtype == np.uint16  # astropy does not mask
    np.testing.assert_array_equal(open_volume(path).numpy()[0], [[np.nan, 32768, 65535], [32773, 32774, 32775]])
    wide = raw(tmp_path / "y.fits", np.array([[5, 2**31 - 1]], "i4"), BSCALE=1, BZERO=2**31, BLANK=5)
    np.testing.assert_array_equal(open_volume(wide).numpy()[0], [[np.nan, 2**32 - 1]])
    exact = raw(tmp_path / "z.fits", np.array([[5, 2**62 + 1]], "i8"))
    assert open_volume(exact).numpy().tolist() == [[[5, 2**62 + 1]]]
    raw(exact, np.array([[5, 2**62 + 1]], "i8"), BLANK=5)
    with pytest.raises(InputError, match=r"integers beyond 2\^53, like 4611686018427387905, with BLANK"):
        open_volume(exact).numpy()


def test_a_blank_that_marks_nothing_is_told_and_one_of_floats_is_not(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.fits", pixels((3, 4), "i2"), BLANK=99999)
    with pytest.warns(UserWarning, match="BLANK = 99999 is no int16"):
        assert open_volume(path).dtype == np.int16
    path = raw(tmp_path / "y.fits", pixels((3, 4), "f4"), BLANK=5)
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(open_volume(path).numpy()[0], astropy_values(path))


def real_files(folder: Path) -> list[Path]:
    return sorted((folder / "fits").rglob("*.fits*"))


def test_real_files_read_as_astropy_reads_them(real_data: Path) -> None:
    read = 0
    for path in real_files(real_data):
        for part in ours.images(path):
            axes = "zyx" if path.name in ("3d1.fits", "arange.fits") else None
            with open_volume(f"{path}[{part}]", axes) as volume:
                theirs = astropy_values(path, volume.header.index)
                np.testing.assert_array_equal(volume[0], theirs)
                middle = tuple(slice(size // 3, 2 * size // 3 + 1) for size in theirs.shape)
                np.testing.assert_array_equal(volume[0, *middle], theirs[middle])
                assert volume.dtype == theirs.dtype.newbyteorder("=")
                if path.name == "unsolved.fits":  # astropy and CFITSIO say so too
                    with pytest.raises(InputError, match="its data sum to 3995378405 and DATASUM says 4087826492"):
                        volume.verify()
                else:
                    volume.verify()
                read += 1
    assert read > 45


def test_several_images_are_a_choice(tmp_path: Path, real_data: Path) -> None:
    path = real_data / "fits" / "labelled" / "2d1.fits"
    with pytest.raises(InputError) as caught:
        open_volume(path)
    assert caught.value.exit_code == 2
    assert "holds 2 images, and none is chosen" in caught.value.what
    for words in ("0 PRIMARY,1: empty", "1: float32 (400, 400)", "2: int32 (400, 400)", "3: int64 (345,)"):
        assert words in caught.value.what
    assert caught.value.fix == "write 2d1.fits[1] or 2d1.fits[2]"
    assert open_volume(f"{path}[2]").dtype == np.int32
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=[1, 2])], name="CAT")
    single = save_many(tmp_path / "one.fits", table, image(pixels((3, 4)), "SCI"))
    assert open_volume(single).header.index == 2
    for part, words in (("0", "holds no image of two axes"), ("cat", "holds a table"), ("9", "there is no HDU [9]")):
        with pytest.raises(InputError) as caught:
            open_volume(f"{single}[{part}]")
        assert words in caught.value.what
        assert caught.value.fix == "write one.fits[2] (or by name, one.fits[SCI,1])"
    with pytest.raises(InputError, match="holds no image of two axes or more"):
        open_volume(save_many(tmp_path / "none.fits", table))
    with pytest.raises(InputError, match="holds no image of two axes or more"):
        open_volume(save(tmp_path / "row.fits", pixels((9,))))


def test_hdus_by_index_name_and_version(tmp_path: Path) -> None:
    planes = [pixels((5, 6)) for _ in range(4)]
    path = save_many(
        tmp_path / "mef.fits",
        *(image(planes[0], "SCI", 1), image(planes[1], "ERR"), image(planes[2], "SCI", 2), image(planes[3], "A,B")),
    )
    content = path.read_bytes()
    assert content.count(b"'ERR     '") == 1
    path.write_bytes(content.replace(b"'ERR     '", b"'eRR     '"))
    wanted = {"1": 0, "SCI,1": 0, "sci,2": 2, "SCI, 2": 2, "Err": 1, "ERR  ": 1, "3": 2, "a,b": 3, "A,B,1": 3}
    for part, number in wanted.items():
        np.testing.assert_array_equal(open_volume(f"{path}[{part}]").numpy()[0], planes[number])
        theirs = part if not part.isdecimal() else int(part)
        if part not in ("SCI,1", "sci,2", "SCI, 2", "A,B,1"):
            np.testing.assert_array_equal(astropy_values(path, theirs), planes[number])
    with pytest.warns(
        UserWarning, match=r"2 HDUs are called \[sci\]; the first is read, version 1; the others are \[3\]"
    ):
        np.testing.assert_array_equal(open_volume(f"{path}[sci]").numpy()[0], planes[0])
    assert ours.images(path) == ["SCI,1", "eRR,1", "SCI,2", "4"]
    header = open_volume(f"{path}[SCI,2]").header
    assert (header.index, header.name, header.version, header.shape) == (3, "SCI", 2, (5, 6))
    with pytest.raises(InputError, match=r"there is no HDU \[SCI,3\]"):
        open_volume(f"{path}[SCI,3]")


@pytest.mark.parametrize(
    ("stored", "axes", "shape", "squeezed", "channels"),
    [
        ((5, 6), None, (1, 5, 6), (), None),
        ((5, 6), "yx", (1, 5, 6), (), None),
        ((1, 6), None, (1, 1, 6), (), None),
        ((5, 6), "cyx", (1, 5, 6), (), None),
        ((1, 5, 6), None, (1, 5, 6), (0,), None),
        ((1, 1, 5, 6), None, (1, 5, 6), (0, 1), None),
        ((1, 1, 5, 6), "zyx", (1, 1, 5, 6), (0,), None),
        ((1, 5, 6), "zyx", (1, 1, 5, 6), (), None),
        ((1, 5, 6), "cyx", (1, 5, 6), (), 0),
        ((4, 5, 6), "cyx", (4, 5, 6), (), 0),
        ((4, 5, 6), "zyx", (1, 4, 5, 6), (), None),
        ((4, 1, 5, 6), "cyx", (4, 5, 6), (1,), 0),
        ((1, 4, 5, 6), "cyx", (4, 5, 6), (0,), 1),
        ((3, 4, 5, 6), "czyx", (3, 4, 5, 6), (), 0),
    ],
)
def test_axes_are_declared_and_single_ones_dropped(
    tmp_path: Path, stored: tuple, axes: str, shape: tuple, squeezed: tuple, channels: int | None
) -> None:
    values = pixels(stored)
    volume = open_volume(save(tmp_path / "x.fits", values), axes)
    assert volume.shape == shape
    assert volume.spacing == (1.0,) * (len(shape) - 1)
    assert volume.affine is None
    assert (volume.header.shape, volume.header.squeezed, volume.header.channels_axis) == (stored, squeezed, channels)
    np.testing.assert_array_equal(volume.numpy(), values.reshape(shape))
    np.testing.assert_array_equal(volume[0, ..., 1:5:2], values.reshape(shape)[0, ..., 1:5:2])
    np.testing.assert_array_equal(volume[:, ::-1, -1], values.reshape(shape)[:, ::-1, -1])
    assert volume[:, 1:1].size == 0


@pytest.mark.parametrize(
    ("stored", "axes", "words", "fix"),
    [
        (
            (4, 5, 6),
            None,
            r"3 axes \(4, 5, 6\), and what the first holds is not declared",
            "`axes: zyx` or `axes: cyx`",
        ),
        ((2, 3, 4, 5), None, "4 axes", "`axes: czyx`"),
        ((2, 2, 2, 4, 5), None, "5 axes", "split"),
        ((4, 5, 6), "yx", "3 axes .* and axes 'yx' were declared", "as many axes"),
        ((5, 6), "zyx", "2 axes .* and axes 'zyx' were declared", "as many axes"),
        ((5, 6), "xyzc", "axes 'xyzc' are not known for FITS", "yx, cyx, zyx"),
    ],
)
def test_axes_that_are_not_declared_are_asked_for(
    tmp_path: Path, stored: tuple, axes: str, words: str, fix: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_volume(save(tmp_path / "x.fits", pixels(stored)), axes)
    assert fix in caught.value.fix


@pytest.mark.parametrize("tile", [None, (1, 40), (16, 16), (7, 40), (30, 40), (30, 3)])
def test_windows_read_in_pieces_are_those_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: tuple | None
) -> None:
    values = pixels((30, 40))
    path = save(tmp_path / "x.fits", values)
    if tile:
        path = save_many(path, fits.CompImageHDU(values, tile_shape=tile, compression_type="GZIP_2", quantize_level=0))
    monkeypatch.setattr(fits_pixels, "_BLOCK", 500)
    monkeypatch.setattr(fits_pixels, "_TILES_BLOCK", 500)
    volume = open_volume(path)
    for rows in (slice(None), slice(3, 29), slice(7, 8), slice(28, 2, -3)):
        for columns in (slice(None), slice(5, 39), 17, slice(4, 30, 4)):
            for least in (0, 1 << 16):
                monkeypatch.setattr(fits_pixels, "_ROW_BYTES", least)
                np.testing.assert_array_equal(volume[0, rows, columns], values[rows, columns])


def test_compressed_by_content_not_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = pixels((40, 50), "i2")
    plain = save(tmp_path / "x.fits", values).read_bytes()
    for pack in (gzip.compress, bz2.compress, lambda data: gzip.compress(data[:3000]) + gzip.compress(data[3000:])):
        (tmp_path / "y.fits").write_bytes(pack(plain))
        np.testing.assert_array_equal(open_volume(tmp_path / "y.fits").numpy()[0], values)
    monkeypatch.setattr(fits_scratch, "MAX_SHARE", 1e-9)
    with pytest.raises(ResourceError, match=r"decompressed it is larger than .* of what is free in"):
        open_volume(tmp_path / "y.fits")


@pytest.mark.parametrize(
    ("cards", "dtype", "labels"),
    [
        ({"BTYPE": "LABEL"}, "u1", True),
        ({"CLASS0": "sky", "CLASS1": "star"}, "i2", True),
        ({"BTYPE": "LABEL"}, "f4", False),
        ({"BTYPE": "Intensity"}, "i2", False),
        ({}, "u1", False),
    ],
)
def test_classes_are_told_from_intensities(tmp_path: Path, cards: dict, dtype: str, labels: bool) -> None:
    assert open_volume(save(tmp_path / "x.fits", pixels((3, 4), dtype), **cards)).labels == labels


MEMORY = """
import sys, psutil
import numpy as np
from densepred.volumes import open_volume
volume = open_volume(sys.argv[1])
volume[:, :1, :8]
before = psutil.Process().memory_info().rss
window = volume[:, 9000:9512, 7000:7512]
assert window.shape == (1, 512, 512) and window[0, 3, 4] == 5 and window.sum() == 5
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print((int(high.split()[1]) * 1024 - before) / 1e6)
"""


def test_a_window_of_a_huge_mosaic_costs_the_window(tmp_path: Path) -> None:
    path, side = tmp_path / "mosaic.fits", 20_000
    head = fits.Header({"SIMPLE": True, "BITPIX": -32, "NAXIS": 2, "NAXIS1": side, "NAXIS2": side}).tostring().encode()
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + 4 * (9003 * side + 7004))
        file.write(np.array(5, ">f4").tobytes())
        file.truncate(len(head) + -(-4 * side * side // 2880) * 2880)
    out = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True).stdout
    assert float(out) < 50


def test_noise_stays_noise(tmp_path: Path) -> None:
    values = RNG.normal(0, 1, (20, 30)).astype("f4")
    lossy = save_many(tmp_path / "x.fits", fits.CompImageHDU(values, compression_type="RICE_1", quantize_level=16))
    read = open_volume(lossy)
    np.testing.assert_array_equal(read.numpy()[0], astropy_values(lossy, 1))
    assert read.header.compression == "RICE_1"
