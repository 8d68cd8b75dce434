"""Run directories with the weights as they are drawn, for tests of what is done with predictions."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import safetensors.torch
import torch
from astropy.io import fits

from densepred import config as configuration
from densepred.cases.case import collect
from densepred.cases.plan import make_plan
from densepred.models.build import build


def noise(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).normal(seed * 3, 1, (size, size)).astype(np.float32)


def run_of(root: Path, suffix: str, classes: dict[int, str], name: str = "run") -> Path:
    """A run directory with the weights as they are drawn; images of seeds 0 and 1 lie beside it."""
    (root / "set").mkdir(exist_ok=True)
    for seed in (0, 1):
        for path, array in ((f"c{seed}", noise(seed)), (f"c{seed}_label", (noise(seed) > seed * 3).astype(np.uint8))):
            image(root / "set" / f"{path}{suffix}", array)
    data = {"root": str(root / "set"), "images": f"{{id}}{suffix}", "labels": f"{{id}}_label{suffix}"}
    raw = {
        "data": data | {"classes": classes},
        "model": {"dims": 2, "channels": [4, 8]},
        "patch": {"size": [16, 16], "batch": 1},
        "inference": {"device": "cpu", "precision": "float32"},
    }
    config = configuration.check(raw, {}, "test")
    folder = root / name
    folder.mkdir()
    (folder / "config.yaml").write_text(configuration.dump(config))
    plan = make_plan(config, collect(config.data))
    plan.save(folder / "plan.json")
    torch.manual_seed(0)
    model = build(config.model, len(plan.channels), len(plan.classes), 0)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".fits":
        fits.writeto(path, array, overwrite=True)
    else:
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)
    return path
