"""Small NIfTI data sets for the tests of cases."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.config import DataConfig

CLASSES = {0: "background", 1: "head", 2: "body"}


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), shift: float = 0.0) -> Path:
    """Write an array `(*spatial)`, with the spacing in the order of the array; `shift` moves it along x, in mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*reversed(spacing), *[1.0] * (4 - len(spacing))])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(array.T, affine), path)
    return path


def blob(shape: tuple[int, ...] = (6, 7, 8), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image, float32, and its label, uint8 with the values 0, 1 and 2."""
    generator = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[1:3, 1:4] = 1
    label[3:5, 2:5] = 2
    return (label * 10 + generator.normal(100, 3, shape)).astype(np.float32), label


def make_set(root: Path, count: int = 6, shape: tuple[int, ...] = (6, 7, 8)) -> list[str]:
    """`imagesTr/<id>.nii.gz` and `labelsTr/<id>.nii.gz`; returns the ids."""
    ids = [f"case_{number:02d}" for number in range(count)]
    for number, case in enumerate(ids):
        image, label = blob(shape, number)
        save(root / "imagesTr" / f"{case}.nii.gz", image, (1.0,) * len(shape))
        save(root / "labelsTr" / f"{case}.nii.gz", label, (1.0,) * len(shape))
    return ids


def case_of(root: Path, image: np.ndarray, label: np.ndarray | None = None, name: str = "a") -> Case:
    """A case of one channel, written to `root`."""
    path = save(root / f"{name}.nii.gz", image, (1.0,) * image.ndim)
    truth = None if label is None else save(root / f"{name}_label.nii.gz", label, (1.0,) * label.ndim)
    return Case(name, (path,), truth)


def plan(**changes: object) -> Plan:
    """Three classes with the values 0, 1 and 2."""
    settings = {
        "dims": 3,
        "channels": ("t1",),
        "classes": ("background", "head", "body"),
        "values": (0, 1, 2),
        "label_map": {0: 0, 1: 1, 2: 2},
    }
    channels = changes.get("channels", settings["channels"])
    assert isinstance(channels, tuple)
    return Plan.model_validate({**settings, "normalize": ("zscore",) * len(channels), **changes})


def by_patterns(root: Path, **changes: object) -> DataConfig:
    """The set that `make_set` writes, found by patterns."""
    settings: dict[str, object] = {"root": str(root), "images": "imagesTr/*.nii.gz", "labels": "labelsTr/{id}.nii.gz"}
    return DataConfig.model_validate(settings | {"classes": CLASSES} | changes)


def save_json(root: Path, content: object, name: str = "dataset.json") -> None:
    """Write a list or folds."""
    (root / name).write_text(json.dumps(content))
