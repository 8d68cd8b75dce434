"""2D models on volumes: plane by plane across any axis, or across all three with the mean of their logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from densepred.inference.forward import Model, pick
from densepred.inference.sliding_window import Progress, Slab, SlidingWindowInferer, Source, as_float
from densepred.inference.windows import MAPS

Number = TypeVar("Number", int, float)


class Slicewise(nn.Module):
    """A 2D model that takes windows of volumes, each plane across an axis as an image of its own.

    Args:
        model: maps (B, C, *image) to logits (B, K, *image), or to a dict of such.
        axis: of the volume; the planes hold the other two, in their order.
        output: the name of the output to take of a dict; by default its first.

    Example:
        >>> Slicewise(nn.Conv2d(1, 3, 3, padding=1), axis=1)(torch.zeros(2, 1, 8, 4, 9)).shape
        torch.Size([2, 3, 8, 4, 9])
    """

    def __init__(self, model: Model, axis: int, output: str | None = None) -> None:
        super().__init__()
        if axis not in (0, 1, 2):
            raise ValueError(f"axis must be 0, 1 or 2, got {axis!r}")
        self.model, self._dim, self._output = model, axis + 2, output
        self.training = getattr(model, "training", False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Z, Y, X) -> logits (B, K, Z, Y, X)."""
        images = x.movedim(self._dim, 1)
        logits = pick(self.model(images.flatten(0, 1)), self._output)
        return logits.unflatten(0, images.shape[:2]).movedim(1, self._dim)


