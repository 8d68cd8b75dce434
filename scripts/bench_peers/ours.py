"""densepred: `SlidingWindowInferer` on arrays, `densepred predict` on files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench_peers.common import Setting, Task
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.models.layers import to_channels_last

REQUIRES: tuple[str, ...] = ()
ON_DEVICE = True
AGAINST = ("gaussian", "even")
FORMATS = (".nii.gz", ".fits")


def settings(device: str, compiled: bool) -> list[Setting]:
    batches = (4, 8) if device.startswith("cuda") else (4,)
    return [Setting("auto"), *(Setting("auto", batch) for batch in batches), Setting("float32")]


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Labels, reduced slab by slab as `Predictor` does."""
    model = to_channels_last(task.network())
    inferer = SlidingWindowInferer(
        task.window,
        task.overlap,
        setting.blend,
        setting.batch,
        task.device,
        setting.precision,
        setting.spacing,
    )

    def labels(image: Tensor) -> Tensor:
        out = torch.empty(image.shape[1:], dtype=torch.uint8, device=image.device)
        for start, stop, slab in inferer.stream(model, image):
            out[start:stop] = slab.max(0).indices
        return out

    return labels


def prepare_files(task: Task, setting: Setting) -> Callable[[Path, Path], None]:
    """The command, called in this process; its start is part of the first call."""
    options = {
        "window": list(task.window),
        "overlap": task.overlap,
        "blend": setting.blend,
        "batch": setting.batch,
        "precision": setting.precision,
        "device": task.device,
    }
    overrides = [f"inference.{key}={value}" for key, value in options.items()]

    def predict(source: Path, target: Path) -> None:
        from densepred.cli import main

        command = ["densepred", "predict", str(task.folder / "run"), str(source), "--out", str(target.parent)]
        axes = ["data.axes=zyx"] if source.suffix == ".fits" else []  # a cube's meaning must be said
        with patch.object(sys, "argv", [*command, *overrides, *axes]):
            try:
                main()
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"densepred predict ended with {end.code}") from end

    return predict
