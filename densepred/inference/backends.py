"""Which runtime runs the network: the one asked for, or for `auto` the fastest in a short trial, and as exact as torch.

    prepared = prepare(model, (1, 1, 96, 96, 96), device, torch.bfloat16, windows=1000)
    logits = prepared(windows)
    prepared.backend, prepared.describe()

The trial runs only where it costs less than half of what it can be hoped to save in the windows to come. Times differ
from run to run, so what has to be the same bits everywhere (shards, devices, a rerun) has to name the backend.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from densepred.errors import InputError, ResourceError
from densepred.inference.openvino_runtime import OpenVinoRuntime
from densepred.inference.runtimes import CompiledRuntime, Runtime, Task, TorchRuntime
from densepred.registry import lookup

RUNTIMES: dict[str, Callable[[nn.Module, Task], Runtime]] = {
    "torch": TorchRuntime,
    "compiled": CompiledRuntime,
    "openvino": OpenVinoRuntime,
}
GAIN = 0.95
"""Another runtime is taken if it needs less than this share of torch's time."""
LEAST = 100
"""Windows below which not even torch is timed."""
ROUNDS = 3
_FLOORS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2**-6, 2**-10), torch.float16: (2**-9, 2**-13)}
"""Differences from float32's logits, largest and mean, that are always allowed: shares of the largest logit."""


@dataclass(frozen=True)
class Hope:
    """What a trial costs, and the share of the time that it may save: about the best that was ever measured."""

    seconds: float
    forwards: int
    saves: float


HOPES = {
    ("openvino", "cpu"): Hope(3.0, 20, 0.5),
    ("compiled", "cpu"): Hope(30.0, 14, 0.1),
    ("compiled", "cuda"): Hope(45.0, 14, 0.6),
}


@dataclass(frozen=True)
class Trial:
    """What became of a candidate.

    Attributes:
        backend: its name.
        seconds: of a window, if it was timed.
        setup: seconds it took to make.
        note: why it was not taken; empty for the one that was.
    """

    backend: str
    seconds: float | None = None
    setup: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        took = [] if self.seconds is None else [f"{self.seconds * 1000:.1f} ms a window"]
        parts = [*took, *([self.note] if self.note else [])]
        return f"{self.backend}: {', '.join(parts)}" if parts else self.backend


@dataclass(frozen=True)
class Prepared:
    """A network ready for windows of one shape.

    Attributes:
        backend: the name of the runtime that runs it.
        shape: (B, C, *window), the most windows a call takes.
        trials: the runtime taken first, then the others that were looked at.
    """

    backend: str
    shape: tuple[int, ...]
    runtime: Runtime
    trials: tuple[Trial, ...]

    def __call__(self, windows: Tensor) -> Tensor:
        """(b, C, *window) float32, b <= B, on the device -> logits (b, K, *window), floating, of any memory format.

        Raises:
            ValueError: windows of another shape.
        """
        count = windows.shape[0]
        if windows.shape[1:] != self.shape[1:] or not 0 < count <= self.shape[0]:
            expected = f"(1 to {self.shape[0]}, {', '.join(map(str, self.shape[1:]))})"
            raise ValueError(f"windows must have shape {expected}, got {tuple(windows.shape)}")
        if count < self.shape[0] and self.backend != "torch":  # made for this very batch
            rest = windows.new_zeros(self.shape[0] - count, *self.shape[1:])
            return self.runtime(torch.cat([windows, rest]))[:count]
        return self.runtime(windows)

    def taking(self, shape: Sequence[int]) -> Prepared | None:
        """The same network, of the same weights, for another batch; None where it was made for this very shape."""
        if self.backend != "torch" or tuple(shape[1:]) != self.shape[1:]:
            return None
        return replace(self, shape=tuple(shape))

    def describe(self) -> str:
        """One line: what runs, and what else was looked at."""
        return f"backend {'; '.join(map(str, self.trials))}"


