"""PNG, JPEG and BMP: one image (Y, X), its colours as channels, decoded as a whole.

Red, green, blue and, where the file has it, alpha (opaque or not) are channels; grey with alpha gives two. Values are
those stored: 1-, 2- and 4-bit grey is not stretched to 255, 16 bits stay 16. A palette gives its colours, or with
`mask.png[index]` the indices, which is how class maps are often kept. Spacing is 1 without a unit: dots per inch are
the size on paper. JPEG is lossy and has no checksum: damage can go unseen, and no labels are written to it.

References: PNG specification (third edition); Exif 2.3, tag 274.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densepred.errors import InputError
from densepred.volumes.arrays import FileArray, stranger
from densepred.volumes.bombs import FREE, expands
from densepred.volumes.volume import Volume, check_memory

try:
    from PIL import Image
except ImportError as error:
    raise InputError("PNG, JPEG and BMP files need Pillow", "pip install pillow") from error

from densepred.volumes.image_writer import CONTENT, open_writer

__all__ = ["ImageHeader", "open_writer", "read"]

FORMATS = {".png": ("PNG",), ".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".bmp": ("BMP",)}
_SAMPLES = {"1": 1, "L": 1, "I;16": 1, "P": 3, "LA": 2, "RGB": 3, "RGBA": 4}
_PNG_SAMPLES: dict[int | None, int] = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type; Pillow's mode errs for 16 bits
_MAX_RATIO = 1100  # no PNG holds more bytes per byte: deflate's limit is 1032
_FIX = "get the file again from its source"


@dataclass(frozen=True)
class ImageHeader:
    """What a volume keeps of its image file.

    Args:
        colour: 3 where the channels are red, green and blue, 4 with alpha, else 0.
        dpi: dots per inch along x and y, written back.
        unit: None: the spacing has no unit.
    """

    colour: int = 0
    dpi: tuple[float, float] | None = None
    unit: str | None = None


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open a file: its header is read and checked, its pixels are left for later.

    Args:
        path: a `.png`, `.jpg`, `.jpeg` or `.bmp`.
        axes: None, "yx" or "yxc": what the file says cannot be changed.
        part: "index" for the indices of a palette image instead of its colours; the volume then holds labels.

    Raises:
        InputError: no such image, truncated, damaged, larger than Pillow's limit, or of a mode that is not supported.

    Example:
        >>> read("photo.png").shape  # doctest: +SKIP
        (3, 480, 640)
    """
    path = Path(path)
    stored = ImageArray(path, part)
    letters = "yxc" if len(stored.shape) == 3 else "yx"
    if axes not in (None, letters):
        raise InputError(f"axes '{axes}' were declared and the file has '{letters}'", "leave out `axes`", path)
    array = FileArray(stored, letters, path)
    return Volume(array, (1.0, 1.0), header=stored.header, path=path, labels=stored.labels)


