"""Transforms of the library albumentations, by name, for 2D."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densepred.augment.draws import Numbers
from densepred.config.transforms import Albumentations
from densepred.errors import InputError

_HIDDEN = ("Lambda",)
"""Takes functions, which are no plain values."""


class ImageTransform:
    """One of albumentations' transforms.

    It sees the intensities of a sample scaled to 0..1 by their smallest and largest value over all channels, which is
    undone afterwards. Labels and flags go along as masks: what comes from outside has label -1 and flag 0. It runs on
    the CPU, sample by sample, seeded by the sample.

    Args:
        settings: its name and arguments.

    Raises:
        InputError: albumentations is missing, has no such transform, or the arguments are not those it takes.

    Example:
        >>> transform = ImageTransform(Albumentations(name="Transpose"))  # doctest: +SKIP
    """

    def __init__(self, settings: Albumentations) -> None:
        self.settings = settings
        library = _library()
        kind = _find(library, settings.name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # the library warns of arguments that it does not know
                made = kind(**settings.arguments, p=1.0)
        except Exception as error:
            text = str(error).partition("\n")[0]
            what = f"augment: albumentations.{settings.name} does not take {settings.arguments}: {text}"
            raise InputError(what, "see the library's documentation for its arguments") from error
        self._run = library.Compose([made])

    def __call__(self, image: Tensor, label: Tensor, numbers: Numbers, flags: Sequence[int]) -> None:
        """Change one sample in place: image (C, Y, X), label (Y, X) integers or (T, Y, X) float, or a number."""
        fires, seed = numbers.fires(self.settings.probability), numbers.seed()
        if not fires:
            return
        values = image.detach().cpu().numpy()
        channels = [c for c in range(len(values)) if c not in flags]
        low, high = values[channels].min(), values[channels].max()
        span = max(float(high - low), 1e-7)
        scaled = np.ascontiguousarray(np.moveaxis((values[channels] - low) / span, 0, -1), np.float32)
        masks = [values[c] for c in flags] + _masks(label)
        self._run.set_random_seed(seed % 2**32)
        try:
            done: dict[str, Any] = self._run(image=scaled, **({"masks": np.stack(masks)} if masks else {}))
        except Exception as error:  # such as images with more channels than it can do
            what = f"augment: albumentations.{self.settings.name} failed on {scaled.shape}: {str(error).strip()}"
            raise InputError(what, "leave it out, or give it other arguments") from error
        moved = np.asarray(done["image"], np.float32)
        moved = moved[..., None] if moved.ndim == 2 else moved  # some drop a single channel
        if moved.shape != scaled.shape:
            what = (
                f"augment: albumentations.{self.settings.name} changes the shape from {scaled.shape} to {moved.shape}"
            )
            raise InputError(what, "give it arguments that keep the patch's size, or leave it out")
        image[channels] = torch.from_numpy(np.moveaxis(moved, -1, 0) * span + low).to(image)
        if masks:
            back = torch.from_numpy(np.stack(list(done["masks"])))
            for place, flag in enumerate(flags):
                image[flag] = back[place].to(image)
            _put_back(label, back[len(flags) :])


def _masks(label: Tensor) -> list[np.ndarray]:
    """Labels so that 0 stands for -1, since 0 is what comes from outside; maps, then where each is known."""
    if label.ndim == 0:
        return []
    if label.is_floating_point():
        maps = label.detach().float().cpu().numpy()
        known = np.isfinite(maps)
        return [*np.where(known, maps, 0).astype(np.float32), *known.astype(np.float32)]
    return [(label + 1).cpu().numpy().astype(np.float32)]


def _put_back(label: Tensor, masks: Tensor) -> None:
    if label.ndim == 0:
        return
    if label.is_floating_point():
        maps, known = masks.to(label).chunk(2)
        label.copy_(maps.masked_fill(known < 1, float("nan")))
    else:
        label.copy_((masks[0] - 1).to(label))


def _library() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the internet for newer versions
    try:
        import albumentations
    except ImportError as error:
        what = f"augment: a transform of albumentations needs that library ({error})"
        raise InputError(what, "install it: pip install 'densepred[image2d]'") from error
    return albumentations


def _find(library: Any, name: str) -> Any:
    """A class of transforms in the library's own namespace; nothing else can be named."""
    known = {
        key: kind
        for key, kind in vars(library).items()
        if isinstance(kind, type)
        and issubclass(kind, library.BasicTransform)
        and kind.__module__.startswith("albumentations.augmentations.")
        and key not in _HIDDEN
    }
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        near = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(
            f"augment: albumentations has no transform {name!r}{near}", "see its documentation for the names"
        )
    return known[name]
