"""Results of several images go into one file, in order, with each one's header; judged by astropy and nibabel."""

from __future__ import annotations

import itertools
import signal
import tracemalloc
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable

from densepred.errors import InputError, ResourceError
from densepred.volumes import (
    Provenance,
    Record,
    Volume,
    fits_tiles,
    members,
    open_members,
    open_members_writer,
    open_volume,
)
from tests.disk_faults import attempt, available
from tests.fits_files import TAN, image, pixels, save
from tests.member_files import exposure
from tests.nifti_files import GEOMETRY_FIELDS, load_nib, save_nib, scan

FITS = (".fits", ".fits.gz", ".fits.fz")
NIFTI = (".nii", ".nii.gz")
NAMES = {0: "sky", 1: "star", 2: "cosmic"}


def marked(volume: Volume) -> np.ndarray:
    """A label map that depends on the values, `(1, *spatial)`."""
    return (np.nan_to_num(volume.numpy()) % 3).astype(np.uint8)


def copied(target: Path, sources: Iterable[Volume], count: int, dtype: Any = np.uint8, **more: Any) -> list[np.ndarray]:
    """Write a label map (or, of floats, the classes' shares) of every image, some planes at a time."""
    out = []
    labels = np.dtype(dtype).kind != "f"
    with open_members_writer(target, count, dtype, labels=labels, **more) as writer:
        assert writer.dtype == np.dtype(dtype)
        for volume in sources:
            values = marked(volume)
            if not labels:
                values = np.stack([values[0] == value for value in NAMES]).astype(dtype)
            part = writer.member(volume)
            for start in range(0, values.shape[1], 4):
                part.write(values[:, start : start + 4])
            out.append(values)
    return out


def sound(path: Path) -> list[Any]:
    """The HDUs by astropy, with every checksum compared, none missing."""
    with warnings.catch_warnings(action="error"):
        with fits.open(path, checksum=True, disable_image_compression=True) as raw:
            for hdu in raw:
                hdu.verify("exception")
                assert hdu.verify_checksum() == hdu.verify_datasum() == 1
        with fits.open(path, memmap=False) as file:
            return [hdu.copy() for hdu in file]


# Writing FITS


@pytest.mark.parametrize("suffix", FITS)
@pytest.mark.parametrize("chosen", ["SCI,all", "all"])
def test_label_maps_mirror_the_structure(tmp_path: Path, suffix: str, chosen: str) -> None:
    source = f"{exposure(tmp_path / 'x_flc.fits')}[{chosen}]"
    target = tmp_path / f"labels{suffix}"
    record = Record(names=NAMES, provenance=Provenance(model="unet", command="densepred predict"))
    values = copied(target, open_members(source), len(members(source)), record=record)
    hdus = sound(target)
    with fits.open(tmp_path / "x_flc.fits") as file:
        sources = [hdu.copy() for hdu in file if hdu.is_image and hdu.data is not None]
    sources = [hdu for hdu in sources if chosen == "all" or hdu.name == "SCI"]
    assert [(hdu.name, hdu.ver) for hdu in hdus[1:-1]] == [(hdu.name, hdu.ver) for hdu in sources]
    assert hdus[0].data is None
    assert hdus[0].header["TELESCOP"] == "HST"
    for hdu, theirs, expected in zip(hdus[1:-1], sources, values, strict=True):
        np.testing.assert_array_equal(hdu.data, expected[0])
        assert hdu.header["BUNIT"] == ""
        assert hdu.header["CLASS2"] == "cosmic"
        assert hdu.header["DPMODEL"] == "unet"
        assert hdu.header["DPINSUM"] == theirs.header["DATASUM"]
        assert hdu.header.get("CCDCHIP") == theirs.header.get("CCDCHIP")
        corners = np.array([[0, 0], [16, 0], [16, 8], [0, 8], [8, 4]], float)
        with warnings.catch_warnings(action="ignore"):
            places = [WCS(header).all_pix2world(corners, 0) for header in (hdu.header, theirs.header)]
        np.testing.assert_array_equal(*places)
    counts = np.bincount(np.concatenate([part.ravel() for part in values]), minlength=3)
    assert hdus[-1].name == "LABELS"
    assert hdus[-1].data["npix"].tolist() == counts.tolist()
    assert members(f"{target}[all]") == [part.replace("x_flc.fits", target.name) for part in members(source)]


