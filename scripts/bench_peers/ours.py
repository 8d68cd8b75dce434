"""densepred: `SlidingWindowInferer` on arrays, `densepred predict` on files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench_peers.common import Setting, Task
from densepred.device import pick_precision
from densepred.inference.backends import prepare as prepared
from densepred.inference.sliding_window import SlidingWindowInferer

REQUIRES: tuple[str, ...] = ()
ON_DEVICE = True
AGAINST = ("gaussian", "even")
FORMATS = (".nii.gz", ".fits")


def settings(device: str, compiled: bool) -> list[Setting]:
    batches = (4, 8) if device.startswith("cuda") else (4,)
    found = [Setting("auto"), *(Setting("auto", batch) for batch in batches)]
    if not device.startswith("cuda") and find_spec("openvino"):
        found.append(Setting("auto", backend="openvino"))
    if compiled:
        found.append(Setting("auto", backend="compiled"))
    return [*found, Setting("float32")]


def prepare(task: Task, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Labels, reduced slab by slab as `Predictor` does."""
    device = torch.device(task.device)
    precision, shape = pick_precision(setting.precision, device), (setting.batch, task.channels, *task.window)
    model = prepared(task.network(), shape, device, precision, setting.backend)
    inferer = SlidingWindowInferer(
        task.window, task.overlap, setting.blend, setting.batch, device, spacing=setting.spacing, skip=0.0
    )

    def labels(image: Tensor) -> Tensor:
        out = torch.empty(image.shape[1:], dtype=torch.uint8, device=image.device)
        for start, stop, slab in inferer.stream(model, image):
            out[start:stop] = slab.max(0).indices.to(torch.uint8)
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
        "backend": setting.backend,
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
