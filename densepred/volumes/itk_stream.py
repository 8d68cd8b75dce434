"""Where the voxels of an NRRD or MetaImage file lie, and whether they are all there and undamaged.

ITK decodes; here the stream is only counted and its checksum compared, in bounded memory.
"""

from __future__ import annotations

import bz2
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from densepred.errors import InputError
from densepred.volumes.arrays import stranger

_CHUNK = 1 << 20
_LONGEST, _MAX_HEADER = 1 << 20, 1 << 23
"""Bytes of a line and of a header; ITK keeps them on its stack."""
_MOST_AXES = 10
"""Of a MetaImage: ITK's own limit, which it does not check."""
_FIX = "get the file again from its source"
_SINGLE = "save it as one file"
_PATTERN = re.compile(r"[^%\s]*%(?:0?[1-9])?d[^%\s]*")
"""A name with a number in it."""
_MAGIC = {".nrrd": (b"NRRD",), ".nhdr": (b"NRRD",), ".mha": (b"=",), ".mhd": (b"=",)}


@dataclass(frozen=True)
class Voxels:
    """The voxels of a header.

    Attributes:
        header: the file that describes them.
        file: the one file that holds them; None where several do.
        start: the first byte; negative where they are the last bytes of the file.
        encoding: "raw", "gzip", "zlib", "bzip2" or "text".
        windows: a region can be read without the rest.
        packed: how many bytes the compressed stream has, where the header says it; ITK allocates them.
    """

    header: Path
    file: Path | None
    start: int
    encoding: str
    windows: bool
    packed: int = 0

    def check_there(self) -> None:
        """Look for the file of voxels.

        Raises:
            InputError: it is missing.
        """
        if self.file is not None and not self.file.is_file():
            fix = f"put it beside {self.header.name}"
            raise InputError(f"its voxels are in {self.file.name}, which is not there", fix, self.header)

    def check_length(self, needed: int, count: int) -> None:
        """Compare the length of what is stored with what is needed.

        Args:
            needed: bytes of the voxels.
            count: how many numbers these are; as text each takes a digit and, but for the last, a blank.

        Raises:
            InputError: it is shorter.
        """
        least = {"raw": needed, "text": 2 * count - 1}.get(self.encoding, 0)
        if self.file is None:
            return
        held = self.file.stat().st_size - max(self.start, 0)
        if held < least:
            raise InputError(f"truncated: holds {held} of {least} bytes of voxels", _FIX, self.header)

    def check_stream(self, needed: int) -> None:
        """Decode compressed voxels once, forward, without keeping them.

        Raises:
            InputError: they are damaged, or not `needed` bytes.
        """
        if self.encoding in ("raw", "text"):
            return
        if self.file is None:
            what = "its voxels are compressed in several files, which cannot be checked"
            raise InputError(what, "save it as one file", self.header)
        held, stored = 0, self.file.stat().st_size
        try:
            for size in _decoded(self.file, self.start, self.encoding):
                held += size
                if held > needed:
                    break
        except (zlib.error, OSError, EOFError) as error:
            what = f"its compressed voxels are damaged after {held} of {needed} bytes ({error})"
            raise InputError(what, _FIX, self.header) from error
        if held > needed:
            raise InputError(f"holds over {needed} bytes of voxels", _FIX, self.header)
        if held < needed:
            raise InputError(f"truncated: holds {held} of {needed} bytes of voxels", _FIX, self.header)
        if self.packed > stored:
            what = f"impossible sizes: CompressedDataSize = {self.packed} in a file of {stored} bytes"
            raise InputError(what, _FIX, self.header)


