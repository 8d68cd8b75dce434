"""A CUDA device without one: tensors of the machine's memory, computed there, that say they are on `cuda:0`.

Mixing them with tensors of the CPU is refused as CUDA does, and what would wait for the device is noted. torch's own
FakeTensorMode cannot be used: in a build without CUDA it has no generators and no layers there.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HERE = str(Path(__file__).parent.parent / "densepred")
_WAITING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "nonzero", "masked_select")
_STRICT = ("cat", "stack", "index_select", "index_copy_", "index_add_", "gather", "scatter", "scatter_add_", "where")
_TO_NUMPY = ("numpy", "__array__")
_ANYWHERE = ("_has_compatible_shallow_copy_type", "is_same_size", "set_")


class FakeGenerator(torch.Generator):
    """One that says which device it is of."""

    def __new__(cls, device: str | torch.device = "cpu") -> FakeGenerator:
        made = super().__new__(cls)
        made.of = torch.device(device)
        return made


class FakeCuda(TorchFunctionMode):
    """While it is on, `cuda:0` is a device.

    Attributes:
        waits: what waited for the device, and from where in densepred.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._there: dict[int, StorageWeakRef] = {}

    def device_of(self, x: Tensor) -> torch.device:
        if x.device.type != "cpu":
            return x.device
        found = self._there.get(x.untyped_storage()._cdata)
        return CPU if found is None else CUDA

    def _put(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            ref = StorageWeakRef(x.untyped_storage())
            self._there[ref.cdata] = ref  # which keeps the number from being given away again
        return x

    def _wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(HERE)]
        where = f"{frames[-1].filename[len(HERE) + 1 :]}:{frames[-1].lineno}" if frames else "outside"
        self.waits.append(f"{where} {what}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, args[0])
        if name == "__set__":
            return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda", "type_as"):
            return self._moved(func, name, args, kwargs)
        if name == "pin_memory":
            return args[0]
        return self._computed(func, name, args, kwargs)

    def _get(self, func: Any, x: Tensor) -> Any:
        attribute, device = func.__self__.__name__, self.device_of(x)
        if attribute == "device":
            return device
        if attribute in ("is_cuda", "is_cpu"):
            return device.type == attribute[3:]
        out = func(x)
        if isinstance(out, Tensor) and device == CUDA:  # such as the gradient
            self._put(out)
        return out

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source = self.device_of(args[0])
        others = [self.device_of(a) for a in args[1:] if isinstance(a, Tensor)]
        named = [torch.device(a) for a in (*args[1:], kwargs.get("device")) if isinstance(a, str | torch.device)]
        target = {"cpu": CPU, "cuda": CUDA}.get(name) or next(iter([*named, *others]), source)
        target = CUDA if target.type == "cuda" else target
        blocking = not (kwargs.get("non_blocking") or any(a is True for a in args[1:]))
        if source != target and CUDA in (source, target) and (blocking or target == CPU):
            self._wait(f"copy from {source.type} to {target.type}")
        args = tuple(_nowhere(a) for a in args)
        kwargs = {key: _nowhere(a) for key, a in kwargs.items()}
        out = args[0] if name in ("cpu", "cuda") else func(*args, **kwargs)
        if source != target and out.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            out = out.clone()
        return self._put(out) if target == CUDA else out

    def _computed(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        there = any(self.device_of(t) == CUDA for t in tensors)
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = _nowhere(torch.device(wanted))
            there = torch.device(wanted).type == "cuda"
            if there and name in ("tensor", "as_tensor", "asarray"):
                self._wait(f"{name} of numbers")
        elif there:
            self._check(name, args, tensors)
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "of", CPU).type != ("cuda" if there else "cpu"):
            raise RuntimeError(f"{name}: a generator of the other device")
        known = {t.untyped_storage()._cdata for t in tensors}  # of which views and changes in place stay where they are
        out = func(*args, **kwargs)
        if there:
            tree_map_only(Tensor, lambda t: t if t.untyped_storage()._cdata in known else self._put(t), out)
        return out

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Refuse tensors of both devices, and note what waits."""
        if name in _ANYWHERE:
            return
        if name in _TO_NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in _WAITING:
            self._wait(name)
        if name in ("__getitem__", "__setitem__"):
            self._index(name, args)
            return
        if name == "copy_":
            if len({self.device_of(t) for t in tensors}) > 1 and not (len(args) > 2 and args[2]):
                self._wait("copy_ between devices")
            return
        lone = [t for t in tensors if not t.ndim and self.device_of(t) == CPU and name not in _STRICT]
        rest = [t for t in tensors if not any(t is one for one in lone)]
        if len({self.device_of(t) for t in rest}) > 1:
            shapes = [(tuple(t.shape), str(self.device_of(t))) for t in tensors]
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, got {shapes}")

    def _index(self, name: str, args: Any) -> None:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        for one in index:
            if isinstance(one, list):
                self._wait(f"{name} by a list")
            elif isinstance(one, Tensor) and self.device_of(one) != self.device_of(args[0]):
                if self.device_of(args[0]) == CPU:
                    raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
                self._wait(f"{name} by a tensor of the CPU")
            elif isinstance(one, Tensor) and one.dtype == torch.bool:
                self._wait(f"{name} by a mask")
        value = args[2] if name == "__setitem__" else None
        if isinstance(value, Tensor) and self.device_of(value) != self.device_of(args[0]):
            self._wait(f"{name} of a tensor of the other device")


def _nowhere(value: Any) -> Any:
    """The same argument where there is no such device."""
    if isinstance(value, str) and value.startswith("cuda"):
        return CPU
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A machine with a CUDA device, for the time of the block, for this thread and those that begin in it."""
    autocast, nothing = torch.autocast, contextlib.nullcontext
    stream = SimpleNamespace(synchronize=lambda: None)
    fakes: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nothing(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "mem_get_info": lambda *_: (10**10, 10**10),
        "Stream": lambda *_: stream,
        "stream": lambda _: nothing(),
        "current_stream": lambda *_: stream,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    monkeypatch.setattr("densepred.augment.intensity.Generator", FakeGenerator)

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch.amp, "autocast", Autocast)
    with FakeCuda() as mode:
        grouped = clip_grad._group_tensors_by_device_and_dtype

        def groups(lists: list[list[Tensor]]) -> Any:
            device = mode.device_of(lists[0][0])
            return {(device, dtype): found for (_, dtype), found in grouped(lists).items()}

        plain = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            with mode:
                plain(thread)

        monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", groups)
        monkeypatch.setattr(threading.Thread, "run", run)
        yield mode