@pytest.mark.parametrize("suffix", FITS)
def test_probabilities_have_an_hdu_per_class_and_image(tmp_path: Path, suffix: str) -> None:
    source = f"{exposure(tmp_path / 'x_flc.fits')}[SCI,all]"
    target = tmp_path / f"probabilities{suffix}"
    values = copied(
        target, open_members(source), 2, np.float32, channels=3, record=Record(names=NAMES, probability=True)
    )
    hdus = sound(target)[1:]
    names = [(f"PROB_{name}", chip) for chip in (1, 2) for name in NAMES.values()]
    assert [(hdu.name, hdu.ver) for hdu in hdus] == names
    for hdu, expected in zip(hdus, itertools.chain(*values), strict=True):
        np.testing.assert_array_equal(hdu.data, expected)
        assert hdu.header["BTYPE"] == "PROBABILITY"
        assert hdu.header["CCDCHIP"] == 3 - hdu.ver


def test_probabilities_of_images_of_one_version_stay_apart(tmp_path: Path) -> None:
    source = f"{exposure(tmp_path / 'x_flc.fits')}[all]"
    copied(
        tmp_path / "p.fits",
        open_members(source),
        6,
        np.float32,
        channels=3,
        record=Record(names=NAMES, probability=True),
    )
    hdus = sound(tmp_path / "p.fits")[1:]
    assert [(hdu.name, hdu.ver) for hdu in hdus] == [(f"PROB_{n}", v) for v in range(1, 7) for n in NAMES.values()]


@pytest.mark.parametrize("suffix", FITS)
def test_an_image_in_the_primary_hdu_stays_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "x.fits"
    first = fits.PrimaryHDU(pixels((6, 7)), fits.Header({**TAN, "OBJECT": "M 31"}))
    cube = image(pixels((3, 5, 4)), "CUBE", 1, OBJECT="M 33")
    fits.HDUList([first, image(pixels((4, 5)), "SCI", 7), fits.ImageHDU(pixels((2, 9)))]).writeto(path)
    values = copied(tmp_path / f"y{suffix}", open_members(f"{path}[all]"), 3)
    hdus = [hdu for hdu in sound(tmp_path / f"y{suffix}") if hdu.data is not None]
    assert [(hdu.name, hdu.ver) for hdu in hdus[1:]] == [("SCI", 7), (hdus[2].name, 1)]
    assert hdus[0].header["OBJECT"] == "M 31"
    assert isinstance(hdus[0], fits.PrimaryHDU) == (suffix != ".fits.fz")
    for hdu, expected in zip(hdus, values, strict=True):
        np.testing.assert_array_equal(hdu.data, expected[0])
    fits.HDUList([fits.PrimaryHDU(), cube, cube]).writeto(path, overwrite=True)
    values = copied(tmp_path / f"z{suffix}", open_members(f"{path}[all]", "zyx"), 2)
    for hdu, expected in zip(sound(tmp_path / f"z{suffix}")[1:], values, strict=True):
        np.testing.assert_array_equal(hdu.data, expected[0])


def test_look_up_tables_are_kept_once(tmp_path: Path) -> None:
    """Both chips refer to the same ones."""
    path = tmp_path / "x.fits"
    wcs = WCS(fits.Header(TAN))
    rng = np.random.default_rng(1)
    for axis in (1, 2):
        table = DistortionLookupTable(rng.normal(size=(4, 4)).astype("f4"), (1, 1), (1, 1), (8, 8))
        setattr(wcs, f"cpdis{axis}", table)
    made = wcs.to_fits(relax=True)
    images = [image(pixels((20, 30)), "SCI", chip) for chip in (1, 2)]
    for hdu in images:
        hdu.header.update(made[0].header)
    fits.HDUList([fits.PrimaryHDU(), *images, *made[1:]]).writeto(path)
    copied(tmp_path / "y.fits", open_members(f"{path}[SCI,all]"), 2)
    with fits.open(tmp_path / "y.fits") as written, fits.open(path) as source:
        assert [(hdu.name, hdu.ver) for hdu in written] == [(hdu.name, hdu.ver) for hdu in source]
        corners = np.array([[0, 0], [29, 19], [11, 7]], float)
        for chip in (1, 2):
            places = [WCS(file["SCI", chip].header, file).all_pix2world(corners, 0) for file in (written, source)]
            np.testing.assert_array_equal(*places)


