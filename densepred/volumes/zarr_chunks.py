"""Looking at the chunks of a Zarr array before they are decompressed: none may expand to more than a chunk.

Reference: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed (version 1.0).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ShardingCodec

from densepred.errors import InputError
from densepred.volumes.bombs import CODECS, expands

_FIX = "get the store again from its source, or write it again"
MAX_METADATA = 1 << 24
"""Bytes of the longest metadata that are believed."""
_NO_CHUNK = (1 << 64) - 1


def check_metadata(folder: Path) -> None:
    """The metadata of a store are of a sensible length; zarr reads them whole.

    Raises:
        InputError: they are not.
    """
    for name in ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata"):
        file = folder / name
        if file.is_file() and file.stat().st_size > MAX_METADATA:
            raise InputError(f"{name} has {file.stat().st_size} bytes: no metadata are that long", _FIX, folder)


class ChunkFiles:
    """The files of an array's chunks.

    Args:
        array: of a store on disk.
        path: for messages.

    Raises:
        InputError: the chunks are compressed more than once.
    """

    def __init__(self, array: zarr.Array, path: Path) -> None:
        self._path, self._sharded = path, False
        self._chunk = int(np.prod(array.chunks, dtype=np.int64)) * int(np.dtype(array.dtype).itemsize)
        described: Any = array.metadata.to_dict()
        if array.metadata.zarr_format == 2:
            listed = [*(described.get("filters") or ()), described.get("compressor") or {}]
            names = [str(codec.get("id")) for codec in listed]
        else:
            codecs: Any = array.metadata.codecs
            sharding = next((codec for codec in codecs if isinstance(codec, ShardingCodec)), None)
            if sharding is not None:
                index = [_name(codec) for codec in sharding.index_codecs]
                self._sharded = True
                self._at_end = sharding.index_location.value == "end"
                self._index = 16 * int(
                    np.prod(array.shards or 1, dtype=np.int64) // np.prod(array.chunks, dtype=np.int64)
                )
                self._sum = 4 * index.count("crc32c")
                codecs = sharding.codecs if set(index) <= {"bytes", "crc32c"} else ()
            names = [_name(codec) for codec in codecs]
        packed = [name for name in names if name in CODECS]
        if len(packed) > 1:
            raise InputError(f"its chunks are compressed more than once ({', '.join(packed)})", _FIX, path)
        self._codec = packed[0] if packed else None
        self._seen: set[Path] = set()

    def check(self, file: Path) -> None:
        """Look at a file, once.

        Raises:
            InputError: a chunk in it expands to more than a chunk.
        """
        if self._codec is None or file in self._seen:
            return
        with open(file, "rb") as opened:
            content = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        for piece in self._pieces(content):
            if expands(piece, self._codec, self._chunk):
                what = f"a chunk of {file.name} expands to more than the {self._chunk} bytes of a chunk"
                raise InputError(what, _FIX, self._path)
        self._seen.add(file)

    def _pieces(self, content: memoryview) -> Iterator[memoryview]:
        if not self._sharded:
            yield content
            return
        start = len(content) - self._index - self._sum if self._at_end else 0
        if start < 0 or len(content) < self._index:
            return  # too short, which zarr says
        for at, size in np.frombuffer(content[start : start + self._index], "<u8").reshape(-1, 2).tolist():
            if at != _NO_CHUNK:
                yield content[at : at + size]


def _name(codec: Any) -> str:
    return str(codec.to_dict()["name"]).removeprefix("numcodecs.")
