"""One way through an image: planes in, windows through the network, finished planes of logits out."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.device import sent
from densepred.errors import InputError, ResourceError
from densepred.inference import windows
from densepred.inference.empty import EmptyWindows
from densepred.inference.forward import Forward
from densepred.inference.modes import evaluating
from densepred.inference.ring import Accumulator, Ring
from densepred.inference.threads import ahead
from densepred.inference.windows import WindowGrid

if TYPE_CHECKING:
    from densepred.inference.sliding_window import SlidingWindowInferer

Progress = Callable[[int, int], None]
Slab = tuple[int, int, Tensor]

READ_BYTES = 1 << 24  # of float32 planes asked of the source at a time
SLAB_BYTES = 1 << 26  # of float32 logits handed out at a time


class Source(Protocol):
    """Anything of shape (C, *spatial) that gives `source[:, z0:z1]`: a tensor, a numpy array, a lazy volume."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class Part(NamedTuple):
    """A part of an image: some of its planes, and of these some lines (of a 2D image: rows, and of these columns).

    Attributes:
        planes: from where to where (exclusive) along axis 0.
        lines: the same along axis 1.
    """

    planes: tuple[int, int]
    lines: tuple[int, int]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        """All of an image of this spatial shape."""
        return cls((0, shape[0]), (0, shape[1]))


class _Window(NamedTuple):
    """A window by its numbers along the axes; if it is empty, the value of each channel."""

    at: tuple[int, ...]
    value: tuple[float, ...] | None