def test_real_extensions(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "fits/odd/test0.fits"
    values = copied(tmp_path / "y.fits.fz", open_members(f"{path}[SCI,all]", checksum="ignore"), 4)
    hdus = sound(tmp_path / "y.fits.fz")[1:]
    with fits.open(path) as source:
        assert [(hdu.name, hdu.ver) for hdu in hdus] == [(hdu.name, hdu.ver) for hdu in source[1:]]
        for hdu, expected, theirs in zip(hdus, values, source[1:], strict=True):
            np.testing.assert_array_equal(hdu.data, expected[0])
            np.testing.assert_array_equal(hdu.data, np.nan_to_num(theirs.data) % 3)


# Writing NIfTI


@pytest.mark.parametrize("suffix", NIFTI)
@pytest.mark.parametrize("big", [False, True])
def test_a_series_keeps_its_header(tmp_path: Path, suffix: str, big: bool) -> None:
    header = nib.Nifti1Header(endianness=">" if big else "<")
    header.set_data_shape((4, 5, 6, 3))
    header.set_xyzt_units("mm", "msec")
    header["pixdim"][4], header["toffset"] = 720.0, 12.5
    affine = np.array([[0, -2.0, 0.1, 5], [1.5, 0, 0, -7], [0, 0.1, 3.0, 9], [0, 0, 0, 1]])
    source = tmp_path / f"bold{suffix}"
    made = nib.Nifti1Image(scan((4, 5, 6, 3)), affine, header)
    made.header["pixdim"][4] = 720.0
    made.to_filename(source)
    values = copied(tmp_path / f"y{suffix}", open_members(source, "xyzt"), 3)
    written, theirs = load_nib(tmp_path / f"y{suffix}"), load_nib(source)
    assert written.shape == (4, 5, 6, 3)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, np.concatenate(values))
    np.testing.assert_array_equal(written.affine, theirs.affine)
    assert written.header.get_zooms()[3] == theirs.header.get_zooms()[3] == 720.0
    assert written.header.get_xyzt_units() == ("mm", "msec")
    assert written.header["toffset"] == 12.5
    for field in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(written.header[field], theirs.header[field])
    assert written.header["intent_code"] == 1002
    with open_volume(f"{tmp_path / f'y{suffix}'}[2]") as frame:
        assert frame.labels
        np.testing.assert_array_equal(frame.numpy(), values[2])


def test_channels_of_frames_lie_along_a_fifth_axis(tmp_path: Path) -> None:
    source = save_nib(tmp_path / "bold.nii.gz", scan((4, 5, 6, 3)))
    values = copied(tmp_path / "p.nii.gz", open_members(source, "xyzt"), 3, np.float32, channels=3)
    written = load_nib(tmp_path / "p.nii.gz")
    assert written.shape == (4, 5, 6, 3, 3)
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, np.stack(values, axis=1))


@pytest.mark.parametrize("name", ["functional.nii", "example4d.nii.gz"])
def test_real_series(real_data: Path, tmp_path: Path, name: str) -> None:
    path = real_data / "nifti_odd" / name
    values = copied(tmp_path / "y.nii.gz", open_members(path, "xyzt"), len(members(path, "xyzt")))
    written, theirs = load_nib(tmp_path / "y.nii.gz"), load_nib(path)
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, np.concatenate(values))
    assert written.header.get_zooms() == theirs.header.get_zooms()
    assert written.header.get_xyzt_units() == theirs.header.get_xyzt_units()
    np.testing.assert_array_equal(written.affine, theirs.affine)


def test_a_series_of_one_frame_keeps_its_four_axes(tmp_path: Path) -> None:
    source = save_nib(tmp_path / "x.nii", scan((4, 5, 6, 1)))
    copied(tmp_path / "y.nii", open_members(source, "xyzt"), 1)
    assert load_nib(tmp_path / "y.nii").shape == (4, 5, 6, 1)


# What is refused, and what is left behind


def box(rows: int = 3, size: float = 1.0) -> Volume:
    return Volume(np.zeros((1, 2, rows, 4), np.float32), (size,) * 3, np.diag([size] * 3 + [1]))


