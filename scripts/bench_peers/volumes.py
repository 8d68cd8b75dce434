"""The network and the volume that all tools get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from densepred.config import ModelConfig
from densepred.models.build import build, initialize

GRAIN = 16  # voxels between the knots of the smooth part


def planes(size: tuple[int, ...], seed: int = 0) -> Iterator[np.ndarray]:
    """Int16 planes (Y, X) of a volume of smooth blobs and noise: the same whatever the memory."""
    rng = np.random.default_rng(seed)
    knots = rng.normal(0, 200, [n // GRAIN + 2 for n in size]).astype(np.float32)
    for z in range(size[0]):
        k, share = divmod(z, GRAIN)
        plane = torch.from_numpy(knots[k] + (knots[k + 1] - knots[k]) * np.float32(share / GRAIN))
        smooth = F.interpolate(plane[None, None], scale_factor=GRAIN, mode="bilinear")[0, 0, : size[1], : size[2]]
        yield (1000 + smooth.numpy() + rng.normal(0, 40, size[1:]).astype(np.float32)).astype(np.int16)


def write_volume(folder: Path, size: tuple[int, ...], channels: int) -> None:
    """`image.npy`, (C, *size) float32 with mean 0 and deviation 1, and `raw.npy`, (*size) int16."""
    raw = open_memmap(folder / "raw.npy", "w+", np.int16, size)
    total = square = 0.0
    for z, plane in enumerate(planes(size)):
        raw[z] = plane
        total, square = total + float(plane.sum(dtype=float)), square + float((plane.astype(float) ** 2).sum())
    mean = total / raw.size
    deviation = (square / raw.size - mean**2) ** 0.5
    image = open_memmap(folder / "image.npy", "w+", np.float32, (channels, *size))
    for z, plane in enumerate(raw):
        image[:, z] = (plane - np.float32(mean)) / np.float32(deviation)
    image.flush()


def read_volume(folder: Path, path: Path, run: Path | None) -> tuple[int, ...]:
    """`image.npy` and `raw.npy` of a file: normalised as a run's plan says, else by mean and deviation."""
    from densepred.volumes import open_volume

    volume = open_volume(path)
    values = np.asarray(volume[:], np.float32)
    np.save(folder / "raw.npy", values[0])
    if run is None:
        values = (values - values.mean()) / values.std()
    else:
        from densepred.cases.plan import Plan
        from densepred.cases.preprocess import check_image, normalized

        plan = Plan.load(run / "plan.json")
        check_image(volume, plan)
        values = np.asarray(normalized(volume, plan)[:], np.float32)
    np.save(folder / "image.npy", values)
    return tuple(values.shape[1:])


def write_task(folder: Path, task: dict[str, Any], run: Path | None, widths: tuple[int, ...]) -> dict[str, Any]:
    """`task.json` and `weights.safetensors`, of a run or of a plain 3D U-Net with weights from a seed.

    The biases of a seeded network's last layer are set so that no class wins everywhere.
    """
    if run is None:
        model = ModelConfig(channels=widths, dims=3)
        network = initialize(build(model, task["channels"], task["classes"]), 0).eval()
        _balance(network, np.load(folder / "image.npy", mmap_mode="r"), task["window"])
        weights = network.state_dict()
    else:
        import densepred.config

        config, plan = densepred.config.load(run / "config.yaml"), json.loads((run / "plan.json").read_text())
        model = config.model
        task |= {"channels": len(plan["channels"]), "classes": len(plan["classes"])}
        task["window"] = task["window"] or list(config.inference.window or config.patch.size)
        weights = safetensors.torch.load_file(run / "model.safetensors")
    task |= {"model": model.model_dump(mode="json")}
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    (folder / "task.json").write_text(json.dumps(task))
    return task


def _balance(network: torch.nn.Module, image: np.ndarray, window: list[int]) -> None:
    part = torch.from_numpy(np.array(image[(slice(None), *map(slice, window))]))[None]
    missing = [max(w - n, 0) for w, n in zip(window, part.shape[2:], strict=True)]
    part = F.pad(part, [pad for missed in reversed(missing) for pad in (0, missed)])
    with torch.inference_mode():
        found: Tensor = network(part)
    last = [value for name, value in network.named_parameters() if name.endswith("bias")][-1]
    assert last.shape == found.shape[1:2]
    with torch.no_grad():
        last -= found.flatten(2).median(2).values[0]


def write_files(folder: Path, task: dict[str, Any], run: Path | None, suffixes: list[str]) -> None:
    """`image` and a `small` corner of it in each format, and the run directory that `densepred predict` takes."""
    import nibabel
    from astropy.io import fits
    from bench_memory import make_run

    raw = np.load(folder / "raw.npy", mmap_mode="r")
    small = raw[tuple(slice(size + 1) for size in task["window"])]
    nibabel.openers.Opener.default_compresslevel = 1
    for name, values in (("image", raw), ("small", small)):
        if ".nii.gz" in suffixes:
            nibabel.save(nibabel.Nifti1Image(np.asarray(values).T, np.eye(4)), folder / f"{name}.nii.gz")
        if ".fits" in suffixes:
            fits.writeto(folder / f"{name}.fits", np.asarray(values), overwrite=True)
    if run is None:
        run = make_run(folder / "run", tuple(task["window"]), tuple(task["model"]["channels"]), task["classes"])
        (run / "model.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    else:
        (folder / "run").symlink_to(run.resolve(), target_is_directory=True)