def across(
    inferer: SlidingWindowInferer, models: Sequence[Model], axis: int, size: int
) -> tuple[SlidingWindowInferer, list[Model]]:
    """An inferer and models of planes as those of volumes, whose windows hold whole planes across `axis`.

    As many planes make a window as images a batch, side by side without overlap; where they do not come out even, some
    planes are predicted twice, with the same result. MONAI's map of weights, which is no product over the axes, is
    taken plane by plane.

    Args:
        inferer: its window, overlap, mirrored axes and multiple are those of planes.
        models: of planes.
        axis: of the volume.
        size: of the volume along it.
    """
    others = [other for other in range(3) if other != axis]
    count = -(-size // inferer.batch)
    thick = 1 if inferer.blend in MAPS else -(-size // count)
    laid = replace(
        inferer,
        window=with_axis(inferer.window, axis, thick),
        overlap=with_axis(inferer.overlap, axis, 0.0),
        multiple=with_axis(inferer.multiple, axis, 1),
        mirror_axes=tuple(others[of_plane] for of_plane in inferer.mirror_axes),
        batch=inferer.batch if thick == 1 else 1,
    )
    return laid, [Slicewise(model, axis, inferer.output) for model in models]


def stream(
    inferer: SlidingWindowInferer,
    model: Model,
    source: Source,
    slices: int | str | None,
    progress: Progress | None = None,
) -> Generator[Slab, None, None]:
    """Logits of an image by a model of as many axes; or, where `slices` is an axis or "all", of a volume by one of
    planes.

    Args:
        inferer: its window, overlap, mirrored axes and multiple are those that the model takes.
        model: maps (B, C, *window) to logits (B, K, *window), or to a dict of such.
        source: the image, (C, *spatial).
        slices: the axis of the volume that planes lie across, "all" for the mean of the three; None: it is no volume
            for a model of planes.
        progress: called with the windows done and all windows.

    Yields:
        (z0, z1, slab), as `SlidingWindowInferer.stream`.

    Example:
        >>> model, image = nn.Conv2d(1, 3, 3, padding=1), torch.zeros(1, 4, 8, 9)
        >>> inferer = SlidingWindowInferer((8, 8), device="cpu")
        >>> sum(slab.shape[1] for _, _, slab in stream(inferer, model, image, "all"))
        4
    """
    if slices is None:
        return inferer.stream(model, source, progress)
    axes = (0, 1, 2) if slices == "all" else (int(slices),)
    views: Sequence[Source] = Shared(source, len(axes)).views if len(axes) > 1 else [source]
    laid = [across(inferer, [model], axis, source.shape[1 + axis]) for axis in axes]
    passes = [one.passing(models, view) for (one, models), view in zip(laid, views, strict=True)]
    hooks = [None] * len(axes) if progress is None else summed(progress, [each.windows for each in passes])
    streams = [each.slabs(hook) for each, hook in zip(passes, hooks, strict=True)]
    return streams[0] if len(streams) == 1 else averaged(streams)


def with_axis(plane: Number | Sequence[Number], axis: int, across: Number) -> tuple[Number, ...]:
    """One number for each axis of a volume, from one for both or for each of a plane's, and that across it."""
    given: list[Number] = list(plane) if isinstance(plane, Sequence) else [plane, plane]
    given.insert(axis, across)
    return tuple(given)


def summed(progress: Progress, totals: Sequence[int]) -> list[Progress]:
    """A hook for each of several streams; together they tell `progress` of all windows."""
    done = [0] * len(totals)

    def of(number: int) -> Callable[[int, int], None]:
        def hook(now: int, _: int) -> None:
            done[number] = now
            progress(sum(done), sum(totals))

        return hook

    return [of(number) for number in range(len(totals))]


def averaged(streams: Sequence[Generator[Slab, None, None]]) -> Generator[Slab, None, None]:
    """The mean of several streams of slabs along axis 0 of one volume, in lockstep, whatever their thickness.

    A stream is asked for its next slab when the last one is used up, so that one slab of each is held.

    Args:
        streams: of (z0, z1, slab (K, z1 - z0, *rest)), each in order from the same plane.

    Raises:
        ValueError: they do not cover the same planes.

    Example:
        >>> thin = ((z, z + 1, torch.full((1, 1), 0.0)) for z in range(4))
        >>> thick = ((z, z + 2, torch.full((1, 2), 1.0)) for z in (0, 2))
        >>> [(z0, z1, slab.tolist()) for z0, z1, slab in averaged([thin, thick])][-1]
        (3, 4, [[0.5]])
    """
    held: list[Slab | None] = [None] * len(streams)
    done: int | None = None
    with ExitStack() as stack:
        ways = [stack.enter_context(closing(one)) for one in streams]
        while True:
            for number, way in enumerate(ways):
                held[number] = next(way, None) if (now := held[number]) is None or now[1] == done else now
            slabs = [slab for slab in held if slab is not None]
            if not slabs:
                return
            done = slabs[0][0] if done is None else done
            if len(slabs) < len(held) or any(not start <= done < stop for start, stop, _ in slabs):
                raise ValueError(f"streams must cover the same planes, got others from plane {done} on")
            end = min(stop for _, stop, _ in slabs)
            parts = [slab[:, done - start : end - start] for start, _, slab in slabs]
            yield done, end, sum(parts[1:], parts[0]) / len(parts)
            done = end


class Shared:
    """A source that is read forward once for several readers, each at its own place.

    Held are the planes from the slowest reader to the fastest, in blocks as they were read.

    Args:
        source: (C, *spatial).
        readers: how many.
        start: the first plane that any of them reads.

    Attributes:
        views: a source for each reader, to be read forward as `view[:, z0:z1]`; they may be in threads of their own.
    """

    def __init__(self, source: Source, readers: int, start: int = 0) -> None:
        self._source, self._lock = source, threading.Lock()
        self._blocks: list[tuple[int, Tensor]] = []
        self._done = [start] * readers
        self.views = [_View(self, number, tuple(source.shape)) for number in range(readers)]

    @property
    def held(self) -> int:
        """Planes in memory."""
        return sum(block.shape[1] for _, block in self._blocks)

    def read(self, reader: int, start: int, stop: int) -> Tensor:
        """Planes of one reader, (C, stop - start, *rest) float32.

        Raises:
            ValueError: they lie before those it has read.
        """
        with self._lock:
            if not self._done[reader] <= start < stop:
                raise ValueError(f"planes must be read forward from {self._done[reader]}, got {start}..{stop}")
            known = self._blocks[-1][0] + self._blocks[-1][1].shape[1] if self._blocks else max(self._done)
            if known < stop:
                self._blocks.append((known, as_float(self._source[:, known:stop])))
            parts = [block[:, max(start - z, 0) : max(stop - z, 0)] for z, block in self._blocks]
            self._done[reader] = stop
            slowest = min(self._done)
            self._blocks = [(z, block) for z, block in self._blocks if z + block.shape[1] > slowest]
        parts = [part for part in parts if part.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _View:
    """What one reader of a shared source sees."""

    def __init__(self, shared: Shared, number: int, shape: tuple[int, ...]) -> None:
        self._shared, self._number, self.shape = shared, number, shape

    def __getitem__(self, key: Any) -> Tensor:
        """Planes `[:, z0:z1]`."""
        start, stop, _ = key[1].indices(self.shape[1])
        return self._shared.read(self._number, start, stop)
