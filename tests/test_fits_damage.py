"""Damaged, false and hostile FITS files: none passes as data, none costs memory."""

from __future__ import annotations

import bz2
import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes import fits as ours
from densepred.volumes import open_volume
from tests.fits_files import RNG, image, patched, pixels, save, save_many

VALUES = RNG.normal(1000, 30, (40, 50)).astype("i2")
SIZE = VALUES.nbytes


def summed(path: Path, values: np.ndarray = VALUES) -> Path:
    """A plain file with CHECKSUM and DATASUM, or a RICE-compressed one for `.fz`."""
    if path.suffix == ".fz":
        return save_many(path, fits.CompImageHDU(values, compression_type="RICE_1"), checksum=True)
    fits.PrimaryHDU(values).writeto(path, checksum=True, overwrite=True)
    return path


def test_checksums_are_compared_ignored_or_required(tmp_path: Path) -> None:
    path = summed(tmp_path / "x.fits")
    assert ours.read(path, checksum="require").numpy().shape == (1, 40, 50)
    torn = bytearray(path.read_bytes())
    torn[2880 + 7] ^= 4
    path.write_bytes(torn)
    for take in (lambda v: v.numpy(), lambda v: list(v.slabs(7)), lambda v: v.verify()):
        with pytest.raises(InputError, match=r"HDU 0: its data sum to \d+ and DATASUM says \d+: the file is corrupt"):
            take(open_volume(path))
    assert ours.read(path, checksum="ignore").numpy()[0, 0, 3] != VALUES[0, 3]
    patched(summed(path), DATE="2020-01-01")
    with pytest.raises(InputError, match=r"CHECKSUM does not match, off by 0x\w{8}: the data are as DATASUM says"):
        open_volume(path).numpy()
    bare = save(tmp_path / "y.fits", VALUES)
    open_volume(bare).verify()
    with pytest.raises(InputError, match="has neither CHECKSUM nor DATASUM"):
        ours.read(bare, checksum="require").numpy()
    with pytest.raises(ValueError, match="checksum must be one of verify, ignore, require, got 'off'"):
        ours.read(bare, checksum="off")  # type: ignore[arg-type]


def test_truncated_files_say_how_much_they_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", VALUES)
    sound = path.read_bytes()
    for held in (0, 1, 1000, SIZE - 1):
        path.write_bytes(sound[: 2880 + held])
        with pytest.raises(InputError, match=rf"HDU 0 holds {held} of {SIZE} bytes \(file truncated or download"):
            open_volume(path)
        for pack, name in ((gzip.compress, "x.fits.gz"), (bz2.compress, "x.fits.bz2")):
            (tmp_path / name).write_bytes(pack(sound[: 2880 + held]))
            with pytest.raises(InputError, match=rf"{name}: HDU 0 holds {held} of {SIZE} bytes"):
                open_volume(tmp_path / name)
    for length in (80, 2000, 2879):
        path.write_bytes(sound[:length].replace(b"END", b"   "))
        with pytest.raises(InputError, match=f"HDU 0: the file ends within the header .no END in {length} bytes"):
            open_volume(path)


@pytest.mark.parametrize("summed_too", [False, True])
def test_missing_padding_is_a_warning_and_the_data_are_right(tmp_path: Path, summed_too: bool) -> None:
    path = summed(tmp_path / "x.fits") if summed_too else save(tmp_path / "x.fits", VALUES)
    path.write_bytes(path.read_bytes()[: 2880 + SIZE])
    with pytest.warns(UserWarning, match=f"{-SIZE % 2880} bytes of padding are missing") as caught:
        np.testing.assert_array_equal(open_volume(path).numpy()[0], VALUES)
    assert len(caught) == 1


