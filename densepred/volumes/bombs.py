"""Whether compressed data expand to more than they should, found out in bounded memory.

Libraries that decompress a chunk allocate whatever comes out of it: 10 MB of deflate may become 10 GB. What is small
enough to do no harm is not looked at, so that files as they are usually cost nothing.

References: RFC 1950 and 1952 (zlib, gzip), RFC 8878 (Zstandard), the header of Blosc 1.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from isal import isal_zlib

FREE = 64 << 20
"""Bytes that data may expand to beyond what they should."""
_FED, _STEP = 1 << 16, 1 << 20
_ZSTD_BLOCK = 1 << 17

CODECS = ("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4")
"""What is known here, by numcodecs' names; lz4 with its size in front, as numcodecs has it."""
Octets: TypeAlias = "bytes | memoryview"


def expands(data: Octets, codec: str, most: int) -> bool:
    """Whether `data` give over `most` bytes and `FREE` besides; damaged data, and codecs not known here, do not.

    Args:
        data: the whole compressed piece.
        codec: one of `CODECS`.
        most: bytes that it should give.

    Example:
        >>> import zlib
        >>> expands(zlib.compress(bytes(80 << 20)), "zlib", 100), expands(zlib.compress(bytes(100)), "zlib", 100)
        (True, False)
    """
    limit = most + FREE
    if codec in ("blosc", "lz4"):
        start = 4 if codec == "blosc" else 0
        return int.from_bytes(data[start : start + 4], "little") > limit
    if codec == "zstd":
        return sum(_zstd_blocks(data)) > limit
    if codec not in _DECODERS or (codec in ("gzip", "zlib") and len(data) * 1040 <= limit):
        return False
    total = 0
    for size in _pieces(data, _DECODERS[codec]):
        total += size
        if total > limit:
            return True
    return False


_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: isal_zlib.decompressobj(31),
    "zlib": lambda: isal_zlib.decompressobj(15),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lambda: lzma.LZMADecompressor(memlimit=FREE),
}


def _pieces(data: Octets, make: Callable[[], Any]) -> Iterator[int]:
    """How many bytes come out, piece by piece, of all members that follow each other; to where they are damaged."""
    decoder, at, left = make(), 0, b""
    try:
        while left or at < len(data):
            if not left:
                left = bytes(data[at : at + _FED])
                at += len(left)
            yield len(decoder.decompress(left, _STEP))
            while not decoder.eof and not getattr(decoder, "needs_input", True):
                yield len(decoder.decompress(b"", _STEP))
            left = decoder.unused_data if decoder.eof else getattr(decoder, "unconsumed_tail", b"")
            decoder = make() if decoder.eof else decoder
    except (isal_zlib.error, OSError, EOFError, lzma.LZMAError):  # type: ignore[misc]
        return


def _zstd_blocks(data: Octets) -> Iterator[int]:
    """The most that each block of a Zstandard stream can give, from the headers alone."""
    at = 0
    while at + 5 <= len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if 0x184D2A50 <= magic <= 0x184D2A5F:
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            return
        flags = data[at + 4]
        single = flags >> 5 & 1
        at += 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
        last = False
        while not last and at + 3 <= len(data):
            head = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
            at += 3 + (1 if kind == 1 else size)
            yield size if kind < 2 else _ZSTD_BLOCK
        at += 4 * (flags >> 2 & 1)
