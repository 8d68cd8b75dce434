"""The bytes of plain and gzipped files: read forward, counted and checked.

Reference for gzip: RFC 1952.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from isal import igzip, isal_zlib

from densepred.errors import InputError
from densepred.volumes.bombs import FREE

MAX_RATIO = 1100
"""No gzip file holds more bytes per byte: deflate's limit is 1032."""
MAX_STREAMS = 64
"""Files held open for one volume; with more channels than this, reading by slabs starts over and over."""
_CHUNK = 1 << 20
_FIX = "get the file again from its source"


def is_gzipped(path: Path) -> bool:
    """Whether the content, not the name, is gzip."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


class Bytes(Protocol):
    """The content of a file, without compression, from any position but best forward."""

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or fewer if there are no more."""

    def expect(self, total: int) -> None:
        """Declare that `total` bytes are needed; raises InputError where the file cannot hold them."""

    def read_into(self, offset: int, target: np.ndarray, stream: int = 0) -> None:
        """Fill the contiguous `target` from `offset`; reads of one `stream` that go forward cost nothing extra."""

    def verify(self) -> None:
        """Read to the end and check; raises InputError where the file is damaged."""

    def close(self) -> None:
        """Let go of the file."""


def open_bytes(path: Path) -> Bytes:
    """The bytes of a plain or gzipped file; OSError where it cannot be opened."""
    return GzipBytes(path) if is_gzipped(path) else PlainBytes(path)


def truncated(path: Path, held: int, needed: int) -> InputError:
    """The error for a file that ends too early."""
    return InputError(f"truncated: holds {held} of {needed} bytes", _FIX, path)


def _corrupt(path: Path, error: Exception) -> InputError:
    checksum = any(words in str(error) for words in ("CRC", "incorrect data check"))  # isal's and zlib's
    what = "the checksum does not match" if checksum else f"the gzip stream is broken ({error})"
    return InputError(f"{what}: the file is corrupt", _FIX, path)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be read: {error.strerror or error}", "check the file's permissions and the disk", path)


class PlainBytes:
    """A file as it lies on disk; it carries no checksum, so only its size can be verified."""

    def __init__(self, path: Path) -> None:
        self.path, self._total = path, 0

    def head(self, size: int) -> bytes:
        with open(self.path, "rb") as file:
            return file.read(size)

    def expect(self, total: int) -> None:
        self._total = total
        self.verify()

    def read_into(self, offset: int, target: np.ndarray, stream: int = 0) -> None:
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                held = file.readinto(target.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if held < target.nbytes:
            raise truncated(self.path, offset + held, self._total)

    def verify(self) -> None:
        held = self.path.stat().st_size
        if held < self._total:
            raise truncated(self.path, held, self._total)

    def close(self) -> None:
        """Nothing is held open."""


class GzipBytes:
    """A gzipped file: every stream is a decompressor at its own position, which starts anew for a backward read.

    Whichever stream reads the last of the expected bytes goes on to the end of the file, where isal checks CRC and
    length of each gzip member. After the last member only zero bytes are allowed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._total = path, 0
        self._verified = False
        self._streams: dict[int, _GzipStream] = {}

    def head(self, size: int) -> bytes:
        held = b""
        try:
            for chunk in _decoded(self.path):
                held += chunk
                if len(held) >= size:
                    break
        except zlib.error as error:
            raise _corrupt(self.path, error) from error
        return held[:size]

    def expect(self, total: int) -> None:
        self._total = total
        size = self.path.stat().st_size
        if total > size * MAX_RATIO:
            what = f"truncated, or its header is wrong: {size} compressed bytes never hold the {total} it declares"
            raise InputError(what, _FIX, self.path)

    def read_into(self, offset: int, target: np.ndarray, stream: int = 0) -> None:
        reader = self._at(offset, stream)
        held = reader.read_into(target.reshape(-1).view(np.uint8).data, self._total)
        if held < target.nbytes:
            raise truncated(self.path, reader.position, self._total)
        if reader.position >= self._total:
            self._finish(reader)

    def verify(self) -> None:
        if not self._verified:
            furthest = max(self._streams.values(), key=lambda stream: stream.position, default=None)
            self._finish(furthest or self._at(0, 0))

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def _at(self, offset: int, key: int) -> _GzipStream:
        stream = self._streams.get(key)
        if stream is None or stream.position > offset:
            if stream is None and len(self._streams) >= MAX_STREAMS:
                key_of_oldest = next(iter(self._streams))
                self._streams.pop(key_of_oldest).close()
            stream = self._streams[key] = _GzipStream(self.path)
        stream.skip(offset - stream.position, self._total)
        return stream

    def _finish(self, stream: _GzipStream) -> None:
        stream.skip(None, self._total)
        if stream.position < self._total:
            raise truncated(self.path, stream.position, self._total)
        self._verified = True


class _GzipStream:
    """One forward pass over a gzipped file."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        try:
            self._file = igzip.IGzipFile(path, "rb")
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_into(self, target: memoryview, needed: int) -> int:
        """Fill `target`; returns how many bytes there were. `needed` is the whole file's, for the message."""
        filled = 0
        while filled < len(target):
            chunk = self._read(min(_CHUNK, len(target) - filled), needed)
            if not chunk:
                break
            target[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return filled

    def skip(self, size: int | None, needed: int) -> None:
        """Go `size` bytes on, or to the end of the file, which checks it."""
        while size is None or size > 0:
            chunk = self._read(_CHUNK if size is None else min(_CHUNK, size), needed)
            if not chunk:
                break
            size = None if size is None else size - len(chunk)

    def _read(self, size: int, needed: int) -> bytes:
        try:
            chunk = self._file.read1(size)
        except EOFError as error:
            held = _decodable(self.path)
            if held < needed:
                raise truncated(self.path, held, needed) from error
            what = f"holds its {needed} bytes, but its gzip stream does not end as it should: the file is corrupt"
            raise InputError(what, _FIX, self.path) from error
        except (igzip.BadGzipFile, isal_zlib.error) as error:  # type: ignore[misc]
            raise _corrupt(self.path, error) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        self.position += len(chunk)
        if self.position > needed + FREE:
            raise InputError(f"goes on for over {FREE} bytes behind the {needed} it declares", _FIX, self.path)
        return chunk

    def close(self) -> None:
        self._file.close()


def _decoded(path: Path) -> Iterator[bytes]:
    """What a gzip file gives before it is cut off or broken, to the last byte, by the standard library.

    Raises:
        zlib.error: where it is broken.
    """
    decoder = zlib.decompressobj(31)
    with open(path, "rb") as file:
        while data := decoder.unconsumed_tail or decoder.unused_data or file.read(1 << 12):
            if decoder.eof:
                decoder = zlib.decompressobj(31)
            yield decoder.decompress(data, _CHUNK)
    yield decoder.flush()


def _decodable(path: Path) -> int:
    total = 0
    with suppress(zlib.error):
        for chunk in _decoded(path):
            total += len(chunk)
    return total


@contextmanager
def open_forward(path: Path) -> Iterator[IO[bytes]]:
    """A plain or gzipped file opened for one forward read, as written by us."""
    with igzip.IGzipFile(path, "rb") if is_gzipped(path) else open(path, "rb") as file:
        yield file  # type: ignore[misc]
