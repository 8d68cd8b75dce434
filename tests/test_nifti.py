"""NIfTI read and written; nibabel is the witness for what a file holds."""

from __future__ import annotations

import gzip
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Header

from densepred.errors import InputError
from densepred.volumes import (
    Volume,
    open_volume,
    open_writer,
)
from tests.nifti_files import load_nib, patched, save_nib, scan

KINDS = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def real_files(folder: Path) -> list[Path]:
    hippocampus = sorted(folder.glob("hippocampus/*Tr/*.nii.gz"))[::40]
    odd = [*folder.glob("nifti_odd/*.nii*"), *folder.glob("spinal_cord/*.nii*"), *folder.glob("ct_mr/*.nii*")]
    return sorted(odd) + hippocampus


def test_real_files_read_as_nibabel_reads_them(real_data: Path) -> None:
    files = real_files(real_data)
    assert len(files) > 15
    for path in files:
        theirs = load_nib(path)
        values = np.asarray(theirs.dataobj).T
        with open_volume(path, "xyzc") as volume:
            whole = volume.numpy()
            np.testing.assert_array_equal(volume.affine, theirs.affine)
            assert whole.shape == ((1, *values.shape) if values.ndim == 3 else values.shape)
            np.testing.assert_allclose(whole, values.reshape(whole.shape), rtol=2e-7 if values.dtype == "f8" else 0)
            slabs = np.concatenate([slab for _, _, slab in volume.slabs(7)], axis=1)
            np.testing.assert_array_equal(slabs, whole)


def test_real_files_that_need_a_word_or_are_refused(real_data: Path) -> None:
    for name, axes in (("example4d.nii.gz", r"\(128, 96, 24, 2\)"), ("functional.nii", r"\(17, 21, 3, 20\)")):
        with pytest.raises(InputError, match=f"4 axes {axes}") as caught:
            open_volume(real_data / "nifti_odd" / name)
        assert "`axes: xyzc`" in caught.value.fix
    with pytest.raises(InputError, match=r"a pair of files \(\.hdr and \.img\)"):
        open_volume(real_data / "nifti_odd" / "nifti1.hdr")


def test_scaling_is_applied_and_a_void_slope_is_none(tmp_path: Path) -> None:
    stored = scan((5, 6, 7))
    path = save_nib(tmp_path / "x.nii", stored)
    patched(path, scl_slope=0.1, scl_inter=-1024.0)
    volume = open_volume(path)
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(volume.numpy()[0], (stored.T * float(np.float32(0.1)) - 1024).astype(np.float32))
    for kind, wide in (("u1", False), ("i2", False), ("f4", False), ("i4", True), ("u8", True), ("f8", True)):
        fine = save_nib(tmp_path / "fine.nii", scan((5, 6, 7), kind) + (2**30 + 1 if kind == "i4" else 0))
        volume = open_volume(patched(fine, scl_slope=0.5, scl_inter=-8.0))
        assert volume.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_array_equal(volume.numpy()[0], load_nib(fine).get_fdata().T)
    for slope, inter in ((0, 5), (np.nan, 5), (1, 0)):
        assert open_volume(patched(path, scl_slope=slope, scl_inter=inter)).dtype == np.int16
    with pytest.raises(InputError, match="scl_inter = nan"):
        open_volume(patched(path, scl_slope=2, scl_inter=np.nan))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_memory_of_a_forward_pass_does_not_grow_with_depth(tmp_path: Path, suffix: str, slope: float) -> None:
    peaks = []
    for depth in (64, 640):
        path = tmp_path / f"{depth}{suffix}"
        Volume.from_array(np.zeros((depth, 128, 64), np.int16), (1, 1, 1)).save(path)
        raw = gzip.decompress(path.read_bytes()) if suffix == ".nii.gz" else path.read_bytes()
        plain = tmp_path / "plain.nii"
        plain.write_bytes(raw)
        raw = patched(plain, scl_slope=slope).read_bytes()
        path.write_bytes(gzip.compress(raw, 1) if suffix == ".nii.gz" else raw)
        tracemalloc.start()
        for _ in open_volume(path).slabs(16):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


def test_sform_wins_over_qform_and_a_disagreement_is_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(scan((4, 5, 6)), np.eye(4))
    image.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    image.set_sform(np.eye(4), 1)
    image.to_filename(tmp_path / "x.nii")
    with pytest.warns(UserWarning, match="voxels of 1 x 1 x 1 and 2 x 2 x 2; the sform is used"):
        assert open_volume(tmp_path / "x.nii").spacing == (1, 1, 1)
    with warnings.catch_warnings(action="error"):
        patched(tmp_path / "x.nii", sform_code=0)
        assert open_volume(tmp_path / "x.nii").spacing == (2, 2, 2)
        patched(tmp_path / "x.nii", qform_code=0, pixdim=[0, 3, 4, 5, 0, 0, 0, 0])
        assert open_volume(tmp_path / "x.nii").spacing == (5, 4, 3)


