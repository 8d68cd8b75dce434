"""`Volume`, its channels, and writing it whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.errors import InputError, ResourceError
from densepred.volumes import (
    FORMATS,
    Volume,
    corner_offset,
    label_dtype,
    open_volume,
    open_writer,
    stack,
    suffix_of,
)
from densepred.volumes import volume as volume_module
from densepred.volumes.volume import full_key, span
from tests.nifti_files import RNG, load_nib, save_nib, scan


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_index_reads_as_in_numpy(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "indexed.nii.gz"
    shape = (3, 7, 4, 5)
    values = np.arange(np.prod(shape), dtype="i2").reshape(shape)
    if not path.exists():
        save_nib(path, values.T)
    edge = st.none() | st.integers(-9, 9)
    step = st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3])
    index = [data.draw(st.integers(-size, size - 1) | st.builds(slice, edge, edge, step)) for size in shape][
        : data.draw(st.integers(0, 4))
    ]
    key = (*index, ...) if data.draw(st.booleans()) else tuple(index)
    np.testing.assert_array_equal(open_volume(path, "xyzc")[key], values[key])


def test_indices_that_are_not_basic_are_refused() -> None:
    with pytest.raises(TypeError, match="an integer, a slice"):
        full_key(([0, 1],), (3, 3))  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="outside an axis of 3"):
        full_key((0, 3), (3, 3))
    with pytest.raises(IndexError, match="at most 2 indices"):
        full_key((0, 0, 0), (3, 3))
    assert span(slice(8, 1, -3), 10) == (2, 9, slice(None, None, -3))


def test_a_volume_larger_than_memory_is_refused_whole_and_read_by_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_nib(tmp_path / "x.nii.gz", scan((30, 30, 30)))
    monkeypatch.setattr(volume_module.os, "sysconf", lambda name: 8192 if name == "SC_PAGE_SIZE" else 4)
    with pytest.raises(ResourceError, match="reading it at once"):
        open_volume(path).numpy()
    with pytest.raises(ResourceError):
        stack([open_volume(path), open_volume(path)])[:, :10]
    assert sum(slab.shape[1] for _, _, slab in open_volume(path).slabs(4)) == 30


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (np.array([0, 1, 255]), "u1"),
        (np.array([0, 256, 32767]), "i2"),
        (np.array([0, -1, 3], np.int8), "i2"),
        (np.array([0, 32768, 70000]), "i4"),
        (np.array([0, 65535], np.uint16), "i4"),
        (np.array([0, 3], np.uint64), "u1"),
        (np.array([False, True]), "u1"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_labels_come_back_as_the_same_integers(tmp_path: Path, values: np.ndarray, stored: str, suffix: str) -> None:
    labels = RNG.choice(values, (5, 6, 7)).astype(values.dtype)
    labels.flat[: len(values)] = values
    source = open_volume(save_nib(tmp_path / "source.nii", scan((7, 6, 5))))
    source.like(labels).save(tmp_path / f"seg{suffix}")
    back = open_volume(tmp_path / f"seg{suffix}")
    assert back.labels
    assert back.dtype == np.dtype(stored)
    np.testing.assert_array_equal(back.numpy()[0], labels)
    theirs = load_nib(tmp_path / f"seg{suffix}")
    assert theirs.header.get_intent()[0] == "label"
    assert (theirs.dataobj.slope, theirs.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(theirs.affine, source.affine)


def test_types_no_program_reads_are_stored_as_others_and_what_fits_none_is_refused(tmp_path: Path) -> None:
    half = RNG.normal(size=(3, 4, 5)).astype(np.float16)
    Volume.from_array(half, (1, 1, 1)).save(tmp_path / "half.nii.gz")
    assert open_volume(tmp_path / "half.nii.gz").dtype == np.float32
    np.testing.assert_array_equal(open_volume(tmp_path / "half.nii.gz").numpy()[0], half)
    with pytest.raises(InputError, match=f"within int32, got 0 to {2**40}"):
        Volume.from_array(np.array([[0, 2**40]]), (1, 1), labels=True).save(tmp_path / "x.nii")
    with pytest.raises(ValueError, match="dtype must be an integer type for labels"):
        Volume.from_array(half, (1, 1, 1), labels=True).save(tmp_path / "x.nii")
    with pytest.raises(ValueError, match="got complex64"):
        Volume.from_array(half.astype(np.complex64), (1, 1, 1)).save(tmp_path / "x.nii")
    assert not (tmp_path / "x.nii").exists()
    assert label_dtype(255) == np.uint8
    assert label_dtype(256) == np.int16
    assert label_dtype(32768) == np.int32


def test_bytes_do_not_depend_on_the_slabs(tmp_path: Path) -> None:
    values = np.cumsum(RNG.integers(-2, 3, (2, 40, 96, 160)), axis=-1).astype(np.int16)  # over two chunks a channel
    like = Volume(values[:1], (1, 1, 1))
    written = set()
    for number, thickness in enumerate((1, 7, 40)):
        path = tmp_path / f"{number}.nii.gz"
        with open_writer(path, like, np.int16, channels=2) as writer:
            for start in range(0, 40, thickness):
                writer.write(values[:, start : start + thickness])
        written.add(path.read_bytes())
    assert len(written) == 1
    np.testing.assert_array_equal(np.asarray(load_nib(path).dataobj).T, values)
    np.testing.assert_array_equal(open_volume(path, "xyzc").numpy(), values)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    like = Volume(np.ones((1, 4, 5, 6), np.uint8), (1, 1, 1))
    path = tmp_path / f"x{suffix}"
    like.save(path)
    before = path.read_bytes()

    def broken(slabs: list[np.ndarray], stop: Exception | None = None) -> None:
        with open_writer(path, like, np.uint8, channels=2) as writer:
            for slab in slabs:
                writer.write(slab)
            if stop is not None:
                raise stop

    slab = np.zeros((2, 2, 5, 6), np.uint8)
    with pytest.raises(KeyError):
        broken([slab], KeyError("x"))
    with pytest.raises(ValueError, match="all 4 planes must be written, got 2"):
        broken([slab])
    with pytest.raises(ValueError, match="slab must have the shape"):
        broken([slab, slab, slab])
    with pytest.raises(ValueError, match="slab must have the shape"):
        broken([slab[:1]])
    with pytest.raises(ValueError, match="values must fit uint8, got 300 to 300"):
        broken([slab.astype(int) + 300])
    with pytest.raises(ValueError, match="values must fit uint8"):
        broken([slab + np.float32(0.5)])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rot(path: Path) -> None:
        if path.suffix == ".nii":
            raw = bytearray(path.read_bytes())
            raw[400] ^= 1
            path.write_bytes(raw)

    monkeypatch.setattr("densepred.files.sync", rot)
    with pytest.raises(ResourceError, match="does not read back"):
        Volume.from_array(scan((5, 6, 7)), (1, 1, 1)).save(tmp_path / "x.nii")
    assert not list(tmp_path.iterdir())


def test_channels_from_several_files_become_one_volume(tmp_path: Path) -> None:
    a, b = scan((4, 5, 6)), scan((4, 5, 6), "f4")
    both = stack([open_volume(save_nib(tmp_path / f"{n}.nii.gz", v)) for n, v in (("a", a), ("b", b))])
    expected = np.stack([a.T, b.T]).astype("f4")
    assert both.shape == (2, 6, 5, 4)
    assert both.dtype == np.float32
    np.testing.assert_array_equal(both.numpy(), expected)
    np.testing.assert_array_equal(np.concatenate([slab for *_, slab in both.slabs(4)], 1), expected)
    for key in ((1,), (0, 2), (slice(None, None, -1), slice(1, 3), 0), (..., 3), (slice(0, 0),)):
        np.testing.assert_array_equal(both[key], expected[key])
    assert both.affine is not None
    both.save(tmp_path / "both.nii.gz")
    np.testing.assert_array_equal(open_volume(tmp_path / "both.nii.gz", "xyzc").numpy(), expected)
    both.close()


def test_channels_on_different_grids_are_refused_with_the_offset(tmp_path: Path) -> None:
    moved = np.diag([1.0, 2, 3, 1])
    moved[1, 3] = 0.5
    a = open_volume(save_nib(tmp_path / "a.nii", scan((4, 5, 6))))
    b = open_volume(save_nib(tmp_path / "b.nii", scan((4, 5, 6)), moved))
    c = open_volume(save_nib(tmp_path / "c.nii", scan((4, 5, 7))))
    assert corner_offset(a, b) == pytest.approx(0.25)
    with pytest.raises(InputError, match=r"a\.nii and .*b\.nii lie 0\.25 voxels apart"):
        stack([a, b])
    with pytest.raises(InputError, match=r"a\.nii and .*c\.nii are \(6, 5, 4\) and \(7, 5, 4\)"):
        stack([a, c])
    moved[1, 3] = 0.001
    near = Volume(b.numpy(), b.spacing, moved)
    assert stack([a, near]).shape == (2, 6, 5, 4)
    stretched = Volume.from_array(np.ones((6, 5, 4)), (3.0, 2.0, 1.5))
    assert corner_offset(a, stretched) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least one"):
        stack([])


def test_volumes_check_their_parts() -> None:
    volume = Volume.from_array(np.zeros((4, 5)), (1.0, 2.0))
    assert (volume.shape, volume.dims, volume.spacing) == ((1, 4, 5), 2, (1.0, 2.0))
    assert Volume.from_array(np.zeros((3, 4, 5)), (1.0, 2.0)).shape == (3, 4, 5)
    assert volume.like(np.ones((2, 4, 5), np.float32)).labels is False
    with pytest.raises(ValueError, match=r"array must have 2 or 3 axes, got shape \(4,\)"):
        Volume.from_array(np.zeros(4), (1, 1))
    with pytest.raises(ValueError, match="spacing must be 2 positive numbers"):
        Volume(np.zeros((1, 4, 5)), (1, 0))
    with pytest.raises(ValueError, match="without empty axes"):
        Volume(np.zeros((1, 0, 5)), (1, 1))
    with pytest.raises(ValueError, match="affine must be 4x4"):
        Volume(np.zeros((1, 4, 5)), (1, 1), np.eye(3))
    with pytest.raises(ValueError, match=r"spatial shape \(4, 5\)"):
        volume.like(np.zeros((5, 4)))


def test_suffixes_choose_the_format(tmp_path: Path) -> None:
    assert suffix_of("a.b.NII.GZ") == ".nii.gz"
    assert suffix_of(Path("x/y.nii")) == ".nii"
    with pytest.raises(InputError) as caught:
        suffix_of("scan.niigz")
    assert "did you mean '.nii" in caught.value.fix
    assert all(suffix in caught.value.fix for suffix in FORMATS)
    with pytest.raises(InputError, match="there is no folder"):
        Volume.from_array(np.zeros((2, 2)), (1, 1)).save(tmp_path / "nowhere" / "x.nii")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("densepred.volumes.nifti.open", denied, raising=False)  # root may write anywhere
    with pytest.raises(InputError, match=r"cannot write to this folder \(Permission denied\)") as caught:
        Volume.from_array(scan((2, 2)), (1, 1)).save(tmp_path / "x.nii")
    assert caught.value.file == tmp_path
