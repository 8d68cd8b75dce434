"""The network on a device, what a call of it takes, and predictions that keep within the memory."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from densepred.config import Config, InferenceConfig
from densepred.device import copied_to_cpu, freed, is_exhausted, pick_precision
from densepred.errors import ResourceError
from densepred.inference import memory
from densepred.inference.backends import Prepared, prepare
from densepred.inference.forward import Forward, Model
from densepred.inference.modes import evaluating
from densepred.inference.outputs import Predicted
from densepred.inference.sliding_window import Part, Progress, SlidingWindowInferer
from densepred.inference.spool import Arrays, Spool
from densepred.inference.volume_pass import VolumePass, Way
from densepred.inference.windows import MAPS, WindowGrid
from densepred.models.dense import Model as Network

GPU_BATCH = 4
"""Windows per forward pass of a GPU, where a recipe leaves it open: so each takes least (docs/benchmarks.md)."""
READ_AHEAD = 2
"""Pieces of an image that are read before the network needs them."""
_LOG = logging.getLogger(__name__)

Reduce = Callable[[Predicted], Arrays]


@dataclass(frozen=True)
class Ready:
    """The network, ready for windows of one shape.

    Attributes:
        inferer: for these windows.
        models: to call.
        base: bytes that the program takes, or on a GPU the weights.
        fixed: bytes that these and the network at work take.
        logits: channels of the logits.
        backends: what runs each model.
    """

    inferer: SlidingWindowInferer
    models: Sequence[Model]
    base: int
    fixed: int
    logits: int
    backends: tuple[str, ...]


@dataclass
class Compute:
    """The network on a device.

    Args:
        models: several make an ensemble.
        inferer: windows, batch, precision and device.
        backend: what runs the network, see `densepred.inference.backends`.
        fallback: makes the same on the CPU, where the user has not asked for a certain device.
    """

    models: Sequence[Model]
    inferer: SlidingWindowInferer
    backend: str = "torch"
    fallback: Callable[[], Compute] | None = None
    _with_variance: Compute | None = None
    _smaller: Compute | None = None
    _ready: dict[tuple[int | None, tuple[int, ...]], Ready] = field(default_factory=dict)
    _runs: list[tuple[Model, Prepared]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        assert self.inferer.device is not None
        return torch.device(self.inferer.device)

    def ready(self, channels: int, way: Way, windows: int) -> Ready:
        """The network for windows of a way through an image, which is tried out once for each shape of windows.

        Args:
            channels: of the image.
            way: how it is gone through.
            windows: how many there will be.
        """
        inferer, models = way.laid(self.inferer, self.models)
        window = inferer.grid(way.model_shape).window
        with self._lock:
            if (way.axis, window) not in self._ready:
                self._ready[way.axis, window] = self._made(inferer, models, (inferer.batch, channels, *window), windows)
            return self._ready[way.axis, window]

    def ready_for(self, image: VolumePass) -> list[Ready]:
        """The network for each way through an image."""
        windows = image.windows(self.inferer, Part.whole(image.result_shape))
        return [self.ready(image.channels, way, windows) for way in image.ways]

    def _made(
        self, inferer: SlidingWindowInferer, models: Sequence[Model], shape: tuple[int, ...], windows: int
    ) -> Ready:
        device, precision = self.device, pick_precision(inferer.precision, self.device)
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
        with memory.peak_of(device) as peak:
            views = windows << len(inferer.mirror_axes)
            made = [self._prepared(model, shape, precision, views, inferer.output) for model in models]
            called = [model for model, _ in made]
            forward = Forward(called, inferer.mirror_axes, inferer.output, inferer.spread, precision)
            with evaluating(*called), torch.inference_mode():
                logits = forward(torch.zeros(shape, device=device)).shape[1]
            for _, described in made:
                if self.backend == "auto":
                    _LOG.info("%s", described)
            window = 4 * logits * math.prod(shape[2:])
            # a freed block that nothing else fits into may stay beside the next: the largest is that of the logits
            kept = 0 if device.type == "cuda" else shape[0] * window
            kept += 0 if inferer.skip is None else window  # of empty windows
            fixed = base + peak() + kept
            return Ready(inferer, called, base, fixed, logits, tuple(described for _, described in made))

    def _prepared(
        self, model: Model, shape: tuple[int, ...], precision: torch.dtype, windows: int, output: str | None
    ) -> tuple[Model, str]:
        if not isinstance(model, nn.Module):
            return model, "a function"
        for known, other in self._runs:  # a copy of the weights for each batch would take memory that has run out
            if known is model and (same := other.taking(shape)) is not None:
                return same, same.describe()
        prepared = prepare(model, shape, self.device, precision, self.backend, windows, output)
        self._runs.append((model, prepared))
        return prepared, prepared.describe()

    def giving_variance(self) -> Compute:
        """The same with one more channel behind the logits; the same one each time."""
        with self._lock:
            if self._with_variance is None:
                fallback = self.fallback
                varied = None if fallback is None else lambda: fallback().giving_variance()
                varying = replace(self.inferer, variance=True)
                self._with_variance = Compute(self.models, varying, self.backend, varied, _runs=self._runs)
            return self._with_variance

    def smaller(self) -> Compute | None:
        """The same with half as many windows in a call; the same one each time."""
        if self.inferer.batch == 1:
            return None
        with self._lock:
            if self._smaller is None:
                halved = replace(self.inferer, batch=self.inferer.batch // 2)
                self._smaller = Compute(self.models, halved, self.backend, self.fallback, _runs=self._runs)
            return self._smaller


@dataclass
class Report:
    """How an image was predicted.

    Attributes:
        windows: calls of the network, counted in windows.
        bands: in how many bands of lines.
        ranges: in how many ranges of planes, by as many workers.
        batch: windows in a call.
        device: where.
        foretold: bytes of the device's memory that it was to take at most.
        allowed: bytes that it was allowed to.
        backend: what runs the network.
        invalid: pixels that do not count.
        notes: what was changed on the way, because memory ran out.
    """

    windows: int = 0
    bands: int = 0
    ranges: int = 1
    batch: int = 0
    device: str = ""
    foretold: int = 0
    allowed: int = 0
    backend: str = ""
    invalid: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        bands = f" in {self.bands} bands" if self.bands > 1 else ""
        foretold, allowed = self.foretold / 1e9, self.allowed / 1e9
        return f"{self.windows} windows{bands} on {self.device}, peak memory at most {foretold:.2f} of {allowed:.2f} GB"


class WithinMemory:
    """Predicts an image within a budget of memory, in bands of lines where whole planes take too much.

    Where memory runs out all the same, smaller batches are taken, then narrower bands, then the CPU; the values stay
    those of the same windows. `report` tells what was done.

    Args:
        image: what is predicted.
        compute: the network on its device.
        budget: bytes of RAM, or of a GPU's memory; by default most of what is free.
        scratch: folder for the lines of bands until all are there.
        sharing: workers that share the budget.
        voxel: bytes of a voxel of all that `reduce` makes.
        held: bytes of the machine's memory that its results take until all are there.
    """

    def __init__(
        self,
        image: VolumePass,
        compute: Compute,
        budget: int | None,
        scratch: Path | None = None,
        sharing: int = 1,
        voxel: int = 0,
        held: int = 0,
    ) -> None:
        self.image, self.compute, self.budget, self.scratch = image, compute, budget, scratch
        self.sharing, self.voxel, self.held = sharing, voxel, held
        self.report = Report()
        self._made: list[Ready] = []
        self._narrower = 1  # bands are so many times narrower than foretold
        self._invalid: dict[int, int] = {}  # plane of the image -> pixels

    def slabs(
        self, reduce: Reduce, progress: Progress | None = None, planes: tuple[int, int] | None = None
    ) -> Generator[tuple[int, int, Arrays], None, None]:
        """Yield (z0, z1, what `reduce` makes of these planes), whole planes in order.

        Args:
            reduce: from logits to what is wanted; called for parts of planes.
            progress: called with the windows done and all.
            planes: of the result; by default all.

        Raises:
            ResourceError: the memory does not suffice for the narrowest band.
        """
        start, stop = planes or (0, self.image.result_shape[0])
        while start < stop:
            reason = None
            try:
                found = self._bands()
                level = logging.INFO if self.report.windows > 1 else logging.DEBUG  # a small image is no news
                _LOG.log(level, "%s: %s", self.image.name, self.report)
                for first, last, arrays in self._attempt(found, (start, stop), reduce, progress):
                    yield first, last, arrays
                    start = last
                    del arrays
            except (MemoryError, RuntimeError) as error:
                if not is_exhausted(error):
                    raise
                reason = str(error).partition("\n")[0] or "of the machine"
            if reason is not None:  # here, where the error no longer holds on to what filled the memory
                self._shrink(reason)

    def _bands(self) -> list[tuple[int, int]]:
        """The lines of the result, in bands that fit; what that takes goes into the report.

        Raises:
            MemoryError: none does.
        """
        image, inferer, device, report = self.image, self.compute.inferer, self.compute.device, self.report
        report.bands, report.device = 0, str(device)
        lines, every = image.result_shape[1], Part.whole(image.result_shape)
        self._made = self.compute.ready_for(image)
        grids = [way.laid(inferer, [])[0].grid(way.model_shape) for way in image.ways]
        shape = (image.channels, *image.shape)
        fixed = max(ready.fixed for ready in self._made) + memory.shared(grids, shape)
        laid = [(grid, ready.logits) for grid, ready in zip(grids, self._made, strict=True)]
        fixed += sum(memory.buffers(grid, shape, logits) for grid, logits in laid)
        fixed += memory.ring(image.rings, grids, shape)
        fixed += 0 if device.type == "cuda" else self.held
        needs = [self._needs(grid, logits) for grid, logits in laid]

        spooled = 0 if device.type == "cuda" else memory.SPOOLED * self.voxel * math.prod(image.result_shape[1:])

        def taken(width: int) -> int:
            return fixed + sum(one.bytes(width) for one in needs) + (spooled if width < lines else 0)

        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
        base = min(ready.base for ready in self._made)
        allowed = self.budget or int(used + memory.SHARE * memory.available(device))
        allowed = base + (allowed - base) // self.sharing
        widest = memory.widest(taken, lines, allowed) // self._narrower
        if widest < 1:
            raise MemoryError(f"{taken(1) / 1e9:.2f} GB of memory are needed, {allowed / 1e9:.2f} GB are allowed")
        starts = [round(start * lines / grids[0].axes[1].padded) for start in grids[0].axes[1].starts]
        found = memory.bands(lines, widest, starts)
        report.bands, report.batch = len(found), inferer.batch
        report.backend = "; ".join(dict.fromkeys(text for ready in self._made for text in ready.backends))
        report.foretold, report.allowed = taken(max(stop - start for start, stop in found)), allowed
        report.windows = sum(image.windows(inferer, Part(every.planes, band)) for band in found)
        return found

    def _needs(self, grid: WindowGrid, logits: int) -> memory.Needs:
        image, first = self.image, len(self.image.shape) == 2
        row = 1 if first else max(grid.axes[2].padded, image.shape[2])
        weights = self.compute.inferer.blend in MAPS
        return memory.needs(grid, image.result_shape[1], image.channels, logits, weights, row)

    def _attempt(
        self, bands: list[tuple[int, int]], planes: tuple[int, int], reduce: Reduce, progress: Progress | None
    ) -> Iterator[tuple[int, int, Arrays]]:
        counted = [self.image.windows(self.compute.inferer, Part(planes, band)) for band in bands]
        first = self.image.on_image(Part(planes, bands[0])).planes[0]
        self._invalid = {z: count for z, count in self._invalid.items() if z < first}

        def run(number: int) -> Iterator[Predicted]:
            before = sum(counted[:number])

            def advance(done: int, _: int) -> None:
                if progress is not None:
                    progress(before + done, sum(counted))

            part = Part(planes, bands[number])
            ready = [(each.inferer, each.models) for each in self._made]
            yield from self.image.planes(ready, part, advance, self._invalid)

        if len(bands) == 1:
            for predicted in run(0):
                yield predicted.start, predicted.stop, reduce(predicted)
        else:
            with Spool(self.scratch, planes, self.image.result_shape[1:]) as spool:
                for number, band in enumerate(bands):
                    for predicted in run(number):
                        spool.write(predicted.start, band, reduce(predicted))
                yield from spool.slabs()
        self.report.invalid = sum(self._invalid.values())

    def _shrink(self, reason: str) -> None:
        """After memory ran out: a smaller batch, else narrower bands, else the CPU.

        Raises:
            ResourceError: nothing is left to try.
        """
        freed(self.compute.device)
        smaller = self.compute.smaller()
        if smaller is not None:
            self.compute, done = smaller, f"batch {smaller.inferer.batch}"
        elif self.report.bands and self.image.result_shape[1] // (2 * self.report.bands) >= 1 and self._narrower < 64:
            self._narrower *= 2
            done = "narrower bands"
        elif self.compute.fallback is not None:
            self.compute, self._narrower, done = self.compute.fallback(), 1, "the CPU"
        else:
            fix = "give more memory (inference.memory says how much may be taken), or lower inference.window"
            raise ResourceError(f"the memory is exhausted ({reason})", fix)
        note = f"memory ran out on {self.report.device} ({reason}): went on with {done}"
        self.report.notes.append(note)
        _LOG.warning("%s: %s", self.image.name, note)


def batch_of(settings: InferenceConfig, device: torch.device) -> int:
    """Windows per forward pass."""
    if settings.batch != "auto":
        return settings.batch
    return GPU_BATCH if device.type == "cuda" else 1


def computing(models: Sequence[Network], config: Config, device: torch.device) -> Compute:
    """The networks of a recipe on a device; where that was for us to choose, on the CPU if a GPU's memory is too small.

    Args:
        models: on the device.
        config: the recipe, whose `inference` section is followed.
        device: where to compute.
    """
    settings = config.inference
    inferer = SlidingWindowInferer(
        window=settings.window or config.patch.size,
        overlap=settings.overlap,
        blend=settings.blend,
        batch=batch_of(settings, device),
        device=device,
        precision=str(pick_precision(settings.precision, device)).removeprefix("torch."),
        mirror_axes=settings.mirror,
        output=settings.head,
        multiple=common_stride(models) if settings.blend == "none" else 1,
        skip=settings.skip,
        temperature=settings.temperature,
        ahead=READ_AHEAD,
    )

    @cache
    def on_cpu() -> Compute:
        return computing([copied_to_cpu(model) for model in models], config, torch.device("cpu"))

    return Compute(
        models, inferer, settings.backend, on_cpu if settings.device == "auto" and device.type != "cpu" else None
    )


def common_stride(models: Sequence[Network]) -> tuple[int, ...]:
    """The least multiple of the coarsest strides of all, axis by axis."""
    return tuple(math.lcm(*axis) for axis in zip(*(model.stride for model in models), strict=True))
