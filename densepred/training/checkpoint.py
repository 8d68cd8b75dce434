"""Checkpoints: folders of safetensors and JSON with a manifest of hashes, whole or absent; nothing is a pickle."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from densepred.errors import InputError, UnsafeError
from densepred.files import atomic_write, needing_space, part_path, sha256, sync

KEPT = 2
_LOG = logging.getLogger(__name__)


def refuse_link(folder: Path) -> None:
    """Refuse to keep checkpoints behind a link: older ones are removed, and these could be another run's.

    Raises:
        UnsafeError: the folder is a symbolic link.
    """
    if folder.is_symlink():
        fix = "put the folder that it points to in its place; the whole run may lie behind a link"
        raise UnsafeError("the folder of checkpoints is a symbolic link", fix, folder)


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX` in one step and drop all but the newest checkpoints.

    Args:
        folder: the run's `checkpoints`.
        step: steps done.
        tensors: file stem -> tensors by name.
        state: plain JSON data.

    Raises:
        UnsafeError: as `refuse_link`.
    """
    refuse_link(folder)
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{step:08d}"
    part = part_path(final)
    part.mkdir()
    try:
        with needing_space(final):
            for stem, group in tensors.items():
                (part / f"{stem}.safetensors").write_bytes(packed(group))
            (part / "state.json").write_text(json.dumps(state))
            hashes = {file.name: sha256(file) for file in sorted(part.iterdir())}
            (part / "manifest.json").write_text(json.dumps(hashes, indent=1))
            for file in part.iterdir():
                sync(file)
            sync(part)
            if final.exists():
                shutil.rmtree(final)
            os.rename(part, final)
            sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    atomic_write(folder / "last", final.name + "\n")
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def packed(tensors: dict[str, Tensor]) -> bytes:
    """Tensors in the safetensors format."""
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def newest(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint whose hashes hold, as (tensors, state); None if there never was one.

    Raises:
        InputError: there are checkpoints, but every one is damaged.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        if _whole(path):
            tensors = {file.stem: safetensors.torch.load_file(file) for file in path.glob("*.safetensors")}
            return tensors, json.loads((path / "state.json").read_text())
        _LOG.warning("%s does not match its manifest: trying the one before", path)
    if found:
        raise InputError("every checkpoint is damaged", "start the training anew in another folder", folder)
    return None


def _whole(path: Path) -> bool:
    try:
        hashes = json.loads((path / "manifest.json").read_text())
        return bool(hashes) and all(sha256(path / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `<parameter>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def load_optimizer(
    optimizer: Optimizer,
    tensors: dict[str, Tensor],
    like: Callable[[Tensor, Tensor], Tensor] = lambda value, parameter: value,
) -> None:
    """Put back what `optimizer_tensors` gave; `like` shares a value out as its parameter is.

    Values are laid out as their parameters: files hold contiguous ones, and of another layout than the gradients a GPU
    would go through them one by one, in other kernels.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = _laid_out(like(value, parameters[int(index)]), parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """An entry of a parameter's own shape in its memory layout."""
    if value.shape != parameter.shape or hasattr(value, "full_tensor"):
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