class WindowPass:
    """A part of one image on its way through the network.

    A voxel's value does not depend on the part it is in: the same windows are added up in the same order.

    Args:
        inferer: the settings.
        grid: the windows over the whole image.
        forward: the network.
        source: the image.
        device: where the windows are.
        part: what is wanted of the image.
    """

    def __init__(
        self,
        inferer: SlidingWindowInferer,
        grid: WindowGrid,
        forward: Forward,
        source: Source,
        device: torch.device,
        part: Part,
    ) -> None:
        self.inferer, self.grid, self.forward, self.source, self.device = inferer, grid, forward, source, device
        first, second, *rest = grid.axes
        (start, self.end), (low, high) = (
            [edge + a.before for edge in e] for a, e in zip(grid.axes, part, strict=False)
        )
        self.rows, self.columns = grid.touching(*part)
        self.lower = (start, low, *(axis.before for axis in rest))
        self.extent = (high - low, *(axis.size for axis in rest))
        self.begin = second.starts[self.columns[0]]  # the lines that these columns of windows see
        self.stop = second.starts[self.columns[-1]] + second.window
        self.windows = grid.count(*part)
        self.weights = Weights(grid, inferer.blend, device)
        seen = (self.stop - self.begin, *(axis.padded for axis in rest))
        self.image = Ring(source.shape[0], grid.window[0], seen, device)
        self.empty: EmptyWindows | None = None
        if inferer.skip is not None:
            self.empty = EmptyWindows(inferer.skip, grid.window, forward, inferer.variance)
        self.sums: Accumulator | None = None
        self.loaded, self.done = first.starts[self.rows[0]], 0

    def slabs(self, progress: Progress | None = None) -> Generator[Slab, None, None]:
        """Yields as `SlidingWindowInferer.stream`; between two slabs the models and torch's modes are the caller's."""
        axis, offset = self.grid.axes[0], self.grid.axes[0].before
        blocks = self._blocks(torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None)
        if self.inferer.ahead:
            blocks = ahead(blocks, self.inferer.ahead)
        with closing(blocks):
            for row in self.rows:
                with evaluating(*self.forward.models), torch.inference_mode():
                    self._load(blocks, axis.starts[row] + axis.window)
                    self._predict_row(row, progress)
                assert self.sums is not None  # every row has a window
                last = row == self.rows[-1]
                finished = self.end if last else min(axis.starts[row + 1], self.end)
                thickness = max(SLAB_BYTES // (4 * len(self.sums.values.planes) * math.prod(self.extent)), 1)
                while (start := self.sums.start) < finished:
                    with torch.inference_mode():
                        slab = self.sums.retire(min(start + thickness, finished))
                    yield start - offset, self.sums.start - offset, slab
                    del slab  # not held beside the next one

    def _blocks(self, stream: torch.cuda.Stream | None) -> Generator[tuple[int, Tensor], None, None]:
        """The planes that the rows need, in order, each once: where they lie in the widened image, (C, n, *seen).

        They may be made in a thread of their own, which does not know the stream of the caller.
        """
        first, rest = self.grid.axes[0], [axis.size for axis in self.grid.axes[1:]]
        channels = self.source.shape[0]
        stop = min(first.starts[self.rows[-1]] + first.window, first.size)
        most = read_at_once(self.grid, channels)
        start = self.loaded
        while start < stop:
            due = next(s + first.window for s in (first.starts[row] for row in self.rows) if s + first.window > start)
            end = min(start + most, due, stop)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                block = as_float(self.source[:, start:end])
                if block.shape != (channels, end - start, *rest):
                    expected = (channels, end - start, *rest)
                    raise ValueError(f"source[:, {start}:{end}] must have shape {expected}, got {tuple(block.shape)}")
                block = sent(self._widen(self._cut_lines(block)), self.device)
            yield start, block
            del block  # not held beside the next one
            start = end

    def _load(self, blocks: Iterator[tuple[int, Tensor]], stop: int) -> None:
        """Puts the planes below `stop` into the ring."""
        stop = min(stop, self.grid.axes[0].padded)
        while self.loaded < stop:
            start, block = next(blocks)
            self.image.write(start, block)
            self.loaded = start + block.shape[1]

    def _cut_lines(self, block: Tensor) -> Tensor:
        """Of planes (C, n, *rest) the lines that are seen, as a copy, so that whole planes do not wait to be used."""
        if self.stop - self.begin == self.grid.axes[1].padded:
            return block
        return block[:, :, self.begin : self.stop].clone()

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

    def _predict_row(self, row: int, progress: Progress | None) -> None:
        """Predicts and adds the windows that begin at start `row` of axis 0, in the order of their places."""
        indices = list(self.grid.row(row, self.columns))
        values: Sequence[tuple[float, ...] | None] = [None] * len(indices)
        if self.empty is not None:
            _, second, *rest = self.grid.axes
            lines = [second.starts[column] - self.begin for column in self.columns]
            values = self.empty.values(self.image, [lines, *(axis.starts for axis in rest)])
        # one tensor for all, as small ones that stay would lie scattered in what is freed and split it up
        totals, before = torch.empty(len(indices), device=self.device), self.done
        for batch in self._batches([_Window(*each) for each in zip(indices, values, strict=True)]):
            start = self.done - before
            self._add(batch, self._logits(batch), totals[start : start + len(batch)])
            self.done += len(batch)
            if progress is not None:
                progress(self.done, self.windows)
        self._check_finite(indices, totals)

    def _batches(self, order: Sequence[_Window]) -> Iterator[list[_Window]]:
        """Runs of windows to predict together; an empty one ends a run, so that all are added in the same order."""
        run: list[_Window] = []
        for window in order:
            if run and (window.value is not None or len(run) == self.inferer.batch):
                yield run
                run = []
            if window.value is not None:
                yield [window]
            else:
                run.append(window)
        if run:
            yield run

    def _add(self, batch: Sequence[_Window], logits: Tensor, totals: Tensor) -> None:
        """Adds logits (B, K, *window) one window after the other; puts the sum of each window's into `totals`, (B,).

        No name of a caller holds the logits, so that their memory is free again for the next call of the model.
        """
        if self.sums is None:
            depth, normalised = self.grid.window[0], self.weights.normalised
            self.sums = Accumulator(logits.shape[1], depth, self.lower, self.extent, normalised, self.device)
        for window, one in zip(batch, logits, strict=True):
            self.sums.add(self.grid.corner(window.at), one, self.weights[window.at])
        torch.sum(logits, dim=tuple(range(1, logits.ndim)), out=totals)

    def _logits(self, batch: Sequence[_Window]) -> Tensor:
        """(B, K, *window) float32."""
        value = batch[0].value
        if value is None:
            return self.forward(self._cut([window.at for window in batch]))
        assert self.empty is not None
        if self.empty.audited(self._number(batch[0].at)):
            logits = self.forward(self._cut([batch[0].at]))
            self.empty.compare(value, logits[0])
            return logits
        return self.empty.logits(value, self.device)[None]

    def _number(self, index: tuple[int, ...]) -> int:
        """The place of a window among all of the image, whatever part is predicted."""
        number = 0
        for at, axis in zip(index, self.grid.axes, strict=True):
            number = number * len(axis.starts) + at
        return number

    def _seen(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Where a window begins in the ring of planes."""
        z, y, *rest = self.grid.corner(index)
        return (z, y - self.begin, *rest)

    def _cut(self, indices: Sequence[tuple[int, ...]]) -> Tensor:
        """The windows with these indices: (B, C, *window)."""
        cut = torch.empty(len(indices), self.source.shape[0], *self.grid.window, device=self.device)
        for index, out in zip(indices, cut, strict=True):
            self.image.read(self._seen(index), out)
        return cut

    def _check_finite(self, indices: Sequence[tuple[int, ...]], totals: Tensor) -> None:
        """One look, and one wait for the device, a row: a sum of logits is finite only if they all are."""
        finite = torch.isfinite(totals)
        if finite.all():
            return
        index = indices[int(finite.logical_not().nonzero()[0])]
        cut = self._cut([index])
        bad = int(torch.isfinite(cut).logical_not().sum())
        corner = tuple(start - axis.before for start, axis in zip(self.grid.corner(index), self.grid.axes, strict=True))
        where = f"the window of shape {self.grid.window} at voxel {corner}"
        if bad:
            raise InputError(
                f"{bad} of {cut.numel()} values are NaN or infinite in {where}",
                fix="replace the invalid voxels, or mask them, before predicting",
            )
        fix = "check the weights of the model"
        fix = fix if self.forward.dtype == torch.float32 else "predict with precision float32"
        raise ResourceError(f"the logits of {where} are not all finite, though its input is", fix=fix)


def read_at_once(grid: WindowGrid, channels: int) -> int:
    """How many planes are asked of the source at a time: of an image that is widened along axis 0, all."""
    first, *rest = grid.axes
    if first.padded > first.size:
        return first.size
    return max(READ_BYTES // (4 * channels * math.prod(axis.size for axis in rest)), 1)


class Weights:
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


def as_float(block: Any) -> Tensor:
    """Planes of any kind and byte order as a float32 tensor."""
    if isinstance(block, Tensor):
        return block.detach().float()
    return torch.from_numpy(np.require(block, dtype=np.float32, requirements=["C", "W"]))
