"""A data set and a recipe so small that three folds train in seconds."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

RECIPE = """
data:
  images: "images/*.nii.gz"
  labels: "labels/{id}.nii.gz"
  classes: {0: background, 7: cube}
  folds: 3
  normalize: ct_window
model: {channels: [4, 8]}
patch: {size: [12, 12, 12], batch: 2}
optimizer: {ema: 0.5, lr: 0.02}
training: {epochs: 2, steps: 12, tensorboard: false, device: cpu}
inference: {mirror: [2], device: cpu}
"""


def write_set(root: Path, count: int = 6) -> Path:
    """Volumes with a bright cube of value 7, and a recipe, whose path is returned."""
    generator = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros((12, 13, 14), np.uint8)
        z, y, x = generator.integers(1, 6, 3)
        label[z : z + 5, y : y + 6, x : x + 6] = 7
        image = 2 * (label > 0) + generator.normal(0, 0.3, label.shape)
        for folder, array in {"images": image.astype(np.float32), "labels": label}.items():
            (root / folder).mkdir(exist_ok=True, parents=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / folder / f"c{number}.nii.gz")
    (root / "recipe.yaml").write_text(RECIPE.replace("data:\n", f"data:\n  root: {root}\n"))
    return root / "recipe.yaml"
