"""What a child process needs: the task, the network, and how to measure."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from densepred.config import ModelConfig
from densepred.device import pick_precision
from densepred.inference.forward import pick
from densepred.models.build import build


@dataclass(frozen=True)
class Setting:
    """How a tool is run: `precision` by autocast; `blend`, `spacing` and `backend` are options of ours alone."""

    precision: str = "float32"
    batch: int = 1
    compiled: bool = False
    blend: str = "gaussian"
    spacing: str = "even"
    backend: str = "torch"

    def __str__(self) -> str:
        parts = [self.precision, *([f"batch {self.batch}"] if self.batch > 1 else []), *(["compiled"] * self.compiled)]
        parts += [self.backend] * (self.backend != "torch")
        if (self.blend, self.spacing) != ("gaussian", "even"):
            parts.append(f"{self.blend}, {self.spacing} windows")
        return ", ".join(parts)


@dataclass(frozen=True)
class Task:
    """One network and one volume, in a folder: `task.json`, `weights.safetensors`, `image.npy`."""

    folder: Path
    window: tuple[int, ...]
    overlap: float
    device: str
    model: dict[str, Any]
    channels: int
    classes: int

    @classmethod
    def load(cls, folder: Path) -> Task:
        said = json.loads((folder / "task.json").read_text())
        return cls(folder, tuple(said.pop("window")), **said)

    @property
    def steps(self) -> list[int]:
        """Voxels of overlap along each axis."""
        return [size - int(size * (1 - self.overlap)) for size in self.window]

    def network(self, compiled: bool = False) -> nn.Module:
        """The network with its weights, in evaluation mode, on the device."""
        model: nn.Module = build(ModelConfig.model_validate(self.model), self.channels, self.classes)
        model.load_state_dict(safetensors.torch.load_file(self.folder / "weights.safetensors"))
        model = First(model).eval().requires_grad_(False).to(self.device)
        return torch.compile(model) if compiled else model

    def image(self) -> Tensor:
        """(C, *spatial) float32 in the memory of the host, normalised."""
        return torch.from_numpy(np.load(self.folder / "image.npy"))

    def autocast(self, setting: Setting) -> AbstractContextManager[None]:
        """Autocast in the precision of a setting."""
        dtype = pick_precision(setting.precision, torch.device(self.device))
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype != torch.float32)


class First(nn.Module):
    """A network that gives one tensor: of several outputs, as with deep supervision, the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window)."""
        return pick(self.model(x), None)


def wait(device: str) -> float:
    """The time when the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def steady(run: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of a call over at least three rounds and `seconds`, after two calls to warm up.

    On a GPU a round is of many calls that do not wait for each other.
    """
    run()
    once = wait(device)
    run()
    calls = 1 if device == "cpu" else max(1, int(seconds / 10 / (wait(device) - once)))
    times: list[float] = []
    while len(times) < 3 or sum(times) * calls < seconds:
        start = wait(device)
        for _ in range(calls):
            run()
        times.append((wait(device) - start) / calls)
    return statistics.median(times)


def peak_memory(device: str) -> dict[str, float]:
    """MB of this process at its peak: resident (VmHWM), and on the GPU allocated and reserved by torch."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith("VmHWM")), None)  # some sandboxes do not tell
    kilobytes = int(found.split()[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"rss": kilobytes / 1024}
    if device.startswith("cuda"):
        peaks |= {"allocated": torch.cuda.max_memory_allocated(device) / 2**20}
        peaks |= {"reserved": torch.cuda.max_memory_reserved(device) / 2**20}
    return peaks