def test_an_axis_of_one_is_dropped_and_restored(tmp_path: Path) -> None:
    values = scan((4, 5, 6, 1, 1))
    volume = open_volume(save_nib(tmp_path / "x.nii.gz", values))
    assert volume.shape == (1, 6, 5, 4)
    volume.like(np.ones((6, 5, 4), bool)).save(tmp_path / "y.nii.gz")
    assert load_nib(tmp_path / "y.nii.gz").shape == (4, 5, 6, 1, 1)
    with open_writer(tmp_path / "p.nii", volume, np.float32, channels=3) as writer:
        writer.write(np.zeros((3, 6, 5, 4), np.float32))
    assert load_nib(tmp_path / "p.nii").shape == (4, 5, 6, 3)


def test_axes_say_which_axis_holds_channels(tmp_path: Path) -> None:
    values = scan((4, 5, 3))
    path = save_nib(tmp_path / "x.nii", values)
    assert open_volume(path).shape == (1, 3, 5, 4)
    assert open_volume(path, "xyzc").shape == (1, 3, 5, 4)
    assert open_volume(path, "xyc").shape == (3, 5, 4)
    with pytest.raises(InputError, match="not known for NIfTI"):
        open_volume(path, "xyzct")
    with pytest.raises(InputError, match="what lies along the last is not declared"):
        open_volume(path, "xy")
    with pytest.raises(InputError, match="only one may hold channels"):
        open_volume(save_nib(tmp_path / "y.nii", scan((2, 2, 2, 2, 2))), "xyzc")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slabs_of_channels_equal_the_whole_forward_and_backward(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = scan((6, 7, 11, 4))
    path = save_nib(tmp_path / f"x{suffix}", values)
    for streams in (64, 2):  # with fewer streams than channels reading starts over, and is still right
        monkeypatch.setattr("densepred.volumes.streams.MAX_STREAMS", streams)
        volume = open_volume(path, "xyzc")
        for start, stop, slab in volume.slabs(4):
            np.testing.assert_array_equal(slab, values.T[:, start:stop])
        np.testing.assert_array_equal(volume[:, 2:5], values.T[:, 2:5])
        np.testing.assert_array_equal(volume.numpy(), values.T)
    with pytest.raises(ValueError, match="thickness must be at least 1"):
        next(volume.slabs(0))


def test_the_header_of_an_output_tells_what_it_holds(tmp_path: Path) -> None:
    header = Nifti1Header()
    header.set_xyzt_units("micron", "sec")
    header["cal_max"], header["intent_code"], header["scl_slope"] = 9, 1007, 3
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the source"))
    path = save_nib(tmp_path / "x.nii", scan((3, 4, 5)), header=header)
    open_volume(path).save(tmp_path / "y.nii")
    written = load_nib(tmp_path / "y.nii").header
    raw = Nifti1Header((tmp_path / "y.nii").read_bytes()[:348], check=False)
    assert written.get_xyzt_units() == ("micron", "sec")
    assert (raw["cal_max"], raw["intent_code"], raw["scl_slope"], raw["scl_inter"]) == (0, 0, 1, 0)
    assert raw["descrip"].item().startswith(b"densepred")
    assert not written.extensions


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7)])
def test_an_array_gets_a_header_of_its_own(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spacing = (4.0, 2.0, 0.5)[-len(shape) :]
    Volume.from_array(scan(shape), spacing).save(tmp_path / "x.nii")
    theirs = load_nib(tmp_path / "x.nii")
    np.testing.assert_array_equal(theirs.affine, np.diag([0.5, 2, 4 if len(shape) == 3 else 1, 1]))
    assert (int(theirs.header["sform_code"]), int(theirs.header["qform_code"])) == (1, 1)
    assert theirs.header.get_zooms() == spacing[::-1]
    assert open_volume(tmp_path / "x.nii").spacing == spacing


def test_a_sheared_affine_without_a_header_goes_to_the_sform_alone(tmp_path: Path) -> None:
    affine = np.array([[1, 0.4, 0, 3], [0, 1, 0, 4], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    Volume(np.ones((1, 3, 4, 5), np.int16), (2.0, 1.0, 1.0), affine).save(tmp_path / "x.nii")
    with warnings.catch_warnings(action="error"):
        back = open_volume(tmp_path / "x.nii").affine
    assert back is not None
    np.testing.assert_allclose(back, affine, rtol=1e-6)
    assert int(load_nib(tmp_path / "x.nii").header["qform_code"]) == 0
