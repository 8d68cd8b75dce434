"""Several processes that train one network together, started by `accelerate launch` or `torchrun`; alone there is one.

What is minimised is the loss of the whole batch: each process computes the outputs of its samples, all of them see all
outputs, and each sends the gradient back through its own.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor, nn

from densepred.errors import InputError
from densepred.files import locked

_PATIENCE = timedelta(hours=24)
"""For what one process does alone, such as preparing the cases; a dead one is told by the launcher at once."""
_FAREWELL = 1.0
"""Seconds: many turns of a busy machine's scheduler."""


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if this one was started as one of several.

    Args:
        device: the one chosen; of several GPUs each process of a machine takes its own.

    Returns:
        The device of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
        atexit.register(_leave)
        if not first():
            logging.getLogger("densepred").setLevel(logging.ERROR)  # the first says it for all
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if count() > 1 and device.type == "cuda" else device


def _leave() -> None:
    """Give the threads of gloo the time to let go of their last tensors.

    Each needs the interpreter for it, and aborts the process if there is none any more; nothing tells when they are
    done, and they outlive the group (torch 2.13).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_FAREWELL)


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0. The first writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Is this the one that writes?"""
    return rank() == 0


def wait() -> None:
    """For the others to come here too."""
    if count() > 1:
        dist.barrier()


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder, once for all processes."""
    with locked(folder) if first() else contextlib.nullcontext():
        yield
        wait()


def alone(action: Callable[[], Any]) -> Any:
    """What the first process finds by `action`, plain data, told to all."""
    found = [action() if first() else None]
    if count() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def largest(*values: float) -> list[float]:
    """The largest over the processes of each value; what all of them must decide alike is decided by this."""
    if count() == 1:
        return list(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def collected(items: Sequence[Any]) -> list[Any]:
    """The items of a list of which process r has done r, r + n, r + 2 n, ...: all of them in their order."""
    if count() == 1:
        return list(items)
    parts: list[Sequence[Any]] = [()] * count()
    dist.all_gather_object(parts, items)
    longest = max(map(len, parts))
    return [part[index] for index in range(longest) for part in parts if index < len(part)]


def whole(values: Any) -> Any:
    """The values of all processes' samples: tensors (b, ...) -> (n * b, ...), alone or in a mapping.

    The gradient flows to the samples of this process; those of the others get theirs there.
    """
    if count() == 1:
        return values
    if isinstance(values, Mapping):
        return {name: whole(value) for name, value in values.items()}
    own: Tensor = values.contiguous()
    parts = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(parts, own.detach())
    parts[rank()] = own
    return torch.cat(parts)


def samples(batch: int, parts: int) -> list[slice]:
    """Which samples of a batch this process computes, in each of the parts that are computed one after the other.

    Neighbours go to different parts, since the patches around a class are the last of a batch.

    Raises:
        InputError: they cannot all have equally many.

    Example:
        >>> samples(6, 2)
        [slice(0, 6, 2), slice(1, 6, 2)]
    """
    shares = parts * count()
    if batch % shares:
        text = f" of {parts} parts" if parts > 1 else ""
        what = f"a batch of {batch} cannot be split evenly over {count()} processes{text}"
        raise InputError(what, f"set patch.batch to a multiple of {shares}")
    return [slice(part + parts * rank(), batch, shares) for part in range(parts)]


def shard(model: nn.Module, device: torch.device) -> None:
    """Share out a network's parameters, and so their gradients and the optimiser's state, over the processes (FSDP).

    Each stage of the encoder and each step of the decoder is put together when it is needed, and the rest at once.
    Done before the optimiser is made, for the parameters are new ones.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, for it takes long to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    for name, part in model.named_modules():
        if re.fullmatch(r"(encoder|decoder)\.\w+\.\d+", name):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def like(value: Tensor, other: Tensor) -> Tensor:
    """`value`, which every process has in full, shared out as `other` is."""
    if not hasattr(other, "full_tensor") or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


def full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which each process may hold a shard, put together."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
