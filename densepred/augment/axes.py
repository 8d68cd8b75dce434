"""Linear maps along each axis of an image, as products with small matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def along_axes(rows: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Apply a matrix along every axis.

    Args:
        rows: (n, *spatial).
        matrices: for each axis (out, in), or (n, out, in) with one for each row; None leaves the axis.

    Returns:
        (n, *out).

    Example:
        >>> import torch
        >>> along_axes(torch.arange(4.0).view(1, 2, 2), [torch.ones(1, 2), torch.eye(2)]).tolist()
        [[[2.0, 4.0]]]
    """
    for axis, matrix in enumerate(matrices):
        if matrix is None:
            continue
        before, after = rows.shape[1 : axis + 1], rows.shape[axis + 2 :]
        count, size = rows.shape[0], rows.shape[axis + 1]
        if matrix.ndim == 2:
            matrix = matrix.expand(count, *matrix.shape)
        if not after:
            rows = (rows.reshape(count, -1, size) @ matrix.transpose(1, 2)).reshape(count, *before, -1)
        else:
            flat = rows.reshape(count, before.numel(), size, after.numel())
            rows = (matrix.unsqueeze(1) @ flat).reshape(count, *before, -1, *after)
    return rows
