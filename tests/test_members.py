"""Files of several images: HDUs and frames come out one by one and go back into one file, in order.

Judged by astropy and nibabel.
"""

from __future__ import annotations

import gzip
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from densepred.errors import InputError
from densepred.volumes import (
    Provenance,
    Record,
    Volume,
    members,
    open_members,
    open_members_writer,
    open_volume,
    streams,
)
from tests.fits_files import TAN, image, pixels, save, save_many
from tests.nifti_files import GEOMETRY_FIELDS, load_nib, save_nib, scan

FITS = (".fits", ".fits.gz", ".fits.fz")
NIFTI = (".nii", ".nii.gz")
NAMES = {0: "sky", 1: "star", 2: "cosmic"}


def exposure(path: Path, **options: Any) -> Path:
    """As the camera files of Hubble: two chips of other sizes, each with its error and its flags."""
    hdus = []
    for chip, rows in ((1, 12), (2, 9)):
        cards = {**TAN, "CRVAL1": 150.0 + chip, "CD1_1": -5.5e-5, "CD1_2": 1e-6, "CD2_1": 1e-6, "CD2_2": 5.5e-5}
        del cards["CDELT1"], cards["CDELT2"]
        cards |= {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 1e-5, "B_ORDER": 2}
        cards |= {"CCDCHIP": 3 - chip, "BUNIT": "ELECTRONS", "INHERIT": True}
        hdus.append(image(pixels((rows, 17)), "SCI", chip, **cards))
        hdus.append(image(pixels((rows, 17)), "ERR", chip, BUNIT="ELECTRONS"))
        hdus.append(image(pixels((rows, 17), "i2"), "DQ", chip))
    hdus.append(fits.BinTableHDU.from_columns([fits.Column("x", "J", array=[1, 2])], name="WCSCORR"))
    save_many(path, *hdus, checksum=True, **options)
    with fits.open(path, "update") as file:
        file[0].header["TELESCOP"] = "HST"
        file[0].add_checksum()
    return path


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


# What a path stands for


def test_all_stands_for_the_images_in_their_order(tmp_path: Path) -> None:
    path = exposure(tmp_path / "x_flc.fits")
    with fits.open(path) as file:
        listed = [f"{path}[{hdu.name},{hdu.ver}]" for hdu in file if hdu.is_image and hdu.data is not None]
    assert members(f"{path}[all]") == listed
    assert members(f"{path}[sci,ALL]") == [f"{path}[SCI,1]", f"{path}[SCI,2]"]
    assert members(f"{path}[SCI,2]") == [f"{path}[SCI,2]"]
    assert members(path) == [str(path)]


def test_nameless_and_double_hdus_are_named_by_their_index(tmp_path: Path) -> None:
    path = tmp_path / "x.fits"
    save_many(path, image(pixels((3, 4))), image(pixels((3, 4)), "SCI"), image(pixels((3, 4)), "SCI"))
    assert members(f"{path}[all]") == [f"{path}[{index}]" for index in (1, 2, 3)]
    assert members(f"{path}[SCI,all]") == [f"{path}[{index}]" for index in (2, 3)]


def test_frames_are_numbered_where_times_are_declared(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "bold.nii.gz", scan((4, 5, 6, 3)))
    assert members(path, "xyzt") == [f"{path}[{frame}]" for frame in range(3)]
    assert members(f"{path}[1]", "xyzt") == [f"{path}[1]"]
    assert members(path, "xyzc") == members(path) == [str(path)]
    for shape in ((4, 5, 6), (4, 5, 6, 1)):
        one = save_nib(tmp_path / "one.nii", scan(shape))
        assert members(one, "xyzt") == [str(one)]
        assert open_volume(one, "xyzt").shape == (1, 6, 5, 4)


def test_other_formats_are_one_image(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, scan((3, 4)))
    assert members(path) == [str(path)]
    assert [volume.shape for volume in open_members(path)] == [(1, 3, 4)]


