"""A small synthetic set and a tiny recipe, shared by the tests of whole commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.helpers import ROOT, started_anew

TINY = """
data: {dataset: dataset.json, folds: 4}
model: {channels: [4, 8], deep_supervision: 0}
patch: {size: [16, 16, 16], batch: 2}
optimizer: {ema: 0.9}
training: {epochs: 4, steps: 6, checkpoint_every: 2, tensorboard: false, seed: 3}
inference: {window: [32, 32, 32]}
"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight synthetic volumes with labels."""
    folder = tmp_path_factory.mktemp("synthetic")
    script = ROOT / "data" / "synthetic_volumes.py"
    subprocess.run([sys.executable, script, folder, "--cases", "8", "--seed", "1"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in a few seconds."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def trained(dataset: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted training."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = started_anew("train", recipe, f"data.root={dataset}", "--run", run)
    assert done.returncode == 0, done.stderr
    return run
