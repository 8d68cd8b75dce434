"""What the tests of training share: a small set of volumes, and what to read off a run."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parent.parent


def volumes(folder: Path, recipe: str, count: int = 6) -> None:
    """Write volumes with a bright cube of value 7 and unknown (255) corners of different sizes, and a recipe."""
    generator = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros((14, 15, 16), np.uint8)
        z, y, x = generator.integers(1, 7, 3)
        label[z : z + 6, y : y + 6, x : x + 6] = 7
        image = (label > 0) + generator.normal(0, 0.3, label.shape).astype(np.float32)
        for name, array in {"images": image.astype(np.float32), "labels": label}.items():
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"c{number}.nii.gz")
    (folder / "recipe.yaml").write_text(recipe)


def losses(run: Path) -> list[float]:
    """The loss of each epoch."""
    return [row["loss"] for row in json.loads((newest(run) / "state.json").read_text())["rows"]]


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))
