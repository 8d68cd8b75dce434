"""Planes of which some lines come at a time, on disk until all lines are there."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from densepred.files import needing_space, remove

_BLOCK = 1 << 24  # bytes that are read at a time

Arrays = Mapping[str, NDArray[Any]]
Layout = Mapping[str, tuple[int, str]]
"""Kind of result -> channels and the type of the values."""


class Spool:
    """Unnamed files, one for each kind of result; they are gone with the program, however it ends.

    Args:
        folder: where they lie; by default where the system puts temporary files.
        planes: from which to which plane of the result.
        rest: spatial shape of a plane.
        kept: the files have names, in a folder that is made for them, and stay there for another to `adopt`.
    """

    def __init__(self, folder: Path | None, planes: tuple[int, int], rest: Sequence[int], kept: bool = False) -> None:
        self.folder, self._kept = folder or Path(tempfile.gettempdir()), kept
        self.planes, self.rest = planes, tuple(rest)
        if kept:
            with needing_space(self.folder):
                self.folder.mkdir()
        self._files: dict[str, tuple[IO[bytes], int, np.dtype]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, start: int, lines: tuple[int, int], arrays: Arrays) -> None:
        """Put in planes from `start` on, of these some lines: kind -> (C, n, lines, *rest).

        Raises:
            DiskFullError: the disk is full.
        """
        for kind, array in arrays.items():
            file, channels, dtype = self._file(kind, array)
            for channel in range(channels):
                for number, plane in enumerate(array[channel], start - self.planes[0]):
                    data = np.ascontiguousarray(plane, dtype).reshape(-1).view(np.uint8).data
                    offset = self._offset(channel, number, lines[0], dtype)
                    with needing_space(self.folder / "temporary files"):
                        _write(file.fileno(), data, offset)

    def slabs(self) -> Iterator[tuple[int, int, dict[str, NDArray[Any]]]]:
        """Whole planes, in order, a few at a time: from, to, kind -> (C, n, *rest)."""
        plane = sum(channels * dtype.itemsize for _, channels, dtype in self._files.values()) * math.prod(self.rest)
        most = max(_BLOCK // max(plane, 1), 1)
        for start in range(*self.planes, most):
            stop = min(start + most, self.planes[1])
            yield start, stop, {kind: self._read(kind, start, stop) for kind in self._files}

    @property
    def layout(self) -> Layout:
        """What is in the files."""
        return {kind: (channels, dtype.str) for kind, (_, channels, dtype) in self._files.items()}

    def adopt(self, folder: Path, layout: Layout) -> None:
        """Take over what another spool, of the same planes, has kept; the folder is removed."""
        for kind, (channels, dtype) in layout.items():
            file = open(folder / kind, "rb")  # noqa: SIM115 - closed by the stack
            self._files[kind] = self._stack.enter_context(file), channels, np.dtype(dtype)
        remove(folder)

    def _file(self, kind: str, array: NDArray[Any]) -> tuple[IO[bytes], int, np.dtype]:
        if kind not in self._files:
            with needing_space(self.folder / "temporary files"):
                file = self._opened(kind)
            self._files[kind] = self._stack.enter_context(file), len(array), array.dtype
        return self._files[kind]

    def _opened(self, kind: str) -> IO[bytes]:
        if not self._kept:
            return tempfile.TemporaryFile(dir=self.folder)
        part = self.folder / kind
        return open(part, "w+b")

    def _read(self, kind: str, start: int, stop: int) -> NDArray[Any]:
        file, channels, dtype = self._files[kind]
        out = np.empty((channels, stop - start, *self.rest), dtype)
        for channel in range(channels):
            view = memoryview(out[channel].reshape(-1).view(np.uint8).data)
            offset = self._offset(channel, start - self.planes[0], 0, dtype)
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                if not count:
                    raise EOFError("lines are missing")
                view, offset = view[count:], offset + count
        return out

    def _offset(self, channel: int, plane: int, line: int, dtype: np.dtype) -> int:
        lines, rows = self.rest[0], math.prod(self.rest[1:])
        depth = self.planes[1] - self.planes[0]
        return (((channel * depth + plane) * lines) + line) * rows * dtype.itemsize


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
