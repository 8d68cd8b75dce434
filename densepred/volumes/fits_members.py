"""Several images of one FITS file: which "all" stands for, and writing as many into one file, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from densepred.files import atomic_path
from densepred.volumes import fits, fits_writer
from densepred.volumes.fits_cards import Contents, Provenance
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.fits_layout import default_contents, plan
from densepred.volumes.fits_legend import Legend
from densepred.volumes.record import Record
from densepred.volumes.volume import Volume


def members(path: Path, part: str | None, axes: str | None) -> list[str] | None:
    """What to write in brackets for each image that "all" or "SCI,all" stands for; None where `part` is neither.

    Raises:
        InputError: as `fits.read`, or there are no such images.
    """
    if part is None or part.rpartition(",")[2].strip().lower() != "all":
        return None
    return fits.images(path, part)


@contextmanager
def open_writer(
    path: Path, count: int, dtype: np.dtype, channels: int, labels: bool, record: Record | None = None
) -> Iterator[MembersWriter]:
    """Write `count` images one after the other into one file; else as `fits_writer.open_writer`.

    Each has the header, EXTNAME and EXTVER of its source; of probabilities, each class has an HDU with that EXTVER. One
    table LABELS counts the pixels of all images together.
    """
    how = fits_writer.by_suffix(path)
    stored = fits_writer.checked_dtype(np.dtype(dtype), labels, how)
    told = Told(channels, labels, how == "tiles", *fits.recorded(record, channels, labels))
    writer = MembersWriter(stored, count, told)
    with atomic_path(path, writer.verify) as part, ExitStack() as stack:
        writer.start(part, how, stack)
        yield writer
        writer.finish()


class Told(NamedTuple):
    """What holds for all images of a file; see `fits_writer.open_writer`."""

    channels: int
    labels: bool
    tiles: bool
    contents: Contents | None
    legend: Legend | None
    provenance: Provenance


class MembersWriter(fits_writer.Writer):
    """Takes images in order, each slab by slab; made by `open_writer`."""

    def __init__(self, dtype: np.dtype, count: int, told: Told) -> None:
        super().__init__(dtype, told.legend)
        self._count, self._told = count, told
        self._versions: set[int] = set()

    def member(self, like: Volume) -> MembersWriter:
        """Begin the next image, on the grid and with the header of `like`.

        Raises:
            InputError: the header's distortion needs tables that are gone.
            ValueError: the image before is not whole, or there are enough.
        """
        if len(self._outputs) == self._count:
            raise ValueError(f"count must be the number of images, got {self._count} and one more")
        channels, labels, tiles, contents, legend, provenance = self._told
        contents = self._named(contents or default_contents(like, self.dtype, channels, labels), like.header)
        first = not self._outputs
        output = plan(like, self.dtype, channels, labels, contents, legend, provenance, tiles, first)
        self.begin(output, (channels, *like.shape[1:]))
        return self

    def _named(self, contents: Contents, source: object) -> Contents:
        """With EXTNAME and EXTVER of the source; classes, which have names of their own, with the next free EXTVER."""
        held = source if isinstance(source, FitsHeader) and source.index > 0 else None
        if self._told.channels == 1 or contents.layout == "cube":
            return replace(contents, name=held.name, version=held.version) if held and held.name else contents
        version = held.version if held else 1
        while version in self._versions:
            version += 1
        self._versions.add(version)
        return replace(contents, version=version)

    def finish(self) -> None:
        """As `Writer.finish`.

        Raises:
            ValueError: planes or images are missing.
        """
        if len(self._outputs) != self._count:
            raise ValueError(f"all {self._count} images must be written, got {len(self._outputs)}")
        super().finish()
