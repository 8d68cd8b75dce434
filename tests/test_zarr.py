"""Zarr and OME-Zarr; zarr itself is the witness for what a store holds."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densepred import files
from densepred.errors import DensepredError, InputError, UnsafeError
from densepred.files import atomic_folder
from densepred.volumes import Volume, open_volume, open_writer
from densepred.volumes.volume import corner_offset
from densepred.volumes.zarr_ome import transform
from densepred.volumes.zarr_store import _refuse_code
from densepred.volumes.zarr_write import sharding
from tests.nifti_files import save_nib, scan

SPACE = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
TIME, CHANNEL = {"name": "t", "type": "time"}, {"name": "c", "type": "channel"}


def ome_store(path: Path, levels: list[np.ndarray], axes: list[dict], scales: list[list], version: str = "0.5") -> Path:
    """An image as the specification describes it, written with zarr alone; 0.4 stands for Zarr v2."""
    modern = version == "0.5"
    group = zarr.open_group(str(path), mode="w", zarr_format=3 if modern else 2)
    datasets = []
    for number, (values, scale) in enumerate(zip(levels, scales, strict=True)):
        chunks = tuple(max(1, size // 2) for size in values.shape)
        array = group.create_array(f"s{number}", shape=values.shape, dtype=values.dtype, chunks=chunks)
        array[...] = values
        datasets.append({"path": f"s{number}", "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    image: dict[str, Any] = {"axes": axes, "datasets": datasets, "version": version}
    group.attrs.update({"ome": {"version": version, "multiscales": [image]}} if modern else {"multiscales": [image]})
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_images_are_read_at_each_resolution(tmp_path: Path, version: str) -> None:
    fine = np.arange(2 * 4 * 6 * 8, dtype=">u2" if version == "0.4" else "u2").reshape(1, 2, 4, 6, 8)
    coarse = fine[..., ::2, ::2]
    scales = [[1, 1, 2.0, 0.5, 0.25], [1, 1, 2.0, 1.0, 0.5]]
    path = ome_store(tmp_path / "x.ome.zarr", [fine, coarse], [TIME, CHANNEL, *SPACE], scales, version)
    for part, values, spacing in (
        ("", fine, (2, 0.5, 0.25)),
        ("[0]", fine, (2, 0.5, 0.25)),
        ("[1]", coarse, (2, 1, 0.5)),
    ):
        volume = open_volume(f"{path}{part}")
        np.testing.assert_array_equal(volume.numpy(), values[0])
        np.testing.assert_array_equal(volume[1, 1:3, ::-2], values[0, 1, 1:3, ::-2])
        assert (volume.spacing, volume.header.unit, volume.labels) == (spacing, "um", False)
        assert volume.dtype == np.uint16
        assert volume.affine is None
    assert open_volume(f"{path}[s1]").spacing == (2, 1, 0.5)
    with pytest.raises(InputError, match=r"no resolution \[2\]: the image has 2"):
        open_volume(f"{path}[2]")
    with pytest.raises(InputError, match="there is no 'labels/x' in it, but s0, s1"):
        open_volume(f"{path}[labels/x]")


def test_times_must_be_declared_and_axes_of_one_return(tmp_path: Path) -> None:
    values = np.arange(3 * 4 * 5 * 6, dtype="f4").reshape(3, 1, 4, 5, 6)
    path = ome_store(tmp_path / "x.zarr", [values], [TIME, CHANNEL, *SPACE], [[1] * 5])
    with pytest.raises(InputError, match="'t' of 3 is neither space nor channel") as caught:
        open_volume(path)
    assert "`axes: czyx`" in caught.value.fix
    np.testing.assert_array_equal(open_volume(path, "czyx").numpy(), values[:, 0])
    single = ome_store(tmp_path / "y.zarr", [values[:1]], [TIME, CHANNEL, *SPACE], [[1] * 5])
    open_volume(single).like(np.ones((4, 5, 6), np.uint8)).save(tmp_path / "out.zarr")
    written = zarr.open(str(tmp_path / "out.zarr"), mode="r")
    assert written["0"].shape == (1, 1, 4, 5, 6)
    assert written["0"].metadata.dimension_names == ("t", "c", "z", "y", "x")
    with pytest.raises(InputError, match="describe the axes 'cz'"):
        open_volume(ome_store(tmp_path / "z.zarr", [values[0, 0]], [CHANNEL, SPACE[0]], [[1] * 3]))


def test_transformations_compose_as_the_specification_says() -> None:
    steps = [{"type": "scale", "scale": [2, 3]}, {"type": "translation", "translation": [10, 20]}]
    multi = {
        "datasets": [{"path": "0", "coordinateTransformations": steps}],
        "coordinateTransformations": [{"type": "scale", "scale": [0.5, 0.1]}],
    }
    scale, shift = transform(multi, 0, 2, Path("x"))
    np.testing.assert_allclose([scale, shift], [[1, 0.3], [5, 2]])
    for bad in ([0, 1], [1, -1], [1, float("nan")], [1]):
        steps[0]["scale"] = bad
        with pytest.raises(InputError, match=r"impossible scale|not known for 2 axes"):
            transform(multi, 0, 2, Path("x"))


def test_translations_are_positions(tmp_path: Path) -> None:
    path = ome_store(tmp_path / "x.zarr", [np.ones((4, 5, 6), "u1")], SPACE, [[2, 1, 0.5]])
    head = json.loads((path / "zarr.json").read_text())
    steps = head["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    steps.append({"type": "translation", "translation": [30, 20, 10]})
    (path / "zarr.json").write_text(json.dumps(head))
    affine = open_volume(path).affine
    assert affine is not None
    np.testing.assert_array_equal(affine, [[0.5, 0, 0, 10], [0, 1, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_plain_arrays_and_groups(tmp_path: Path, zarr_format: Any) -> None:
    values = np.random.default_rng(0).normal(size=(7, 20, 30)).astype("f4")
    array = zarr.create_array(str(tmp_path / "x.zarr"), shape=values.shape, dtype="f4", chunks=(2, 7, 9),
                              zarr_format=zarr_format, fill_value=np.nan)  # fmt: skip
    array[:4] = values[:4]
    volume = open_volume(tmp_path / "x.zarr")
    np.testing.assert_array_equal(volume[:, 1:4], values[np.newaxis, 1:4])
    assert np.isnan(volume.numpy()[:, 4:]).all()  # a store of others: chunks that are not there have the fill value
    assert open_volume(tmp_path / "x.zarr", "cyx").shape == (7, 20, 30)
    with pytest.raises(InputError, match="one array, without a part"):
        open_volume(tmp_path / "x.zarr[0]")
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w", zarr_format=zarr_format)
    for name in ("raw", "sub/mask"):
        group.create_array(name, shape=(4, 5), dtype="i2")[...] = 3
    with pytest.raises(InputError, match=r"several arrays: \[raw\] \(4, 5\) int16; \[sub/mask\] \(4, 5\)") as caught:
        open_volume(tmp_path / "g.zarr")
    assert caught.value.fix == "add one: g.zarr[raw]"
    assert open_volume(tmp_path / "g.zarr[sub/mask]").shape == (1, 4, 5)
    assert open_volume(tmp_path / "g.zarr[sub]").shape == (1, 4, 5)
    shutil.copytree(tmp_path / "x.zarr", tmp_path / "unnamed")
    assert open_volume(tmp_path / "unnamed").shape == (1, 7, 20, 30)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["u1", "i1", "u2", ">i2", "i4", "u4", "f4", "f8"]),
    channels=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
    numbers=st.lists(st.floats(-3, 3, width=32), min_size=12, max_size=12),
    oriented=st.booleans(),
    thickness=st.integers(1, 9),
)
def test_what_is_written_reads_back_and_zarr_reads_it(
    tmp_path: Path, kind: str, channels: int, spatial: tuple, numbers: list, oriented: bool, thickness: int
) -> None:
    values = np.random.default_rng(0).integers(0, 120, (channels, *spatial)).astype(kind)
    affine = np.eye(4)
    affine[:3] = np.eye(3, 4) * 4 + np.reshape(numbers, (3, 4)) * [0.3, 0.3, 0.3, 50]
    spacing = np.linalg.norm(affine[:3, : len(spatial)], axis=0)[::-1].tolist()
    like = Volume(values, spacing, affine if oriented else None)
    path = tmp_path / "x.zarr"
    with open_writer(path, like, values.dtype, channels) as writer:
        for start in range(0, spatial[0], thickness):
            writer.write(values[:, start : start + thickness])
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.numpy(), values)
    assert volume.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-15)
    if oriented:
        np.testing.assert_array_equal(volume.affine, affine)
    else:
        assert volume.affine is None
    array = zarr.open(str(path), mode="r")["0"]
    np.testing.assert_array_equal(array[...], values if channels > 1 else values[0])
    assert array.shards is not None


def test_the_metadata_are_those_of_ome_zarr_05(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "x.nii", scan((7, 6, 5), "u1"))
    open_volume(path).like(np.ones((5, 6, 7), np.uint8)).save(tmp_path / "x.zarr")
    head = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())
    assert (head["zarr_format"], head["node_type"]) == (3, "group")
    ome = head["attributes"]["ome"]
    assert ome["version"] == "0.5"
    assert "image-label" in ome
    steps = [{"type": "scale", "scale": [3.0, 2.0, 1.0]}]
    assert ome["multiscales"][0]["datasets"] == [{"path": "0", "coordinateTransformations": steps}]
    assert [axis["name"] for axis in ome["multiscales"][0]["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in ome["multiscales"][0]["axes"]} == {"millimeter"}
    assert open_volume(tmp_path / "x.zarr").labels


def test_labels_go_into_an_image(tmp_path: Path) -> None:
    image = Volume(scan((2, 5, 6, 7)), (3, 2, 1), np.diag([1.0, 2, 3, 1]))
    image.save(tmp_path / "x.zarr")
    image = open_volume(tmp_path / "x.zarr")
    mask = np.arange(210, dtype="i4").reshape(1, 5, 6, 7)
    for name in ("cells", "nuclei", "cells"):
        with open_writer(f"{tmp_path}/x.zarr[labels/{name}]", image, np.int32, labels=True) as writer:
            writer.write(mask)
    back = open_volume(f"{tmp_path}/x.zarr[labels/cells]")
    np.testing.assert_array_equal(back.numpy(), mask)
    assert back.labels
    assert corner_offset(image, back) == 0
    root = zarr.open(str(tmp_path / "x.zarr"), mode="r")
    assert root["labels"].attrs["ome"]["labels"] == ["cells", "nuclei"]
    assert root["labels/cells"].attrs["ome"]["image-label"]["source"] == {"image": "../../"}

    def scale(group: Any) -> Any:
        return group.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]

    assert scale(root)[-3:] == scale(root["labels/cells"])[-3:]
    np.testing.assert_array_equal(image.numpy(), open_volume(tmp_path / "x.zarr").numpy())
    for target, labels in (("x.zarr[other/a]", True), ("x.zarr[labels/a]", False), ("x.zarr[labels/a/b]", True)):
        with (
            pytest.raises(InputError, match="cannot write"),
            open_writer(f"{tmp_path}/{target}", image, "u1", 1, labels),
        ):
            pass
    zarr.create_array(str(tmp_path / "v2.zarr"), shape=(5, 6, 7), dtype="u1", zarr_format=2)
    with (
        pytest.raises(InputError, match=r"no OME-Zarr 0\.5 image"),
        open_writer(f"{tmp_path}/v2.zarr[labels/a]", image, "u1", 1, True),
    ):
        pass


def test_a_store_of_ours_with_holes_is_no_background(tmp_path: Path) -> None:
    values = np.ones((1, 200, 70, 70), np.uint8)
    Volume(values, (1, 1, 1)).save(tmp_path / "x.zarr")
    shards = sorted(path for path in (tmp_path / "x.zarr/0/c").rglob("*") if path.is_file())
    assert len(shards) == 4
    shards[2].unlink()
    assert (zarr.open(str(tmp_path / "x.zarr"), mode="r")["0"][128:192] == 0).all()  # what zarr itself says
    volume = open_volume(tmp_path / "x.zarr")
    assert (volume[:, :128] == 1).all()
    with pytest.raises(InputError, match=r"shard c/2/0/0 is missing"):
        volume[:, 120:130]
    with pytest.raises(InputError, match="is missing"):
        volume.verify()
    head = json.loads((tmp_path / "x.zarr/0/zarr.json").read_text())
    head["attributes"]["densepred"]["done"] = "d0"
    (tmp_path / "x.zarr/0/zarr.json").write_text(json.dumps(head))
    with pytest.raises(InputError, match="unfinished: 3 of its 4 shards were written"):
        open_volume(tmp_path / "x.zarr")
    with pytest.raises(InputError, match="the store was replaced"):
        volume[:, :3]


def test_no_flipped_bit_and_no_cut_passes_as_data(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (1, 8, 20, 20)).astype("u1")
    Volume(values, (1, 1, 1)).save(tmp_path / "x.zarr")
    (shard,) = (path for path in (tmp_path / "x.zarr/0/c").rglob("*") if path.is_file())
    sound, refused = shard.read_bytes(), 0
    for bit in np.random.default_rng(1).integers(0, 8 * len(sound), 150):
        torn = bytearray(sound)
        torn[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(torn)
        try:
            np.testing.assert_array_equal(open_volume(tmp_path / "x.zarr").numpy(), values)  # a bit without meaning
        except InputError as error:
            refused += "is damaged" in error.what
    assert refused > 140
    for length in (0, 10, len(sound) - 1):
        shard.write_bytes(sound[:length])
        with pytest.raises(InputError, match="is damaged"):
            open_volume(tmp_path / "x.zarr").numpy()


class Payload:
    """What a hostile file would bring along."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("filters", "compressor"),
    [([{"id": "pickle"}], None), ([{"id": "delta", "dtype": "<i4"}, {"id": "pickle"}], None), (None, {"id": "pickle"})],
)
def test_chunks_that_would_run_code_are_refused(tmp_path: Path, filters: Any, compressor: Any) -> None:
    head = {"zarr_format": 2, "shape": [4, 4], "chunks": [4, 4], "dtype": "<i4", "fill_value": 0, "order": "C"}
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / ".zarray").write_text(json.dumps(head | {"compressor": compressor, "filters": filters}))
    (tmp_path / "x.zarr" / "0.0").write_bytes(pickle.dumps(Payload(tmp_path / "harm")))
    with pytest.raises(DensepredError, match="pickle"):
        open_volume(tmp_path / "x.zarr").numpy()
    assert not (tmp_path / "harm").exists()
    array = zarr.create_array({}, shape=(4,), dtype="i4", zarr_format=2, filters=[numcodecs.Pickle()])
    with pytest.raises(UnsafeError, match="pickled"):  # for versions of zarr that would open it
        _refuse_code(array, tmp_path)


