"""The inferer: a model applied window by window to an image of any size, forward along its first axis.

Every input plane is read once, finished planes of logits are handed out while the rest of the image is still unread,
and the memory in use depends on the window and on the size of a plane, not on the number of planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.device import PRECISIONS, pick_precision
from densepred.errors import InputError, ResourceError
from densepred.inference import windows
from densepred.inference.ring import Accumulator, Ring
from densepred.inference.windows import WindowGrid

Model = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
Progress = Callable[[int, int], None]
Slab = tuple[int, int, Tensor]

READ_BYTES = 1 << 24  # of float32 planes asked of the source at a time


class Source(Protocol):
    """Anything of shape (C, *spatial) that gives `source[:, z0:z1]`: a tensor, a numpy array, a lazy volume."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, key: Any, /) -> Any: ...


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
        one = (self.window,) if isinstance(self.window, int) else self.window
        windows.check_windows(one, self.overlap if isinstance(self.overlap, Sequence) else (self.overlap,))

    def grid(self, shape: Sequence[int]) -> WindowGrid:
        """The windows over an image of the spatial shape `shape`."""
        return WindowGrid.plan(shape, self.window, self.overlap, self.spacing, self.multiple)

    def __call__(self, model: Model, image: Source, progress: Progress | None = None) -> Tensor:
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

    def stream(self, model: Model, source: Source, progress: Progress | None = None) -> Iterator[Slab]:
        """Logits slab by slab along axis 0, each as soon as no later window can change it.

        Args:
            model: maps (B, C, *window) to logits (B, K, *window), or to a dict of such.
            source: the image, (C, *spatial); its planes are read once and in order, as `source[:, z0:z1]`.
            progress: called with the windows done and all windows after each call of the model.

        Yields:
            (z0, z1, slab): planes z0..z1 as (K, z1 - z0, *rest) float32 on the device of the model.

        Raises:
            ValueError: an image that does not fit the window, or a model whose output is not of the window's size.
            InputError: NaN or infinite values in the image.
            ResourceError: NaN or infinite logits although the image is finite.
        """
        mirrored = sorted(set(self.mirror_axes))
        if mirrored and not 0 <= mirrored[0] <= mirrored[-1] < len(source.shape) - 1:
            raise ValueError(f"mirror_axes must be within 0..{len(source.shape) - 2}, got {tuple(self.mirror_axes)}")
        return _Pass(self, self.grid(source.shape[1:]), model, source, progress).slabs()


