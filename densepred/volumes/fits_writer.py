"""Writing FITS: plain (`.fits`), gzipped (`.fits.gz`) or compressed by tiles (`.fits.fz`), slab by slab.

A plain file gets its full length first and is filled in place; sums are taken on the way and the headers, whose lengths
are known, come last. Memory does not grow with the image.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
from astropy.io import fits
from isal import igzip, isal_zlib

from densepred.errors import InputError, ResourceError
from densepred.files import atomic_path
from densepred.volumes.arrays import as_stored, check_slab
from densepred.volumes.fits_cards import Contents, Provenance, stored_dtype
from densepred.volumes.fits_cut import binned_header, cutout_header
from densepred.volumes.fits_header import FitsHeader, wcs_offset
from densepred.volumes.fits_layout import Output, plan
from densepred.volumes.fits_legend import Legend, count_labels
from densepred.volumes.fits_sums import sum_of_stream
from densepred.volumes.fits_tiles import PlainSink, Sealed, Sink, TileSink, big_endian
from densepred.volumes.gzip_writer import GzipWriter
from densepred.volumes.streams import open_forward
from densepred.volumes.volume import Volume

__all__ = ["Contents", "Legend", "Writer", "binned_header", "cutout_header", "open_writer"]

Compression: TypeAlias = Literal["none", "gzip", "tiles"]

WCS_TOLERANCE = 1e-6
"""Pixels by which corners and centre of the file read back may lie from the source's."""
_PIECE = 1 << 22  # bytes that are converted at once
_COPY = 1 << 22
_ENOSPC = 28


@contextmanager
def open_writer(
    path: str | Path,
    like: Volume,
    dtype: np.dtype,
    channels: int = 1,
    labels: bool = False,
    contents: Contents | None = None,
    legend: Legend | None = None,
    provenance: Provenance | None = None,
    compression: Compression | None = None,
) -> Iterator[Writer]:
    """Write a file slab by slab; it gets its name only once it is whole and has been read back.

    An image from a primary HDU goes to the primary HDU, one from an extension to an extension behind a copy of the
    source's primary header; a compressed one always goes to an extension.

    Args:
        path: a `.fits`, `.fits.gz` or `.fits.fz`.
        like: gives the grid and, if it came from FITS, the header.
        dtype: of the values; what is stored for it is told by `Writer.dtype`.
        channels: how many; several float channels that `like` does not have are taken for probabilities of classes
            and get one HDU each, unless `contents` says what they are.
        labels: the values are classes.
        contents: names, unit and layout.
        legend: of the classes; gives a table LABELS with the pixels of each.
        provenance: cards that tell how the file came about, see `fits_cards.PROVENANCE`, and "HISTORY".
        compression: by default by the suffix.

    Raises:
        InputError: the header's distortion needs tables that are gone, or the folder cannot be written to.
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: the disk is full, or gives back something else than was written.

    Example:
        >>> volume = Volume.from_array(np.zeros((4, 5), np.float32), (1.0, 1.0))
        >>> names = Legend({0: "sky", 1: "source"})
        >>> with open_writer("sources.fits", volume, np.dtype("u1"), labels=True, legend=names) as writer:
        ...     writer.write(np.zeros((1, 4, 5), np.uint8))
        >>> fits.getdata("sources.fits", "LABELS")["npix"].tolist()
        [20, 0]
    """
    path = Path(path)
    how = compression or by_suffix(path)
    stored = checked_dtype(np.dtype(dtype), labels, how)
    output = plan(like, stored, channels, labels, contents, legend, provenance or {}, tiles=how == "tiles")
    writer = Writer(stored, legend)
    with atomic_path(path, writer.verify) as part, ExitStack() as stack:
        writer.start(part, how, stack)
        writer.begin(output, (channels, *like.shape[1:]))
        yield writer
        writer.finish()


def by_suffix(path: Path) -> Compression:
    """How a file of this name is compressed.

    Raises:
        InputError: FITS is not written so.
    """
    suffix = path.suffix.lower()
    if suffix == ".bz2":
        raise InputError("FITS is not written with bzip2", "choose .fits.fz or .fits.gz", path)
    return "gzip" if suffix == ".gz" else "tiles" if suffix == ".fz" else "none"


def checked_dtype(dtype: np.dtype, labels: bool, how: Compression) -> np.dtype:
    """The type that is written for `dtype`.

    Raises:
        ValueError: it cannot be stored.
    """
    stored = stored_dtype(dtype, labels)
    if how == "tiles" and stored.kind in "iu" and stored.itemsize == 8:
        raise ValueError(f"dtype must have at most 32 bits in a compressed image, got {dtype}: write .fits instead")
    return stored


