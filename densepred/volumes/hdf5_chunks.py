"""The chunks of an HDF5 dataset, looked at before HDF5 decompresses them: all written, none a bomb.

HDF5 doubles its buffer for as long as a compressed chunk goes on.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from densepred.errors import InputError
from densepred.volumes.bombs import FREE, expands
from densepred.volumes.volume import check_memory

_FIX = "get the file again from its source"
_DEFLATE, _FLETCHER = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32
_PLAIN = (h5py.h5z.FILTER_SHUFFLE, _FLETCHER, h5py.h5z.FILTER_NBIT, h5py.h5z.FILTER_SCALEOFFSET)
"""Filters that do not make much of little."""
_RATIO = 1040


class Chunks:
    """The chunks of `data`, a dataset of the file at `path`.

    Raises:
        InputError: they cannot be found, none was written, or they are compressed more than once.
        ResourceError: one of them does not fit into memory.
    """

    def __init__(self, data: Any, path: Path) -> None:
        self._data, self._path = data, path
        self._suspects: set[tuple[int, ...]] = set()
        found: dict[tuple[int, ...], int] = {}
        try:
            stored = data.id.get_storage_size()
            if data.chunks and data.size:
                data.id.chunk_iter(lambda chunk: found.update({chunk.chunk_offset: chunk.size}))
        except (OSError, RuntimeError) as error:
            raise InputError(f"the HDF5 file is broken ({str(error)[:150]})", _FIX, path) from error
        if data.chunks and data.size:
            self._look_at(found)
        elif data.size and not stored:
            raise InputError(f"'{data.name}' was declared and never written", "write it again", path)

    def _look_at(self, found: dict[tuple[int, ...], int]) -> None:
        data = self._data
        self._chunk = data.dtype.itemsize
        for size in data.chunks:
            self._chunk *= int(size)
        check_memory(2 * self._chunk, self._path)
        setup = data.id.get_create_plist()
        self._filters = [setup.get_filter(number)[0] for number in range(setup.get_nfilters())]
        packers = [code for code in self._filters if code not in _PLAIN]
        if len(packers) > 1:
            what = f"the chunks of '{data.name}' are compressed more than once (filters {packers})"
            raise InputError(what, "write them with one of these filters", self._path)
        if packers == [_DEFLATE]:
            self._suspects = {at for at, size in found.items() if size * _RATIO > self._chunk + FREE}
        grid = [range(0, size, chunk) for size, chunk in zip(data.shape, data.chunks, strict=True)]
        whole = int(np.prod([len(axis) for axis in grid], dtype=np.int64))
        held = sum(all(at in axis for at, axis in zip(place, grid, strict=True)) for place in found)
        if held == 0:
            raise InputError(f"'{data.name}' was declared and never written", "write it again", self._path)
        if held < whole:
            what = f"{whole - held} of {whole} chunks of '{data.name}' were never written and read as {data.fillvalue}"
            warnings.warn(f"{self._path}: {what}", stacklevel=6)

    def check(self, key: tuple[slice, ...]) -> None:
        """Before a box is read: look at those of its chunks that are large enough to be bombs, once.

        Raises:
            InputError: one expands to more than a chunk.
            OSError: it cannot be read.
        """
        if not self._suspects:
            return
        grid = [
            range(part.start // step * step, part.stop, step) for part, step in zip(key, self._data.chunks, strict=True)
        ]
        for place in self._suspects.intersection(itertools.product(*grid)):
            left_out, packed = self._data.id.read_direct_chunk(place)
            if not left_out & 1 << self._filters.index(_DEFLATE) and expands(packed, "zlib", self._chunk):
                what = f"the chunk of '{self._data.name}' at {place} expands to more than its {self._chunk} bytes"
                raise InputError(what, _FIX, self._path)
            self._suspects.remove(place)
