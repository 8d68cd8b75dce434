"""Label maps of which only the largest connected components are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from densepred.cases.plan import Plan
from densepred.errors import InputError
from densepred.inference.spool import Arrays

ALL = "*"
"""All classes but the background, together."""
_PLANES = 16  # handed on at a time once all are there
_BYTES = 7  # of a voxel: its label, of two bytes at most, its place in the mask, its component


@dataclass(frozen=True)
class KeepLargest:
    """What is kept of label maps, one step after the other.

    Args:
        groups: of each step the values whose largest component stays.
        background: what is written in the place of the others.
    """

    groups: tuple[tuple[int, ...], ...]
    background: int

    @classmethod
    def of(cls, plan: Plan, names: Sequence[str]) -> KeepLargest:
        """By the names of classes, or `ALL`.

        Raises:
            InputError: there is no such class, or it is the background.
        """
        known = dict(zip(plan.classes[1:], plan.values[1:], strict=True))
        unknown = [name for name in names if name != ALL and name not in known]
        if unknown:
            what = f"inference.keep_largest: {unknown[0]!r} is no class of this model"
            raise InputError(what, f"choose of {', '.join(known)}, or {ALL} for all of them together")
        groups = tuple(tuple(known.values()) if name == ALL else (known[name],) for name in names)
        return cls(groups, plan.values[0] if plan.values else 0)

    def bytes_of(self, shape: Sequence[int]) -> int:
        """The most memory that `held` takes for an image of a spatial shape."""
        return _BYTES * math.prod(shape) if self.groups else 0

    def apply(self, labels: NDArray[np.integer]) -> int:
        """Change label values `(*spatial)` in place; returns how many voxels became background."""
        return sum(keep_largest(labels, values, self.background) for values in self.groups)

    def held(self, slabs: Iterable[tuple[int, int, Arrays]], shape: Sequence[int]) -> Iterator[tuple[int, int, Arrays]]:
        """Finished planes, in which labels come last: what is a component is known when all are there.

        Args:
            slabs: (z0, z1, kind -> (C, n, *rest)), in order.
            shape: spatial shape of the image.
        """
        whole: NDArray[np.integer] | None = None
        for start, stop, arrays in slabs:
            if not self.groups or "labels" not in arrays:
                yield start, stop, arrays
                continue
            if whole is None:
                whole = np.empty(tuple(shape), arrays["labels"].dtype)
            whole[start:stop] = arrays["labels"][0]
            others = {kind: values for kind, values in arrays.items() if kind != "labels"}
            if others:
                yield start, stop, others
        if whole is None:
            return
        self.apply(whole)
        for start in range(0, len(whole), _PLANES):
            part = whole[start : start + _PLANES]
            yield start, start + len(part), {"labels": part[np.newaxis]}


def keep_largest(labels: NDArray[np.integer], values: Sequence[int], background: int) -> int:
    """Turn all but the largest connected component of some label values into background, in place.

    Voxels that touch by a corner are connected; of equally large components the first one in the array stays.

    Args:
        labels: `(*spatial)`.
        values: of which the components are, all together.
        background: what the other components become.

    Returns:
        How many voxels were changed.

    Example:
        >>> line = np.array([1, 0, 2, 2, 0, 3])
        >>> keep_largest(line, [1, 2], 0), line.tolist()
        (1, [0, 0, 2, 2, 0, 3])

    Source: Isensee et al. 2021, Nature Methods 18, 203 (nnU-Net), "Post-processing".
    """
    mask = np.empty(labels.shape, bool)
    for part, into in _planes(labels, mask):  # some at a time: numpy works on these in wider types
        into[...] = np.isin(part, values)
    box = _box(mask)
    if box is None:
        return 0
    found, count = ndimage.label(mask[box], ndimage.generate_binary_structure(labels.ndim, labels.ndim))
    del mask
    if count < 2:
        return 0
    sizes = np.zeros(count + 1, np.int64)
    for (part,) in _planes(found):
        sizes += np.bincount(part.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = sizes.argmax()
    for part, into in _planes(found, labels[box]):
        into[(part > 0) & (part != largest)] = background
    return int(sizes.sum() - sizes[largest])


def _planes(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Views of a few planes of arrays of one shape."""
    for start in range(0, len(arrays[0]), _PLANES):
        yield tuple(array[start : start + _PLANES] for array in arrays)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The part of an array that holds all that is true; None if nothing is."""
    slices = []
    for axis in range(mask.ndim):
        (there,) = np.nonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(there):
            return None
        slices.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(slices)