class _Pass:
    """One image on its way through one model."""

    def __init__(
        self, inferer: SlidingWindowInferer, grid: WindowGrid, model: Model, source: Source, progress: Progress | None
    ) -> None:
        self.inferer, self.grid, self.model, self.source, self.progress = inferer, grid, model, source, progress
        self.device = torch.device(inferer.device) if inferer.device is not None else home_of(model, source)
        if inferer.device is not None and isinstance(model, nn.Module):
            model.to(self.device)
        self.dtype = pick_precision(inferer.precision, self.device)
        axes = sorted({axis + 2 for axis in inferer.mirror_axes})
        self.flips = list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))
        self.weights = _Weights(grid, inferer.blend, self.device)
        self.image = Ring(source.shape[0], grid.window[0], grid.padded[1:], self.device)
        self.sums: Accumulator | None = None
        self.loaded = self.done = 0

    def slabs(self) -> Iterator[Slab]:
        """Yields as `SlidingWindowInferer.stream`; between two slabs the model and torch's modes are the caller's."""
        axis = self.grid.axes[0]
        for row, start in enumerate(axis.starts):
            last = row + 1 == len(axis.starts)
            with evaluating(self.model), torch.inference_mode():
                self._load(start + axis.window)
                self._predict_row(row)
                slab = self._finish(axis.padded if last else axis.starts[row + 1])
            yield start, start + slab.shape[1], slab
            del slab  # not held beside the next one

    def _load(self, stop: int) -> None:
        """Reads the planes below `stop` that are not in the ring yet."""
        first, rest = self.grid.axes[0], [axis.size for axis in self.grid.axes[1:]]
        stop, channels = min(stop, first.size), self.source.shape[0]
        most = max(READ_BYTES // (4 * channels * math.prod(rest)), 1) if first.padded == first.size else first.size
        for start in range(self.loaded, stop, most):
            end = min(start + most, stop)
            block = as_float(self.source[:, start:end])
            if block.shape != (channels, end - start, *rest):
                expected = (channels, end - start, *rest)
                raise ValueError(f"source[:, {start}:{end}] must have shape {expected}, got {tuple(block.shape)}")
            self.image.write(start, self._widen(block))
        self.loaded = stop

    def _widen(self, block: Tensor) -> Tensor:
        """Adds the border to planes (C, n, *rest) of an image smaller than the window."""
        for dim, axis in enumerate(self.grid.axes, start=1):
            after = axis.padded - axis.size - axis.before
            if not after:
                continue
            if self.inferer.border == "reflect":
                block = block.index_select(dim, torch.from_numpy(axis.reflected()).to(block.device))
            else:
                block = F.pad(block, [0, 0] * (block.ndim - 1 - dim) + [axis.before, after])
        return block

    def _predict_row(self, row: int) -> None:
        """Predicts and adds the windows that begin at start `row` of axis 0, in the order of their places."""
        order = self.grid.row(row)
        sums: list[Tensor] = []
        while batch := list(islice(order, self.inferer.batch)):
            sums.append(self._add(batch, self._predict(self._cut(batch))))
            self.done += len(batch)
            if self.progress is not None:
                self.progress(self.done, len(self.grid))
        self._check_finite(row, torch.cat(sums))

    def _cut(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """The windows with these indices: (B, C, *window)."""
        cut = torch.empty(len(batch), self.source.shape[0], *self.grid.window, device=self.device)
        for index, out in zip(batch, cut, strict=True):
            self.image.read(self.grid.corner(index), out)
        return cut

    def _predict(self, cut: Tensor) -> Tensor:
        """Logits (B, K, *window) float32 of windows (B, C, *window), averaged over the mirrored views."""
        if len(self.flips) == 1:
            return self._forward(cut)
        total = torch.zeros((), device=self.device)
        for axes in self.flips:  # flip copies, so a model that works in place leaves `cut` as it is
            total = total + self._forward(cut.flip(axes)).flip(axes)
        return total / len(self.flips)

    def _forward(self, cut: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = pick(self.model(cut), self.inferer.output)
        if logits.ndim != cut.ndim or (logits.shape[0], *logits.shape[2:]) != (cut.shape[0], *cut.shape[2:]):
            expected = f"({cut.shape[0]}, K, {', '.join(map(str, cut.shape[2:]))})"
            raise ValueError(f"model must give logits of shape {expected} for its input, got {tuple(logits.shape)}")
        # the ring's own layout: adding channels-last logits to it takes more than twice as long
        return logits.to(torch.float32, memory_format=torch.contiguous_format)

    def _add(self, batch: Sequence[tuple[int, ...]], logits: Tensor) -> Tensor:
        """Adds logits (B, K, *window) one window after the other; returns the sum of each window's, (B,).

        No name of a caller holds the logits, so that their memory is free again for the next call of the model.
        """
        if self.sums is None:
            shape = (logits.shape[1], self.grid.window[0], self.grid.padded[1:])
            self.sums = Accumulator(*shape, normalised=self.weights.normalised, device=self.device)
        for index, one in zip(batch, logits, strict=True):
            self.sums.add(self.grid.corner(index), one, self.weights[index])
        return logits.flatten(1).sum(1)

    def _finish(self, stop: int) -> Tensor:
        """The finished planes below `stop`, without the border."""
        assert self.sums is not None  # every row has a window
        first, *rest = self.grid.axes
        slab = self.sums.retire(stop, [axis.before for axis in rest], [axis.size for axis in rest])
        return slab[:, first.before : first.before + first.size] if first.padded != first.size else slab

    def _check_finite(self, row: int, sums: Tensor) -> None:
        """One look, and one wait for the device, a row: a sum of logits is finite only if they all are."""
        if torch.isfinite(sums).all():
            return
        index = list(self.grid.row(row))[int(torch.isfinite(sums).logical_not().nonzero()[0])]
        cut = self._cut([index])
        bad = int(torch.isfinite(cut).logical_not().sum())
        corner = tuple(start - axis.before for start, axis in zip(self.grid.corner(index), self.grid.axes, strict=True))
        where = f"the window of shape {self.grid.window} at voxel {corner}"
        if bad:
            raise InputError(
                f"{bad} of {cut.numel()} values are NaN or infinite in {where}",
                fix="replace the invalid voxels, or mask them, before predicting",
            )
        fix = "check the weights of the model" if self.dtype == torch.float32 else "predict with precision float32"
        raise ResourceError(f"the logits of {where} are not all finite, though its input is", fix=fix)


class _Weights:
    """The weight of each window, (*window) float32 on the device, made when it is asked for."""

    def __init__(self, grid: WindowGrid, blend: str, device: torch.device) -> None:
        self.normalised = blend in windows.KERNELS
        if self.normalised:
            kernel = windows.KERNELS[blend]
            self.tables = [torch.from_numpy(axis.weights(kernel(axis.window))).to(device) for axis in grid.axes]
        else:
            self.map = torch.from_numpy(windows.MAPS[blend](grid.window)).to(device)

    def __getitem__(self, index: tuple[int, ...]) -> Tensor:
        if not self.normalised:
            return self.map
        weight, *others = [table[i] for table, i in zip(self.tables, index, strict=True)]
        for other in others:
            weight = weight[..., None] * other
        return weight


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode for the time of the block; afterwards every layer is back in its own mode."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def pick(output: Tensor | Mapping[str, Tensor], name: str | None) -> Tensor:
    """One tensor of what a model returned: the tensor itself, or of a dict the one called `name` or else the first.

    Raises:
        ValueError: no output of this name.
        TypeError: neither a tensor nor a dict of tensors.
    """
    if isinstance(output, Mapping):
        if not output or (name is not None and name not in output):
            raise ValueError(f"output must be one of {', '.join(output) or 'none at all'}, got {name!r}")
        output = output[next(iter(output)) if name is None else name]
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor or a dict of tensors, got {type(output).__name__}")
    return output


def as_float(block: Any) -> Tensor:
    """Planes of any kind and byte order as a float32 tensor."""
    if isinstance(block, Tensor):
        return block.detach().float()
    return torch.from_numpy(np.require(block, dtype=np.float32, requirements=["C", "W"]))


def home_of(model: Model, source: Source) -> torch.device:
    """The device of the model's first weight; without weights, the image's; of a file, the CPU."""
    if isinstance(model, nn.Module):
        for tensor in chain(model.parameters(), model.buffers()):
            return tensor.device
    return source.device if isinstance(source, Tensor) else torch.device("cpu")
