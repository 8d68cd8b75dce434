"""Which voxel belongs to which object, told slab by slab: connected components, or the instances of a map.

Inside this package a label value v is the code v + 1, and 0 is a voxel of no object.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from densepred.errors import InputError

NEAR = 1e-3
"""A label stored as a fraction may lie this far from its integer."""
NEIGHBOURS = {2: {4: 1, 8: 2}, 3: {6: 1, 18: 2, 26: 3}}
"""Dimensions -> neighbours of a voxel -> scipy's rank of the connection."""
_SPREAD = 4  # codes up to this many times the size of the slab are counted in a table, larger ones sorted
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Found:
    """The objects, or the parts of objects, in one slab.

    Args:
        local: `(n, *rest)`, 1 to K, and 0 for no object.
        key: `(K,)` int64, of what object each is a part.
        code: `(K,)` int64, label value + 1.
    """

    local: np.ndarray
    key: np.ndarray
    code: np.ndarray


class Finder(Protocol):
    """Takes the slabs of a label map forward."""

    pairs: list[np.ndarray]
    """`(M, 2)` each: keys that turned out to be of one object, the one to be dropped first."""

    def find(self, codes: np.ndarray) -> Found:
        """The objects of the next slab, `(n, *rest)`."""


def codes_of(slab: np.ndarray, none: Collection[int], path: Path | None = None) -> np.ndarray:
    """Label values as int64 codes: value + 1, and 0 for NaN and the values of `none`, which are no objects.

    Raises:
        InputError: values that are no integers, are negative, or are over 2^62.

    Example:
        >>> codes_of(np.array([[0, 1], [7, 255]]), none=[0, 255]).tolist()
        [[0, 2], [8, 0]]
    """
    missing = np.zeros(slab.shape, bool)
    if slab.dtype.kind == "f":
        missing, rounded = np.isnan(slab), np.rint(slab)
        with np.errstate(invalid="ignore"):
            odd = ~missing & ~((np.abs(slab - rounded) <= NEAR) & (np.abs(rounded) <= 1 << 53))
        if odd.any():
            what = f"not labels: {int(odd.sum())} values of a slab are no integers, such as {slab[odd][0]:g}"
            raise InputError(what, "give a label map; images go second", path)
        slab = np.where(missing, 0, rounded)
    elif slab.size and int(slab.max()) > 1 << 62:
        raise InputError(f"the label value {int(slab.max())} is over 2^62", "renumber the labels", path)
    values = slab.astype(np.int64)
    for value in none:
        missing |= values == value
    wrong = (values < 0) & ~missing
    if wrong.any():
        what = f"{int(wrong.sum())} voxels of a slab have negative labels, such as {values[wrong][0]}"
        raise InputError(what, f"say that {values[wrong][0]} is the background", path)
    return np.where(missing, 0, values + 1)


def compact(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes there are, rising, `(K,)`, and for each voxel which of them it has: 1 to K, 0 for code 0."""
    if codes.max(initial=0) <= _SPREAD * codes.size:
        there = np.bincount(codes.reshape(-1)) > 0
        there[:1] = False
        return np.flatnonzero(there), (np.cumsum(there) * there)[codes]
    found = np.unique(codes[codes > 0])
    return found, np.where(codes > 0, np.searchsorted(found, codes) + 1, 0)


class Instances:
    """Every value is one object, wherever it occurs.

    Example:
        >>> Instances().find(np.array([[0, 5], [9, 5]])).key.tolist()
        [5, 9]
    """

    def __init__(self) -> None:
        self.pairs: list[np.ndarray] = []

    def find(self, codes: np.ndarray) -> Found:
        """The objects of the next slab."""
        there, local = compact(codes)
        return Found(local, there, there)


class Components:
    """Voxels of one value that are connected, also across the borders of slabs.

    The last plane of a slab is kept with the keys of its objects. What touches one of these in the next plane is a part
    of it; where a part touches several, they are one object and the smallest of their keys goes on.

    Args:
        dims: 2 or 3.
        connectivity: neighbours of a voxel: 4 or 8 in 2D, 6, 18 or 26 in 3D; None for all of them.

    Raises:
        InputError: another number of neighbours.

    Example:
        >>> finder = Components(2)
        >>> [finder.find(np.array([row])).key.tolist() for row in ([1, 0, 1], [1, 0, 1], [1, 1, 1])]
        [[0, 1], [0, 1], [0]]
        >>> finder.pairs[-1].tolist()
        [[1, 0]]
    """

    def __init__(self, dims: int, connectivity: int | None = None) -> None:
        known = NEIGHBOURS[dims]
        connectivity = max(known) if connectivity is None else connectivity
        if connectivity not in known:
            allowed = ", ".join(map(str, known))
            raise InputError(f"in {dims}D a voxel has no {connectivity} neighbours", f"connectivity: one of {allowed}")
        self.pairs: list[np.ndarray] = []
        self._structure = ndimage.generate_binary_structure(dims, known[connectivity])
        self._next = 0
        self._front: tuple[np.ndarray, np.ndarray] | None = None

    def find(self, codes: np.ndarray) -> Found:
        """The objects of the next slab."""
        local, code = self._label(codes)
        key = self._keys(self._touching(codes[0], local[0]), len(code))
        front = np.concatenate([[-1], key])[local[-1]]
        self._front = front, codes[-1]
        return Found(local, key, code)

    def _label(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number the components within a slab, and tell the code of each."""
        there, index = compact(codes)
        local, found = np.zeros(codes.shape, np.int64), [np.empty(0, np.int64)]
        total = 0
        for number, (code, box) in enumerate(zip(there, ndimage.find_objects(index), strict=True), 1):
            mine, count = ndimage.label(index[box] == number, self._structure)
            part = local[box]
            part[mine > 0] = mine[mine > 0] + total
            found.append(np.full(count, code))
            total += count
        return local, np.concatenate(found)

    def _touching(self, codes: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Pairs (key of the last plane, part of this slab) of one code that touch, `(M, 2)`, each once."""
        if self._front is None:
            return np.empty((0, 2), np.int64)
        keys, before = self._front
        width, pairs = int(local.max(initial=0)) + 1, [np.empty(0, np.int64)]
        for shift in np.argwhere(self._structure[0]) - 1:
            there = tuple(
                slice(max(0, -step), size - max(0, step)) for step, size in zip(shift, local.shape, strict=True)
            )
            here = tuple(
                slice(max(0, step), size - max(0, -step)) for step, size in zip(shift, local.shape, strict=True)
            )
            one = (before[there] == codes[here]) & (codes[here] > 0)
            pairs.append(np.unique(keys[there][one] * width + local[here][one]))
        return np.stack(np.divmod(np.unique(np.concatenate(pairs)), width), axis=1)

    def _keys(self, touching: np.ndarray, count: int) -> np.ndarray:
        """The key of each part, and a note of the keys that became one."""
        opened, at = np.unique(touching[:, 0], return_inverse=True)
        edges = np.ones(len(at), bool), (touching[:, 1] - 1, count + at)
        size = count + len(opened)
        _, group = connected_components(coo_matrix(edges, (size, size)), directed=False)
        smallest = np.full(size, _NONE)
        np.minimum.at(smallest, group[count:], opened)
        key, kept = smallest[group[:count]], smallest[group[count:]]
        fresh = key == _NONE
        key[fresh] = self._next + np.arange(np.count_nonzero(fresh))
        self._next += int(np.count_nonzero(fresh))
        merged = opened != kept
        if merged.any():
            self.pairs.append(np.stack([opened[merged], kept[merged]], axis=1))
        return key
