"""HDF5 and `.npy` read and written; h5py and numpy are the witnesses."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densepred.errors import InputError, ResourceError
from densepred.volumes import Volume, open_volume, open_writer
from densepred.volumes.hdf5 import Hdf5Header

RNG = np.random.default_rng(0)
KINDS = ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"]
SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple)


def scan(shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    return RNG.integers(0, 100, shape).astype(dtype)


def save_h5(path: Path, attrs: dict[str, Any] | None = None, **data: np.ndarray) -> Path:
    with h5py.File(path, "w") as part:
        for name, values in data.items():
            part[name] = values
            part[name].attrs.update(attrs or {})
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*KINDS, "i8", "u8", "f2", "?"]),
    shape=SHAPES,
    channels=st.integers(1, 3),
    big=st.booleans(),
    fortran=st.booleans(),
)
def test_npy_round_trips_with_numpy(
    tmp_path: Path, kind: str, shape: tuple, channels: int, big: bool, fortran: bool
) -> None:
    values = scan((channels, *shape), kind)
    stored = np.asarray(values, values.dtype.newbyteorder(">" if big else "<"), order="F" if fortran else "C")
    np.save(tmp_path / "in.npy", stored)
    volume = open_volume(tmp_path / "in.npy", "c" + "zyx"[-len(shape) :])
    np.testing.assert_array_equal(volume.numpy(), values)
    assert volume.dtype == ("u1" if kind == "?" else kind)
    volume.save(tmp_path / "out.npy")
    written = np.load(tmp_path / "out.npy", allow_pickle=False)
    np.testing.assert_array_equal(written, values if channels > 1 else values[0])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), shape=SHAPES, channels=st.integers(1, 3), labels=st.booleans())
def test_hdf5_round_trips_with_h5py(tmp_path: Path, kind: str, shape: tuple, channels: int, labels: bool) -> None:
    values = scan((channels, *shape), kind)
    labels = labels and kind[0] in "iu"
    spacing = (0.3, 0.2, 0.1)[-len(shape) :]
    source = Volume(values, spacing, header=Hdf5Header("raw", "um"), labels=labels)
    source.save(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        data = file["label" if labels else "raw"]
        np.testing.assert_array_equal(data[()], values if channels > 1 else values[0])
        np.testing.assert_array_equal(data.attrs["element_size_um"], spacing)
        assert data.compression == "gzip"
        assert data.fletcher32
        assert labels or data.dtype == kind
    with open_volume(tmp_path / "x.h5") as volume:
        np.testing.assert_array_equal(volume.numpy(), values)
        assert (volume.spacing, volume.labels, volume.header.unit) == (spacing, labels, "um")


def test_the_real_file_and_its_way_through(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "cells" / "1135_mini.h5"
    with pytest.raises(InputError, match=r"\[label\] \(100, 100, 100\) uint8; \[raw\] \(100, 100, 100\)") as caught:
        open_volume(source)
    assert "1135_mini.h5[label]" in caught.value.fix
    with pytest.raises(InputError, match=r"has no dataset \[mask\], but \[label\]"):
        open_volume(f"{source}[mask]")
    with open_volume(f"{source}[raw]") as raw, h5py.File(source) as theirs:
        np.testing.assert_array_equal(raw.numpy()[0], theirs["raw"][()])
        np.testing.assert_array_equal(raw[0, 3:9, 50, ::-2], theirs["raw"][3:9, 50, :][:, ::-2])
        assert raw.spacing == tuple(theirs["raw"].attrs["element_size_um"])
        raw.save(tmp_path / "copy.h5")
    with open_volume(tmp_path / "copy.h5") as copy:
        assert copy.spacing == raw.spacing
        assert copy.labels is False


def test_slabs_of_any_thickness_make_the_same_file(tmp_path: Path) -> None:
    values = scan((2, 70, 20, 30), "u2")
    like = Volume(values, (1, 1, 1))
    for suffix, axes in ((".h5", None), (".npy", "czyx")):
        for thickness in (1, 7, 70):
            with open_writer(tmp_path / f"x{suffix}", like, values.dtype, 2) as writer:
                for start in range(0, 70, thickness):
                    writer.write(values[:, start : start + thickness])
            with open_volume(tmp_path / f"x{suffix}", axes) as volume:
                np.testing.assert_array_equal(volume.numpy(), values)
                for start, stop, slab in volume.slabs(9):
                    np.testing.assert_array_equal(slab, values[:, start:stop])


def test_hdf5_tells_what_its_axes_hold(tmp_path: Path) -> None:
    values = scan((4, 5, 6, 2))
    tags = json.dumps({"axes": [{"key": key} for key in "zyxc"]})
    with open_volume(save_h5(tmp_path / "a.h5", {"axistags": tags}, exported_data=values)) as volume:
        np.testing.assert_array_equal(volume.numpy(), np.moveaxis(values, -1, 0))
    tags = json.dumps({"axes": [{"key": key} for key in "tzyx"]})
    with pytest.raises(InputError, match="holds 4 times"):
        open_volume(save_h5(tmp_path / "t.h5", {"axistags": tags}, exported_data=values))
    plain = save_h5(tmp_path / "b.h5", raw=values)
    with pytest.raises(InputError, match=r"4 axes \(4, 5, 6, 2\): what lies along them is not declared"):
        open_volume(plain)
    with open_volume(plain, "zyxc") as volume:
        assert volume.shape == (2, 4, 5, 6)
    with pytest.raises(InputError, match="name a time axis"):
        open_volume(plain, "tzyx")
    with pytest.raises(InputError, match="axes 'zyx' were declared and the file has 4"):
        open_volume(plain, "zyx")
    with pytest.raises(InputError, match="axes 'xyz' are not known"):
        open_volume(plain, "xyz")


def test_an_axis_that_may_hold_colours_is_asked_about(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", scan((32, 32, 3)))
    with pytest.raises(InputError, match="the axis of 3 may hold channels") as caught:
        open_volume(tmp_path / "x.npy")
    assert "`axes: yxc` or `axes: zyx`" in caught.value.fix
    assert open_volume(tmp_path / "x.npy", "yxc").shape == (3, 32, 32)
    assert open_volume(tmp_path / "x.npy", "zyx").shape == (1, 32, 32, 3)
    np.save(tmp_path / "x.npy", scan((1, 1, 7, 8, 9)))
    assert open_volume(tmp_path / "x.npy").shape == (1, 7, 8, 9)
    np.save(tmp_path / "x.npy", scan((7,)))
    with pytest.raises(InputError, match="one axis only"):
        open_volume(tmp_path / "x.npy")


def test_voxel_sizes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for sizes in ([0.0, 1, 1], [1.0, np.nan, 1], [1.0, 2]):
        path = save_h5(tmp_path / "x.h5", {"element_size_um": sizes}, raw=scan((4, 5, 6)))
        with pytest.raises(InputError, match="impossible voxel size of '/raw': element_size_um"):
            open_volume(path)
    with open_volume(save_h5(tmp_path / "x.h5", {"element_size_um": [3.0, 2, 1]}, raw=scan((5, 6)))) as volume:
        assert volume.spacing == (2, 1)
    Volume.from_array(scan((5, 6)), (2, 1)).save(tmp_path / "y.h5")
    with h5py.File(tmp_path / "y.h5") as file:
        assert dict(file["raw"].attrs).keys().isdisjoint({"element_size_um"})  # no unit is known
    with open_volume(tmp_path / "y.h5") as volume:
        assert (volume.spacing, volume.header.unit) == ((2, 1), None)


def test_damaged_npy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, scan((20, 30)))
    sound = path.read_bytes()
    for size, words in ((0, "empty"), (4, "no .npy file"), (20, "header of this .npy"), (400, r"holds 400 of 728")):
        path.write_bytes(sound[:size])
        with pytest.raises(InputError, match=words):
            open_volume(path)
    path.write_text("<html>log in</html>")
    with pytest.raises(InputError, match=r"no \.npy file: starts with '<html>log in"):
        open_volume(path)
    path.write_bytes(sound + b"more")
    with pytest.warns(UserWarning, match="4 bytes behind its array"):
        open_volume(path)
    np.save(path, np.array([{"a": 1}, None], object).reshape(1, 2))
    with pytest.raises(InputError, match="Python objects, which are never loaded"):
        open_volume(path)
    np.save(path, scan((3, 4), "c8"))
    with pytest.raises(InputError, match="voxels of type complex64"):
        open_volume(path)
    np.save(path, np.zeros((0, 4)))
    with pytest.raises(InputError, match="impossible sizes"):
        open_volume(path)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": (32000,) * 3, "fortran_order": False, "descr": "<f8"})
    path.write_bytes(head.getvalue())
    with pytest.raises(InputError, match="holds 128 of 262144000000128 bytes"):
        open_volume(path)


def test_damaged_hdf5_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    values = scan((40, 50, 60))
    Volume.from_array(values, (1, 1, 1)).save(path)
    sound = path.read_bytes()
    for size in (0, 4, 100, 3000, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(InputError) as caught:
            open_volume(path).numpy()
        assert caught.value.file == path
    assert f"holds {size} of {len(sound)} bytes" in caught.value.what
    path.write_text("<html>log in</html>")
    with pytest.raises(InputError, match="no HDF5 file: starts with '<html>log in"):
        open_volume(path)
    refused = 0
    for at in RNG.integers(len(sound) // 4, 3 * len(sound) // 4, 20):  # within the chunks
        torn = bytearray(sound)
        torn[at] ^= 16
        path.write_bytes(torn)
        try:
            with open_volume(path) as volume:
                got = volume.numpy()
        except InputError as error:
            refused += "cannot be read" in error.what
        else:
            np.testing.assert_array_equal(got[0], values)
    assert refused >= 18
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        open_volume(path)


def test_chunks_that_were_never_written_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as part:
        part.create_dataset("raw", (8, 8), "u1", chunks=(4, 4))
    with pytest.raises(InputError, match="'/raw' was declared and never written"):
        open_volume(path)
    with h5py.File(path, "a") as part:
        part["raw"][:4] = 1
    with pytest.warns(UserWarning, match="2 of 4 chunks of '/raw' were never written and read as 0"):
        open_volume(path)


def test_hdf5_without_an_image_of_its_own(tmp_path: Path) -> None:
    path = save_h5(tmp_path / "x.h5", names=np.array([b"a", b"b"]), curve=np.arange(4.0))
    with pytest.raises(InputError, match="holds no dataset of at least two axes"):
        open_volume(path)
    with pytest.raises(InputError, match="'/curve' is no image"):
        open_volume(f"{path}[curve]")
    layout = h5py.VirtualLayout((2, 4), "f8")
    layout[0] = h5py.VirtualSource(path, "curve", (4,))
    with h5py.File(tmp_path / "v.h5", "w") as part:
        part.create_virtual_dataset("raw", layout)
    with pytest.raises(InputError, match="keeps its values in other files"):
        open_volume(tmp_path / "v.h5")
    with h5py.File(tmp_path / "l.h5", "w") as part:
        part["raw"] = h5py.ExternalLink(path.name, "/curve")
    with pytest.raises(InputError, match="keeps its values in other files"):
        open_volume(f"{tmp_path / 'l.h5'}[raw]")


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".tif", ".png"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"x{suffix}"
    like = Volume(scan((1, 6, 7)), (1, 1))
    like.save(path)
    before = path.read_bytes()

    def broken(slabs: list[np.ndarray], stop: Exception | None = None) -> None:
        with open_writer(path, like, np.uint8, labels=True) as writer:
            for slab in slabs:
                writer.write(slab)
            if stop is not None:
                raise stop

    def rot(part: Path) -> None:
        """Leave a sound file with other values, as a disk might."""
        if part.suffix == suffix and part.exists() and ".part." in part.name:
            shutil.copy(other_file, part)

    other_file = tmp_path.parent / f"{tmp_path.name}_other{suffix}"
    Volume(scan((1, 6, 7)), (1, 1)).save(other_file)
    rows = np.ones((1, 3, 7), np.uint8)
    with pytest.raises(KeyError):
        broken([rows], KeyError("x"))
    with pytest.raises(ValueError, match="all 6 planes must be written, got 3"):
        broken([rows])
    with pytest.raises(ValueError, match="slab must have the shape"):
        broken([rows, rows, rows])
    with pytest.raises((ValueError, InputError), match="values"):
        broken([rows.astype(int) + 300])
    with pytest.raises(ValueError, match="values must fit uint8"):
        broken([rows + np.float32(0.5)])
    monkeypatch.setattr("densepred.files.sync", rot)
    with pytest.raises(ResourceError, match="does not read back"):
        broken([rows, rows])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".tif", ".png"])
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("densepred.volumes.arrays.open", denied, raising=False)  # root may write anywhere
    with pytest.raises(InputError, match=r"cannot write to this folder \(Permission denied\)"):
        Volume.from_array(scan((4, 5)), (1, 1)).save(tmp_path / f"x{suffix}")


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        for suffix in (".h5", ".npy", ".tif", ".png", ".bmp"):
            Volume.from_array(scan((4, 5)), (1, 1)).save(tmp_path / f"x{suffix}")
            with open_volume(tmp_path / f"x{suffix}") as volume:
                assert volume.numpy().shape == (1, 4, 5)
