"""One image through normalisation, to the model's grid, through the network, and back to its own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from densepred.cases.plan import Plan
from densepred.cases.preprocess import NormalizedVolume, normalized
from densepred.cases.regrid import Regrid
from densepred.cases.resample import resampled_shape
from densepred.inference.blocks import in_blocks
from densepred.inference.forward import Model
from densepred.inference.outputs import Predicted
from densepred.inference.reduce import split
from densepred.inference.resample import Resampled, resample_slabs
from densepred.inference.sliding_window import Part, Progress, Slab, SlidingWindowInferer
from densepred.volumes import Volume
from densepred.volumes.grid import Box


class VolumePass:
    """What is predicted of one image, whole or part by part.

    Making one reads the image once, for what normalises it and to verify the file.

    Args:
        volume: `(C, *spatial)`.
        plan: what the model knows of its training data.
        box: the part of the image to predict; all by default.
        blocks: pixels along a side of the blocks that the result is averaged over.

    Attributes:
        name: of the image, for messages.
        shape: spatial shape of the image, or of the box.
        model_shape: the same on the grid of the model.
        result_shape: the same in blocks.

    Raises:
        InputError: too few valid pixels, or a damaged file.
    """

    def __init__(self, volume: Volume, plan: Plan, box: Box | None = None, blocks: int = 1) -> None:
        whole = normalized(volume, plan)
        self.source = whole if box is None else whole.cutout(box)
        self.blocks, self.name = blocks, str(volume.path or "image")
        self.channels, *shape = self.source.shape
        self.shape = tuple(shape)
        spacing = plan.spacing
        self.model_shape = resampled_shape(self.shape, volume.spacing, spacing) if spacing else self.shape
        before = len(shape) - 2
        self.result_shape = (*shape[:before], *(size // blocks for size in shape[before:]))

    def on_image(self, part: Part) -> Part:
        """The part of the image that a part of the result comes from."""
        along = self.blocks if len(self.shape) == 2 else 1
        (z0, z1), (y0, y1) = part
        return Part((z0 * along, z1 * along), (y0 * self.blocks, y1 * self.blocks))

    def on_model_grid(self, part: Part) -> Part:
        """The part of the model's grid that a part of the result comes from."""
        image = self.on_image(part)
        return image if self.model_shape == self.shape else _needed(self._back(image, torch.device("cpu")), image)

    def planes(
        self,
        inferer: SlidingWindowInferer,
        models: list[Model],
        part: Part,
        progress: Progress | None = None,
        screened: Callable[[int], None] | None = None,
    ) -> Iterator[Predicted]:
        """Yield finished planes of a part of the result, as soon as no later window can change them.

        Args:
            inferer: it has a device.
            models: which are there.
            part: of the result.
            progress: called with the windows done and all of this part.
            screened: called at the end with the number of invalid pixels.
        """
        assert inferer.device is not None
        device, image, source = torch.device(inferer.device), self.on_image(part), Screened(self.source)
        slabs: Iterator[Slab]
        if self.model_shape == self.shape:
            slabs = inferer.stream(models, source, progress, image)
        else:
            back = self._back(image, device)
            moved = Resampled(source, self.model_shape, device)
            slabs = resample_slabs(inferer.stream(models, moved, progress, _needed(back, image)), back, image.planes[1])
        lines = slice(*image.lines)
        parts = ((a, b, split(slab, inferer.variance)) for a, b, slab in slabs)
        planes = (
            Predicted(z0, z1, logits, source.invalid(z0, z1, lines), spread) for z0, z1, (logits, spread) in parts
        )
        yield from planes if self.blocks == 1 else in_blocks(planes, self.blocks, part.planes[0])
        if screened is not None:
            screened(source.count)

    def _back(self, image: Part, device: torch.device) -> Regrid:
        """From the model's grid to a part of the image's."""
        back = Regrid(self.model_shape, self.shape, device, image.lines)
        back.restart(image.planes[0])
        return back


def _needed(back: Regrid, image: Part) -> Part:
    """The part of the model's grid that a part of the image is resampled from."""
    return Part((back.read, back.reach(image.planes[1])), back.lines_needed)


class Screened:
    """A normalised volume that remembers the invalid pixels of the planes it has read until they are asked for."""

    def __init__(self, source: NormalizedVolume) -> None:
        self.source, self.shape, self.count = source, source.shape, 0
        self._planes: dict[int, NDArray[np.bool_]] = {}

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Planes `[:, z0:z1]`, read forward."""
        values, valid = self.source.read(key)
        if valid is not None:
            start = key[1].start or 0
            for z, plane in enumerate(valid, start):
                if not plane.all():
                    self._planes[z] = ~plane
        return values

    def invalid(self, start: int, stop: int, lines: slice = slice(None)) -> NDArray[np.bool_] | None:
        """Bool (n, *rest) of planes that were read, and of these some lines; None where all pixels are valid."""
        found = {z: self._planes.pop(z) for z in range(start, stop) if z in self._planes}
        if not found:
            return None
        out = np.zeros((stop - start, *self.shape[2:]), bool)
        for z, plane in found.items():
            out[z - start] = plane
        out = out[:, lines]
        self.count += int(out.sum())
        return out if out.any() else None
