"""Many images, the small ones together in calls of the network, each as by itself."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from densepred.device import freed, is_exhausted, pick_precision
from densepred.errors import ResourceError
from densepred.inference.forward import Forward
from densepred.inference.images import predict_images
from densepred.inference.outputs import Predicted
from densepred.inference.reduce import split
from densepred.inference.volume_pass import VolumePass
from densepred.volumes import Volume

if TYPE_CHECKING:
    from densepred.inference.compute import Compute

_LOG = logging.getLogger(__name__)


def small(image: VolumePass, compute: Compute) -> bool:
    """Whether a window holds all of an image."""
    (way, *others) = image.ways
    return (
        not others
        and way.axis is None
        and image.blocks == 1
        and way.model_shape == image.shape
        and len(compute.inferer.grid(image.shape)) == 1
    )


def in_batches(
    images: Iterable[tuple[Volume, VolumePass]],
    compute: Compute,
    large: Callable[[Volume], Iterator[Predicted]],
) -> Iterator[tuple[Volume, Iterator[Predicted]]]:
    """Predict images in their order, as many small ones in a call of the network as `compute` has windows in a batch.

    Args:
        images: each with its way to the network.
        compute: the network.
        large: predicts one that is not small.

    Yields:
        Each volume with its finished planes.
    """
    waiting: deque[tuple[Volume, VolumePass]] = deque()
    window: tuple[int, ...] = ()
    for volume, image in images:
        fits = small(image, compute)
        own = compute.inferer.grid(image.shape).window if fits else ()
        if waiting and (own != window or not fits):
            yield from _together(waiting, compute)
        if not fits:
            yield volume, large(volume)
            continue
        window = own
        waiting.append((volume, image))
        if len(waiting) == compute.inferer.batch:
            yield from _together(waiting, compute)
    yield from _together(waiting, compute)


def _together(
    waiting: deque[tuple[Volume, VolumePass]], compute: Compute
) -> Iterator[tuple[Volume, Iterator[Predicted]]]:
    """Predict what waits in one call, or where memory runs out in several, and on the CPU at last.

    Raises:
        ResourceError: a single image is too large.
    """
    while waiting:
        try:
            yield from _in_calls(waiting, compute)
        except (MemoryError, RuntimeError) as error:
            if not is_exhausted(error):
                raise
            reason = str(error).partition("\n")[0] or "of the machine"
        if waiting:  # here, where the error no longer holds on to what filled the memory
            freed(compute.device)
            less = compute.smaller() or (compute.fallback() if compute.fallback else None)
            if less is None:
                fix = "give more memory, or lower inference.window"
                raise ResourceError(f"the memory is exhausted ({reason})", fix, waiting[0][0].path)
            compute = less
            told = f"batch {compute.inferer.batch} on {compute.device}"
            _LOG.warning("memory ran out (%s): went on with %s", reason, told)


def _in_calls(
    waiting: deque[tuple[Volume, VolumePass]], compute: Compute
) -> Iterator[tuple[Volume, Iterator[Predicted]]]:
    """Predict what waits, as many in a call as `compute` has windows in a batch."""
    (_, first), count = waiting[0], len(waiting)
    heat = first.temperature
    ready = compute.ready(first.channels, first.ways[0], count)
    inferer, precision = ready.inferer, pick_precision(compute.inferer.precision, compute.device)
    forward = Forward(ready.models, inferer.mirror_axes, inferer.output, inferer.spread, precision)
    shape = (inferer.batch, first.channels, *inferer.grid(first.shape).window)
    read = [image.source.read((slice(None), slice(0, image.shape[0]))) for _, image in waiting]
    logits = predict_images(forward, shape, [values for values, _ in read], compute.device, inferer.border)
    for (values, valid), slab in zip(read, logits, strict=True):
        volume, _ = waiting[0]
        if not bool(slab.isfinite().all()):
            waiting.popleft()
            what = "the logits are not all finite, though its input is"
            raise ResourceError(what, "check the weights of the model, or predict in float32", volume.path)
        invalid: NDArray[np.bool_] | None = None if valid is None or valid.all() else ~valid
        mean, spread = split(slab, inferer.variance)
        waiting.popleft()  # now that nothing is left to fail
        yield volume, iter([Predicted(0, values.shape[1], mean, invalid, spread, heat)])


def counting(planes: Iterable[Predicted], counted: list[int]) -> Iterator[Predicted]:
    """The same planes; the numbers of their invalid pixels go to `counted`."""
    for part in planes:
        counted.append(0 if part.invalid is None else int(part.invalid.sum()))
        yield part
