"""MONAI: `sliding_window_inference`; on files LoadImage before it, argmax and SaveImage behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench_peers.common import Setting, Task

REQUIRES = ("monai",)
ON_DEVICE = True
AGAINST = ("gaussian_monai", "fixed")
FORMATS = (".nii.gz", ".fits")


def settings(device: str, compiled: bool) -> list[Setting]:
    found = [Setting(), Setting("bfloat16"), Setting("bfloat16", 4)]
    return [*found, *([Setting("bfloat16", 4, True)] if compiled else [])]


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    from monai.inferers import sliding_window_inference

    model = task.network(setting.compiled)

    def logits(image: Tensor) -> Tensor:
        options = {"overlap": task.overlap, "mode": "gaussian"}
        with torch.inference_mode(), task.autocast(setting):
            found = sliding_window_inference(image[None], task.window, setting.batch, model, **options)
        return found[0]

    return logits


def prepare_files(task: Task, setting: Setting) -> Callable[[Path, Path], None]:
    """Turned between MONAI's order of a NIfTI file's axes, (X, Y, Z), and the one that the network is for.

    MONAI reads no FITS: there its user takes astropy.
    """
    from monai.transforms import LoadImage, NormalizeIntensity, SaveImage

    logits = prepare(task, setting)
    load, normalise = LoadImage(ensure_channel_first=True), NormalizeIntensity()

    def through(image: Tensor) -> Tensor:
        return logits(normalise(image).to(task.device)).argmax(0, keepdim=True)

    def nifti(source: Path, target: Path) -> None:
        name = target.name.removesuffix(".nii.gz")
        save = SaveImage(
            target.parent, output_postfix="", separate_folder=False, output_dtype=np.uint8, print_log=False
        )
        labels = through(load(source).permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        labels.meta["filename_or_obj"] = name
        save(labels)

    def sky(source: Path, target: Path) -> None:
        from astropy.io import fits

        values, header = fits.getdata(source, header=True)
        labels = through(torch.from_numpy(values.astype(np.float32))[None])
        fits.writeto(target, labels[0].cpu().numpy().astype(np.uint8), header)

    return lambda source, target: (sky if source.suffix == ".fits" else nifti)(source, target)
