"""One row of the table, in a process of its own."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench_peers.common import Setting, Task, peak_memory, wait


def main(arguments: argparse.Namespace) -> None:
    """Measure what `--child` names, and leave the figures in the file `--result`."""
    task = Task.load(arguments.work)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child == "bare":
        found = import_module("bench_peers.bare").measure(task, arguments.compile, arguments.seconds)
    elif arguments.child == "images":
        images = import_module("bench_peers.images")
        found = images.measure(task, arguments.images, arguments.image_size, arguments.seconds)
    else:
        setting = Setting(**json.loads(arguments.setting))
        measure = on_files if arguments.files else on_arrays
        found = measure(task, import_module(f"bench_peers.{arguments.child}"), setting, arguments)
    arguments.result.write_text(json.dumps(found))


def on_arrays(task: Task, tool: Any, setting: Setting, arguments: argparse.Namespace) -> dict[str, float]:
    """From an image in memory (the device's, where the tool takes it there) to labels in the same memory."""
    predict, image = tool.prepare(task, setting), task.image()
    if tool.ON_DEVICE:
        image = image.to(task.device)

    def run(image: Tensor) -> tuple[Tensor, float, float]:
        start = wait(task.device)
        labels = predict(image)
        windows = wait(task.device)
        if labels.is_floating_point():  # logits (K, *spatial)
            labels = labels.argmax(0)
        return labels, wait(task.device) - start, windows - start

    if not arguments.memory:  # on a GPU all of it, for kernels are chosen anew for the batch that is left at the end
        run(image if task.device.startswith("cuda") else image[(slice(None), *_corner(task))])
    if task.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(task.device)
    labels, seconds, windows = run(image)
    peaks = peak_memory(task.device)
    np.save(arguments.result.with_suffix(".npy"), labels.to(torch.uint8).cpu().numpy())
    return {"seconds": seconds, "argmax": seconds - windows, **peaks}


def _corner(task: Task) -> tuple[slice, ...]:
    """A corner of the image of four windows, if it is so large."""
    first, *others = task.window
    return slice(first), *(slice(size + 1) for size in others)


def on_files(task: Task, tool: Any, setting: Setting, arguments: argparse.Namespace) -> dict[str, float]:
    """From a file to a label file."""
    suffix = arguments.suffix
    predict = tool.prepare_files(task, setting)
    target = arguments.result.with_suffix("")
    target.mkdir()
    (target / "small").mkdir()
    if not arguments.memory:
        predict(task.folder / f"small{suffix}", target / "small" / f"small{suffix}")
    if task.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(task.device)
    start = wait(task.device)
    predict(task.folder / f"image{suffix}", target / f"image{suffix}")
    seconds = wait(task.device) - start
    peaks = peak_memory(task.device)
    np.save(arguments.result.with_suffix(".npy"), _labels(next(target.glob(f"image{suffix}*"))))
    return {"seconds": seconds, **peaks}


def _labels(path: Path) -> np.ndarray:
    """A label file, slowest axis first, as uint8."""
    if ".fits" in path.suffixes:  # ours are compressed, .fits.fz
        from astropy.io import fits

        return next(hdu.data for hdu in fits.open(path) if hdu.is_image and hdu.data is not None).astype(np.uint8)
    import nibabel

    found = np.asanyarray(nibabel.load(path).dataobj).T
    return np.squeeze(found).astype(np.uint8)
