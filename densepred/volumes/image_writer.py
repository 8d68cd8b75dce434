"""PNG, JPEG and BMP written as a whole: the rows gather in memory, and the file is decoded again before it is named.

PNG takes 8 and 16 bits and up to four channels; BMP 8 bits, grey or RGB, without loss; JPEG the same with loss (quality
95), so no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from densepred.errors import InputError
from densepred.files import atomic_path
from densepred.volumes.arrays import SlabSink, create
from densepred.volumes.volume import Volume, check_memory

CONTENT = ("Content", "label map: the values are classes")
"""The text chunk of a PNG that we write as labels."""
_FIX = "write a .tif file"


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[SlabSink]:
    """Write a file; it gets its name only once it is whole and, unless it is JPEG, has been read back.

    Args:
        path: a `.png`, `.jpg`, `.jpeg` or `.bmp`.
        like: gives the grid (Y, X) and, from an image file, the dots per inch.
        dtype: of the values; integers beyond 8 bits are stored in 16.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        labels: the values are classes; a PNG file says so.

    Raises:
        InputError: the format cannot hold such an image, or changes its classes.
        ValueError: not all rows were written.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    kind = {".png": "PNG", ".bmp": "BMP"}.get(path.suffix.lower(), "JPEG")
    stored = _stored_dtype(np.dtype(dtype), kind, labels, path)
    if like.dims != 2:
        what = f"{kind} holds one image (Y, X), and this volume has {like.shape[1]} planes"
        raise InputError(what, _FIX, path)
    if channels > 4 or (kind != "PNG" and channels not in (1, 3)):
        raise InputError(f"{kind} cannot hold {channels} channels", _FIX, path)

    def verify(part: Path) -> None:
        from densepred.volumes.image import read

        if kind != "JPEG":
            writer.compare(lambda: read(part))

    with atomic_path(path, verify) as part, create(part) as file:
        writer = Writer((channels, *like.shape[1:]), stored, path)
        yield writer
        writer.finish()
        _encode(writer.whole, file, kind, getattr(like.header, "dpi", None), labels)


def _stored_dtype(dtype: np.dtype, kind: str, labels: bool, path: Path) -> np.dtype:
    if labels and kind == "JPEG":
        raise InputError("JPEG is lossy and would change the classes", "write a .png file", path)
    if dtype.kind not in "biu":
        raise InputError(f"{kind} holds integers of up to 16 bits, not {dtype}", _FIX, path)
    if dtype.itemsize == 1:
        return np.dtype(np.uint8)
    if kind == "PNG":
        return np.dtype(np.uint16)
    if labels:
        return np.dtype(np.uint8)
    raise InputError(f"{kind} holds integers of 8 bits, not {dtype}", "write a .png file", path)


class Writer(SlabSink):
    """Gathers the rows; made by `open_writer`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
        super().__init__(shape, dtype)
        self._path = path
        check_memory(2 * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, path)
        self.whole = np.empty((*shape[1:], shape[0]), dtype)

    def write(self, slab: np.ndarray) -> None:
        """See `SlabSink.write`.

        Raises:
            InputError: a value that the format cannot hold.
        """
        most = int(np.iinfo(self.dtype).max)
        if slab.size and slab.dtype.kind in "iu" and (slab.min() < 0 or slab.max() > most):
            what = f"values from {slab.min()} to {slab.max()} do not fit 0 to {most}"
            raise InputError(what, _FIX, self._path)
        super().write(slab)

    def _put(self, slab: np.ndarray, start: int) -> None:
        self.whole[start : start + slab.shape[1]] = np.moveaxis(slab, 0, -1)


def _encode(pixels: np.ndarray, file: IO[bytes], kind: str, dpi: Any, labels: bool) -> None:
    """`(Y, X, C)` to an open file."""
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        import imagecodecs

        file.write(imagecodecs.png_encode(pixels))  # Pillow has no colours of 16 bits
        return
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {} if dpi is None else {"dpi": dpi}
    if kind == "PNG" and labels:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(*CONTENT)
    if kind == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
    image.save(file, kind, **options)
