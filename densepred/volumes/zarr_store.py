"""Zarr stores (v2 and v3) and OME-Zarr images (0.1 to 0.5), read by the region; written as sharded OME-Zarr 0.5.

A missing chunk of a Zarr array reads as its fill value, which looks like background. A store of ours therefore keeps,
in the attributes of its array, one bit per shard that is set once the shard is written; without all of them, or where a
shard's file is gone, it is refused. Other stores are read as the format says.

Reference: https://zarr-specs.readthedocs.io, https://ngff.openmicroscopy.org/0.5/.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from densepred.errors import InputError, UnsafeError
from densepred.volumes import zarr_ome
from densepred.volumes.arrays import FileArray
from densepred.volumes.volume import Volume, check_memory
from densepred.volumes.zarr_chunks import ChunkFiles, check_metadata
from densepred.volumes.zarr_write import MARKS, Writer, open_part_writer, open_writer, unpacked

__all__ = ["StoredZarr", "Writer", "open_part_writer", "open_writer", "read"]

_FIX = "get the store again from its source, whole"
_MOST_LISTED, _DEEPEST = 20, 4
_BATCH = 8  # chunks that a thread takes at a time


def read(path: str | Path, axes: str | None = None, part: str | None = None) -> Volume:
    """Open an array of a store: metadata are read and checked, voxels are left for later.

    Args:
        path: the folder.
        axes: what the axes hold, one of `arrays.AXES`, where the metadata do not say it.
        part: None for the only array or the full resolution of an image; a number for another of its resolutions; the
            path of an array or an image within the store, such as "labels/cells".

    Raises:
        InputError: no Zarr store, several arrays to choose from, metadata that make no sense, or an unfinished store.
        UnsafeError: reading it would run code that it brings along.

    Example:
        >>> read("cells.ome.zarr", part="labels/nuclei").labels  # doctest: +SKIP
        True
    """
    path = Path(path)
    with zarr.config.set({"codec_pipeline.batch_size": _BATCH}):  # arrays keep what was set when they were opened
        array, group, level = _chosen(path, _opened(path), part)
    _refuse_code(array, path)
    multi = None if group is None else zarr_ome.multiscale(group.attrs.asdict(), path)
    known, unit = _names(array) if multi is None else zarr_ome.axes_of(multi, array.ndim, path)
    letters = zarr_ome.arrange(known, array.shape, axes, path)
    stored = StoredZarr(array, path)
    lazy = FileArray(stored, letters, path)
    scale, shift = np.ones(array.ndim), np.zeros(array.ndim)
    if multi is not None:
        scale, shift = zarr_ome.transform(multi, level, array.ndim, path)
    at = [letters.index(letter) for letter in "zyx" if letter in letters]
    spacing, start = scale[at].tolist(), shift[at].tolist()
    attributes = (array if group is None else group).attrs.asdict()
    affine = zarr_ome.affine_from(attributes, spacing, start)
    header = zarr_ome.ZarrHeader(_restorable(known, letters), unit, tuple(start), attributes)
    labels = lazy.dtype.kind in "ui" and "image-label" in zarr_ome.metadata(attributes)
    return Volume(lazy, spacing, affine, header, path, labels)


def _opened(path: Path) -> Any:
    if not path.is_dir():
        raise InputError("no Zarr store: it is a file, not a folder", "unpack it, or give it its true suffix", path)
    check_metadata(path)
    if not any((path / mark).is_file() for mark in MARKS):
        what = f"no Zarr store: the folder has none of {', '.join(MARKS)}"
        raise InputError(what, "give the folder that has one", path)
    try:
        return zarr.open(store=str(path), mode="r", use_consolidated=False)
    except Exception as error:  # zarr does not check what it parses
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"its metadata cannot be read: {what}", _FIX, path)


def _chosen(path: Path, node: Any, part: str | None) -> tuple[zarr.Array, zarr.Group | None, int]:
    """The array that is meant, the group that describes it if there is one, and its number there."""
    inner = (part or "").strip("/")
    if isinstance(node, zarr.Array):
        if inner:
            raise InputError(f"the store is one array, without a part [{part}]", "leave the brackets out", path)
        return node, None, 0
    levels = _levels(node, path)
    if levels and inner.isdecimal():
        if int(inner) >= len(levels):
            what = f"there is no resolution [{inner}]: the image has {len(levels)}"
            raise InputError(what, f"choose one of [0] to [{len(levels) - 1}]", path)
        return _member(node, levels[int(inner)], path), node, int(inner)
    target = _member(node, inner, path) if inner else node
    if isinstance(target, zarr.Array):
        return _described(node, target, inner, path)
    levels = _levels(target, path)
    if levels:
        return _member(target, levels[0], path), target, 0
    choices = list(itertools.islice(_choices(target, inner, path), _MOST_LISTED + 1))
    if len(choices) == 1:
        return _chosen(path, node, choices[0][0])
    if not choices:
        raise InputError("the store has no array", "choose another store", path)
    lines = "; ".join(f"[{name}] {what}" for name, what in choices[:_MOST_LISTED])
    more = " and more" if len(choices) > _MOST_LISTED else ""
    raise InputError(f"it holds several arrays: {lines}{more}", f"add one: {path.name}[{choices[0][0]}]", path)


def _described(node: Any, array: zarr.Array, inner: str, path: Path) -> tuple[zarr.Array, zarr.Group | None, int]:
    """An array that was named, with the nearest group above that counts it among its resolutions."""
    parts = inner.split("/")
    for cut in range(len(parts) - 1, -1, -1):
        group = node if cut == 0 else node["/".join(parts[:cut])]
        levels = _levels(group, path)
        if "/".join(parts[cut:]) in levels:
            return array, group, levels.index("/".join(parts[cut:]))
    return array, None, 0


def _levels(group: Any, path: Path) -> list[str]:
    multi = zarr_ome.multiscale(group.attrs.asdict(), path)
    return [] if multi is None else [str(dataset["path"]).strip("/") for dataset in multi["datasets"]]


def _member(group: Any, name: str, path: Path) -> Any:
    try:
        return group[name]
    except KeyError:
        inside = ", ".join(sorted(name for name, _ in group.members())[:_MOST_LISTED]) or "nothing"
        raise InputError(f"there is no '{name}' in it, but {inside}", "name one of these in brackets", path) from None
    except Exception as error:
        raise _unreadable(path, error) from error


def _choices(group: Any, prefix: str, path: Path, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Arrays and images below a group, with a word on each."""
    for name, member in sorted(group.members(), key=lambda pair: pair[0]):
        inner = f"{prefix}/{name}" if prefix else name
        if isinstance(member, zarr.Array):
            yield inner, f"{member.shape} {member.dtype}"
        elif levels := _levels(member, path):
            yield inner, f"image of {len(levels)} resolutions"
        elif depth < _DEEPEST:
            yield from _choices(member, inner, path, depth + 1)


