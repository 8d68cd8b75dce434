"""Writing gzip: deflated piece by piece, and read back by another library.

References: RFC 1951 (deflate) and 1952 (gzip).
"""

from __future__ import annotations

from typing import IO, NamedTuple, TypeAlias

import imagecodecs
from isal import isal_zlib

Octets: TypeAlias = "bytes | bytearray | memoryview"

_PIECE = 1 << 20
_LEVEL = 2
_HEAD = b"\x1f\x8b\x08" + bytes(6) + b"\xff"  # deflate; no flags, no time, no system
_END = b"\x03\x00"  # the last block, empty


class Piece(NamedTuple):
    """A piece of the content: length and CRC of its bytes in the file, and of those that were compressed."""

    packed: int
    packed_crc: int
    size: int
    crc: int


class GzipWriter:
    """One gzip member without time or name; its bytes depend on the content alone, not on the portions written.

    The content is cut into pieces, each deflated for itself and ended at a full byte, so that each can be read back for
    itself.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held = file, bytearray()
        self._pieces: list[Piece] = []
        self._crc = self._size = 0
        file.write(_HEAD)

    def write(self, data: Octets) -> None:
        """Append bytes."""
        view = memoryview(data)
        if self._held:
            missing = _PIECE - len(self._held)
            self._held += view[:missing]
            view = view[missing:]
            if len(self._held) < _PIECE:
                return
            self._put(self._held)
            self._held = bytearray()
        while len(view) >= _PIECE:
            self._put(view[:_PIECE])
            view = view[_PIECE:]
        self._held += view

    def finish(self) -> None:
        """Write what is held and the trailer; the file stays open."""
        if self._held:
            self._put(self._held)
        self._held = bytearray()
        self._file.write(self._tail)

    def reads_back(self, file: IO[bytes]) -> bool:
        """Whether the next bytes of `file` are the member that was written, and give its content."""
        return (
            file.read(len(_HEAD)) == _HEAD
            and all(_is_sound(file.read(piece.packed), piece) for piece in self._pieces)
            and file.read(len(self._tail)) == self._tail
        )

    @property
    def _tail(self) -> bytes:
        return _END + self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little")

    def _put(self, data: Octets) -> None:
        encoder = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -15)
        packed = encoder.compress(data) + encoder.flush(isal_zlib.Z_SYNC_FLUSH)
        self._file.write(packed)
        piece = Piece(len(packed), isal_zlib.crc32(packed), len(data), isal_zlib.crc32(data))
        self._crc = isal_zlib.crc32_combine(self._crc, piece.crc, piece.size)
        self._size += piece.size
        self._pieces.append(piece)


def _is_sound(packed: bytes, piece: Piece) -> bool:
    """Whether the bytes are those that were written, and give the content by libdeflate, which wrote none of them."""
    if isal_zlib.crc32(packed) != piece.packed_crc:  # by itself a piece could end too early, and still be whole
        return False
    try:
        data = imagecodecs.deflate_decode(packed + _END, raw=True, out=piece.size)
    except RuntimeError:
        return False
    return len(data) == piece.size and isal_zlib.crc32(data) == piece.crc
