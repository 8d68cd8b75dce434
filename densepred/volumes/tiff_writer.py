"""TIFF written page by page: OME-XML with the voxel size, lossless zlib, BigTIFF where 4 GB would not do.

Planes of a stack go into the file as they come, Z slowest and channels within it. The rows of an image (Y, X) gather in
an unnamed file beside it first, since TIFF wants tiles and whole channels.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from densepred.files import atomic_path
from densepred.volumes.arrays import SlabSink, create, micrometres, stored_dtype
from densepred.volumes.tiff_header import LABELS
from densepred.volumes.volume import Volume

_CLASSIC = (1 << 32) - (1 << 26)  # bytes of pixels beyond which offsets of 4 bytes may not reach
_TILE = 256
_LARGE = 1 << 22  # pixels; larger pages are tiled


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[SlabSink]:
    """Write a file slab by slab; it gets its name only once it is whole and has been read back.

    Args:
        path: a `.tif` or `.tiff`.
        like: gives the grid, the voxel size (in micrometres where its unit is known, else without a unit) and whether
            three or four channels are colours.
        dtype: of the values; `SlabSink.dtype` is what is stored.
        channels: more than one become pages of their own, or samples where they are colours.
        labels: the values are classes; the file says so.

    Raises:
        ValueError: the dtype cannot be stored, or not all planes were written.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    stored = stored_dtype(np.dtype(dtype), labels)
    shape = (channels, *like.shape[1:])
    colour = getattr(like.header, "colour", 0) == channels and not labels and stored in (np.uint8, np.uint16)
    options = _options(like, shape, stored, colour, labels)
    axes = "zyx"[-len(shape) + 1 :]
    axes = f"{axes}c" if colour else axes if channels == 1 else axes.replace("yx", "cyx")

    def verify(part: Path) -> None:
        from densepred.volumes.tiff import read

        writer.compare(lambda: read(part, axes))

    with atomic_path(path, verify) as part, ExitStack() as stack:
        file = stack.enter_context(create(part))
        big = int(np.prod(shape, dtype=np.int64)) * stored.itemsize > _CLASSIC
        tif = stack.enter_context(tifffile.TiffWriter(file, bigtiff=big, byteorder="<", ome=False))
        scratch = stack.enter_context(tempfile.TemporaryFile(dir=part.parent)) if len(shape) == 3 else None
        writer = Writer(tif, scratch, shape, stored, options)
        yield writer
        writer.finish()


def _options(
    like: Volume, shape: tuple[int, ...], dtype: np.dtype, colour: bool, labels: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `TiffWriter.write` gets for every page, and for the first one besides."""
    every: dict[str, Any] = {"compression": "zlib", "metadata": None, "contiguous": False, "software": "densepred"}
    every["photometric"] = "rgb" if colour else "minisblack"
    if colour:
        every["planarconfig"] = "contig"
        if shape[0] == 4:
            every["extrasamples"] = [getattr(like.header, "alpha", "unassalpha")]
    if not labels and dtype in (np.uint8, np.uint16):
        every["predictor"] = 2
    if shape[-1] * shape[-2] > _LARGE:
        every["tile"] = (_TILE, _TILE)
    factor = micrometres(like)
    sizes = [size * (factor or 1.0) for size in like.spacing]
    meta: dict[str, Any] = {"Description": LABELS} if labels else {}
    if factor or set(sizes) != {1.0}:
        for axis, size in zip("XYZ", reversed(sizes), strict=False):
            meta |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "µm" if factor else "pixel"}
    if factor:
        every |= {"resolution": (1e4 / sizes[-1], 1e4 / sizes[-2]), "resolutionunit": "CENTIMETER"}
    return every, {"description": _ome(shape, dtype, colour, meta)}


def _ome(shape: tuple[int, ...], dtype: np.dtype, colour: bool, meta: dict[str, Any]) -> bytes:
    channels, *depth, rows, columns = shape
    samples = channels if colour else 1
    planes = [*depth, *([] if colour or channels == 1 else [channels])]
    axes = "Z" * len(depth) + ("" if colour or channels == 1 else "C") + "YX" + ("S" if colour else "")
    stored = (int(np.prod(planes, dtype=np.int64)), 1, 1, rows, columns, samples)
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"densepred {shape} {dtype} {sorted(meta.items())}")  # the same for the same
    xml = tifffile.OmeXml(Creator="densepred", UUID=f"urn:uuid:{name}")
    xml.addimage(dtype, (*planes, rows, columns, *[samples] * colour), stored, axes=axes, **meta)
    return xml.tostring(declaration=True).encode()


class Writer(SlabSink):
    """Makes pages of slabs; made by `open_writer`."""

    def __init__(
        self, tif: Any, scratch: Any, shape: tuple[int, ...], dtype: np.dtype, options: tuple[dict, dict]
    ) -> None:
        super().__init__(shape, dtype)
        self._tif, self._scratch = tif, scratch
        self._every, self._first = options

    def _put(self, slab: np.ndarray, start: int) -> None:
        if self._scratch is None:
            for number in range(slab.shape[1]):
                self._image(slab[:, number])
            return
        row = self.shape[2] * self.dtype.itemsize
        for channel, rows in enumerate(slab):
            self._scratch.seek((channel * self.shape[1] + start) * row)
            self._scratch.write(np.ascontiguousarray(rows).data)

    def finish(self) -> None:
        """See `SlabSink.finish`; an image becomes a page only now."""
        super().finish()
        if self._scratch is not None:
            self._scratch.flush()
            self._image(np.memmap(self._scratch, self.dtype, "r", shape=self.shape))

    def _image(self, planes: np.ndarray) -> None:
        """`(C, Y, X)` as one page of samples, or as one page per channel."""
        if self._every["photometric"] == "rgb":
            self._page(planes.transpose(1, 2, 0))
            return
        for plane in planes:
            self._page(plane)

    def _page(self, page: np.ndarray) -> None:
        data = _tiles(page) if "tile" in self._every else np.ascontiguousarray(page)
        self._tif.write(data, shape=page.shape, dtype=self.dtype, **self._every, **self._first)
        self._first = {}


def _tiles(page: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(0, page.shape[0], _TILE):
        for left in range(0, page.shape[1], _TILE):
            yield np.ascontiguousarray(page[top : top + _TILE, left : left + _TILE])