def prepare(
    model: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    precision: torch.dtype,
    backend: str = "auto",
    windows: int = 1,
    output: str | None = None,
) -> Prepared:
    """Get a network ready to run on many windows.

    Args:
        model: in evaluation mode, in float32, mapping (B, C, *window) to logits (B, K, *window), or to a dict of such.
            It is left as it is; what is prepared has weights of its own.
        shape: of a batch of windows, (B, C, *window).
        device: where the windows will be.
        precision: what convolutions compute in; norms' statistics and parameters stay float32.
        backend: "torch", "compiled" or "openvino"; "auto" is torch, unless a trial shows another to be faster by 5 %,
            and no further from float32's logits than one and a half times torch's in the same precision.
        windows: how many are going to be predicted: few are not worth a trial.
        output: the name of the output to take of a dict; by default its first.

    Raises:
        InputError: a backend asked for by name is not installed, or not possible here.
        ValueError: an unknown backend, or a network in training mode.

    Example:
        >>> from densepred.models.build import create_model
        >>> model = create_model(dims=2, channels=(4, 8)).eval()
        >>> prepared = prepare(model, (2, 1, 32, 32), torch.device("cpu"), torch.float32)
        >>> prepared.backend, prepared(torch.zeros(1, 1, 32, 32)).shape
        ('torch', torch.Size([1, 3, 32, 32]))
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training")
    task = Task(tuple(shape), device, precision, output)
    if backend != "auto":
        start = time.perf_counter()
        runtime = lookup(RUNTIMES, backend, "backend")(model, task)
        return Prepared(backend, task.shape, runtime, (Trial(backend, setup=time.perf_counter() - start),))
    return _Choice(model, task, windows).made()


class _Choice:
    """The trial of one network."""

    def __init__(self, model: nn.Module, task: Task, windows: int) -> None:
        self.model, self.task, self.windows = model, task, windows
        self.torch: Runtime = TorchRuntime(model, task)
        self.probes = _probes(task)  # the first is what is timed
        self._exact: list[Tensor] = []

    def made(self) -> Prepared:
        """torch, or what beat it by most."""
        names = [name for name, kind in HOPES if kind == self.task.device.type]
        if self.windows < LEAST:
            others = [Trial(name, note=f"not tried for {self.windows} windows") for name in names]
            return Prepared("torch", self.task.shape, self.torch, (Trial("torch"), *others))
        (seconds,) = self._seconds([self.torch], rounds=1)
        best, ratio, runtime = Trial("torch", seconds), GAIN, self.torch
        others = []
        for name in names:
            trial, gain, candidate = self._try(name, seconds)
            if candidate is not None and gain < ratio:
                others.append(replace(best, note=f"slower than {name}"))
                best, ratio, runtime = trial, gain, candidate
            else:
                others.append(replace(trial, note=trial.note or f"not faster than {best.backend} by enough"))
        return Prepared(best.backend, self.task.shape, runtime, (best, *others))

    def _try(self, name: str, seconds: float) -> tuple[Trial, float, Runtime | None]:
        """What became of a candidate, its time as a share of torch's, and its runtime if that may be taken.

        Args:
            name: of the candidate.
            seconds: torch's, of a window.
        """
        hope, total = HOPES[name, self.task.device.type], self.windows * seconds
        cost = hope.seconds + hope.forwards * self.task.shape[0] * seconds
        if hope.saves * total < 2 * cost:
            note = f"not tried: a trial takes about {cost:.0f} s, all windows {total:.0f} s"
            return Trial(name, note=note), math.inf, None
        start = time.perf_counter()
        try:
            runtime = RUNTIMES[name](self.model, self.task)
        except (InputError, ResourceError) as error:
            return Trial(name, note=error.what), math.inf, None
        setup = time.perf_counter() - start
        fault = self._fault(runtime)
        if fault:
            return Trial(name, None, setup, fault), math.inf, None
        ours, its = self._seconds([self.torch, runtime])
        return Trial(name, its, setup), its / ours, runtime

    def _seconds(self, runtimes: Sequence[Runtime], rounds: int = ROUNDS) -> list[float]:
        """Of a window, the shortest of rounds in which they take turns, after a call to warm up."""
        windows = self.probes[0]
        least = [math.inf] * len(runtimes)
        for runtime in runtimes:
            runtime(windows)
        for _ in range(rounds):
            for number, runtime in enumerate(runtimes):
                start = self._now()
                runtime(windows)
                least[number] = min(least[number], self._now() - start)
        return [seconds / self.task.shape[0] for seconds in least]

    def _now(self) -> float:
        """The time when the device has done its work."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()

    def _fault(self, runtime: Runtime) -> str:
        """What is wrong with its logits; empty where nothing is."""
        if not self._exact:
            single = self.task.precision == torch.float32
            full = self.torch if single else TorchRuntime(self.model, replace(self.task, precision=torch.float32))
            self._exact = [full(probe).float() for probe in self.probes]
        for probe, exact in zip(self.probes, self._exact, strict=True):
            errors, torchs = _errors(runtime(probe), exact), _errors(self.torch(probe), exact)
            floors = _FLOORS[self.task.precision]
            for error, own, floor, kind in zip(errors, torchs, floors, ("at most", "in the mean"), strict=True):
                if not error <= max(floor, 1.5 * own):  # NaN is a fault too
                    return f"its logits are off by {error:.1e} of the largest {kind}, torch's by {own:.1e}"
        return ""


def _probes(task: Task) -> list[Tensor]:
    """Windows of noise, and empty ones with a bright block in the middle."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task.shape, generator=generator)
    block = torch.zeros(task.shape)
    middle = tuple(slice(n // 4, max(n // 2, n // 4 + 1)) for n in task.shape[2:])
    block[(slice(None), slice(None), *middle)] = 3.0
    return [noise.to(task.device), block.to(task.device)]


def _errors(logits: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and mean difference, as shares of the largest logit."""
    difference, scale = (logits.float() - exact).abs(), max(float(exact.abs().max()), 1e-30)
    return float(difference.max()) / scale, float(difference.mean()) / scale