def check_readable(path: Path) -> None:
    """Tell what is no such file before ITK is asked.

    Raises:
        InputError: it is something else.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        head = file.read(4 if path.suffix.lower() in (".nrrd", ".nhdr") else 400)
    first = head.split(b"\n")[0]
    if not any(mark in first for mark in _MAGIC[path.suffix.lower()]) or first.startswith(b"<"):
        raise stranger(path.suffix.lower(), path)


def locate(path: Path) -> Voxels:
    """Find the voxels of a header."""
    return _of_nrrd(path) if path.suffix.lower() in (".nrrd", ".nhdr") else _of_meta(path)


def _lines(path: Path, last: str | None) -> Iterator[tuple[str, int]]:
    """Lines of a text header, each with where it ends; up to an empty one, or to the one that starts with `last`."""
    with open(path, "rb") as file:
        end = 0
        while line := file.readline(_LONGEST):
            end += len(line)
            if len(line) == _LONGEST or end > _MAX_HEADER:
                raise InputError(f"no end of its header in the first {end} bytes", _FIX, path)
            text = line.decode("latin-1").strip()
            yield text, end
            if last is None and not text:
                return
            if last is not None and text.startswith(last):
                return


def _of_nrrd(path: Path) -> Voxels:
    fields, end = {}, 0
    for text, end in _lines(path, None):  # noqa: B007
        name, colon, value = text.partition(":")
        if colon and not value.startswith("=") and not text.startswith("#"):
            fields[name.strip().lower()] = value.strip()
    spacings = [size for size in fields.get("spacings", "").split() if size.lower() != "nan"]  # of an axis without one
    _check_sizes("spacings", spacings, path, float)
    names = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}
    encoding = names.get(fields.get("encoding", "raw").lower(), "text")
    other = fields.get("data file", fields.get("datafile"))
    lines, skip = (_whole(fields, (f"{unit} skip", f"{unit}skip"), path) for unit in ("line", "byte"))
    if other is not None:
        words = other.split()
        several = other.upper().startswith("LIST") or (len(words) > 1 and "%" in other)
        if several and "%" in words[0]:
            numbers = all(re.fullmatch(r"-?\d{1,9}", word) for word in words[1:])
            if not (_PATTERN.fullmatch(words[0]) and len(words) in (4, 5) and numbers and int(words[3])):
                raise InputError(f"impossible files of voxels: data file: {other[:80]}", _SINGLE, path)
        return Voxels(path, None if several or lines else path.parent / other, skip, encoding, False)
    return Voxels(path, None if lines else path, -1 if skip < 0 else end + skip, encoding, False)


def _whole(fields: dict[str, str], names: tuple[str, ...], path: Path) -> int:
    """The number in the first field that is there, or 0."""
    text = next((fields[name] for name in names if name in fields), "0")
    try:
        return int(text)
    except ValueError:
        raise InputError(f"impossible header: {names[0]}: {text[:40]}", _FIX, path) from None


def _check_sizes(name: str, words: list[str], path: Path, kind: type[int] | type[float], count: int = 0) -> None:
    """All words are positive numbers, `count` of them where it is given."""
    try:
        sizes = [kind(word) for word in words]
    except ValueError:
        sizes = [0]
    if not all(0 < size < math.inf for size in sizes) or len(sizes) != (count or len(sizes)):
        raise InputError(f"impossible sizes: {name} = {' '.join(words)[:80]}", _FIX, path)


def _of_meta(path: Path) -> Voxels:
    fields, end = {}, 0
    for text, end in _lines(path, "ElementDataFile"):  # noqa: B007
        name, _, value = text.partition("=")
        fields[name.strip()] = value.strip()
    axes = _whole(fields, ("NDims",), path)
    if not 2 <= axes <= _MOST_AXES:
        raise InputError(f"impossible number of axes: NDims = {axes}", _FIX, path)
    _check_sizes("DimSize", fields.get("DimSize", "").split(), path, int, axes)
    for name in ("ElementSpacing", "ElementSize"):
        _check_sizes(name, fields.get(name, "").split(), path, float)
    size = _whole(fields, ("CompressedDataSize",), path)
    if size < 0:
        raise InputError(f"impossible sizes: CompressedDataSize = {size}", _FIX, path)
    packed = fields.get("CompressedData", "False").lower() == "true"
    spelled = fields.get("BinaryData", "True").lower() == "false"
    encoding = "zlib" if packed else "text" if spelled else "raw"
    other = fields.get("ElementDataFile", "LOCAL")
    if other.upper() == "LOCAL":
        return Voxels(path, path, end, encoding, encoding == "raw", size)
    several = other.upper().startswith("LIST") or "%" in other
    if several:
        _check_several(other, [int(size) for size in fields["DimSize"].split()], end, path)
    skip = _whole(fields, ("HeaderSize",), path)
    windows = encoding == "raw" and not several
    return Voxels(path, None if several else path.parent / other, skip, encoding, windows, size)


def _check_several(other: str, sizes: list[int], end: int, path: Path) -> None:
    """Of a MetaImage: a plain pattern with a number for each plane, or a list that names every file.

    ITK itself takes a pattern for a format of C, divides by its step, and reads a list that is cut off as far as it is.

    Raises:
        InputError: another pattern, or too few names.
    """
    words = other.split()
    numbers = [int(word) for word in words[1:] if re.fullmatch(r"\d{1,9}", word)]
    strange = len(numbers) < len(words) - 1
    if words[0].upper() == "LIST" and len(words) <= 2 and not strange:
        axes = numbers[0] if numbers else len(sizes) - 1
        if 1 <= axes < len(sizes):
            with open(path, "rb") as file:
                file.seek(end)
                listed = file.read(_MAX_HEADER).split(b"\n")[:-1]
            wanted = math.prod(sizes[axes:])
            if len(listed) < wanted or not all(line.strip() for line in listed[:wanted]):
                what = f"truncated: lists {len(listed)} of {wanted} files, each on a line that ends"
                raise InputError(what, _FIX, path)
            return
    elif _PATTERN.fullmatch(words[0]) and not strange:
        if len(numbers) < 2:
            return  # from the first, or 1, on by ones
        first, last, step = (*numbers, 0)[:3]
        if len(numbers) == 3 and step and len(range(first, last + 1, step)) == sizes[-1]:
            return
    raise InputError(f"impossible files of voxels: ElementDataFile = {other[:80]}", _SINGLE, path)


def _decoded(path: Path, start: int, encoding: str) -> Iterator[int]:
    """How many bytes come out of a compressed stream, piece by piece; to its end, where its checksum is compared."""
    with open(path, "rb") as file:
        file.seek(max(start, 0))
        if encoding == "bzip2":
            with bz2.open(file) as plain:
                while piece := plain.read(_CHUNK):
                    yield len(piece)
            return
        decoder = zlib.decompressobj(47)  # zlib or gzip, by their own first bytes
        data = b""
        while data := decoder.unconsumed_tail or data or file.read(_CHUNK):
            yield len(decoder.decompress(data, _CHUNK))
            data = b""
            if decoder.eof:
                rest = decoder.unused_data + file.read(18)
                if not rest.startswith(b"\x1f\x8b"):
                    return
                file.seek(-len(rest) + len(decoder.unused_data), 1)
                data, decoder = decoder.unused_data, zlib.decompressobj(31)
    raise EOFError("it ends too early")


def check_space(part: Path, needed: int) -> None:
    """Write `needed` bytes in place of `part`, which ITK failed to write without saying why.

    Raises:
        OSError: there is not the room for them.
    """
    with open(part, "wb") as file:
        for start in range(0, needed, _CHUNK):
            file.write(bytes(min(_CHUNK, needed - start)))