def _names(array: zarr.Array) -> tuple[str | None, None]:
    """The letters that the array itself gives to its axes, where they are of ours; it knows no unit."""
    names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.asdict().get("_ARRAY_DIMENSIONS")
    letters = "".join(str(name).lower() for name in names or ())
    plain = (
        len(letters) == array.ndim and len(set(letters)) == len(letters) and {"y", "x"} <= set(letters) <= set("tczyx")
    )
    return (letters if plain else None), None


def _restorable(known: str | None, letters: str) -> str:
    """Letters of the axes for a writer, which restores a dropped axis only where its name is known."""
    pairs = zip(known or letters, letters, strict=True)
    return "".join(name if letter == "1" and name in "tc" else letter for name, letter in pairs)


def _refuse_code(array: zarr.Array, path: Path) -> None:
    """Codecs are asked by name: unpickling chunks would run what they bring along."""
    described = array.metadata.to_dict()
    coding = {key: value for key, value in described.items() if key not in ("attributes", "fill_value")}
    if "pickle" in str(coding).lower():
        raise UnsafeError("its chunks are pickled: reading them would run code", "save it without pickle", path)


class StoredZarr:
    """An array of a store, in the order of its axes there."""

    def __init__(self, array: zarr.Array, path: Path) -> None:
        self._array, self._path = array, path
        self.shape = tuple(int(size) for size in array.shape)
        try:
            self.dtype = np.dtype(array.dtype)
        except TypeError as error:
            raise _unreadable(path, error) from error
        self._place = path / array.path if array.path else path
        if 0 in array.chunks:
            raise InputError(f"impossible sizes: chunks of {array.chunks}", _FIX, path)
        self._stamp = self._stat()
        check_memory(int(np.prod([float(size) for size in array.chunks])) * self.dtype.itemsize, path)
        self._files = ChunkFiles(array, path)
        self._outer = array.shards or array.chunks
        self._grid = tuple(-(-size // step) for size, step in zip(self.shape, array.chunks, strict=True))
        self._seen: set[tuple[int, ...]] = set()
        ours: Any = array.attrs.asdict().get(zarr_ome.OURS)
        self._ours = isinstance(ours, Mapping) and "done" in ours
        if self._ours:
            self._check_finished(str(ours["done"]))

    def _check_finished(self, packed: str) -> None:
        count = int(np.prod([-(-size // step) for size, step in zip(self.shape, self._outer, strict=True)]))
        done = int(unpacked(packed, count).sum())
        if done < count:
            what = f"unfinished: {done} of its {count} shards were written"
            raise InputError(what, "remove it and write it again", self._path)

    def read(self, key: tuple[slice, ...]) -> np.ndarray:
        """The values of a box, one slice with start and stop per axis.

        Raises:
            InputError: a chunk is damaged, or a shard of a store of ours is missing.
        """
        if self._stat() != self._stamp:
            raise InputError("the store was replaced while it was read", "open it again", self._path)
        self._check_files(key)
        try:
            values = np.asarray(self._array[key])
        except Exception as error:  # a codec may raise anything
            if isinstance(error, OSError) and error.errno is not None:
                raise
            cause = " ".join(str(error).split())[:200] or type(error).__name__
            what = f"a chunk of {self._array.path or 'the array'} is damaged: {cause}"
            raise InputError(what, _FIX, self._path) from error
        self._seen.update(itertools.product(*self._touched(key, self._array.chunks)))
        return values

    @staticmethod
    def _touched(key: tuple[slice, ...], steps: tuple[int, ...]) -> list[range]:
        return [range(part.start // step, -(-part.stop // step)) for part, step in zip(key, steps, strict=True)]

    def _check_files(self, key: tuple[slice, ...]) -> None:
        """A file that is missing, of ours, or empty, of anyone's, would read as background; none may be a bomb."""
        for at in itertools.product(*self._touched(key, self._outer)):
            name = self._array.metadata.encode_chunk_key(at)
            try:
                empty = (self._place / name).stat().st_size == 0
            except FileNotFoundError:
                if self._ours:
                    raise InputError(
                        f"its shard {name} is missing: the store is incomplete", _FIX, self._path
                    ) from None
                continue
            if empty:
                raise InputError(f"its chunk {name} is damaged: the file is empty", _FIX, self._path)
            self._files.check(self._place / name)

    def _stat(self) -> tuple[int, int]:
        for name in ("zarr.json", ".zarray"):
            if (self._place / name).exists():
                found = (self._place / name).stat()
                return found.st_ino, found.st_mtime_ns
        raise InputError("the store is gone", "check the path", self._path)

    def verify(self) -> None:
        """Decode the chunks that have not been read yet, which checks them."""
        steps = self._array.chunks
        for at in itertools.product(*map(range, self._grid)):
            if at not in self._seen:
                box = [
                    (n * step, min((n + 1) * step, size)) for n, step, size in zip(at, steps, self.shape, strict=True)
                ]
                self.read(tuple(slice(start, stop) for start, stop in box))

    def close(self) -> None:
        """Nothing is held open."""
