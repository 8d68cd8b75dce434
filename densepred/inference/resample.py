"""Images and logits on another grid, plane by plane: only what the next planes need is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from densepred.cases.regrid import Kernel, Regrid
from densepred.device import sent
from densepred.inference.sliding_window import Slab, Source, as_float


class Resampled:
    """A lazy image on another grid, the same as `densepred.cases.resample.resample` of the whole.

    Reading forward, `resampled[:, z0:z1]` after `resampled[:, y0:z0]`, asks the source for each plane once, in order,
    and holds those that the next ones need. Reading elsewhere begins anew there, with the same values.

    Args:
        source: the image, (C, *spatial).
        shape: the new spatial shape.
        device: where the planes are computed, and stay; by default the CPU.
        kernels: the filter of each axis; by default linear.

    Raises:
        ValueError: `shape` has not one positive number for each spatial axis.

    Example:
        >>> fine = Resampled(torch.rand(1, 3, 4, 5), (6, 4, 10))
        >>> fine.shape, fine[:, 0:2].shape
        ((1, 6, 4, 10), torch.Size([1, 2, 4, 10]))
    """

    def __init__(
        self,
        source: Source,
        shape: Sequence[int],
        device: str | torch.device = "cpu",
        kernels: Sequence[Kernel] | None = None,
    ) -> None:
        if len(shape) != len(source.shape) - 1 or min(shape) < 1:
            raise ValueError(f"shape must be {len(source.shape) - 1} positive numbers, got {tuple(shape)}")
        self.source, self.device, self.shape = source, torch.device(device), (source.shape[0], *shape)
        self._regrid = Regrid(source.shape[1:], shape, self.device, kernels=kernels)

    @torch.no_grad()
    def __getitem__(self, key: Any) -> Tensor:
        """Planes `[:, z0:z1]`, float32 (C, z1 - z0, *rest) on the device."""
        every, planes = key
        start, stop, step = planes.indices(self.shape[1])
        if every != slice(None) or step != 1:
            raise ValueError(f"only whole planes can be read, [:, z0:z1], not {key}")
        regrid, channels = self._regrid, self.shape[0]
        out = torch.empty(channels, max(stop - start, 0), *self.shape[2:], device=self.device)
        if start != regrid.done and len(out[0]):
            regrid.restart(start)
        while regrid.done < stop and len(out[0]):
            if (done := regrid.done) < (ready := min(regrid.ready, stop)):
                out[:, done - start : ready - start] = regrid.take(ready)
            else:
                end = min(regrid.read + regrid.piece(channels), regrid.reach(stop))
                regrid.add(sent(as_float(self.source[:, regrid.read : end]), self.device))
        return out


@torch.no_grad()
def resample_slabs(slabs: Iterator[Slab], regrid: Regrid, stop: int | None = None) -> Iterator[Slab]:
    """Resample a stream of slabs, as `densepred.cases.resample.resample` the whole, on the device they are on.

    Args:
        slabs: (z0, z1, slab (K, z1 - z0, *rest)), in order, from `regrid.read` on.
        regrid: from the grid of the slabs to the new one.
        stop: the plane of the new grid to end before; by default all come.

    Yields:
        (z0, z1, slab (K, z1 - z0, *target rest)) in order, of a few planes each.
    """
    stop = regrid.target[0] if stop is None else stop
    for start, end, slab in slabs:
        most = regrid.piece(slab.shape[0])
        for first in range(start, end, most):
            regrid.add(slab[:, first - start : first - start + most])
            if (done := regrid.done) < (ready := min(regrid.ready, stop)):
                yield done, ready, regrid.take(ready)
