"""What a worker of a cluster runs: it reads the run directory by itself, and predicts one case at a time."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from densepred.cases.case import Case
from densepred.errors import DensepredError, StoppedError, WorkersError


class Identity(NamedTuple):
    """What decides on the bytes of results besides the model and the images."""

    device: str
    precision: str
    densepred: str
    torch: str


class Actor:
    """A predictor that asks before it puts files in their places; several threads may call it.

    Args:
        runs: the run directories.
        overrides: as for `load`.
        device: "cpu" or "cuda".
        threads: of torch.
        hashes: of the weights and of the settings, which must be those found here.
    """

    def __init__(
        self, runs: Sequence[str], overrides: Sequence[str], device: str, threads: int, hashes: tuple[str, str]
    ) -> None:
        import torch

        from densepred.inference.predictor import load

        log = logging.getLogger("densepred")
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO)
        torch.set_num_threads(threads)
        self._states: dict[str, str] = {}
        self._changed, self._one = threading.Condition(), threading.Lock()
        self._fault: DensepredError | None = None
        try:
            self._predictor = load(runs, overrides, device=device)
        except DensepredError as error:
            self._fault = WorkersError(f"a worker cannot start: {error.what}", error.fix, error.file)
            return
        if (self._predictor.weights_hash, self._predictor.config_hash) != hashes:
            what = "a worker finds another model than the batch began with"
            self._fault = WorkersError(
                what, "leave the run directory as it is, and densepred the same everywhere", runs[0]
            )

    def identity(self) -> Identity | DensepredError:
        """What it is, once it is up; or why it cannot work."""
        if self._fault is not None:
            return self._fault
        from densepred.device import pick_precision

        predictor = self._predictor
        precision = str(pick_precision(predictor.config.inference.precision, predictor.device))
        versions = (metadata.version(name) for name in ("densepred", "torch"))
        return Identity(predictor.device.type, precision, *versions)

    def predict(self, ticket: str, case: Case, paths: Mapping[str, Path]) -> DensepredError | None:
        """Predict a case; returns its fault.

        Args:
            ticket: names this attempt. Earlier ones are dropped, whatever became of them.
            case: its images and planes.
            paths: as for `Predictor.predict_file`.
        """
        from densepred.device import needing_memory
        from densepred.inference.faults import LESS_MEMORY, fault_of

        with self._changed:
            self._states |= {other: "dropped" for other, state in self._states.items() if state != "ended"}
            self._states.setdefault(ticket, "running")
            self._changed.notify_all()
        try:
            with self._one:
                if self._fault is not None:
                    return self._fault
                with needing_memory(LESS_MEMORY):
                    self._predictor.predict_file(case, paths, lambda *_: self._go_on(ticket), lambda: self._ask(ticket))
            return None
        except Exception as error:
            return fault_of(error, case)
        finally:
            self._set(ticket, "ended")

    def asks(self, ticket: str) -> bool:
        """Wait until an attempt asks whether to put its files in their places; False if it ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self._states.get(ticket) in ("asks", "dropped", "ended"))
            return self._states[ticket] == "asks"

    def answer(self, ticket: str, place: bool) -> None:
        """Whether to put the files in their places; `False` ends an attempt wherever it is."""
        self._set(ticket, "placing" if place else "dropped")

    def _set(self, ticket: str, state: str) -> None:
        with self._changed:
            self._states[ticket] = state
            self._changed.notify_all()

    def _go_on(self, ticket: str) -> None:
        if self._states[ticket] == "dropped":
            raise StoppedError("no longer wanted")

    def _ask(self, ticket: str) -> None:
        with self._changed:
            self._go_on(ticket)
            self._set(ticket, "asks")
            self._changed.wait_for(lambda: self._states[ticket] != "asks")
            self._go_on(ticket)
