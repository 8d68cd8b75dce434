"""The synthetic set: deterministic, sound as a set of files, and out of reach for thresholds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import ndimage

from densepred.files import sha256
from densepred.volumes import corner_offset, open_volume

SCRIPT = Path(__file__).parent.parent / "data" / "synthetic_volumes.py"
SHAPE = (46, 44, 50)


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_volumes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_is_what_it_says(synthetic: ModuleType) -> None:
    image, label, spacing = synthetic.make_case(3, SHAPE)
    assert image.shape == label.shape == SHAPE
    assert (image.dtype, label.dtype) == (np.int16, np.uint8)
    assert spacing == (1.2, 1.0, 1.0)
    assert set(np.unique(label)) == {0, 1, 2}
    outside = ndimage.binary_dilation(label == 2) & (label == 0)
    assert not outside.any(), "a cavity is closed by its wall"


def test_the_seed_decides_every_bit(synthetic: ModuleType) -> None:
    first, again, other = (synthetic.make_case(seed, SHAPE) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("blur", [0, 1])
def test_no_band_of_brightness_finds_the_classes(synthetic: ModuleType, blur: float) -> None:
    edges = np.arange(-400, 1600, 5)
    overlaps: list[list[np.ndarray]] = [[], []]
    for seed in range(8):
        image, label, _ = synthetic.make_case(seed, SHAPE)
        image = ndimage.gaussian_filter(image.astype(np.float32), blur)
        inside = _in_bands(image, edges)
        for value in (1, 2):
            hits = _in_bands(image[label == value], edges)
            overlaps[value - 1].append(2 * hits / np.maximum(inside + (label == value).sum(), 1))
    best = [np.mean(per_case, axis=0).max() for per_case in overlaps]
    assert best[0] < 0.6
    assert best[1] < 0.2
    assert 0.1 < np.mean(best) < 0.6


def _in_bands(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[i, j]: how many values lie from edge i up to edge j; 0 where j is not above i."""
    below = np.concatenate([[0], np.cumsum(np.histogram(values, edges)[0])])
    return np.triu(below[None, :] - below[:, None])


def test_the_files_are_a_sound_set(tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        command = [sys.executable, str(SCRIPT), str(out), "--cases", "2", "--seed", "1"]
        subprocess.run(command, check=True, cwd=SCRIPT.parent.parent, env={"PYTHONPATH": "."}, timeout=60)
    index = json.loads((outs[0] / "dataset.json").read_text())
    assert index["labels"] == {"0": "background", "1": "wall", "2": "cavity"}
    assert index["numTraining"] == len(index["training"]) == 2
    for pair in index["training"]:
        image, label = (open_volume(outs[0] / pair[kind]) for kind in ("image", "label"))
        assert image.affine is not None
        assert image.shape == label.shape
        assert all(44 <= size <= 52 for size in image.shape[1:])
        assert corner_offset(image, label) == 0
        assert image.spacing == pytest.approx((1.2, 1.0, 1.0), abs=1e-5)
        assert np.count_nonzero(np.abs(image.affine[:3, :3]) > 0.01) > 3, "the affine is oblique"
        assert set(np.unique(label.numpy())) == {0, 1, 2}
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*.*"))
    assert len(files) == 5
    assert [sha256(outs[0] / file) for file in files] == [sha256(outs[1] / file) for file in files]
