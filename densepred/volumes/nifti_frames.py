"""The frames of a 4D NIfTI file (its fourth axis holds times), each an image of its own, read and written in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header

from densepred.errors import InputError
from densepred.files import atomic_path
from densepred.volumes import nifti_header
from densepred.volumes.arrays import check_slab
from densepred.volumes.channels import check_grids
from densepred.volumes.nifti import NiftiArray, Writer, opened, volume_of
from densepred.volumes.record import Record
from densepred.volumes.streams import MAX_STREAMS, Bytes
from densepred.volumes.volume import Volume


def members(path: Path, part: str | None, axes: str | None) -> list[str] | None:
    """What to write in brackets for each frame, where all are meant: with axes "xyzt" and no part.

    Raises:
        InputError: as `nifti.read`.
    """
    if axes != "xyzt" or part is not None:
        return None
    count = nifti_header.layout(opened(path)[1], axes, path)[0]
    return [str(frame) for frame in range(count)] if count > 1 else None


def open_frames(path: Path) -> Iterator[Volume]:
    """The frames of a file, opened once: reading them in order goes through it once per pass over a frame.

    The file is verified before the first; closing a frame does not close it.

    Raises:
        InputError: as `read`, or it is damaged.
    """
    source, header = opened(path)
    shape = nifti_header.layout(header, "xyzt", path)
    try:
        for frame in range(shape[0]):
            array = FrameArray(source, header, shape, frame, path, shared=True)
            array.verify()
            yield volume_of(array, header, path)
    finally:
        source.close()


def chosen(part: str | None, count: int, path: Path) -> int:
    """The number of the frame that `part` names, of `count`.

    Raises:
        InputError: there is none, or none is named and there are several.
    """
    if part is None and count == 1:
        return 0
    choice = f"write {path.name}[0]" + (f" to {path.name}[{count - 1}]" if count > 1 else "")
    if part is None:
        raise InputError(f"holds {count} frames, and none is chosen", choice, path)
    if not part.strip().isdecimal() or int(part) >= count:
        raise InputError(f"there is no frame [{part}], the file has {count}", choice, path)
    return int(part)


class FrameArray(NiftiArray):
    """One frame of a 4D file, `(1, Z, Y, X)`.

    A second pass over it reads a second stream, so that both go forward from frame to frame where these share a file.

    Args:
        source: the file.
        header: its header.
        shape: of all frames, `(T, Z, Y, X)`.
        frame: which one.
        path: for messages.
        shared: other frames read from `source` too, so it is not closed with this one.
    """

    def __init__(
        self,
        source: Bytes,
        header: Nifti1Header,
        shape: tuple[int, ...],
        frame: int,
        path: Path,
        shared: bool = False,
    ) -> None:
        super().__init__(source, header, shape, path)
        self.shape = (1, *shape[1:])
        self._frame, self._shared = frame, shared
        self._next = self._passes = 0

    def _decode(self, channel: int, plane: int, target: np.ndarray, stream: int) -> None:
        self._passes += plane < self._next
        self._next = plane + len(target)
        super()._decode(self._frame, plane, target, self._passes % MAX_STREAMS)

    def close(self) -> None:
        """Let go of the file, if no other frame needs it."""
        if not self._shared:
            super().close()


@contextmanager
def open_writer(
    path: Path, count: int, dtype: np.dtype, channels: int, labels: bool, record: Record | None = None
) -> Iterator[FramesWriter]:
    """Write `count` frames one after the other into a 4D file, 5D with several channels; else as `open_writer`."""
    writer = FramesWriter(count, nifti_header.stored_dtype(np.dtype(dtype), labels), channels, labels, record)
    with atomic_path(path, writer.verify) as part, ExitStack() as stack:
        writer.start(part, path.suffix.lower() == ".gz", stack)
        yield writer
        writer.finish()


class FramesWriter:
    """Takes frames in order, each slab by slab; made by `open_writer`.

    On disk the planes of a channel follow each other through all frames, as if these were one long image.
    """

    def __init__(self, count: int, dtype: np.dtype, channels: int, labels: bool, record: Record | None) -> None:
        self.dtype, self._record = dtype, record
        self._count, self._channels, self._labels = count, channels, labels
        self._first: Volume | None = None
        self._shape: tuple[int, ...] = (0, 0)
        self._begun = self._written = 0

    def start(self, part: Path, gzipped: bool, stack: ExitStack) -> None:
        """Say where the file goes, which the first frame opens."""
        self._place = part, gzipped, stack

    def member(self, like: Volume) -> FramesWriter:
        """Begin the next frame, on the grid of `like`.

        Raises:
            InputError: it is not the first frame's grid, or the folder cannot be written to.
            ValueError: the frame before is not whole, or there are enough.
        """
        self._check_whole()
        if self._begun == self._count:
            raise ValueError(f"count must be the number of frames, got {self._count} and one more")
        if self._first is None:
            self._first, self._shape = like, (self._channels, *like.shape[1:])
            header = nifti_header.for_output(like, self.dtype, self._channels, self._labels, self._count, self._record)
            planes = self._count * like.shape[1]
            self._all = Writer(header, (self._channels, planes, *like.shape[2:]), self.dtype)
            self._all.start(*self._place)
        else:
            check_grids(self._first, like, "frames")
        self._begun, self._written = self._begun + 1, 0
        return self

    def write(self, slab: np.ndarray) -> None:
        """Append the next planes of the frame, `(C, n, *rest)`; as `Writer.write`."""
        check_slab(slab, self._shape, self._written)
        self._all.write(slab)
        self._written += slab.shape[1]

    def finish(self) -> None:
        """Bring the channels together.

        Raises:
            ValueError: planes or frames are missing.
        """
        self._check_whole()
        if self._begun != self._count:
            raise ValueError(f"all {self._count} frames must be written, got {self._begun}")
        self._all.finish()

    def _check_whole(self) -> None:
        if self._begun and self._written != self._shape[1]:
            raise ValueError(f"all {self._shape[1]} planes must be written, got {self._written}")

    def verify(self, path: Path) -> None:
        """See `Writer.verify`."""
        self._all.verify(path)