def test_what_is_no_image_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.zarr").write_bytes(b"x")
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "odd.zarr").mkdir()
    (tmp_path / "odd.zarr" / "zarr.json").write_text("<html>")
    zarr.open_group(str(tmp_path / "none.zarr"), mode="w")
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(3, 3), dtype="c8")
    zarr.create_array(str(tmp_path / "one.zarr"), shape=(3,), dtype="f4")
    zarr.create_array(str(tmp_path / "five.zarr"), shape=(2, 2, 2, 3, 3), dtype="f4")
    for name, words in (
        ("file", "is a file, not a folder"), ("empty", "has none of zarr.json"), ("odd", "metadata cannot be read"),
        ("none", "has no array"), ("c", "complex64 are not supported"), ("one", "one axis only"), ("five", "5 axes"),
        ("absent", "no such file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            open_volume(tmp_path / f"{name}.zarr")
        assert caught.value.fix


def test_a_huge_declared_array_costs_nothing_to_open(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "x.zarr"), shape=(32000, 32000, 32000), dtype="f8", chunks=(64, 64, 64))
    tracemalloc.start()
    volume = open_volume(tmp_path / "x.zarr")
    assert volume[:, 5, :9, :9].shape == (1, 9, 9)
    with pytest.raises(Exception, match="this machine has"):
        volume.numpy()
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_memory_of_writing_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (2048, 4096):
        like = Volume(np.zeros((1, 1, 1, 1), np.uint8), (1, 1, 1))
        like.array = np.broadcast_to(np.uint8(1), (1, depth, 128, 128))
        tracemalloc.start()
        like.save(tmp_path / f"{depth}.zarr")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert sharding(3, (4096, 4096, 4096), 4)[1][0] == 1


def test_only_a_store_is_replaced(tmp_path: Path) -> None:
    volume = Volume(np.ones((1, 4, 4), np.uint8), (1, 1))
    (tmp_path / "photos.zarr").mkdir()
    (tmp_path / "photos.zarr" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(UnsafeError, match="no Zarr store"):
        volume.save(tmp_path / "photos.zarr")
    with (
        pytest.raises(ValueError, match="all 4 planes must be written, got 2"),
        open_writer(tmp_path / "y.zarr", volume, np.uint8) as writer,
    ):
        writer.write(np.ones((1, 2, 4), np.uint8))
    assert os.listdir(tmp_path) == ["photos.zarr"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_folders_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "x") as part:
            (part / "file").write_text(content)
        assert (tmp_path / "x" / "file").read_text() == content
        assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(KeyError), atomic_folder(tmp_path / "x") as part:
        raise KeyError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x", lambda part: (_ for _ in ()).throw(RuntimeError)):
        pass
    assert (tmp_path / "x" / "file").read_text() == "new"
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "plain").write_text("")
    for name in ("link", "plain"):
        with pytest.raises(UnsafeError, match="the output is a"), atomic_folder(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["link", "plain", "x"]