def test_a_file_cut_before_the_hdu_says_so(tmp_path: Path) -> None:
    path = save_many(tmp_path / "x.fits", image(pixels((50, 60)), "SCI"), image(pixels((50, 60)), "ERR"))
    path.write_bytes(path.read_bytes()[: 2880 * 2 + 500])
    with pytest.raises(InputError, match=r"no HDU \[ERR\] .*HDU 1 is cut off, the file is truncated"):
        open_volume(f"{path}[ERR]")
    with pytest.raises(InputError, match="HDU 1 holds 500 of 12000 bytes"):
        open_volume(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", VALUES)
    volume = open_volume(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"cannot be read \("):
        volume[:, 30:]
    with pytest.raises(InputError, match="has become shorter"):
        volume.verify()


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_cut_streams(tmp_path: Path, suffix: str, cut: float) -> None:
    raw = save(tmp_path / "x.fits", RNG.normal(0, 99, (200, 200))).read_bytes()
    whole = {".gz": gzip.compress, ".bz2": bz2.compress}[suffix](raw)
    path = tmp_path / f"x.fits{suffix}"
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(InputError, match=r"the compressed stream is cut off .* after \d+ bytes"):
        open_volume(path)
    torn = bytearray(whole)
    torn[len(torn) // 2] ^= 16
    path.write_bytes(torn)
    with pytest.raises(InputError, match=r"the (gzip|bzip2) stream is corrupt"):
        open_volume(path)


def test_what_lies_behind_the_last_hdu(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", VALUES)
    sound = path.read_bytes()
    path.write_bytes(sound + bytes(2880))
    with warnings.catch_warnings(action="error"):
        open_volume(path).numpy()
    path.write_bytes(sound + b"garbage" * 500)
    with pytest.warns(UserWarning, match="the 3500 bytes behind HDU 0 are no FITS"):
        np.testing.assert_array_equal(open_volume(path).numpy()[0], VALUES)


def html(path: Path) -> None:
    path.write_text("\n<html><head>Please log in</head></html>" * 200)


def groups(path: Path) -> None:
    fits.GroupsHDU(
        fits.GroupData(np.zeros((5, 4, 4), "f4"), bitpix=-32, parnames=["U"], pardata=[np.zeros(5)])
    ).writeto(path)


def saved(**cards: object) -> Callable[[Path], object]:
    return lambda path: patched(save(path, VALUES), **cards)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
        (html, "no FITS file: starts with '<html"),
        (lambda path: path.write_bytes(gzip.compress(b"<html>login</html>")), "starts with '<html>login</html>'"),
        (lambda path: path.write_bytes(bytes(range(128, 256)) * 99), "starts with the bytes 80 81 82 83"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: None, "no such file"),
        (groups, "holds no image of two axes or more"),
        (saved(NAXIS1=0), r"no image of two axes or more \(HDUs 0 PRIMARY,1: int16 \(40, 0\)\)"),
        (saved(NAXIS1=-50), "HDU 0: impossible sizes: NAXIS1 = -50"),
        (saved(NAXIS2=40.5), "HDU 0: impossible sizes: NAXIS2 = 40.5"),
        (saved(NAXIS2="wide"), "HDU 0: impossible sizes: NAXIS2 = wide"),
        (saved(NAXIS=3), "HDU 0: impossible sizes: NAXIS3 = None"),
        (saved(NAXIS=-2), "HDU 0: impossible NAXIS = -2"),
        (saved(NAXIS=0), r"no image of two axes or more"),
        (saved(BITPIX=24), "HDU 0: impossible BITPIX = 24"),
        (saved(GCOUNT=-1), "HDU 0: impossible sizes: GCOUNT = -1"),
        (saved(SIMPLE=False), "not standard FITS: SIMPLE = F"),
        (saved(BSCALE=0), "HDU 0: BSCALE = 0 makes all values the same"),
        (saved(BZERO="high"), "HDU 0: impossible scaling: BZERO = high"),
    ],
)
def test_each_fault_has_its_message(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "x.fits"
    make(path)
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError, match=words) as caught:
        open_volume(path).numpy()
    assert caught.value.file == path
    assert caught.value.exit_code == 2


def test_damaged_compressed_pixels_have_a_message(tmp_path: Path) -> None:
    path = save_many(tmp_path / "x.fits", fits.CompImageHDU(VALUES, compression_type="GZIP_1"))
    patched(path, 1, ZCMPTYPE="LZ_99")
    with pytest.raises(InputError, match=r"HDU 1: cannot be decompressed \("):
        open_volume(path).numpy()
    patched(path, 1, ZCMPTYPE="GZIP_1")
    torn = bytearray(path.read_bytes())
    with fits.open(path, disable_image_compression=True) as file:
        heap = file[1].fileinfo()["datLoc"] + file[1].header["NAXIS1"] * file[1].header["NAXIS2"]
    torn[heap + 12 : heap + 30] = bytes(18)
    path.write_bytes(torn)
    with pytest.raises(InputError, match=r"HDU 1: cannot be decompressed \(") as caught:
        open_volume(path).numpy()
    assert caught.value.file == path
