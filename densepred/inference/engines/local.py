"""The devices of this machine, each with its copy of the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densepred.inference.predictor import Predictor

_LOG = logging.getLogger(__name__)


class Local:
    """One worker for each device named.

    Workers on the CPU have as many threads each as one alone would have, because the last bits of a result depend on
    the number of threads; `OMP_NUM_THREADS` sets it.

    Args:
        devices: "cpu", "cuda" or "cuda:N", one as often as it is to have workers; none for what the recipe says.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self._devices = tuple(devices)
        self.device = self._devices[0] if self._devices else None

    @contextmanager
    def workers(
        self, runs: Sequence[Path], overrides: Sequence[str], predictor: Predictor
    ) -> Iterator[Sequence[Predictor]]:
        """The batch's own copy is the first. The memory of a device is shared by the workers on it."""
        from densepred.inference.predictor import load

        self._check_threads()
        found = [predictor, *(load(runs, overrides, device=device) for device in self._devices[1:])]
        for each in found:
            each.sharing = sum(other.device == each.device for other in found)
        yield found

    def _check_threads(self) -> None:
        import torch

        count, threads = self._devices.count("cpu"), torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if count > 1 and count * threads > cores:
            what = "%d workers of %d threads each share %d cores: OMP_NUM_THREADS=%d would be faster"
            _LOG.warning(what, count, threads, cores, max(cores // count, 1))
