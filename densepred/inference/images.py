"""Small images, several in one call of the network: each as by itself, but at the speed of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densepred.inference.forward import Model, pick
from densepred.inference.windows import BORDERS, WindowGrid

Image = Tensor | NDArray[np.float32]


def predict_images(
    model: Model,
    shape: Sequence[int],
    images: Iterable[Image],
    device: torch.device | None = None,
    border: str = "constant",
) -> Iterator[Tensor]:
    """Logits of images no larger than a window, as the inferer makes them of one after the other.

    As many as a call takes are read ahead, widened to the window and predicted together; the last call is filled up
    with zeros, so that every call is of the same shape.

    Args:
        model: maps windows (B, C, *window) to logits (B, K, *window).
        shape: (B, C, *window); B is how many images a call takes.
        images: (C, *spatial) float32 each, of any sizes up to the window.
        device: where the network is; by default the CPU.
        border: what small images are widened by: "constant" zeros, or "reflect".

    Yields:
        (K, *spatial) float32 for each image, in order, on the device.

    Raises:
        ValueError: an image with other channels, or larger than the window, or an unknown border.

    Example:
        >>> model = torch.nn.Conv2d(1, 3, kernel_size=3, padding=1)
        >>> (logits,) = predict_images(model, (4, 1, 32, 32), [np.zeros((1, 20, 32), np.float32)])
        >>> logits.shape
        torch.Size([3, 20, 32])
    """
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    order = iter(images)
    while several := list(islice(order, shape[0])):
        batch = torch.zeros(*shape, device=device)
        places = [_put(image, row, border) for image, row in zip(several, batch, strict=False)]
        with torch.inference_mode():
            logits = pick(model(batch), None)
        for row, place in zip(logits, places, strict=False):
            # a copy, so that an image that is kept does not keep the batch
            yield row[(slice(None), *place)].to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _put(image: Image, row: Tensor, border: str) -> tuple[slice, ...]:
    """Put an image in the middle of a window (C, *window) of zeros; returns where it lies there."""
    values = torch.as_tensor(image, dtype=torch.float32)
    window = tuple(row.shape[1:])
    fits = values.ndim == row.ndim and values.shape[0] == row.shape[0]
    if not fits or any(n > most for n, most in zip(values.shape[1:], window, strict=True)):
        raise ValueError(f"images must be ({row.shape[0]}, *spatial) within {window}, got {tuple(values.shape)}")
    axes = WindowGrid.plan(tuple(values.shape[1:]), window, 0.0).axes
    place = tuple(slice(axis.before, axis.before + axis.size) for axis in axes)
    if border == "reflect":
        for dim, axis in enumerate(axes, start=1):
            if axis.padded > axis.size:
                values = values.index_select(dim, torch.from_numpy(axis.reflected()).to(values.device))
        row.copy_(values)
    else:
        row[(slice(None), *place)] = values.to(row.device)
    return place
