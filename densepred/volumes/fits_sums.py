"""DATASUM and CHECKSUM of FITS, summed piece by piece while an HDU is written or read.

Reference: FITS standard 4.0, section 4.4.2.7 and appendix J (the 32-bit ones' complement checksum).
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from astropy.io.fits import Header

BLOCK = 2880
"""Headers and data fill whole blocks of so many bytes."""
CHECKSUM_UNSET = "0" * 16
_READ_BYTES = 1 << 19
_WORD = 0xFFFFFFFF
_BETWEEN = frozenset(b":;<=>?@[\\]^_`")  # the signs between digits, capitals and small letters


def padding(size: int) -> int:
    """How many bytes are missing to the next full block.

    Example:
        >>> padding(2881)
        2879
    """
    return -size % BLOCK


def add_sums(first: int, second: int) -> int:
    """The ones' complement sum of two 32-bit numbers.

    Example:
        >>> add_sums(0xFFFFFFFE, 3)
        2
    """
    total = first + second
    return (total & _WORD) + (total >> 32)


def sum_of(data: np.ndarray | bytes | memoryview, offset: int = 0) -> int:
    """The sum of bytes as big-endian 32-bit words; 0 is added up to full words.

    Args:
        data: any contiguous bytes.
        offset: where they start in their data unit. The sums of the pieces of a data unit, in any order, add up to
            its own by `add_sums`.

    Example:
        >>> hex(sum_of(bytes([0, 0, 1, 2, 3]))), hex(add_sums(sum_of(bytes([0, 0, 1])), sum_of(bytes([2, 3]), 3)))
        ('0x3000102', '0x3000102')
    """
    octets = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    whole = octets.size // 4 * 4
    total = int(octets[:whole].view(">u4").sum(dtype=np.uint64))
    total += int.from_bytes(octets[whole:].tobytes().ljust(4, b"\0"), "big")
    while total > _WORD:
        total = (total & _WORD) + (total >> 32)
    turn = 8 * (offset % 4)
    return (total >> turn | total << (32 - turn)) & _WORD if turn else total


def sum_of_stream(file: IO[bytes], size: int, offset: int = 0) -> int:
    """The sum of the next `size` bytes of a file, `offset` bytes into their data unit; fewer where it ends."""
    total, end = 0, offset + size
    held = memoryview(bytearray(min(size, _READ_BYTES)))
    while offset < end and (count := file.readinto(held[: end - offset])):  # type: ignore[attr-defined]
        total = add_sums(total, sum_of(held[:count], offset))
        offset += count
    return total


def sealed(header: Header, data_sum: int) -> bytes:
    """The blocks of a header with its DATASUM and CHECKSUM; both cards must be there, so the length stays.

    Args:
        header: changed in place.
        data_sum: of the data unit with its padding.
    """
    header["DATASUM"] = str(data_sum)
    header["CHECKSUM"] = CHECKSUM_UNSET
    unset = header.tostring(endcard=True, padding=True).encode("ascii")
    header["CHECKSUM"] = encoded(_WORD - add_sums(sum_of(unset), data_sum))
    return header.tostring(endcard=True, padding=True).encode("ascii")


def encoded(value: int) -> str:
    """32 bits as the 16 letters and digits of a CHECKSUM card, which add up to them.

    Each byte is shared among four signs that start from "0"; pairs give to each other until all are letters or digits.
    The signs are then turned by one place, as the card's value starts one byte before a word does.

    Example:
        >>> encoded(0xFFFFFFFF - 868229149)  # the example of appendix J
        'hcHjjc9ghcEghc9g'
    """
    signs = bytearray(16)
    for place, byte in enumerate(value.to_bytes(4, "big")):
        shares = [byte // 4 + 48 + (byte % 4 if first else 0) for first in (True, False, False, False)]
        while any(share in _BETWEEN for share in shares):
            for left in (0, 2):
                if shares[left] in _BETWEEN or shares[left + 1] in _BETWEEN:
                    shares[left] += 1
                    shares[left + 1] -= 1
        signs[place::4] = bytes(shares)
    return (signs[-1:] + signs[:-1]).decode("ascii")
