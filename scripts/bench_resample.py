"""Resampling a volume to a model's spacing and logits back, against nnU-Net's way, in time, memory and values.

    python scripts/bench_resample.py

0.7 x 0.7 x 1.5 mm to 1 mm isotropic, 512 x 512 x 300 voxels, and three classes of logits back. nnU-Net resizes each
channel with `skimage.transform.resize`, splines of order 3 for images and 1 for logits. Without nnunetv2 the function
that does the work in there, `scipy.ndimage.zoom`, is called. Ours are linear (the default), and nnU-Net's own filters
(`data.resampling: nnunet`), whose values are the same as its. Each run has a process of its own, reads its
input from a file, and its memory is the peak beyond what the interpreter and its libraries take. On a busy machine
the time of the processor tells more than that of the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch

from densepred.cases.regrid import Kernel, Regrid
from densepred.cases.resample import resample, resampled_shape
from densepred.inference.resample import Resampled, resample_slabs

SPACING, OWN, CLASSES = (1.5, 0.7, 0.7), (1.0, 1.0, 1.0), 3
SLAB = 32  # planes that come from the network, or go to it, at a time
Shape = tuple[int, ...]


class Planes:
    """Float32 planes `[:, z0:z1]` of a raw file, without a memory map, whose pages would count as memory."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape = path, shape

    def __getitem__(self, key: Any) -> np.ndarray:
        start, stop, _ = key[1].indices(self.shape[1])
        out = np.empty((self.shape[0], stop - start, *self.shape[2:]), np.float32)
        plane, depth = 4 * math.prod(self.shape[2:]), self.shape[1]
        with self.path.open("rb") as file:
            for channel, planes in enumerate(out):
                file.seek(plane * (channel * depth + start))
                file.readinto(memoryview(planes).cast("B"))
        return out


def peer(image: np.ndarray, shape: Shape, order: int) -> np.ndarray:
    """nnU-Net's resampler; without nnunetv2, what it does to each channel."""
    if importlib.util.find_spec("nnunetv2"):
        from nnunetv2.preprocessing.resampling.default_resampling import (  # type: ignore[import-not-found]
            resample_data_or_seg_to_shape,
        )

        spacings = (SPACING, OWN) if order == 3 else (OWN, SPACING)
        found: np.ndarray = resample_data_or_seg_to_shape(image, shape, *spacings, order=order, force_separate_z=None)
        return found
    out = np.empty((len(image), *shape), np.float32)
    for channel, values in zip(out, image, strict=True):
        factors = np.divide(shape, values.shape)
        channel[:] = scipy.ndimage.zoom(values.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return out


def streamed_there(source: Planes, shape: Shape, kernels: tuple[Kernel, ...] | None = None) -> None:
    """As the inferer reads: slabs of the new grid, none of them kept."""
    moved = Resampled(source, shape, kernels=kernels)
    for start in range(0, shape[0], SLAB):
        moved[:, start : start + SLAB]


def streamed_back(source: Planes, shape: Shape, kernels: tuple[Kernel, ...] | None = None) -> None:
    """As the inferer writes."""
    depth = source.shape[1]

    def slabs() -> Iterator[tuple[int, int, torch.Tensor]]:
        for start in range(0, depth, SLAB):
            slab = torch.from_numpy(source[:, start : start + SLAB])
            yield start, start + slab.shape[1], slab

    for _ in resample_slabs(slabs(), Regrid(source.shape[1:], shape, kernels=kernels)):
        pass


RUNS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "nnU-Net's way": (
        lambda source, shape: peer(source[:, :], shape, 3),
        lambda source, shape: peer(source[:, :], shape, 1),
    ),
    "densepred, whole arrays": (
        lambda source, shape: resample(source[:, :], shape),
        lambda source, shape: resample(source[:, :], shape),
    ),
    "densepred, as predictions run": (streamed_there, streamed_back),
    "the same, nnU-Net's filters": (
        lambda source, shape: streamed_there(source, shape, (Kernel(3, False),) * 3),
        lambda source, shape: streamed_back(source, shape, (Kernel(1, False),) * 3),
    ),
}


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def child(name: str, way: int, path: Path, shape: Shape, target: Shape, threads: int) -> None:
    """One run: prints seconds, those of the processor, and MB."""
    torch.set_num_threads(threads)
    source, run = Planes(path, shape), RUNS[name][way]
    run_small = Planes(path, (shape[0], 4, 16, 16))
    run(run_small, (6, 11, 11))  # what is made once
    before = resident("VmRSS")
    start, worked = time.perf_counter(), time.process_time()
    run(source, target)
    print(time.perf_counter() - start, time.process_time() - worked, resident("VmHWM") - before)


def agreement() -> tuple[float, float]:
    """The largest difference from nnU-Net's, order 1 and order 3 where that does not clip, values within 0..1."""
    image, shape = np.random.default_rng(0).random((1, 60, 71, 53), np.float32), (90, 101, 45)
    linear = np.abs(resample(image, shape, (Kernel(1, False),) * 3) - peer(image, shape, 1)).max()
    ours = resample(image, shape, (Kernel(3, False),) * 3)
    return float(linear), float(np.abs(np.clip(ours, image.min(), image.max()) - peer(image, shape, 3)).max())


def main() -> None:
    """Parse the command line, run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], help="slowest axis first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    here = tuple(arguments.shape)
    there = resampled_shape(here, SPACING, OWN)
    ways = (((1, *here), there), ((CLASSES, *there), here))
    if arguments.child:
        kind, number, file = arguments.child
        shape, target = ways[int(number)]
        child(kind, int(number), Path(file), shape, target, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        for way, (shape, target) in enumerate(ways):
            path = Path(folder) / f"{way}.raw"
            np.random.default_rng(0).random(shape, np.float32).tofile(path)
            print(f"{'x'.join(map(str, shape))} to {'x'.join(map(str, target))}", flush=True)
            report(way, path, arguments.rounds, [*map(str, here)], arguments.threads)
    linear, cubic = agreement()
    whose = "nnU-Net's" if importlib.util.find_spec("nnunetv2") else "scipy.ndimage.zoom's"
    print(f"largest difference from {whose}, order 1: {linear:.1e}, order 3, clipped as theirs: {cubic:.1e}")


def report(way: int, path: Path, rounds: int, shape: list[str], threads: int) -> None:
    """Runs in turns, and medians."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in RUNS}
    for _ in range(rounds):
        for name, runs in found.items():
            options = ["--shape", *shape, "--threads", str(threads), "--child", name, str(way), str(path)]
            command = [sys.executable, __file__, *options]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs.append(tuple(map(float, done.stdout.split())))
    medians = {name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in found.items()}
    first = medians["nnU-Net's way"]
    for kind, (seconds, worked, memory) in medians.items():
        faster = f"{first[0] / seconds:.0f} times faster ({first[1] / worked:.0f} by processor time)"
        figures = f"{seconds:7.2f} s (processor {worked:6.2f} s) {memory:6.0f} MB"
        print(f"  {kind:29s} {figures}; {faster}, {first[2] / memory:.1f} times less memory", flush=True)


if __name__ == "__main__":
    main()
