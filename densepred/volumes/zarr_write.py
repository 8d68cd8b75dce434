"""Writing OME-Zarr 0.5: Zarr v3, sharded, each shard written once by one writer, and told in a bitmap."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from densepred.errors import InputError, UnsafeError
from densepred.files import atomic_folder, atomic_write
from densepred.volumes import zarr_ome
from densepred.volumes.arrays import SlabSink, stored_dtype
from densepred.volumes.volume import Volume

_BUFFER = 1 << 26  # bytes of planes that are held until their shards are complete
_CHUNK, _SIDES = 1 << 18, 8  # voxels of a chunk; chunks along a side of a shard
_DEEPEST = 64
MARKS = ("zarr.json", ".zgroup", ".zarray")
"""One of these files makes a folder a Zarr store."""


@contextmanager
def open_writer(
    path: str | Path, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = False
) -> Iterator[Writer]:
    """Write a store slab by slab; it gets its name only once it is whole and has been read back.

    Args:
        path: the folder. A store that is there is replaced in one step; another folder is not.
        like: gives the grid; of the axes of a Zarr source that were dropped, t and c are restored.
        dtype: of the values; what is stored for it is told by `Writer.dtype`.
        channels: more than one are stored along an axis c.
        labels: the values are classes.

    Raises:
        ValueError: the dtype cannot be stored, or not all planes were written.
        UnsafeError: there is something else at `path`.
        ResourceError: the disk is full, or gives back something else than was written.
    """
    path = Path(path)
    if path.exists() and not any((path / mark).is_file() for mark in MARKS):
        raise UnsafeError("the output is there and is no Zarr store", "remove it or choose another output", path)
    writer = Writer(like, (channels, *like.shape[1:]), stored_dtype(np.dtype(dtype), labels), labels)
    with atomic_folder(path, writer.verify) as part:
        writer.start(part, path.name.removesuffix(".zarr").removesuffix(".ome"))
        yield writer
        writer.finish()


@contextmanager
def open_part_writer(
    path: str | Path, part: str, like: Volume, dtype: np.dtype, channels: int = 1, labels: bool = True
) -> Iterator[Writer]:
    """Write labels into an image that is there: `labels/<name>`, entered in its list of labels when they are whole.

    Args:
        path: the store of the image, OME-Zarr 0.5.
        part: "labels/<name>".
        like, dtype, channels: see `open_writer`; `like` is the image.
        labels: must be True.

    Raises:
        InputError: the store is no such image, or the part is none of labels.
    """
    path = Path(path)
    folder, _, name = part.strip("/").partition("/")
    if not labels or folder != "labels" or not name or "/" in name or name.startswith("."):
        raise InputError(f"cannot write [{part}]", "into a store only labels are written: [labels/<name>]", path)
    try:
        head = json.loads((path / "zarr.json").read_text())
    except (FileNotFoundError, ValueError):
        head = {}
    if "multiscales" not in head.get("attributes", {}).get("ome", {}):
        raise InputError("no OME-Zarr 0.5 image to put labels into", "convert it to one first", path)
    writer = Writer(like, (channels, *like.shape[1:]), stored_dtype(np.dtype(dtype), True), True, source="../../")
    (path / "labels").mkdir(exist_ok=True)
    with atomic_folder(path / "labels" / name, writer.verify) as unfinished:
        writer.start(unfinished, name)
        yield writer
        writer.finish()
    _enter(path / "labels" / "zarr.json", name)


def _enter(path: Path, name: str) -> None:
    """Add a name to the list of labels."""
    head: dict[str, Any] = {"zarr_format": 3, "node_type": "group"}
    if path.exists():
        head = json.loads(path.read_text())
    ome = head.setdefault("attributes", {}).setdefault("ome", {"version": zarr_ome.VERSION})
    ome["labels"] = sorted({*ome.get("labels", ()), name})
    atomic_write(path, json.dumps(head, indent=2))


class Writer(SlabSink):
    """Takes slabs forward; made by `open_writer`. Holds the planes of one row of shards until it is complete."""

    def __init__(
        self, like: Volume, shape: tuple[int, ...], dtype: np.dtype, labels: bool, source: str | None = None
    ) -> None:
        super().__init__(shape, dtype)
        self._like, self._labels, self._source = like, labels, source
        known = like.header.letters if isinstance(like.header, zarr_ome.ZarrHeader) else ""
        self._letters = (
            "".join(letter for letter in "tc" if letter in known or (letter == "c" and shape[0] > 1))
            + "zyx"[-like.dims :]
        )
        self._chunk, self._shard = sharding(shape[0], shape[1:], dtype.itemsize)
        self._held = np.empty((shape[0], min(self._shard[0], shape[1]), *shape[2:]), dtype)

    def start(self, part: Path, name: str) -> None:
        """Make the group and its array in `part`, an empty folder."""
        attributes = zarr_ome.group_attributes(self._like, name, self._letters, self._labels)
        if self._source is not None:
            attributes["ome"]["image-label"] = {"source": {"image": self._source}}
        lead = (1,) * (len(self._letters) - len(self._chunk))
        channels = (self.shape[0],) if "c" in self._letters else ()
        shape = ((1,) if "t" in self._letters else ()) + channels + self.shape[1:]
        zarr.open_group(str(part), mode="a", zarr_format=3, attributes=attributes)
        self._array = zarr.create_array(
            str(part / "0"),  # a store of its own: below the group zarr would write several files at once
            shape=shape,
            dtype=self.dtype,
            chunks=lead + self._chunk,
            shards=lead + self._shard,
            compressors=ZstdCodec(level=3, checksum=True),
            fill_value=0,
            dimension_names=list(self._letters),
            config={"write_empty_chunks": True},
        )
        grid = [-(-size // step) for size, step in zip(shape, lead + self._shard, strict=True)]
        self._done = np.zeros(grid, bool)
        self._tell()

    def verify(self, part: Path) -> None:
        """Read `part` back; see `SlabSink.compare`."""
        from densepred.volumes.zarr_store import read

        self.compare(lambda: read(part))

    def _put(self, slab: np.ndarray, start: int) -> None:
        depth, at = self._held.shape[1], 0
        while at < slab.shape[1]:
            row, filled = divmod(start + at, depth)
            count = min(depth - filled, slab.shape[1] - at)
            planes = slab[:, at : at + count]
            at += count
            end = row * depth + filled + count
            complete = filled + count == depth or end == self.shape[1]
            if filled or not complete:
                self._held[:, filled : filled + count] = planes
                planes = self._held[:, : filled + count]
            if complete:
                self._store(row, end, planes)

    def _store(self, row: int, stop: int, planes: np.ndarray) -> None:
        """Write the shards of a row, which ends before the plane `stop`, each whole, and then say so.

        They go one by one: of several at once zarr would go on writing the others after one had failed.
        """
        lead = (0,) if "t" in self._letters else ()
        steps = self._shard[1:]
        for channel in range(self.shape[0]):
            at = (*lead, channel) if "c" in self._letters else lead
            for place in np.ndindex(*self._done.shape[-len(steps) :]):
                box: tuple[Any, ...] = tuple(
                    slice(n * step, (n + 1) * step) for n, step in zip(place, steps, strict=True)
                )
                self._array[(*at, slice(stop - planes.shape[1], stop), *box)] = planes[(channel, slice(None), *box)]
                self._done[(*at, row, *place)] = True
        self._tell()

    def _tell(self) -> None:
        self._array.attrs[zarr_ome.OURS] = {"done": packed(self._done)}


def sharding(channels: int, spatial: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a chunk and of a shard along the spatial axes: a row of shards of all channels fits the buffer.

    Example:
        >>> sharding(1, (300, 512, 512), 1)
        ((64, 64, 64), (64, 512, 512))
    """
    plane = channels * itemsize * int(np.prod(spatial[1:], dtype=np.int64))
    most = _DEEPEST if len(spatial) == 3 else 8 * _DEEPEST
    depth = 1 << (max(1, min(most, _BUFFER // plane, spatial[0])).bit_length() - 1)
    if depth < spatial[0] <= min(most, _BUFFER // plane):
        depth = spatial[0]
    side = 1 << max(0, (_CHUNK // depth).bit_length() - 1) // (len(spatial) - 1)
    chunk = (depth, *(min(side, size) for size in spatial[1:]))
    counts = [min(_SIDES, -(-size // step)) for size, step in zip(spatial[1:], chunk[1:], strict=True)]
    return chunk, (depth, *(step * count for step, count in zip(chunk[1:], counts, strict=True)))


def packed(done: np.ndarray) -> str:
    """A bitmap as hexadecimal digits, in C order."""
    return np.packbits(done.reshape(-1)).tobytes().hex()


def unpacked(digits: str, count: int) -> np.ndarray:
    """`count` bits of a bitmap; what is missing or no digit is False."""
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    except ValueError:
        bits = np.zeros(0, np.uint8)
    return np.pad(bits[:count], (0, max(0, count - len(bits)))).astype(bool)
