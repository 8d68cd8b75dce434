"""How much memory a prediction takes, foretold from its shapes and one trial, and what to do so that it fits."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from densepred.inference.window_pass import READ_BYTES, SLAB_BYTES
from densepred.inference.windows import WindowGrid

SHARE = 0.8
"""Of the memory that is free, used where no budget is given."""
_FLOAT = 4
_PLANES = 6  # of logits that are handed out, resampled and reduced at a time, where one has more than SLAB_BYTES
_EVERY = 0.002  # seconds between two looks at the memory in use


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available(device: torch.device) -> int:
    """Bytes that can be had: of the machine (within the limits that containers set), or of a GPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit, or no such group
        return free
    return min(free, limit - used)


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int]]:
    """Watch the memory within the block; gives a function that tells by how many bytes the peak exceeds the start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    start = highest = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(_EVERY):
            highest = max(highest, resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(highest, resident()) - start
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Needs:
    """The bytes that a way through an image takes on its device, with bands of some lines of the result.

    Attributes:
        line: for each line of a band: sums of logits, and planes on their way.
        seen: for each line of the image that a band sees.
        halo: lines that a band sees beyond its own.
        lines: of the whole result.
    """

    line: int
    seen: int
    halo: int
    lines: int

    def bytes(self, lines: int) -> int:
        """With bands of so many lines."""
        return lines * self.line + min(lines + self.halo, self.lines) * self.seen


def needs(grid: WindowGrid, lines: int, channels: int, logits: int, weights: bool, row: int) -> Needs:
    """What windows over an image take.

    Args:
        grid: the windows, on the model's grid.
        lines: of the result, along axis 1.
        channels: of the image.
        logits: channels of the logits.
        weights: whether the sum of the weights is kept for each voxel.
        row: voxels of a line that logits have on their way, the longer of that on the model's grid and in the result.
    """
    first, second, *rest = grid.axes
    voxels, scale = math.prod(axis.padded for axis in rest), second.padded / lines
    summed = (logits + weights) * first.window * voxels
    return Needs(
        line=math.ceil(_FLOAT * (scale * summed + max(scale, 1) * _PLANES * logits * row)),
        seen=math.ceil(_FLOAT * scale * channels * first.window * voxels),
        halo=math.ceil(2 * second.window / scale) + 4,  # and what resampling needs
        lines=lines,
    )


BUFFERS = 3 * SLAB_BYTES + 6 * READ_BYTES
"""What is read and handed out at a time, in its several forms."""


def widest(bytes_of: Callable[[int], int], lines: int, budget: int) -> int:
    """The lines of the widest band that fits a budget, of at most `lines`; 0 if none does."""
    low, high = 0, lines
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle - 1)
    return low


def bands(lines: int, widest: int, edges: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Divides lines into as few bands of at most `widest` as there can be, evenly, but at `edges` where these are near.

    Example:
        >>> bands(100, 40, edges=(0, 32, 64)), bands(100, 60)
        ([(0, 32), (32, 64), (64, 100)], [(0, 50), (50, 100)])
    """
    found: list[tuple[int, int]] = []
    start = 0
    while start < lines:
        left = -(-(lines - start) // widest)  # bands
        even = start + -(-(lines - start) // left)
        least = lines - (left - 1) * widest  # so that no further band is needed
        near = [edge for edge in edges if max(least, start + 1) <= edge <= min(start + widest, lines)]
        stop = min(near, key=lambda edge: abs(edge - even)) if near and left > 1 else even
        found.append((start, stop))
        start = stop
    return found