def test_what_stands_for_nothing_is_refused_with_the_choices(tmp_path: Path) -> None:
    path = exposure(tmp_path / "x.fits")
    with pytest.raises(InputError, match=r"no HDU \[FLAT,all\] \(HDUs 0 PRIMARY,1: empty; 1 SCI,1: float32"):
        members(f"{path}[FLAT,all]")
    with pytest.raises(InputError, match=r"\[SCI,all\] stands for 2 images, and one is wanted") as caught:
        open_volume(f"{path}[SCI,all]")
    assert "x.fits[SCI,1]" in caught.value.fix
    with pytest.raises(InputError, match="no such file"):
        members(tmp_path / "y.fits[all]")
    with pytest.raises(InputError, match="no such file"):
        members(tmp_path / "y.npy")


def test_a_time_series_without_a_word_or_a_frame_is_refused_with_the_choices(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "bold.nii", scan((4, 5, 6, 3)))
    with pytest.raises(InputError, match="what lies along the last is not declared") as caught:
        open_volume(path)
    assert "`axes: xyzc` if the last axis holds channels" in caught.value.fix
    assert "`axes: xyzt` if it holds times" in caught.value.fix
    with pytest.raises(InputError, match="holds 3 frames, and none is chosen") as caught:
        open_volume(path, "xyzt")
    assert caught.value.fix == "write bold.nii[0] to bold.nii[2]"
    for part in ("3", "SCI", "-1"):
        with pytest.raises(InputError, match=rf"no frame \[{part}\], the file has 3"):
            open_volume(f"{path}[{part}]")
    with pytest.raises(InputError, match="holds one image, not a part"):
        open_volume(f"{save_nib(tmp_path / 'one.nii', scan((4, 5, 6)))}[0]")
    with pytest.raises(InputError, match="holds one image, not a part"):
        open_volume(f"{path}[0]", "xyzc")
    with pytest.raises(InputError, match="only one may hold channels or times"):
        members(save_nib(tmp_path / "five.nii", scan((2, 2, 2, 2, 2))), "xyzt")


# Reading frames


@pytest.mark.parametrize("suffix", NIFTI)
def test_frames_read_as_nibabel_reads_them(tmp_path: Path, suffix: str) -> None:
    header = nib.Nifti1Header()
    values = scan((6, 7, 11, 5), "f4")
    path = save_nib(tmp_path / f"x{suffix}", values, header=header)
    for frame, volume in enumerate(open_members(path, "xyzt")):
        expected = load_nib(path).slicer[..., frame]
        np.testing.assert_array_equal(volume.numpy()[0], np.asarray(expected.dataobj).T)
        np.testing.assert_array_equal(volume.affine, expected.affine)
        with open_volume(f"{path}[{frame}]") as alone:
            np.testing.assert_array_equal(np.concatenate([s for *_, s in alone.slabs(4)], 1), volume.numpy())
            np.testing.assert_array_equal(alone[0, 2:9:3, ::2], values[..., frame].T[2:9:3, ::2])
            assert volume.path == alone.path == path
    assert frame == 4


@pytest.mark.parametrize("name", ["functional.nii", "example4d.nii.gz"])
def test_real_time_series_read_as_nibabel_reads_them(real_data: Path, name: str) -> None:
    path = real_data / "nifti_odd" / name
    theirs = np.asarray(load_nib(path).dataobj)
    frames = [volume.numpy()[0] for volume in open_members(path, "xyzt")]
    np.testing.assert_array_equal(np.stack(frames), theirs.T)
    with open_volume(f"{path}[1]") as volume:
        np.testing.assert_array_equal(volume.numpy()[0], theirs[..., 1].T)


