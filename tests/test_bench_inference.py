"""The benchmark of inference: its rows on a tiny network, and what they are compared by."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "bench_inference.py"
TINY = ("--window", "16", "--channels", "4", "8", "--device", "cpu", "--threads", "1", "--seconds", "0.1")


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_bench_inference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, and the figures it leaves."""
    command = [sys.executable, str(SCRIPT), *options, "--json", str(folder / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout, json.loads((folder / "found.json").read_text())


def test_the_table_has_a_row_a_setting_and_agrees_with_monai(tmp_path: Path):
    said, found = run(tmp_path, *TINY, "--size", "24", "28", "20", "--only", "ours", "monai", "--settings", "default")
    rows = {(row["tool"], row["setting"]): row for row in found["rows"]}
    references = {("densepred", "float32"), ("densepred", "float32, gaussian_monai, fixed windows")}
    assert set(rows) == {*references, ("densepred", "auto"), ("MONAI", "float32")}
    assert found["windows"] == {"even": 2 * 3 * 2, "fixed": 2 * 3 * 2}
    assert rows["MONAI", "float32"]["agreement"] >= 0.9999
    assert rows["densepred", "auto"]["agreement"] > 0.97  # bfloat16 where the hardware computes in it
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["seconds"] / found["bare_seconds"][0])
        assert 50 < row["rss"] < 4000
        assert f"| {row['tool']} | {row['setting']} |" in said
    assert "best: " in said


def test_from_file_to_file(tmp_path: Path):
    options = ("--size", "20", "--files", "--suffixes", ".nii.gz", "--only", "monai", "--settings", "default")
    _, found = run(tmp_path, *TINY, *options)
    ours, monai = found["rows"]
    assert (ours["tool"], ours["setting"]) == ("densepred", "float32, gaussian_monai, even windows")
    assert (monai["tool"], monai["suffix"]) == ("MONAI", ".nii.gz")
    assert monai["agreement"] >= 0.9999  # the even and the fixed places are the same here


def test_many_images(tmp_path: Path):
    said, found = run(tmp_path, *TINY, "--images", "2", "--image-size", "32")
    assert found["rounds"][0]["ours"] > 0
    assert "| densepred |" in said


def test_agreement_is_the_share_of_equal_voxels(tmp_path: Path):
    one = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "one.npy", one)
    np.save(tmp_path / "two.npy", np.where(one < 6, 99, one).astype(np.uint8))
    assert _module().agreement(tmp_path / "one.npy", tmp_path / "two.npy") == 0.75


def test_a_row_that_failed_says_why():
    row = ("monai", "float32", "")
    found = _module().summary(row, [{"failed": "out of memory"}], [1.0])
    assert "| failed: out of memory |" in _module().table([found], memory=False)
