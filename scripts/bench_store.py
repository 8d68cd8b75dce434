"""Where preprocessed images are kept: seconds per random patch, bytes on disk and writing speed of several stores.

    python scripts/bench_store.py

Synthetic MR-like volumes (a body in noise, z-scored, then moved to another grid, so that the last bits are full) of 512
x 512 x 300 voxels and of the size of a hippocampus. Compared are a plain .npy read through a memory map, our chunks of
several sizes, the same files read by zarr-python, and blosc2 with nnU-Net's settings, where blosc2 and nnunetv2 can be
imported. All files are in the page cache, as those of a set that fits the memory are; `--cold` drops each from it
before every patch. `--types` also measures what fewer bits would bring. What is written is in `--folder`, and removed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import zarr

from densepred.cases import store
from densepred.cases.store import ArrayWriter, StoredArray

SLAB = 32
Open = Callable[[], Any]


def volume(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 (1, *shape)."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(size=[max(2, size // 16) for size in shape]).astype(np.float32)
    tissue = scipy.ndimage.zoom(coarse, np.divide(shape, coarse.shape), order=1)
    z, y, x = np.ogrid[tuple(slice(-1, 1, complex(size)) for size in shape)]
    signal = np.where(z**2 / 2 + y**2 + x**2 < 0.8, 400 + 150 * tissue, 0).astype(np.float32)
    noise = [generator.standard_normal(shape, np.float32) * 20 for _ in range(2)]
    image = np.rint(np.hypot(signal + noise[0], noise[1]))  # a magnitude: Rician noise
    image = 0.3 * image + 0.7 * np.roll(image, 1, 0)
    return ((image - image.mean()) / image.std())[np.newaxis]


def npy(folder: Path, image: np.ndarray) -> Open:
    """A plain file."""
    path = folder / "image.npy"
    np.save(path, image)
    return lambda: np.load(path, mmap_mode="r")


def ours(edge: int, folder: Path, image: np.ndarray) -> Open:
    """Our chunks, written slab by slab."""
    path, before = folder / "image", store.CHUNK_VOXELS[3]
    store.CHUNK_VOXELS[3] = edge
    with ArrayWriter(path, image.shape, image.dtype, 3) as writer:
        for start in range(0, image.shape[1], SLAB):
            writer.add(image[:, start : start + SLAB])
    store.CHUNK_VOXELS[3] = before
    return lambda: StoredArray(path)


def by_zarr(edge: int, folder: Path, image: np.ndarray) -> Open:
    """The same files, read by zarr-python."""
    ours(edge, folder, image)
    return lambda: zarr.open_array(str(folder / "image"), mode="r")


def zarr_alone(edge: int, folder: Path, image: np.ndarray) -> Open:
    """A file for each chunk, written and read by zarr-python; no checksums."""
    codec = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
    chunks = (len(image), *(min(edge, size) for size in image.shape[1:]))
    array = zarr.create_array(str(folder / "image"), shape=image.shape, chunks=chunks, dtype="f4", compressors=codec)
    array[:] = image
    return lambda: zarr.open_array(str(folder / "image"), mode="r")


def blosc2(patch: int, folder: Path, image: np.ndarray) -> Open:
    """nnU-Net's, whose blocks and chunks go by the patch."""
    import blosc2 as library  # type: ignore[import-not-found]
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params  # type: ignore[import-not-found]

    block, chunk = comp_blosc2_params(image.shape, (patch,) * 3, image.itemsize)
    path, settings = str(folder / "image.b2nd"), {"codec": library.Codec.LZ4HC, "clevel": 5}
    library.set_nthreads(1)
    library.asarray(np.ascontiguousarray(image), urlpath=path, chunks=chunk, blocks=block, cparams=settings)
    return lambda: library.open(urlpath=path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")


def stores(patch: int) -> Iterator[tuple[str, Callable[[Path, np.ndarray], Open]]]:
    """Name -> writes and gives what opens."""
    yield ".npy, memory map", npy
    for edge in (16, 32, 48, 64):
        yield f"ours, chunks of {edge}", lambda folder, image, edge=edge: ours(edge, folder, image)  # type: ignore[misc]
    yield "the same (32) by zarr-python", lambda folder, image: by_zarr(32, folder, image)
    yield "Zarr, a file a chunk of 64", lambda folder, image: zarr_alone(64, folder, image)
    if all(importlib.util.find_spec(name) for name in ("blosc2", "nnunetv2")):
        yield "blosc2, nnU-Net's settings", lambda folder, image: blosc2(patch, folder, image)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def patches(opened: Open, shape: tuple[int, ...], size: int, seeds: range, folder: Path | None) -> list[float]:
    """Seconds for each of some random patches; `folder` is dropped from the page cache before each."""
    seconds = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        corner = [int(generator.integers(max(n - size, 0) + 1)) for n in shape[1:]]
        if folder is not None:
            forget(folder)
        start = time.perf_counter()
        part = opened()[(slice(None), *(slice(a, a + size) for a in corner))]
        np.ascontiguousarray(part).sum()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    name: str, write: Callable[[Path, np.ndarray], Open], image: np.ndarray, sizes: list[int], cold: bool
) -> None:
    """One row: writing, bytes, and milliseconds a patch of each size; patches per second of 1 and 2 threads."""
    with tempfile.TemporaryDirectory(dir=ARGUMENTS.folder) as made:
        folder = Path(made)
        start = time.perf_counter()
        opened = write(folder, image)
        speed = image.nbytes / (time.perf_counter() - start) / 1e6
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cells = []
        for size in sizes:
            count = 20 if size == max(sizes) else 60
            patches(opened, image.shape, size, range(3), None)
            found = patches(opened, image.shape, size, range(count), folder if cold else None)
            with ThreadPoolExecutor(2) as pool:
                start = time.perf_counter()
                parts = [range(at, at + count // 2) for at in (100, 200)]
                jobs = [pool.submit(patches, opened, image.shape, size, part, None) for part in parts]
                done = sum(len(job.result()) for job in jobs) / (time.perf_counter() - start)
            cells.append(f"{size}: {1000 * statistics.median(found):6.1f} ms, 2 threads {done:6.1f}/s")
        wrong = not np.array_equal(np.asarray(opened()[:, :5]), image[:, :5])
    print(
        f"  {name:29s} {used / 1e6:7.1f} MB  write {speed:5.0f} MB/s  {'; '.join(cells)}{' WRONG' * wrong}", flush=True
    )


def main() -> None:
    """Measure each store on each volume."""
    for shape, sizes in ((tuple(ARGUMENTS.shape), [128, 64]), ((36, 50, 35), [32])):
        image = volume(shape)
        types: list[Any] = ["float32", "float16"] if ARGUMENTS.types else ["float32"]
        for kind, (name, write) in itertools.product(types, stores(max(sizes))):
            if kind != "float32" and not name.startswith(("ours", ".npy")):
                continue
            measure(f"{name}{', half' * (kind == 'float16')}", write, image.astype(kind), sizes, ARGUMENTS.cold)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="slowest axis first")
    parser.add_argument("--cold", action="store_true", help="drop each file from the page cache before every patch")
    parser.add_argument("--types", action="store_true", help="also float16")
    parser.add_argument("--folder", help="where to write; by default that of temporary files")
    ARGUMENTS = parser.parse_args()
    main()
