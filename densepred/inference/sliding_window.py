"""The inferer: a model applied window by window to an image of any size, forward along its first axis.

Every input plane is read once, finished planes of logits are handed out while the rest of the image is still unread,
and the memory in use depends on the window and on the size of a plane, not on the number of planes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from densepred.device import PRECISIONS, pick_precision
from densepred.inference import windows
from densepred.inference.forward import Forward, Model
from densepred.inference.spool import Arrays
from densepred.inference.window_pass import Part, Progress, Slab, Source, WindowPass, as_float
from densepred.inference.windows import WindowGrid

__all__ = ["Model", "Part", "Progress", "Slab", "SlidingWindowInferer", "Source", "as_float", "home_of"]


@dataclass(frozen=True)
class SlidingWindowInferer:
    """Predicts images of any size with a model that sees one window at a time, and blends the windows.

    Args:
        window: spatial shape of a window, (Z, Y, X) or (Y, X), or one number for all axes. Where the image is smaller
            it is widened by `border`, and the logits are cropped back.
        overlap: share of a window that its neighbour covers again, one number or one per axis, in [0, 1).
        blend: weights of a window: "gaussian" (nnU-Net's), "constant", "gaussian_monai" (MONAI's, clamped at 1e-3), or
            "none": each voxel is taken from the window it lies deepest in, exactly as of the whole image where windows
            overlap by the network's receptive field and begin at multiples of its stride.
        batch: windows in one call of the model; the last call of a row of windows may have fewer.
        device: where model and windows go (the model is moved there and stays); by default where the model is.
        precision: "float32", "bfloat16" or "float16" (autocast), or "auto": bfloat16 where the hardware computes in it.
            Logits are always added up in float32.
        spacing: "even" spreads the windows evenly (nnU-Net); "fixed" moves only the last one inside (MONAI).
        border: "constant" widens small images by zeros, "reflect" by mirroring.
        mirror_axes: spatial axes to mirror; the logits are averaged over all combinations, 2^len(mirror_axes) calls.
        output: the name of the output to take of a model that returns a dict; by default its first.
        multiple: of which all windows begin, one number or one per axis; for that they grow by less than it.
        variance: append a channel to the logits: the variance of the class probabilities over models and mirrored
            views, the mean over the classes.
        temperature: by which logits are divided before they become the probabilities of `variance`.
        skip: the network is called once for all windows whose values span at most so much; 0 skips windows of one
            value and changes nothing; None calls it for every window. See `densepred.inference.empty`.
        ahead: pieces of the source that are read before they are needed, in a thread of its own; 0 reads in turn.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> model = torch.nn.Conv3d(1, 2, kernel_size=3, padding=1)
        >>> inferer = SlidingWindowInferer(window=(16, 16, 16), overlap=0.5, batch=2)
        >>> inferer(model, torch.zeros(1, 40, 20, 12)).shape
        torch.Size([2, 40, 20, 12])
    """

    window: int | Sequence[int]
    overlap: float | Sequence[float] = 0.5
    blend: str = "gaussian"
    batch: int = 1
    device: str | torch.device | None = None
    precision: str = "float32"
    spacing: str = "even"
    border: str = "constant"
    mirror_axes: Sequence[int] = ()
    output: str | None = None
    multiple: int | Sequence[int] = 1
    variance: bool = False
    temperature: float = 1.0
    skip: float | None = None
    ahead: int = 0

    def __post_init__(self) -> None:
        choices = {
            "blend": (*windows.KERNELS, *windows.MAPS),
            "precision": (*PRECISIONS, "auto"),
            "spacing": tuple(windows.SPACINGS),
            "border": windows.BORDERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.skip is not None and not self.skip >= 0:
            raise ValueError(f"skip must be None or at least 0, got {self.skip}")
        one = (self.window,) if isinstance(self.window, int) else self.window
        windows.check_windows(one, self.overlap if isinstance(self.overlap, Sequence) else (self.overlap,))

    @property
    def spread(self) -> float | None:
        """The temperature of the probabilities whose variance is asked for, if it is."""
        return self.temperature if self.variance else None

    def grid(self, shape: Sequence[int]) -> WindowGrid:
        """The windows over an image of the spatial shape `shape`."""
        return WindowGrid.plan(shape, self.window, self.overlap, self.spacing, self.multiple)

    def __call__(self, model: Model | Sequence[Model], image: Source, progress: Progress | None = None) -> Tensor:
        """Logits of a whole image: (C, *spatial) -> (K, *spatial) float32, on the image's device (a file's: the CPU).

        Raises: as `stream`.
        """
        home = image.device if isinstance(image, Tensor) else torch.device("cpu")
        logits = torch.empty(0)
        for start, stop, slab in self.stream(model, image, progress):
            if start == 0:
                logits = torch.empty(slab.shape[0], *image.shape[1:], device=home)
            logits[:, start:stop] = slab
        return logits

    def stream(
        self,
        model: Model | Sequence[Model],
        source: Source,
        progress: Progress | None = None,
        part: Part | None = None,
    ) -> Generator[Slab, None, None]:
        """Logits slab by slab along axis 0, each as soon as no later window can change it.

        Args:
            model: maps (B, C, *window) to logits (B, K, *window), or to a dict of such; of several, the mean is taken.
            source: the image, (C, *spatial); its planes are read once and in order, as `source[:, z0:z1]`.
            progress: called with the windows done and all windows after each call of the model.
            part: what is wanted of the image; by default all. Voxels have the same values in every part they are in,
                bit for bit with `batch` 1.

        Yields:
            (z0, z1, slab): planes z0..z1 as (K, z1 - z0, *rest) float32 on the device of the model.

        Raises:
            ValueError: an image that does not fit the window, or a model whose output is not of the window's size.
            InputError: NaN or infinite values in the image.
            ResourceError: NaN or infinite logits although the image is finite.
        """
        return self.passing(model, source, part).slabs(progress)

    def results(
        self,
        model: Model | Sequence[Model],
        source: Source,
        outputs: Sequence[str] = ("labels",),
        memory: int | str | None = None,
        progress: Progress | None = None,
    ) -> Generator[tuple[int, int, Arrays], None, None]:
        """Kinds of result slab by slab along axis 0, each reduced on the device and given as an array.

        Args:
            model: as for `stream`.
            source: as for `stream`.
            outputs: some of "labels" (the number of the largest logit), "probabilities" (softmax), "logits",
                "regression" (the same), "entropy" (in nats), "variance" (of the probabilities over models and mirrored
                views, the mean over the classes).
            memory: the most to take, such as "2GB", of the machine or of a GPU; by default most of what is free. Where
                whole planes take more, bands of lines are predicted one after the other and wait on disk.
            progress: as for `stream`.

        Yields:
            (z0, z1, kind -> array (C, z1 - z0, *rest)), in order.

        Raises:
            ValueError: as `stream`; an unknown kind, or no amount of memory.
            InputError: as `stream`.
            ResourceError: as `stream`; or the memory does not suffice.

        Example:
            >>> inferer = SlidingWindowInferer(window=(16, 16, 16))
            >>> model = torch.nn.Conv3d(1, 2, kernel_size=3, padding=1)
            >>> found = inferer.results(model, torch.zeros(1, 20, 20, 12), outputs=["labels", "entropy"])
            >>> [(z0, z1, arrays["labels"].shape) for z0, z1, arrays in found]
            [(0, 4, (1, 4, 20, 12)), (4, 20, (1, 16, 20, 12))]
        """
        from densepred.inference import direct  # which is built on this module

        return direct.results(self, model, source, outputs, memory, progress)

    def passing(self, model: Model | Sequence[Model], source: Source, part: Part | None = None) -> WindowPass:
        """The way of one image through the network, before its first step; see `stream`."""
        mirrored = sorted(set(self.mirror_axes))
        if mirrored and not 0 <= mirrored[0] <= mirrored[-1] < len(source.shape) - 1:
            raise ValueError(f"mirror_axes must be within 0..{len(source.shape) - 2}, got {tuple(self.mirror_axes)}")
        models = list(model) if isinstance(model, Sequence) else [model]
        device = torch.device(self.device) if self.device is not None else home_of(models[0], source)
        for each in models if self.device is not None else ():
            if isinstance(each, nn.Module):
                each.to(device)
        forward = Forward(models, mirrored, self.output, self.spread, pick_precision(self.precision, device))
        shape = source.shape[1:]
        return WindowPass(self, self.grid(shape), forward, source, device, part or Part.whole(shape))


def home_of(model: Model, source: Source) -> torch.device:
    """The device of the model's first weight; without weights, the image's; of a file, the CPU."""
    if isinstance(model, nn.Module):
        for tensor in chain(model.parameters(), model.buffers()):
            return tensor.device
    return source.device if isinstance(source, Tensor) else torch.device("cpu")
