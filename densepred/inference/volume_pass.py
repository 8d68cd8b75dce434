"""One image through normalisation, to the model's grid, through the network, and back to its own grid."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from densepred.cases.regrid import Kernel, Regrid, kernels_for
from densepred.cases.resample import resampled_shape
from densepred.inference.blocks import in_blocks
from densepred.inference.forward import Model
from densepred.inference.outputs import Predicted
from densepred.inference.reduce import split
from densepred.inference.resample import Resampled, resample_slabs
from densepred.inference.slices import Shared, across, averaged, summed, with_axis
from densepred.inference.sliding_window import Part, Progress, Slab, SlidingWindowInferer, Source
from densepred.inference.window_pass import WindowPass


@dataclass(frozen=True)
class Way:
    """How an image is gone through: as it is, or a volume as planes across an axis.

    Attributes:
        axis: that of the volume which planes lie across; None: as it is.
        model_shape: spatial shape of the image on the grid of the model.
        there, back: the filters of the axes to that grid and from it; by default linear.
    """

    axis: int | None
    model_shape: tuple[int, ...]
    there: tuple[Kernel, ...] | None = None
    back: tuple[Kernel, ...] | None = None

    def laid(self, inferer: SlidingWindowInferer, models: Sequence[Model]) -> tuple[SlidingWindowInferer, list[Model]]:
        """Windows and models for this way."""
        if self.axis is None:
            return inferer, list(models)
        return across(inferer, models, self.axis, self.model_shape[self.axis])


class VolumePass:
    """What is predicted of one image, whole or part by part.

    Args:
        source: the image as the network sees it, but for its grid.
        spacing: of its voxels.
        wanted: spacing that the model sees, None for that of the image; without the axis that planes lie across.
        blocks: pixels along a side of the blocks that the result is averaged over.
        slices: how a volume is given to a model of planes: across this axis, or across "all", of which the mean is
            taken; None: images have as many axes as the model.
        name: of the image, for messages.
        resampling: how the image gets to the spacing of the model, and the result back; see `kernels_for`.
        temperature: by which logits are divided for probabilities.

    Attributes:
        shape: spatial shape of the image.
        result_shape: the same in blocks.
        ways: how it is gone through.
    """

    def __init__(
        self,
        source: Validated,
        spacing: Sequence[float],
        wanted: Sequence[float] | None = None,
        blocks: int = 1,
        slices: int | str | None = None,
        name: str = "image",
        resampling: str = "linear",
        temperature: float = 1.0,
    ) -> None:
        self.source, self.blocks, self.name, self.temperature = source, blocks, name, temperature
        self.channels, *shape = source.shape
        self.shape = tuple(shape)
        before = len(shape) - 2
        self.result_shape = (*shape[:before], *(size // blocks for size in shape[before:]))
        axes: Sequence[int | None] = (0, 1, 2) if slices == "all" else (None if slices is None else int(slices),)
        self.ways = [self._way(spacing, wanted, axis, resampling) for axis in axes]

    def _way(self, spacing: Sequence[float], wanted: Sequence[float] | None, axis: int | None, resampling: str) -> Way:
        if wanted is None:
            return Way(axis, self.shape)
        target = wanted if axis is None else with_axis(wanted, axis, spacing[axis])
        there, back = (kernels_for(resampling, spacing, target, labels) for labels in (False, True))
        return Way(axis, resampled_shape(self.shape, spacing, target), there, back)

    def on_image(self, part: Part) -> Part:
        """The part of the image that a part of the result comes from."""
        along = self.blocks if len(self.shape) == 2 else 1
        (z0, z1), (y0, y1) = part
        return Part((z0 * along, z1 * along), (y0 * self.blocks, y1 * self.blocks))

    def windows(self, inferer: SlidingWindowInferer, part: Part) -> int:
        """How many windows it takes to predict a part of the result."""
        image = self.on_image(part)
        grids = [way.laid(inferer, [])[0].grid(way.model_shape) for way in self.ways]
        parts = [self._needed(way, image) for way in self.ways]
        return sum(grid.count(*one) for grid, one in zip(grids, parts, strict=True))

    @property
    def rings(self) -> int:
        """The planes of all channels that the filters of resampling need at a time beyond those of linear ones."""
        moved = [way for way in self.ways if way.there and way.model_shape != self.shape]
        grids = [
            (Regrid(self.shape, way.model_shape, kernels=kernels).depth for kernels in (way.there, None))
            for way in moved
        ]
        return sum(max(depth - linear, 0) for depth, linear in grids)

    def planes(
        self,
        ready: Sequence[tuple[SlidingWindowInferer, Sequence[Model]]],
        part: Part,
        progress: Progress | None = None,
        invalid: dict[int, int] | None = None,
    ) -> Iterator[Predicted]:
        """Yield finished planes of a part of the result, as soon as no later window can change them.

        Args:
            ready: for each way what `Way.laid` gives, on one device, and the models there.
            part: of the result.
            progress: called with the windows done and all of this part.
            invalid: filled with plane -> number of invalid pixels in this part of it, added to what is there.
        """
        image = self.on_image(part)
        source = Screened(self.source, image.lines, invalid)
        passes = self._passes(ready, source, image)
        hooks = [None] * len(passes) if progress is None else summed(progress, [one.windows for one, _ in passes])
        streams = [self._slabs(one, back, image, hook) for (one, back), hook in zip(passes, hooks, strict=True)]
        with closing(streams[0] if len(streams) == 1 else averaged(streams)) as slabs:
            parts = ((a, b, split(slab, ready[0][0].variance)) for a, b, slab in slabs)
            heat = self.temperature
            planes = (Predicted(a, b, logits, source.invalid(a, b), spread, heat) for a, b, (logits, spread) in parts)
            yield from planes if self.blocks == 1 else in_blocks(planes, self.blocks, part.planes[0])

    def _passes(
        self, ready: Sequence[tuple[SlidingWindowInferer, Sequence[Model]]], source: Source, image: Part
    ) -> list[tuple[WindowPass, Regrid | None]]:
        """Of each way, with what leads back to the image's grid."""
        parts = [self._needed(way, image) for way in self.ways]
        views: Sequence[Source] = [source]
        if len(self.ways) > 1:
            laid = zip(self.ways, ready, parts, strict=True)
            start = min(self._first(way, inferer, part) for way, (inferer, _), part in laid)
            views = Shared(source, len(self.ways), start).views
        passes: list[tuple[WindowPass, Regrid | None]] = []
        for way, (inferer, models), part, view in zip(self.ways, ready, parts, views, strict=True):
            assert inferer.device is not None
            device, moved = torch.device(inferer.device), way.model_shape != self.shape
            seen = Resampled(view, way.model_shape, device, way.there) if moved else view
            passes.append((inferer.passing(models, seen, part), self._back(way, image, device) if moved else None))
        return passes

    def _slabs(
        self, one: WindowPass, back: Regrid | None, image: Part, progress: Progress | None
    ) -> Generator[Slab, None, None]:
        with closing(one.slabs(progress)) as slabs:
            yield from slabs if back is None else resample_slabs(slabs, back, image.planes[1])

    def _needed(self, way: Way, image: Part) -> Part:
        """The part of the model's grid that a part of the image comes from."""
        if way.model_shape == self.shape:
            return image
        back = self._back(way, image, torch.device("cpu"))
        return Part((back.read, back.reach(image.planes[1])), back.lines_needed)

    def _back(self, way: Way, image: Part, device: torch.device) -> Regrid:
        """From the model's grid to a part of the image's."""
        back = Regrid(way.model_shape, self.shape, device, image.lines, way.back)
        back.restart(image.planes[0])
        return back

    def _first(self, way: Way, inferer: SlidingWindowInferer, part: Part) -> int:
        """A plane of the image before which none is read for a part of the model's grid."""
        axis = inferer.grid(way.model_shape).axes[0]
        start = axis.starts[axis.touching(part.planes[0] + axis.before, part.planes[1] + axis.before)[0]]
        if way.model_shape[0] == self.shape[0]:
            return start
        return Regrid(self.shape, way.model_shape, kernels=way.there).first(start)


