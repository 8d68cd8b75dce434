"""Bringing streamed slabs to another grid, holding only the planes that the next output planes need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from densepred.cases.resample import axis_matrix
from densepred.inference.sliding_window import Slab


def resample_slabs(slabs: Iterator[Slab], shape: Sequence[int], target: Sequence[int]) -> Iterator[Slab]:
    """Resample a stream of slabs linearly, axis by axis (`densepred.cases.resample` says how).

    Args:
        slabs: (z0, z1, slab (K, z1 - z0, *rest)), in order, covering `shape`.
        shape: spatial shape that the slabs cover.
        target: spatial shape to resample to.

    Yields:
        (z0, z1, slab (K, z1 - z0, *target rest)) in order.
    """
    matrix = axis_matrix(shape[0], target[0]).tocsr()
    reach = [int(matrix.indices[matrix.indptr[j] : matrix.indptr[j + 1]].max()) for j in range(target[0])]
    rest = [torch.from_numpy(axis_matrix(n, m).toarray()).float() for n, m in zip(shape[1:], target[1:], strict=True)]
    planes: dict[int, Tensor] = {}
    done = 0
    for start, stop, slab in slabs:
        planes.update(zip(range(start, stop), _within(slab, rest).unbind(1), strict=True))
        ready = done
        while ready < target[0] and reach[ready] < stop:
            ready += 1
        if ready > done:
            rows = [matrix.getrow(j) for j in range(done, ready)]
            mixed = [sum(w * planes[i] for i, w in zip(row.indices, row.data, strict=True)) for row in rows]
            yield done, ready, torch.stack([torch.as_tensor(plane) for plane in mixed], 1)
            done = ready
        if done < target[0]:
            first = int(matrix.getrow(done).indices.min())
            planes = {i: plane for i, plane in planes.items() if i >= first}


def _within(slab: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix (out, in) to each axis after the first two of (K, n, *rest)."""
    for axis, matrix in enumerate(matrices, start=2):
        slab = torch.movedim(torch.movedim(slab, axis, -1) @ matrix.to(slab).T, -1, axis)
    return slab
