"""Weights files of every length of header are told from pickles."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from densepred.errors import UnsafeError
from densepred.files import is_pickled
from densepred.inference.loading import read_weights


def write(path: Path, header_length: int) -> None:
    """A safetensors file of one tensor with a header of so many bytes (its format allows blanks at the end)."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(header_length)
    path.write_bytes(header_length.to_bytes(8, "little") + header + torch.arange(2.0).numpy().tobytes())


@pytest.mark.parametrize("length", [128, 640, 1152, 0x0D80, 0x8000])
def test_a_header_may_have_any_length(tmp_path: Path, length: int):
    """A length of 128 modulo 256 begins with the byte of a pickle."""
    write(tmp_path / "w.safetensors", length)
    assert read_weights(tmp_path / "w.safetensors")["w"].tolist() == [0, 1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused(tmp_path: Path, protocol: int):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps({"w": [1.0, 2.0]}, protocol))
    assert is_pickled(path.read_bytes()[:9])
    with pytest.raises(UnsafeError, match="a pickle"):
        read_weights(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(UnsafeError, match="a pickle"):
        read_weights(path)
