"""Which device and number format to compute in."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from densepred.allocator import give_back
from densepred.errors import InputError, ResourceError

M = TypeVar("M", bound=nn.Module)
_EXHAUSTED = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS, and of cuDNN before version 9
    "ALLOCATION_FAILED",
    "unable to find an engine",  # what torch says where the workspace of none of cuDNN's fits
    "can't start new thread",
)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: torch sees no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is not a device", "use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} asked for, but torch sees {torch.cuda.device_count()} GPUs", "use device: auto or cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not supported", "use auto, cpu, cuda or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format named, or for `auto` bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probes = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
        fast = any(probe() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def reproducible(device: torch.device) -> None:
    """Convolutions on a GPU give the same bits in every run; cuDNN may choose others otherwise."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextlib.contextmanager
def needing_memory(fix: str) -> Iterator[None]:
    """Tell exhausted memory, of the machine or of a GPU, from other faults.

    Raises:
        ResourceError: it is; `fix` says what to do.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        reason = str(error).partition("\n")[0] or "of the machine"
        raise ResourceError(f"the memory is exhausted ({reason})", fix) from error


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to a GPU: one, for each keeps the memory that it once took."""
    return torch.cuda.Stream(device)


def sent(block: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device: to a GPU it is copied through memory that this can read by itself, beside its other work.

    It may be used in the current stream, and is there when this returns.
    """
    if device.type != "cuda" or block.is_cuda:
        return block.to(device)
    copies = _copies(device)
    with torch.cuda.stream(copies):
        block = block.contiguous().pin_memory().to(device, non_blocking=True)
    copies.synchronize()
    block.record_stream(torch.cuda.current_stream(device))
    return block


def copied_to_cpu(model: M) -> M:
    """A copy on the CPU, which takes nothing of a device's memory, as that may be full.

    Example:
        >>> copied_to_cpu(nn.Linear(2, 1)).weight.device
        device(type='cpu')
    """
    memo: dict[int, object] = {id(one): one.detach().to("cpu", copy=True) for one in model.buffers()}
    for one in model.parameters():
        memo[id(one)] = nn.Parameter(one.detach().to("cpu", copy=True), one.requires_grad)
    return copy.deepcopy(model, memo)


def freed(device: torch.device) -> None:
    """Give memory that nothing holds back to the system and the device."""
    gc.collect()
    give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_exhausted(error: BaseException) -> bool:
    """Does an error tell of exhausted memory, of the machine or of a GPU?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
