"""Writing gzip: deflated piece by piece by several threads, and read back the same way.

References: RFC 1951 (deflate) and 1952 (gzip).
"""

from __future__ import annotations

from typing import IO, NamedTuple, TypeAlias

import imagecodecs
from isal import isal_zlib

from densepred.volumes.threads import in_turn

Octets: TypeAlias = "bytes | bytearray | memoryview"

_PIECE = 1 << 20
_LEVEL = 2
_HEAD = b"\x1f\x8b\x08" + bytes(6) + b"\xff"  # deflate; no flags, no time, no system
_END = b"\x03\x00"  # the last block, empty


class Piece(NamedTuple):
    """What a piece of the content has become: its bytes there, its bytes and their CRC here."""

    packed: int
    size: int
    crc: int


class GzipWriter:
    """One gzip member without time or name; its bytes depend on the content alone, not on the portions written.

    The content is cut into pieces that are deflated each for itself and end at full bytes, so that threads can share
    them. They are written by the thread that calls.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held = file, bytearray()
        self._pieces: list[Piece] = []
        self._crc = self._size = 0
        file.write(_HEAD)

    def write(self, data: Octets) -> None:
        """Append bytes."""
        view = memoryview(data)
        self._crc, self._size = isal_zlib.crc32(view, self._crc), self._size + len(view)
        whole: list[Octets] = []
        if self._held:
            missing = _PIECE - len(self._held)
            self._held += view[:missing]
            view = view[missing:]
            if len(self._held) < _PIECE:
                return
            whole.append(self._held)
            self._held = bytearray()
        end = len(view) - len(view) % _PIECE
        whole += [view[at : at + _PIECE] for at in range(0, end, _PIECE)]
        self._held += view[end:]
        self._put(whole)

    def finish(self) -> None:
        """Write what is held and the trailer; the file stays open."""
        self._put([self._held] if self._held else [])
        self._held = bytearray()
        self._file.write(self._tail)

    def reads_back(self, file: IO[bytes]) -> bool:
        """Whether the next bytes of `file` are the member that was written, and give its content."""
        pieces = ((file.read(piece.packed), piece) for piece in self._pieces)
        return (
            file.read(len(_HEAD)) == _HEAD
            and all(in_turn(_is_sound, pieces))
            and file.read(len(self._tail)) == self._tail
        )

    @property
    def _tail(self) -> bytes:
        return _END + self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little")

    def _put(self, pieces: list[Octets]) -> None:
        for packed, piece in in_turn(_deflated, pieces):
            self._file.write(packed)
            self._pieces.append(piece)


def _deflated(data: Octets) -> tuple[bytes, Piece]:
    encoder = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -15)
    packed = encoder.compress(data) + encoder.flush(isal_zlib.Z_SYNC_FLUSH)
    return packed, Piece(len(packed), len(data), isal_zlib.crc32(data))


def _is_sound(pair: tuple[bytes, Piece]) -> bool:
    """By libdeflate, which wrote none of it."""
    packed, piece = pair
    try:
        data = imagecodecs.deflate_decode(packed + _END, raw=True, out=piece.size)
    except RuntimeError:
        return False
    return len(data) == piece.size and isal_zlib.crc32(data) == piece.crc
