"""Make a small set of 3D volumes for trying the whole road: `python data/synthetic_volumes.py OUT --cases 24 --seed 0`.

Each volume holds a few hollow bodies and several solid lumps of the same brightness. Class 1 is the wall of a hollow
body and class 2 its cavity, which is as bright as the tissue outside. So no threshold finds either: the lumps shine
like walls, and only being enclosed by a wall tells the cavity from the tissue. A shading and noise lie over everything.
The files are NIfTI in the layout of the Medical Segmentation Decathlon, with anisotropic voxels and oblique affines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from densepred.files import atomic_path, atomic_write, writable_folder

LABELS = {0: "background", 1: "wall", 2: "cavity"}
SPACING = (1.2, 1.0, 1.0)  # mm along Z, Y, X
TISSUE, BRIGHT = 400.0, 700.0
SHADING, NOISE, BLUR = 0.15, 60.0, 0.5  # a share, brightness, voxels
WALL = 3.5  # mm


def make_case(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """One volume; the same seed and shape give the same bits.

    Returns:
        image (Z, Y, X) int16, label (Z, Y, X) uint8 with 0 background, 1 wall and 2 cavity, spacing (Z, Y, X) in mm.
    """
    rng = np.random.default_rng(seed)
    label, bright, taken = np.zeros(shape, np.uint8), np.zeros(shape, bool), np.zeros(shape, bool)
    for _ in range(rng.integers(1, 3)):
        radii = rng.uniform(10, 14, 3)
        field = _place(rng, radii, taken)
        label[field < 1] = 1
        label[field < 1 - WALL / radii.mean()] = 2
        taken |= field < 1
    bright |= label == 1
    for _ in range(rng.integers(10, 15)):
        field = _place(rng, rng.uniform(4, 10, 3), taken)
        bright |= field < 1
        taken |= field < 1
    return _photograph(rng, bright), label, SPACING


def _place(rng: np.random.Generator, radii: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Put a bumpy, turned ellipsoid where it touches nothing; where there is no room, it is left out.

    Returns:
        (Z, Y, X) float32, below 1 inside the body and growing outwards; infinite everywhere if there is no room.
    """
    room = ndimage.distance_transform_edt(~taken, sampling=SPACING) if taken.any() else np.full(taken.shape, np.inf)
    inside = np.zeros(taken.shape, bool)
    inside[tuple(slice(round(0.8 * radii.max() / step), -round(0.8 * radii.max() / step)) for step in SPACING)] = True
    free = np.argwhere(inside & (room > 1.25 * radii.max()))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    wave, phase = rng.normal(size=(3, 3)) * 0.12, rng.uniform(0, 2 * np.pi, 3)
    pick = rng.random()
    if not len(free):
        return np.full(taken.shape, np.inf, np.float32)
    points = np.moveaxis(np.indices(taken.shape, np.float32), 0, -1) - free[int(pick * len(free))]
    local = (points * np.asarray(SPACING, np.float32)) @ turn.astype(np.float32)
    bumps = 1 + 0.06 * np.sin(local @ wave.astype(np.float32) + phase.astype(np.float32)).sum(-1)
    return np.linalg.norm(local / radii.astype(np.float32), axis=-1) * bumps


def _photograph(rng: np.random.Generator, bright: np.ndarray) -> np.ndarray:
    """The bright parts (Z, Y, X) as an image: blurred, unevenly lit, noisy, int16."""
    image = TISSUE + (BRIGHT - TISSUE) * ndimage.gaussian_filter(bright.astype(np.float32), BLUR)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in bright.shape), indexing="ij", sparse=True)
    for weight, axis in zip(rng.uniform(-SHADING, SHADING, 3), axes, strict=True):
        image = image * (1 + weight * axis)
    return np.rint(image + rng.normal(0, NOISE, bright.shape)).astype(np.int16)


def make_affine(seed: int) -> np.ndarray:
    """An oblique affine (4, 4) to NIfTI's world for a volume of SPACING: some turn, X from right to left, an offset."""
    rng = np.random.default_rng((seed, 1))
    turn = Rotation.from_euler("xyz", rng.uniform(-15, 15, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-SPACING[2], SPACING[1], SPACING[0]])
    affine[:3, 3] = rng.uniform(-60, 60, 3)
    return affine


def write_set(out: Path, cases: int, seed: int) -> None:
    """Write imagesTr, labelsTr and dataset.json; the same arguments give the same bytes."""
    for folder in ("imagesTr", "labelsTr"):
        writable_folder(out / folder)
    names = [f"synthetic_{index + 1:03d}.nii.gz" for index in range(cases)]
    for index, name in enumerate(names):
        depth, height, width = (int(n) for n in np.random.default_rng((seed, index, 2)).integers(44, 53, 3))
        image, label, _ = make_case(seed * 100_000 + index, (depth, height, width))
        affine = make_affine(seed * 100_000 + index)
        _save(out / "imagesTr" / name, image, affine)
        _save(out / "labelsTr" / name, label, affine)
    atomic_write(out / "dataset.json", json.dumps(_dataset(names), indent=2) + "\n")


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write an array (Z, Y, X) as NIfTI, whose own order is (X, Y, Z)."""
    image = nib.Nifti1Image(array.T, affine)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as part:
        nib.save(image, part)


def _dataset(names: list[str]) -> dict[str, object]:
    """The index of the set in the form of the Medical Segmentation Decathlon."""
    return {
        "name": "synthetic",
        "description": "hollow bodies among solid lumps",
        "tensorImageSize": "3D",
        "modality": {"0": "synthetic"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
    }


def main() -> None:
    """Parse the command line and write the set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--cases", type=int, default=24, help="how many volumes (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other volumes (default 0)")
    arguments = parser.parse_args()
    write_set(arguments.out, arguments.cases, arguments.seed)
    print(f"{arguments.cases} volumes in {arguments.out}")


if __name__ == "__main__":
    main()