class ImageArray:
    """The pixels of a file, `(Y, X)` or `(Y, X, C)`, held from the first read until its last row was read.

    Raises:
        InputError: as `read`.
    """

    def __init__(self, path: Path, part: str | None) -> None:
        self._path, self._index = path, part == "index"
        self._held: np.ndarray | None = None
        with _opened(path) as image:
            if part is not None and not (self._index and image.mode == "P"):
                what = (
                    f"has no part [{part}]" if not self._index else f"has no palette (mode {image.mode}), so no [index]"
                )
                raise InputError(what, "leave the brackets out", path)
            self._png = image.format == "PNG"
            self._depth, kind = _png_pixels(path) if self._png else (8, None)
            _check(image, path)
            self._told = not self._png or "exif" in image.info  # else it may lie behind the pixels
            if self._told:
                _tell_orientation(image, path)
            samples = _PNG_SAMPLES.get(kind, _SAMPLES[image.mode])
            if image.mode == "P" and "transparency" in image.info:
                samples = 4
            samples = 1 if self._index else samples
            self.shape: tuple[int, ...] = (image.height, image.width, *[samples] * (samples > 1))
            self.dtype = np.dtype(f"u{2 if self._depth == 16 else 1}")
            self._check_size(image)
            dpi = image.info.get("dpi")
            dpi = None if dpi is None or not all(0 < float(number) < 1e6 for number in dpi) else dpi
            self.header = ImageHeader(
                samples if samples > 2 else 0, None if dpi is None else (float(dpi[0]), float(dpi[1]))
            )
            self.labels = self._index or (samples == 1 and image.info.get(CONTENT[0]) == CONTENT[1])

    def _check_size(self, image: Any) -> None:
        needed = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        held = self._path.stat().st_size
        least = image.width * self._depth // 8 * image.height
        if self._png and least > held * _MAX_RATIO:
            what = f"declares {image.width} x {image.height} pixels, which its {held} bytes can never hold"
            raise InputError(what, _FIX, self._path)
        check_memory(2 * needed, self._path)  # decoded, and as channels

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """See `Stored.read`."""
        if self._held is None:
            self._held = self._decode()
        values = self._held[key].copy()
        if key[0].stop == self.shape[0]:
            self._held = None
        return values

    def _decode(self) -> np.ndarray:
        try:
            if self._png:
                with _opened(self._path) as image:
                    image.verify()  # the checksums of its chunks, which decoding leaves out
                self._check_stream()
            if self._png and self._depth == 16 and len(self.shape) == 3:
                import imagecodecs

                values = imagecodecs.png_decode(self._path.read_bytes())  # Pillow keeps 8 of the 16 bits
            else:
                values = self._decode_by_pillow()
        except InputError:
            raise
        except Exception as error:  # a codec may raise anything
            what = f"the image is damaged or truncated ({str(error).strip()[:150]})"
            raise InputError(what, _FIX, self._path) from error
        if values.shape != self.shape:
            raise InputError(f"decodes to {values.shape} instead of {self.shape}", _FIX, self._path)
        return values

    def _check_stream(self) -> None:
        """Its pixels are not behind something endless: libpng reads on to the end of the stream."""
        most = 2 * int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize  # with the filters' bytes, interlaced
        if self._path.stat().st_size * _MAX_RATIO > most + FREE and expands(_png_stream(self._path), "zlib", most):
            raise InputError(f"its pixels expand to more than twice the {most // 2} bytes they are", _FIX, self._path)

    def _decode_by_pillow(self) -> np.ndarray:
        with _opened(self._path) as image:
            image.load()
            if not self._told:
                _tell_orientation(image, self._path)
                self._told = True
            if image.mode == "P" and not self._index:
                image = image.convert("RGBA" if self.shape[2] == 4 else "RGB")
            values = np.asarray(image)
        if self._png and image.mode == "L" and self._depth in (2, 4):
            values = values // (255 // (2**self._depth - 1))  # Pillow stretches them to 255
        return values.astype(self.dtype, copy=False)

    def verify(self) -> None:
        """Reading has decoded and checked it all."""

    def close(self) -> None:
        """Let go of the pixels."""
        self._held = None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Pillow's image, by content; a warning where the name says another format."""
    known = FORMATS.get(path.suffix.lower(), ("PNG",))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the memory is checked instead
            image = Image.open(path, formats=["PNG", "JPEG", "BMP"])
    except Image.UnidentifiedImageError as error:
        with open(path, "rb") as file:
            head = file.read(3)
        if head in (b"\x89PN", b"\xff\xd8\xff") or head[:2] == b"BM":
            raise InputError("the header of this image is damaged or truncated", _FIX, path) from error
        raise stranger(known[0], path) from error
    except Image.DecompressionBombError as error:
        what = f"more pixels than Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)}"
        raise InputError(what, "convert it to tiled TIFF, of which parts can be read", path) from error
    except (SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"the header of this image is broken ({str(error)[:150]})", _FIX, path) from error
    with image:
        yield image


def _check(image: Any, path: Path) -> None:
    known = FORMATS.get(path.suffix.lower(), ("PNG",))
    if image.format not in known:
        warnings.warn(f"{path}: the file is {image.format}, against its name", stacklevel=5)
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"holds {image.n_frames} images", "save the one that is meant as a file of its own", path)
    if image.mode not in _SAMPLES:
        raise InputError(f"colour mode {image.mode} is not supported", "convert it to grey or RGB", path)


def _png_pixels(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type, from the header."""
    with open(path, "rb") as file:
        head = file.read(26)
    return head[24], head[25]


def _png_stream(path: Path) -> bytes:
    """The compressed pixels: what is in the chunks IDAT."""
    pieces = []
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"IDAT":
                pieces.append(file.read(size))
                size = 0
            file.seek(size + 4, 1)
    return b"".join(pieces)


def _tell_orientation(image: Any, path: Path) -> None:
    """Warn where viewers turn the image."""
    number = image.getexif().get(274, 1)
    if number not in (0, 1):
        what = f"EXIF orientation {number} is not applied: pixels are given as stored, which viewers turn or mirror"
        warnings.warn(f"{path}: {what}", stacklevel=6)