def written(target: Path, images: Iterable[tuple[Volume, int]], count: int = 2, dtype: Any = np.uint8) -> None:
    """Write label maps of ones: of each image on its grid so many planes at once."""
    with open_members_writer(target, count, dtype, labels=True) as writer:
        for like, planes in images:
            writer.member(like).write(np.ones((1, planes, *like.shape[2:]), dtype))


@pytest.mark.parametrize("suffix", [".fits", ".fits.fz", ".nii.gz"])
@pytest.mark.parametrize(
    ("count", "planes", "words"),
    [
        (2, [2], r"all 2 (images|frames) must be written, got 1"),
        (2, [1, 2], "all 2 planes must be written, got 1"),
        (2, [2, 1], "all 2 planes must be written, got 1"),
        (1, [2, 2], "got 1 and one more"),
        (2, [4], "slab must have the shape"),
        (0, [], "count must be at least 1, got 0"),
    ],
)
def test_what_is_not_whole_is_not_there(tmp_path: Path, suffix: str, count: int, planes: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path / f"y{suffix}", [(box(), number) for number in planes], count)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("other", "words"), [(box(rows=5), "differ in shape"), (box(size=2.0), "differ in geometry")])
def test_frames_of_other_grids_are_refused(tmp_path: Path, other: Volume, words: str) -> None:
    with pytest.raises(InputError, match=f"frames {words}"):
        written(tmp_path / "y.nii", [(box(), 2), (other, 2)])
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "y.fits", [(box(), 2), (other, 2)])
    assert [hdu.shape for hdu in sound(tmp_path / "y.fits")] == [(2, 3, 4), other.shape[1:]]


def test_formats_of_one_image_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds one image, and 2 are to be written"):
        written(tmp_path / "y.png", [(box(), 2)])
    with pytest.raises(InputError, match="there is no folder"):
        written(tmp_path / "no" / "y.fits", [(box(), 2)])
    with pytest.raises(ValueError, match="at most 32 bits"), open_members_writer(tmp_path / "y.fits.fz", 2, np.int64):
        pass


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz", ".nii", ".nii.gz"])
def test_killed_at_every_change_of_the_disk(tmp_path: Path, suffix: str) -> None:
    if why := available():
        pytest.skip(why)
    target = tmp_path / f"y{suffix}"
    written(tmp_path / f"z{suffix}", [(box(), 2)] * 2)
    contents = [b"before", (tmp_path / f"z{suffix}").read_bytes()]
    states = []

    def work() -> str:
        written(target, [(box(), 2)] * 2)
        return ""

    for last in itertools.count(1):
        target.write_bytes(contents[0])
        trial = attempt(work, tmp_path, last, "kill")
        states.append(contents.index(target.read_bytes()))
        if trial.struck is None:
            break
        assert trial.status == -signal.SIGKILL
    assert states == sorted(states)
    assert states[0] == 0
    assert states[-1] == 1
    assert len(states) > 5


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Slabs are written as they come: no image, and no file, is held."""
    like = Volume(np.broadcast_to(np.float32(0), (1, 64, 256, 256)), (1.0,) * 3)
    peaks = []
    for suffix in (".fits", ".nii"):
        tracemalloc.start()
        with open_members_writer(
            tmp_path / f"y{suffix}", 4, np.uint8, labels=True, record=Record(names={0: "a"})
        ) as writer:
            for _ in range(4):
                part = writer.member(like)
                for _ in range(16):
                    part.write(np.zeros((1, 4, 256, 256), np.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 32e6 < 4 * 64 * 256 * 256 * 2


def test_a_changed_bit_on_the_way_to_the_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = fits_tiles.PlainSink.write

    def changed(self: Any, stream: int, data: np.ndarray) -> None:
        write(self, stream, data)
        self._file.seek(self._data)
        self._file.write(b"\7")

    monkeypatch.setattr(fits_tiles.PlainSink, "write", changed)
    with pytest.raises(ResourceError, match="does not read back"):
        written(tmp_path / "y.fits", [(box(), 2)] * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_fits_file_of_one_chosen_image_keeps_its_name(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", pixels((4, 5)), **TAN)
    copied(tmp_path / "y.fits", open_members(f"{path}[all]"), 1)
    (hdu,) = sound(tmp_path / "y.fits")
    assert hdu.name == "PRIMARY"
