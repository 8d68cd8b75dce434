"""Files of several images, HDUs or frames, come out one by one, as astropy and nibabel read them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes import members, open_members, open_volume, streams
from tests.fits_files import image, pixels, save_many
from tests.member_files import exposure
from tests.nifti_files import load_nib, save_nib, scan

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


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
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
    np.testing.assert_array_equal(np.stack(frames), theirs.T.astype(frames[0].dtype))
    with open_volume(f"{path}[1]") as volume:
        np.testing.assert_array_equal(volume.numpy()[0], frames[1])


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