def test_a_gzipped_series_is_decompressed_once_per_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is read twice, for its statistics and for the network, without a start from the front for either."""
    values = scan((16, 16, 16, 30))
    path = save_nib(tmp_path / "x.nii.gz", values)
    read = streams._GzipStream._read
    total = 0

    def counted(self: Any, size: int, needed: int) -> bytes:
        nonlocal total
        chunk = read(self, size, needed)
        total += len(chunk)
        return chunk

    monkeypatch.setattr(streams._GzipStream, "_read", counted)
    for frame, volume in enumerate(open_members(path, "xyzt")):
        with volume:
            for _ in range(2):
                got = np.concatenate([slab for *_, slab in volume.slabs(3)], axis=1)
                np.testing.assert_array_equal(got[0], values[..., frame].T)
    assert total <= 3.1 * values.nbytes  # once to verify, and twice
    total = 0
    volumes = list(open_members(path, "xyzt"))
    for frame in (5, 2, 29):  # any order is right
        np.testing.assert_array_equal(volumes[frame].numpy()[0], values[..., frame].T)


def test_damage_anywhere_is_found_before_the_first_frame(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "x.nii.gz", scan((16, 16, 16, 9)))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    with pytest.raises(InputError, match="corrupt"):
        next(open_members(path, "xyzt"))
    with open_volume(f"{path}[0]") as volume, pytest.raises(InputError, match="corrupt"):
        volume.numpy()
    path.write_bytes(gzip.compress(gzip.decompress(save_nib(path, scan((16, 16, 16, 9))).read_bytes())[:-1]))
    with pytest.raises(InputError, match="truncated"):
        next(open_members(path, "xyzt"))


# Writing FITS


@pytest.mark.parametrize("suffix", FITS)
@pytest.mark.parametrize("chosen", ["SCI,all", "all"])
def test_label_maps_mirror_the_structure(tmp_path: Path, suffix: str, chosen: str) -> None:
    source = f"{exposure(tmp_path / 'x_flc.fits')}[{chosen}]"
    target = tmp_path / f"labels{suffix}"
    record = Record(NAMES, provenance=Provenance(model="unet", command="densepred predict"))
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
    values = copied(target, open_members(source), 2, np.float32, channels=3, record=Record(NAMES, probability=True))
    hdus = sound(target)[1:]
    names = [(f"PROB_{name.upper()}", chip) for chip in (1, 2) for name in NAMES.values()]
    assert [(hdu.name, hdu.ver) for hdu in hdus] == names
    for hdu, expected in zip(hdus, itertools.chain(*values), strict=True):
        np.testing.assert_array_equal(hdu.data, expected)
        assert hdu.header["BTYPE"] == "PROBABILITY"
        assert hdu.header["CCDCHIP"] == 3 - hdu.ver


def test_probabilities_of_images_of_one_version_stay_apart(tmp_path: Path) -> None:
    source = f"{exposure(tmp_path / 'x_flc.fits')}[all]"
    copied(tmp_path / "p.fits", open_members(source), 6, np.float32, channels=3, record=Record(NAMES, probability=True))
    hdus = sound(tmp_path / "p.fits")[1:]
    assert [(hdu.name, hdu.ver) for hdu in hdus] == [
        (f"PROB_{n.upper()}", v) for v in range(1, 7) for n in NAMES.values()
    ]


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
    """Both chips refer to the tables by their versions, as Hubble's do."""
    path = tmp_path / "x.fits"
    hdus = []
    for chip in (1, 2):
        header = fits.Header(TAN)
        for axis in (1, 2):
            header[f"CPDIS{axis}"] = "Lookup"
            header[f"DP{axis}"] = f"EXTVER: {2 * chip - 2 + axis}"
            header[f"DP{axis}"] = "NAXES: 2"
            header.append(f"DP{axis}", f"AXIS.1: 1") if False else None
        hdus.append((chip, header))
    wcs = WCS(fits.Header(TAN))
    from astropy.wcs import DistortionLookupTable

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


