"""Where preprocessed images are kept: seconds per random patch, bytes on disk and writing speed of several stores.

    python scripts/bench_store.py

Synthetic MR-like volumes (a body in noise, z-scored, then moved to another grid, so that the last bits are full) of 512
x 512 x 300 voxels and of the size of a hippocampus. Compared are a plain .npy read through a memory map, our chunks of
several sizes, the same files read by zarr-python, and blosc2 with nnU-Net's settings, where blosc2 and nnunetv2 can be
imported: milliseconds of the processor per patch, and of the clock in brackets, medians. Last, patches per second of
the sampler of training, images with labels, by one thread and by two. All files are in the page cache, as those of a
set that fits the memory are; `--cold` drops each from it before every patch. `--types` also measures what fewer bits
would bring. What is written is in `--folder`, and removed.
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
from densepred.cases.cache import prepare
from densepred.cases.case import Case
from densepred.cases.patches import PatchSampler
from densepred.cases.plan import Plan
from densepred.cases.store import ArrayWriter, StoredArray
from densepred.config.normalize import ZScore

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


def patches(opened: Open, shape: tuple[int, ...], size: int, count: int, folder: Path | None) -> list[list[float]]:
    """Milliseconds of the clock and of the processor for each of some random patches.

    `folder` is dropped from the page cache before each.
    """
    rows = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        corner = [int(generator.integers(max(n - size, 0) + 1)) for n in shape[1:]]
        if folder is not None:
            forget(folder)
        start, worked = time.perf_counter(), time.process_time()
        np.ascontiguousarray(opened()[(slice(None), *(slice(a, a + size) for a in corner))]).sum()
        rows.append([1000 * (time.perf_counter() - start), 1000 * (time.process_time() - worked)])
    return rows


def measure(
    name: str, write: Callable[[Path, np.ndarray], Open], image: np.ndarray, sizes: list[int], cold: bool
) -> None:
    """One row: bytes, MB written per second of the processor, and medians of the processor and of the clock."""
    with tempfile.TemporaryDirectory(dir=ARGUMENTS.folder) as made:
        folder = Path(made)
        worked = time.process_time()
        opened = write(folder, image)
        speed = image.nbytes / (time.process_time() - worked) / 1e6
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cells = []
        for size in sizes:
            patches(opened, image.shape, size, 3, None)
            found = patches(opened, image.shape, size, 30 if size == 128 else 80, folder if cold else None)
            clock, worked = (statistics.median(column) for column in zip(*found, strict=True))
            cells.append(f"{size}: {worked:6.2f} ms ({clock:6.2f})")
        wrong = not np.array_equal(np.asarray(opened()[:, :5]), image[:, :5])
    row = f"  {name:29s} {used / 1e6:7.1f} MB  write {speed:5.0f} MB/s  {'; '.join(cells)}"
    print(f"{row}{' WRONG' * wrong}", flush=True)


def sampling(shape: tuple[int, ...]) -> None:
    """Preparing a case, and patches per second as training draws them."""
    with tempfile.TemporaryDirectory(dir=ARGUMENTS.folder) as made:
        root, image = Path(made), volume(shape)[0]
        label = np.zeros(shape, np.uint8)
        label[scipy.ndimage.uniform_filter(image, 9) > 1] = 1
        np.save(root / "image.npy", np.rint(150 * image + 400).astype(np.int16))
        np.save(root / "label.npy", label)
        del image, label
        plan = Plan(
            dims=3,
            channels=("mr",),
            classes=("background", "bright"),
            values=(0, 1),
            label_map={0: 0, 1: 1},
            normalize=(ZScore(),),
        )
        start, worked = time.perf_counter(), time.process_time()
        case = prepare([Case("a", (root / "image.npy",), root / "label.npy")], plan, root / "cache")[0]
        took = time.perf_counter() - start
        print(f"  preparing the case: {took:.1f} s, of the processor {time.process_time() - worked:.1f} s", flush=True)
        for size in (128, 64):
            sampler = PatchSampler([case], (size,) * 3, 2, 0.5, 0)
            for threads in (1, 2):
                start, worked, count = time.perf_counter(), time.process_time(), 4000 // size
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(sampler.batch, [0] * count, range(count)))
                took, used = time.perf_counter() - start, time.process_time() - worked
                text = f"{2 * count / took:6.1f} patches/s, {500 * used / count:5.1f} ms of the processor each"
                print(f"  sampler, {size}, {threads} threads: {text}", flush=True)


def main() -> None:
    """Measure each store on each volume, and the sampler."""
    for shape, sizes in ((tuple(ARGUMENTS.shape), [128, 64]), ((36, 50, 35), [32])):
        image = volume(shape)
        types: list[Any] = ["float32", "float16"] if ARGUMENTS.types else ["float32"]
        for kind, (name, write) in itertools.product(types, stores(max(sizes))):
            if kind != "float32" and not name.startswith(("ours", ".npy")):
                continue
            measure(f"{name}{', half' * (kind == 'float16')}", write, image.astype(kind), sizes, ARGUMENTS.cold)
    sampling(tuple(ARGUMENTS.shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="slowest axis first")
    parser.add_argument("--cold", action="store_true", help="drop each file from the page cache before every patch")
    parser.add_argument("--types", action="store_true", help="also float16")
    parser.add_argument("--folder", help="where to write; by default that of temporary files")
    ARGUMENTS = parser.parse_args()
    main()
