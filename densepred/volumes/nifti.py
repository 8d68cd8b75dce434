"""NIfTI-1 and NIfTI-2 in one file, plain (`.nii`) or gzipped (`.nii.gz`), read and written by slabs.

On disk x runs fastest, then y, z and the channels, so the planes z0 to z1 of a channel are one run of bytes and reading
by slabs is reading forward.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from isal import isal_zlib
from nibabel.nifti1 import Nifti1Header

from densepred.errors import InputError, ResourceError
from densepred.files import atomic_path
from densepred.volumes import nifti_header
from densepred.volumes.arrays import as_stored, check_slab, scaled_dtype
from densepred.volumes.gzip_writer import GzipWriter
from densepred.volumes.record import Record
from densepred.volumes.streams import Bytes, GzipBytes, open_bytes
from densepred.volumes.volume import Key, Volume, check_memory, full_key, span

RECORDS = True

_BLOCK = 1 << 23  # bytes that are read, or copied, at once
_PIECE = 1 << 19  # bytes of those that are scaled, or summed, while they are in the processor's cache


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a file: its header is read and checked, its voxels are left for later.

    Args:
        path: a `.nii` or `.nii.gz`; where content and name disagree about gzip, the content counts, with a warning.
        axes: None, or what the axes hold: "xyzc" for a fourth axis of channels, "xyzt" for one of times, of which one
            is read (all of `nifti_header.AXES`).
        part: which frame, from 0, of a file with a fourth axis; None: the file holds one image.

    Raises:
        InputError: no NIfTI file, truncated, or a header that makes no sense; no such frame, or none was chosen.
        OSError: it cannot be opened.
    """
    path = Path(path)
    source, header = opened(path)
    if part is not None and axes is None and header["dim"][0] > 3:
        axes = "xyzt"
    shape = nifti_header.layout(header, axes, path)
    if axes == "xyzt":
        from densepred.volumes import nifti_frames

        frame = nifti_frames.FrameArray(source, header, shape, nifti_frames.chosen(part, shape[0], path), path)
        return volume_of(frame, header, path)
    if part is not None:
        raise InputError(f"the file holds one image, not a part [{part}]", "leave the brackets out", path)
    return volume_of(NiftiArray(source, header, shape, path), header, path)


def opened(path: Path) -> tuple[Bytes, Nifti1Header]:
    """The content of a file, and its header.

    Raises:
        InputError: as `read`.
    """
    source = open_bytes(path)
    header = nifti_header.parse(source.head(nifti_header.HEAD_BYTES), path)
    gzipped = isinstance(source, GzipBytes)
    if gzipped != (path.suffix.lower() == ".gz"):
        state = "gzipped" if gzipped else "not gzipped"
        warnings.warn(f"{path}: the file is {state}, against its name", stacklevel=3)
    return source, header


def volume_of(array: NiftiArray, header: Nifti1Header, path: Path) -> Volume:
    """The volume of an array with the geometry of a header."""
    affine = nifti_header.affine_of(header, path)
    spacing = nifti_header.voxel_sizes(affine)[: len(array.shape) - 1]
    labels = int(header["intent_code"]) == nifti_header.INTENT_LABEL and array.dtype.kind in "iu"
    return Volume(array, tuple(reversed(spacing.tolist())), affine, header, path, labels)