@pytest.mark.parametrize("suffix", [".fits", ".fits.fz", ".nii.gz"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, suffix: str) -> None:
    like = Volume.from_array(np.zeros((2, 3, 4), np.float32), (1.0, 1.0, 1.0))
    target, values = tmp_path / f"y{suffix}", np.ones((1, 2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match="all 2 .* must be written, got 1"):
        with open_members_writer(target, 2, np.uint8, labels=True) as writer:
            writer.member(like).write(values)
    with pytest.raises(ValueError, match="all 2 planes must be written, got 1"):
        with open_members_writer(target, 2, np.uint8, labels=True) as writer:
            writer.member(like).write(values[:, :1])
            writer.member(like)
    with pytest.raises(ValueError, match="and one more"):
        with open_members_writer(target, 1, np.uint8, labels=True) as writer:
            writer.member(like).write(values)
            writer.member(like)
    with pytest.raises(ValueError, match="planes"):
        with open_members_writer(target, 2, np.uint8, labels=True) as writer:
            writer.member(like).write(np.concatenate([values, values], axis=1))
    with pytest.raises(ValueError, match="count must be at least 1"):
        with open_members_writer(target, 0, np.uint8):
            pass
    assert list(tmp_path.iterdir()) == []


def test_frames_of_other_grids_are_refused(tmp_path: Path) -> None:
    first = Volume(np.zeros((1, 2, 3, 4)), (1.0,) * 3, np.eye(4), path="a.nii")
    for other, words in (
        (Volume(np.zeros((1, 2, 3, 5)), (1.0,) * 3, np.eye(4)), "frames differ in shape"),
        (Volume(np.zeros((1, 2, 3, 4)), (2.0,) * 3, np.diag([2.0, 2, 2, 1])), "frames differ in geometry"),
    ):
        with pytest.raises(InputError, match=words):
            with open_members_writer(tmp_path / "y.nii", 2, np.uint8) as writer:
                writer.member(first).write(np.zeros((1, 2, 3, 4), np.uint8))
                writer.member(other)
    assert list(tmp_path.iterdir()) == []


def test_formats_of_one_image_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds one image, and 2 are to be written"):
        with open_members_writer(tmp_path / "y.png", 2, np.uint8):
            pass
    with pytest.raises(InputError, match="there is no folder"):
        with open_members_writer(tmp_path / "no" / "y.fits", 2, np.uint8):
            pass
    with pytest.raises(ValueError, match="at most 32 bits"):
        with open_members_writer(tmp_path / "y.fits.fz", 2, np.int64):
            pass


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz", ".fits.fz", ".nii", ".nii.gz"])
def test_the_file_before_stays_until_all_are_written(tmp_path: Path, suffix: str) -> None:
    like = Volume.from_array(np.zeros((2, 3, 4), np.float32), (1.0, 1.0, 1.0))
    target = tmp_path / f"y{suffix}"
    target.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        with open_members_writer(target, 2, np.uint8, labels=True) as writer:
            writer.member(like).write(np.zeros((1, 2, 3, 4), np.uint8))
            assert target.read_bytes() == b"before"
            raise KeyboardInterrupt
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Slabs are written as they come: no image, and no file, is held."""
    import tracemalloc

    like = Volume(np.broadcast_to(np.float32(0), (1, 64, 256, 256)), (1.0,) * 3)
    peaks = []
    for suffix in (".fits", ".nii"):
        tracemalloc.start()
        with open_members_writer(tmp_path / f"y{suffix}", 4, np.uint8, labels=True, record=Record({0: "a"})) as writer:
            for _ in range(4):
                part = writer.member(like)
                for _ in range(16):
                    part.write(np.zeros((1, 4, 256, 256), np.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 32e6 < 4 * 64 * 256 * 256 * 2


def test_a_changed_bit_on_the_way_to_the_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from densepred.errors import ResourceError
    from densepred.volumes import fits_tiles

    like = Volume.from_array(np.zeros((2, 3, 4), np.float32), (1.0, 1.0, 1.0))
    write = fits_tiles.PlainSink.write

    def changed(self: Any, stream: int, data: np.ndarray) -> None:
        write(self, stream, data)
        self._file.seek(-1, 2)
        at = self._data
        self._file.seek(at)
        self._file.write(b"\7")

    with pytest.raises(ResourceError, match="does not read back"):
        with open_members_writer(tmp_path / "y.fits", 2, np.uint8, labels=True) as writer:
            writer.member(like).write(np.zeros((1, 2, 3, 4), np.uint8))
            monkeypatch.setattr(fits_tiles.PlainSink, "write", changed)
            writer.member(like).write(np.zeros((1, 2, 3, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_fits_file_of_one_chosen_image_keeps_its_name(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", pixels((4, 5)), **TAN)
    copied(tmp_path / "y.fits", open_members(f"{path}[all]"), 1)
    (hdu,) = sound(tmp_path / "y.fits")
    assert hdu.name == "PRIMARY"
