"""The ways to run a network on windows of one shape: torch as it is, and torch compiled; OpenVINO has its own module.

Each takes windows (B, C, *window) float32 and gives logits (B, K, *window), from weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densepred.device import is_exhausted, needing_memory
from densepred.errors import InputError
from densepred.inference.forward import pick
from densepred.models.folding import fold_batch_norms
from densepred.models.forms import is_copied
from densepred.models.layers import CONVOLUTIONS, to_channels_last

Runtime = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What a runtime is made for.

    Args:
        shape: of a batch of windows, (B, C, *window).
        device: where the windows are.
        precision: what convolutions compute in.
        output: the name of the output to take of a network that returns a dict; by default its first.
    """

    shape: tuple[int, ...]
    device: torch.device
    precision: torch.dtype = torch.float32
    output: str | None = None


class TorchRuntime:
    """torch, one kernel after the other: batch norms folded, autocast with weights already cast, channels-last.

    On GPUs networks whose norms would copy (`is_copied`) are contiguous, unless compiled.

    Norms keep float32 parameters and statistics. Without batch norms the results are those of plain autocast, bit for
    bit; the casts before every convolution are gone.
    """

    def __init__(self, model: nn.Module, task: Task, compiled: bool = False) -> None:
        self.task = task
        self.model = fold_batch_norms(model, task.shape).to(task.device)
        if compiled or not is_copied(self.model, task.device, task.precision):
            to_channels_last(self.model)
        if task.precision != torch.float32:
            for layer in self.model.modules():
                if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                    layer.to(task.precision)

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, C, *window) -> (B, K, *window), in the precision of the last layer."""
        enabled = self.task.precision != torch.float32
        with torch.inference_mode(), torch.autocast(self.task.device.type, self.task.precision, enabled=enabled):
            return pick(self.model(windows), self.task.output)


class CompiledRuntime(TorchRuntime):
    """The same, compiled for the shape (`torch.compile`), which takes half a minute.

    Raises:
        InputError: there is no C++ compiler, or the network cannot be compiled.
        ResourceError: the memory is exhausted.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(model, task, compiled=True)
        self.model.compile(dynamic=False)
        with making("torch.compile cannot compile the network"):
            self(torch.zeros(task.shape, device=task.device))


@contextmanager
def making(fault: str) -> Iterator[None]:
    """Tells why a runtime cannot be made: the makers' exceptions are of many classes, some of them plain ones.

    Raises:
        InputError: it cannot.
        ResourceError: the memory is exhausted.
    """
    with needing_memory("use inference.backend=torch, or a smaller window or batch"):
        try:
            yield
        except Exception as error:
            if is_exhausted(error):
                raise
            if "InvalidCxxCompiler" in f"{type(error).__name__}: {error}":
                fix = "install g++, or name a C++ compiler in CXX, or use inference.backend=torch"
                raise InputError("backend compiled needs a C++ compiler, there is none", fix) from error
            reason = " ".join(str(error).split())[-300:]
            raise InputError(f"{fault} ({type(error).__name__}: {reason})", "use inference.backend=torch") from error