class NiftiArray:
    """The voxels of a file, `(C, *spatial)`: stored values, or floats where the header scales them."""

    def __init__(self, source: Bytes, header: Nifti1Header, shape: tuple[int, ...], path: Path) -> None:
        stored = header.get_data_dtype()
        self._source, self._path = source, path
        self._stored, self._swapped = stored.newbyteorder("="), not stored.isnative
        self._offset = nifti_header.data_offset(header)
        self._scaling = nifti_header.scaling(header, path)
        self.shape = shape
        self.dtype = self._stored if self._scaling is None else scaled_dtype(self._stored, *self._scaling)
        voxels = 1
        for size in shape:
            voxels *= size
        self._plane = voxels // (shape[0] * shape[1])
        source.expect(self._offset + voxels * stored.itemsize)

    def __getitem__(self, key: Key) -> np.ndarray:
        index = full_key(key, self.shape)
        channel, channel_end, of_channels = span(index[0], self.shape[0])
        start, stop, of_planes = span(index[1], self.shape[1])
        block = self._read(range(channel, channel_end), start, stop)
        return block[of_channels, of_planes, *index[2:]]

    def verify(self) -> None:
        """See `Volume.verify`."""
        self._source.verify()

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()

    def _read(self, channels: range, start: int, stop: int) -> np.ndarray:
        """`(len(channels), stop - start, *rest)`."""
        size = len(channels) * (stop - start) * self._plane * self.dtype.itemsize
        check_memory(size, self._path)
        out = np.empty((len(channels), stop - start, *self.shape[2:]), self.dtype)
        whole = (start, stop) == (0, self.shape[1])  # then the channels follow each other on disk
        step = max(1, _BLOCK // (self._plane * self._stored.itemsize))
        for number, channel in enumerate(channels):
            for first in range(start, stop, step):
                target = out[number, first - start : first - start + step]
                self._decode(channel, first, target, stream=0 if whole else channel)
        return out

    def _decode(self, channel: int, plane: int, target: np.ndarray, stream: int) -> None:
        raw = target if self._scaling is None else np.empty(target.shape, self._stored)
        planes = channel * self.shape[1] + plane
        self._source.read_into(self._offset + planes * self._plane * self._stored.itemsize, raw, stream)
        if self._swapped:
            raw.byteswap(inplace=True)
        if self._scaling is not None:
            _scale(raw.reshape(-1), target.reshape(-1), *self._scaling)


def _scale(raw: np.ndarray, out: np.ndarray, slope: float, inter: float) -> None:
    """Fill `out` with `raw * slope + inter`, computed in float64 and piece by piece, so in the processor's cache."""
    for first in range(0, raw.size, _PIECE // 8):
        piece = raw[first : first + _PIECE // 8].astype(np.float64)
        piece *= slope
        piece += inter
        out[first : first + piece.size] = piece


@contextmanager
def open_writer(
    path: str | Path,
    like: Volume,
    dtype: np.dtype,
    channels: int = 1,
    labels: bool = False,
    record: Record | None = None,
) -> Iterator[Writer]:
    """Write a file slab by slab; it gets its name only once it is whole and has been read back.

    Args:
        path: a `.nii` or `.nii.gz`.
        like: gives the grid and, if it came from NIfTI, the header.
        dtype: of the values; what is stored for it is told by `Writer.dtype`.
        channels: more than one are stored along a fourth axis.
        labels: the values are classes.
        record: of whose provenance version and model stand in the header (`descrip`).

    Raises:
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    stored = nifti_header.stored_dtype(np.dtype(dtype), labels)
    header = nifti_header.for_output(like, stored, channels, labels, record=record)
    writer = Writer(header, (channels, *like.shape[1:]), stored)
    with atomic_path(path, writer.verify) as part, ExitStack() as stack:
        writer.start(part, path.suffix.lower() == ".gz", stack)
        yield writer
        writer.finish()


class Writer:
    """Takes slabs forward; made by `open_writer`.

    Channels lie one after the other on disk: the first goes into the file, the others into unnamed files beside it that
    are appended at the end (a gzip file may have several members).
    """

    def __init__(self, header: Nifti1Header, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._shape, self._written = shape, 0
        self._head = header.binaryblock + bytes(header.single_vox_offset - header.sizeof_hdr)
        self._crc = [0] * shape[0]

    def start(self, part: Path, gzipped: bool, stack: ExitStack) -> None:
        """Open the files; `stack` closes them.

        Raises:
            InputError: the folder cannot be written to.
        """
        try:
            self._files: list[IO[bytes]] = [open(part, "wb")]  # noqa: SIM115 - closed by `stack`
        except PermissionError as error:
            what = f"cannot write to this folder ({error.strerror})"
            raise InputError(what, "choose another folder or change its permissions", part.parent) from error
        self._files += [tempfile.TemporaryFile(dir=part.parent) for _ in self._crc[1:]]  # noqa: SIM115
        for file in self._files:
            stack.enter_context(file)
        self._sinks = [GzipWriter(file) if gzipped else file for file in self._files]
        self._sinks[0].write(self._head)

    def write(self, slab: np.ndarray) -> None:
        """Append the next planes, `(C, n, *rest)`.

        Raises:
            ValueError: a wrong shape, planes past the end, or values that the stored type cannot hold.
        """
        check_slab(slab, self._shape, self._written)
        for channel, sink in enumerate(self._sinks):
            data = np.ascontiguousarray(as_stored(slab[channel], self.dtype)).reshape(-1).view(np.uint8).data
            if not isinstance(sink, GzipWriter):
                self._crc[channel] = isal_zlib.crc32(data, self._crc[channel])
            sink.write(data)
        self._written += slab.shape[1]

    def finish(self) -> None:
        """Bring the channels together.

        Raises:
            ValueError: planes are missing.
        """
        if self._written != self._shape[1]:
            raise ValueError(f"all {self._shape[1]} planes must be written, got {self._written}")
        for sink, file in zip(self._sinks, self._files, strict=True):
            if isinstance(sink, GzipWriter):
                sink.finish()
            if file is not self._files[0]:
                file.seek(0)
                shutil.copyfileobj(file, self._files[0], _BLOCK)

    def verify(self, path: Path) -> None:
        """Read `path` back and compare the checksums of what was written.

        Raises:
            ResourceError: they differ.
        """
        size = self.dtype.itemsize * int(np.prod(self._shape[1:], dtype=np.int64))
        with open(path, "rb") as file:
            if isinstance(self._sinks[0], GzipWriter):
                same = all(sink.reads_back(file) for sink in self._sinks if isinstance(sink, GzipWriter))
            else:
                same = file.read(len(self._head)) == self._head
                same = same and all(_crc_of(file, size) == crc for crc in self._crc)
            if not same or file.read(1):
                raise ResourceError("the file does not read back as it was written", "check the disk", path)


def _crc_of(file: IO[bytes], size: int) -> int:
    crc, held = 0, memoryview(bytearray(min(size, _PIECE)))
    while size and (count := file.readinto(held[:size])):  # type: ignore[attr-defined]
        crc = isal_zlib.crc32(held[:count], crc)
        size -= count
    return crc
