"""Chunked arrays on disk: the bits that were written, for us and for any Zarr library; damage is found."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.cases import store
from densepred.cases.store import ArrayWriter, StoredArray, chunk_shape
from densepred.errors import InputError


def stored(folder: Path, array: np.ndarray, dims: int, planes: int = 7) -> StoredArray:
    axis = array.ndim - dims
    with ArrayWriter(folder, array.shape, array.dtype, dims) as writer:
        for start in range(0, array.shape[axis], planes):
            writer.add(array[(*(slice(None),) * axis, slice(start, start + planes))])
    return StoredArray(folder)


def drawn(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Any bits, so also NaN with a payload, infinities and -0.0."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(0).bytes(size), dtype).reshape(shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int16"])
@pytest.mark.parametrize(
    ("shape", "dims"), [((2, 70, 65, 97), 3), ((100, 70, 67), 3), ((3, 700, 513), 2), ((1, 1, 1, 1), 3), ((5, 4), 2)]
)
def test_every_bit_is_kept_and_zarr_reads_the_same(
    tmp_path: Path, shape: tuple[int, ...], dims: int, dtype: str
) -> None:
    array = drawn(shape, dtype)
    found = stored(tmp_path / "a", array, dims)
    assert (found.shape, found.dtype, found.nbytes, len(found)) == (shape, array.dtype, array.nbytes, shape[0])
    assert np.asarray(found).tobytes() == array.tobytes()
    other = zarr.open_array(str(tmp_path / "a"), mode="r")[...]
    assert isinstance(other, np.ndarray)
    assert (other.tobytes(), other.dtype) == (array.tobytes(), array.dtype)


KEYS = st.integers(-39, 38) | st.builds(
    slice, st.integers(-45, 45) | st.none(), st.integers(-45, 45) | st.none(), st.sampled_from([None, 1, 2, -1])
)


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, StoredArray]:
    """An array, and the same in chunks of 11."""
    array, patch = drawn((2, 39, 39, 39), "int16"), pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(store, "SMALL", 0)
        patched.setattr(store, "CHUNK_VOXELS", {3: 11})
        return array, stored(tmp_path_factory.mktemp("cubes") / "a", array, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(KEYS, max_size=3), st.booleans())
def test_it_is_indexed_as_an_array(cubes: tuple[np.ndarray, StoredArray], keys: list[int | slice], dots: bool) -> None:
    array, found = cubes
    key = (slice(None), *keys, *([...] if dots else []))
    assert found[key].shape == array[key].shape
    assert np.array_equal(found[key], array[key])


def test_threads_read_the_same_array(cubes: tuple[np.ndarray, StoredArray]) -> None:
    array, found = cubes
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda z: found[:, z : z + 9, 5:30], range(30)))
    assert all(np.array_equal(part, array[:, z : z + 9, 5:30]) for z, part in enumerate(parts))


def test_blocks_are_the_chunks_in_order(cubes: tuple[np.ndarray, StoredArray]) -> None:
    array, found = cubes
    assert (found.chunk, found.grid) == ((2, 11, 11, 11), (1, 4, 4, 4))
    assert np.array_equal(found.block(7), array[:, 0:11, 11:22, 33:39])
    assert found.corner(7) == (0, 0, 11, 33)
    assert sum(found.block(number).size for number in range(64)) == array.size


@pytest.mark.parametrize("planes", [1, 5, 32, 33, 70])
def test_the_bytes_do_not_depend_on_how_many_planes_come_at_a_time(tmp_path: Path, planes: int) -> None:
    array = np.round(np.random.default_rng(0).normal(size=(1, 70, 80, 81)), 1).astype(np.float32)
    files = [stored(tmp_path / name, array, 3, n).folder for name, n in (("a", 9), ("b", planes))]
    first, second = ([path.read_bytes() for path in sorted(f.rglob("*")) if path.is_file()] for f in files)
    assert first == second


def test_nothing_is_stored_for_zeros_but_minus_zero_is_kept(tmp_path: Path) -> None:
    array = np.zeros((1, 96, 96, 96), np.float32)
    found = stored(tmp_path / "a", array, 3)
    assert sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file()) < 3000
    array[0, 50, 50, 50] = -0.0
    assert np.signbit(np.asarray(stored(tmp_path / "b", array, 3))).sum() == 1


def test_small_images_are_one_chunk() -> None:
    assert chunk_shape((2, 36, 50, 35), 3) == (2, 36, 50, 35)
    assert chunk_shape((1, 300, 512, 20), 3) == (1, 32, 32, 20)
    assert chunk_shape((512, 512), 2) == (512, 512)
    assert chunk_shape((4, 3000, 90), 2) == (4, 128, 90)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    array = np.round(np.random.default_rng(0).normal(size=(1, 40, 90, 91)), 1).astype(np.float32)
    calls: list[int] = []
    folder = stored(tmp_path / "a", array, 3).folder
    file = folder / "c" / "0" / "0" / "0" / "0"
    good = file.read_bytes()
    places = np.random.default_rng(1).integers(0, len(good) * 8, 200).tolist()
    for place in [*places, len(good) * 8 - 1]:
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(InputError, match=r"ERROR c7: .*the cache is damaged: "):
            np.asarray(StoredArray(folder, lambda: calls.append(1), "c7"))
    assert len(calls) == 201
    for torn in (good[:-1], good[:100], b""):
        file.write_bytes(torn)
        with pytest.raises(InputError, match="checksum"):
            np.asarray(StoredArray(folder))
    file.unlink()
    with pytest.raises(InputError, match=r"cannot be opened \(No such file"):
        np.asarray(StoredArray(folder))


def test_what_is_unfinished_is_no_array(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="8 planes must be written, got 3"),
        ArrayWriter(tmp_path / "a", (1, 8, 9), np.dtype("f4"), 2) as writer,
    ):
        writer.add(np.ones((1, 3, 9), np.float32))
    with pytest.raises(InputError, match="the metadata are no such array's"):
        StoredArray(tmp_path / "a")