class Writer:
    """Takes slabs forward, of one image or of several one after the other; made by `open_writer`."""

    def __init__(self, dtype: np.dtype, legend: Legend | None) -> None:
        self.dtype = dtype
        self._legend = legend
        self._outputs: list[Output] = []
        self._shape: tuple[int, ...] = (0, 0)
        self._written = 0
        self._sinks: list[Sink] = []
        self._labels: Counter[int] = Counter()
        self._sealed: list[Sealed] = []

    def start(self, part: Path, how: Compression, stack: ExitStack) -> None:
        """Open the file; `stack` closes it.

        Raises:
            InputError: the folder cannot be written to.
        """
        try:
            self._final: IO[bytes] = stack.enter_context(open(part, "wb"))  # noqa: SIM115
        except PermissionError as error:
            what = f"cannot write to this folder ({error.strerror})"
            raise InputError(what, "choose another folder or change its permissions", part.parent) from error
        self._file = self._final
        if how == "gzip":
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=part.parent))  # noqa: SIM115
        self._place = part, how, stack

    def begin(self, output: Output, shape: tuple[int, ...]) -> None:
        """Go on to the HDUs of `output`, which take slabs of `shape`, `(C, *spatial)`.

        Raises:
            ValueError: planes of the image before are missing.
            OSError: there is no room for it.
        """
        self._seal()
        part, how, stack = self._place
        if output.primary is not None:
            self._file.write(output.primary[1])
            self._sealed.append(output.primary[0])
        end = held = self._file.seek(0, 2)
        for image in output.images:
            if how == "tiles":
                self._sinks.append(TileSink(image, part.parent, stack))
            else:
                sink = PlainSink(image, self._file, end)
                self._sinks.append(sink)
                end = sink.end
        if end - held > shutil.disk_usage(part.parent).free:
            raise OSError(_ENOSPC, os.strerror(_ENOSPC), str(part))
        self._file.truncate(end)
        self._outputs.append(output)
        self._shape, self._written = shape, 0

    def _seal(self) -> None:
        """Write the headers of the image before, and its data if they are not in their place yet."""
        if self._written != self._shape[1]:
            raise ValueError(f"all {self._shape[1]} planes must be written, got {self._written}")
        self._file.seek(0, 2)
        for sink in self._sinks:
            self._sealed.append(sink.finish(self._file))
        self._sinks.clear()

    def write(self, slab: np.ndarray) -> None:
        """Append the next planes, `(C, n, *rest)`.

        Raises:
            ValueError: a wrong shape, planes past the end, or values that the stored type cannot hold.
        """
        check_slab(slab, self._shape, self._written)
        step = max(1, _PIECE * slab.shape[1] // max(1, slab.nbytes))
        for start in range(0, slab.shape[1], step):
            self._put(as_stored(slab[:, start : start + step], self.dtype))
        self._written += slab.shape[1]

    def _put(self, piece: np.ndarray) -> None:
        if self._legend is not None:
            count_labels(piece, self._labels)
        for sink in self._sinks:
            image = sink.image
            values = piece[image.channels.start : image.channels.stop]
            if image.position:
                sink.write(0, big_endian(np.moveaxis(values, 0, image.position)))
                continue
            for stream, channel in enumerate(values):
                sink.write(stream, big_endian(channel))

    def finish(self) -> None:
        """Write headers and tables, and compress what is to be gzipped.

        Raises:
            ValueError: planes are missing.
        """
        self._seal()
        file = self._file
        tables = list(dict.fromkeys(table for output in self._outputs for table in output.tables))
        if self._legend is not None:
            tables.append(self._legend.table(self._labels))
        file.seek(0, 2)
        for sealed, block in tables:
            file.write(block)
            self._sealed.append(sealed)
        if file is not self._final:
            _gzip(file, self._final)

    def verify(self, path: Path) -> None:
        """Read `path` back and compare headers, sums, shapes and world coordinates with what they must be.

        Raises:
            ResourceError: they differ.
        """
        blocks = []
        with open_forward(path) as file:
            try:
                for header, size, total in self._sealed:
                    blocks.append(file.read(len(header)))
                    same = blocks[-1] == header and sum_of_stream(file, size) == total
                    if not same:
                        break
                same = same and not file.read(1)
            except (EOFError, igzip.BadGzipFile, isal_zlib.error):  # type: ignore[misc]
                same = False
        if not same:
            raise ResourceError("the file does not read back as it was written", "check the disk", path)
        images = [(image, output) for output in self._outputs for image in output.images]
        first = 0 if self._outputs[0].primary is None else 1
        for (image, output), block in zip(images, blocks[first:], strict=False):
            header = fits.Header.fromstring(block.decode("ascii"))
            prefix = "Z" if "ZIMAGE" in header else ""
            shape = tuple(header[f"{prefix}NAXIS{axis}"] for axis in range(header[f"{prefix}NAXIS"], 0, -1))
            for axis in range(header[f"{prefix}NAXIS"] + 1):  # a WCS has as many axes as NAXIS says; a table's are two
                header[f"NAXIS{axis or ''}"] = header[f"{prefix}NAXIS{axis or ''}"]
            if shape != image.shape:
                raise ResourceError(f"the file reads back as {shape} instead of {image.shape}", "check the disk", path)
            _compare_wcs(header, output, path)


def _compare_wcs(header: fits.Header, output: Output, path: Path) -> None:
    source = output.source
    if source is None or not source.has_wcs:
        return
    try:
        source.wcs  # noqa: B018 - a source whose WCS makes no sense is copied as it is
    except InputError:
        return
    written = FitsHeader(header, 0, "", 1, output.shape, output.squeezed, output.channels_axis, path)
    offset = wcs_offset(source, written)
    if not offset <= WCS_TOLERANCE:
        what = f"the world coordinates read back {offset:.3g} pixels from the source's"
        raise ResourceError(what, "report this with the source file", path)


def _gzip(source: IO[bytes], target: IO[bytes]) -> None:
    sink = GzipWriter(target)
    source.seek(0)
    while chunk := source.read(_COPY):
        sink.write(chunk)
    sink.finish()