class Validated(Protocol):
    """An image (C, *spatial) that tells which of its voxels are valid, such as `NormalizedVolume`."""

    @property
    def shape(self) -> Sequence[int]: ...

    def read(self, key: Any, /) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Planes `[:, z0:z1]` (C, n, *rest), and bool (n, *rest) which are valid in all channels; None if all are."""


class Screened:
    """A normalised image that remembers the invalid pixels of the planes it has read until they are asked for.

    Args:
        source: the image.
        lines: those along axis 1 of which invalid pixels are remembered.
        counts: plane -> number of invalid pixels; what is asked for is added to it.
    """

    def __init__(self, source: Validated, lines: tuple[int, int], counts: dict[int, int] | None = None) -> None:
        self.source, self.shape = source, tuple(source.shape)
        self.counts = {} if counts is None else counts
        self._lines, self._planes = slice(*lines), dict[int, NDArray[np.bool_]]()

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Planes `[:, z0:z1]`, read forward."""
        values, valid = self.source.read(key)
        if valid is not None:
            start = key[1].start or 0
            for z, plane in enumerate(valid[:, self._lines], start):
                if not plane.all():
                    self._planes[z] = ~plane
        return values

    def invalid(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Bool (n, lines, *rest) of planes that were read; None where all pixels are valid."""
        found = {z: self._planes.pop(z) for z in range(start, stop) if z in self._planes}
        if not found:
            return None
        out = np.zeros((stop - start, *next(iter(found.values())).shape), bool)
        for z, plane in found.items():
            out[z - start] = plane
            self.counts[z] = self.counts.get(z, 0) + int(plane.sum())
        return out
