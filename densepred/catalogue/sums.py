"""Additive sums over the voxels of objects: those of the parts of an object give those of the whole.

Coordinates are counted from the lowest corner of an object's box, so that squares of large indices do not cancel; where
parts are joined, their sums are shifted to the common corner (the parallel axis theorem).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from densepred.catalogue.objects import Found

_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Sums:
    """A row per object, or per part of one; d axes, M = 1 + C sets of weights: the mask itself, then each channel.

    Args:
        key: `(N,)`, which object.
        code: `(N,)`, its label value + 1.
        first: `(N,)`, flat index of its first voxel.
        voxels: `(N,)`, how many.
        low, high: `(N, d)`, its box, both ends included.
        total, valid, peak: `(N, M)`, sum, number and maximum of the finite values.
        weight: `(N, M)`, sum of the weights: 1 for the mask, and the value of a channel where that is positive.
        linear: `(N, M, d)`, sums of weight * coordinate.
        square: `(N, M, d, d)`, sums of weight * coordinate * coordinate.
    """

    key: np.ndarray
    code: np.ndarray
    first: np.ndarray
    voxels: np.ndarray
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    valid: np.ndarray
    peak: np.ndarray
    weight: np.ndarray
    linear: np.ndarray
    square: np.ndarray

    def rows(self, chosen: np.ndarray) -> Sums:
        """Some of the rows, by a mask or by their numbers."""
        return Sums(*(getattr(self, field.name)[chosen] for field in fields(self)))


def tally(found: Found, image: np.ndarray | None, start: int) -> Sums:
    """The sums of the objects of a slab.

    Args:
        found: the objects of the slab `(n, *rest)`.
        image: `(C, n, *rest)`, or None.
        start: which plane of the volume is the slab's first.
    """
    count, dims = len(found.key), found.local.ndim
    flat = np.flatnonzero(found.local)  # rising: the voxels in their order
    index = found.local.reshape(-1)[flat] - 1
    places = _places(flat, found.local.shape)
    first = np.zeros(count, np.int64)
    first[index[::-1]] = flat[::-1]  # of several, the last that is assigned stays
    low, high = np.full((dims, count), _FAR), np.full((dims, count), -1)
    for axis, place in enumerate(places):
        np.minimum.at(low[axis], index, place)
        np.maximum.at(high[axis], index, place)
    near = [(place - corner[index]).astype(np.float64) for place, corner in zip(places, low, strict=True)]
    channels = [_mask_sums(index, near, count)]
    for values in () if image is None else image:
        channels.append(_channel_sums(index, near, count, values.reshape(-1)[flat].astype(np.float64)))
    total, valid, peak, weight, linear, square = (np.stack(parts, 1) for parts in zip(*channels, strict=True))
    for corner in (low, high):
        corner[0] += start
    first += start * int(np.prod(found.local.shape[1:]))
    voxels = valid[:, 0].astype(np.int64)
    return Sums(found.key, found.code, first, voxels, low.T, high.T, total, valid, peak, weight, linear, square)


def _places(flat: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
    """The coordinates of flat indices, an array for each axis."""
    places = []
    for size in reversed(shape[1:]):
        flat, place = np.divmod(flat, size)
        places.append(place)
    return [flat, *reversed(places)]


def _mask_sums(index: np.ndarray, near: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, ...]:
    voxels = np.bincount(index, minlength=count).astype(np.float64)
    return voxels, voxels, np.ones(count), voxels, *_moments(index, near, count, None)


def _channel_sums(
    index: np.ndarray, near: Sequence[np.ndarray], count: int, values: np.ndarray
) -> tuple[np.ndarray, ...]:
    finite = np.isfinite(values)
    if not finite.all():
        index, values, near = index[finite], values[finite], [place[finite] for place in near]
    peak = np.full(count, -np.inf)
    np.maximum.at(peak, index, values)
    total = np.bincount(index, values, count)
    valid = np.bincount(index, minlength=count).astype(np.float64)
    weights = np.maximum(values, 0)
    return total, valid, peak, np.bincount(index, weights, count), *_moments(index, near, count, weights)


def _moments(
    index: np.ndarray, near: Sequence[np.ndarray], count: int, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    dims = len(near)
    linear, square = np.zeros((count, dims)), np.zeros((count, dims, dims))
    for axis, place in enumerate(near):
        weighted = place if weights is None else place * weights
        linear[:, axis] = np.bincount(index, weighted, count)
        for other in range(axis, dims):
            square[:, axis, other] = square[:, other, axis] = np.bincount(index, weighted * near[other], count)
    return linear, square


def joined(parts: Sequence[Sums], pairs: Sequence[np.ndarray] = ()) -> Sums:
    """One row for each object, under the smallest of its keys, which then rise.

    Args:
        parts: rows of equal key are of one object.
        pairs: `(M, 2)` each, further keys that are of one object.
    """
    whole = Sums(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Sums)))
    if not len(whole.key):
        return whole
    group = _groups(whole.key, pairs)
    whole = whole.rows(np.argsort(group, kind="stable"))
    starts = np.flatnonzero(np.diff(np.sort(group), prepend=-1))
    corner = np.minimum.reduceat(whole.low, starts)
    apart = (whole.low - np.repeat(corner, np.diff(starts, append=len(group)), axis=0)).astype(np.float64)
    linear, square = _shifted(whole, apart)
    out = Sums(
        key=np.minimum.reduceat(whole.key, starts),
        code=whole.code[starts],
        first=np.minimum.reduceat(whole.first, starts),
        voxels=np.add.reduceat(whole.voxels, starts),
        low=corner,
        high=np.maximum.reduceat(whole.high, starts),
        total=np.add.reduceat(whole.total, starts),
        valid=np.add.reduceat(whole.valid, starts),
        peak=np.maximum.reduceat(whole.peak, starts),
        weight=np.add.reduceat(whole.weight, starts),
        linear=np.add.reduceat(linear, starts),
        square=np.add.reduceat(square, starts),
    )
    return out.rows(np.argsort(out.key))


def _groups(keys: np.ndarray, pairs: Sequence[np.ndarray]) -> np.ndarray:
    """A number for each row, equal for those of one object."""
    joints = np.concatenate([np.empty((0, 2), np.int64), *pairs])
    known = np.unique(np.concatenate([keys, joints.reshape(-1)]))
    ends = tuple(np.searchsorted(known, joints).T)
    graph = coo_matrix((np.ones(len(joints), bool), ends), (len(known), len(known)))
    return np.asarray(connected_components(graph, directed=False)[1])[np.searchsorted(known, keys)]


def _shifted(sums: Sums, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The moments with coordinates that are larger by `apart`, `(N, d)`."""
    step = apart[:, None]
    weight = sums.weight[..., None]
    cross = sums.linear[..., :, None] * step[..., None, :]
    square = sums.square + cross + np.swapaxes(cross, -1, -2)
    square += (weight * step)[..., :, None] * step[..., None, :]
    return sums.linear + weight * step, square
