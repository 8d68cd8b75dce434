"""Small NIfTI files for tests, sound and otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
RNG = np.random.default_rng(0)


def scan(shape: tuple[int, ...], dtype: str = "i2") -> np.ndarray:
    """Smooth-ish values of any type, in nibabel's order."""
    return np.asarray(RNG.integers(0, 100, shape), dtype)


def save_nib(path: Path, values: np.ndarray, affine: np.ndarray | None = None, header: object | None = None) -> Path:
    kind = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    kind(values, affine, header, dtype=values.dtype).to_filename(path)
    return path


def load_nib(path: Path) -> Any:
    """nibabel's image, with its real type's members."""
    return nib.load(path)


def patched(path: Path, **fields: object) -> Path:
    """A plain file with header fields overwritten, past nibabel's checks."""
    raw = bytearray(path.read_bytes())
    header = Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path
