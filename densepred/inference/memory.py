"""How much memory a prediction takes, foretold from its shapes and one trial, and what to do so that it fits."""

from __future__ import annotations

import math
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from densepred.inference.window_pass import READ_BYTES, SLAB_BYTES, read_at_once
from densepred.inference.windows import WindowGrid

SHARE = 0.8
"""Of the memory that is free, used where no budget is given."""
_FLOAT = 4
SPOOLED = 5
"""Whole planes of the result in memory, where they were put together from bands: read, waiting and being written."""
_PLANES = 6  # of logits that are handed out, resampled and reduced at a time, where one has more than SLAB_BYTES
_GROUP_FILES = ("memory.max", "memory.current", "inactive_file")
_OLD_GROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_EVERY = 0.002  # seconds between two looks at the memory in use


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _pages(1)


def _pages(field: int) -> int:
    """Bytes of a field of proc(5)'s statm: 1 what is in memory, 5 what counts against RLIMIT_DATA."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")


def available(device: torch.device) -> int:
    """Bytes that can be had: of a GPU, or of the machine, within the limits of the process and of its control groups.

    The limit of a process that counts is RLIMIT_DATA: torch maps its libraries many times over.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024, *left_in_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - _pages(5))
    return max(min(found), 0)


def left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group with a limit that the process is in: those of containers and batch systems.

    Pages of files that were read are not counted as used: they go when memory is needed.

    Args:
        root: where the groups are mounted, of version 2 or 1.
        own: lists the groups of the process.
    """
    found = []
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, names = (root, _GROUP_FILES) if number == "0" else (root / "memory", _OLD_GROUP_FILES)
        inner = folder / path.lstrip("/")  # in a container often not there, but the groups around it are
        for group in (inner, *(one for one in inner.parents if one.is_relative_to(folder))):
            try:
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(stat.get(names[2], 0)))
            except (OSError, ValueError):  # no limit, or no such group
                continue
    return found


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
        line: for each line of a band: sums of logits, planes on their way, and which pixels are invalid.
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
    summed, masks = (logits + weights) * first.window * voxels, first.window * voxels
    return Needs(
        line=math.ceil(_FLOAT * (scale * summed + max(scale, 1) * _PLANES * logits * row) + scale * masks),
        seen=math.ceil(_FLOAT * scale * channels * first.window * voxels),
        halo=math.ceil(2 * second.window / scale) + 4,  # and what resampling needs
        lines=lines,
    )


def buffers(grid: WindowGrid, image: Sequence[int], logits: int) -> int:
    """The bytes that are read and handed out at a time, in their several forms, on a way through an image.

    Args:
        grid: the windows, on the model's grid.
        image: (C, *spatial), its shape on its own grid; it is read in whole planes, however narrow bands are.
        logits: channels of the logits.
    """
    channels, *spatial = image
    voxels, (depth, *rest) = math.prod(spatial), (axis.size for axis in grid.axes)
    plane, most = max(math.prod(rest), voxels // spatial[0]), max(depth * math.prod(rest), voxels)
    read = min(max(READ_BYTES, _FLOAT * channels * read_at_once(grid, channels) * plane), _FLOAT * channels * most)
    at_once = 3 if read == _FLOAT * channels * most else 6  # being read; and waiting, where it is not all there is
    return 3 * min(SLAB_BYTES, _FLOAT * logits * most) + at_once * read


def shared(grids: Sequence[WindowGrid], image: Sequence[int]) -> int:
    """The bytes of an image's planes that are held from the slowest of several ways to the fastest; see `buffers`."""
    channels, *spatial = image
    ahead = max(min(grid.axes[0].window / grid.axes[0].size, 1) * spatial[0] for grid in grids)
    return 0 if len(grids) == 1 else math.ceil(_FLOAT * channels * ahead * math.prod(spatial[1:]))


def ring(planes: int, grids: Sequence[WindowGrid], image: Sequence[int]) -> int:
    """The bytes of planes that resampling holds, on the larger of two grids.

    Args:
        planes: how many.
        grids: of the model.
        image: (C, *spatial), its shape on its own grid.
    """
    channels, _, *rest = image
    largest = max(math.prod(rest), *(math.prod(axis.size for axis in grid.axes[1:]) for grid in grids))
    return _FLOAT * channels * planes * largest


def widest(bytes_of: Callable[[int], int], lines: int, budget: int) -> int:
    """The lines of the widest band that fits a budget, of at most `lines`; 0 if none does.

    Of fewer lines than all, more take more; all may take less than most of them, which come together on disk.
    """
    if bytes_of(lines) <= budget:
        return lines
    low, high = 0, max(lines - 1, 0)
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
