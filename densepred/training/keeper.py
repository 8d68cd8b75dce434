"""What a training keeps on disk: checkpoints to go on from, weights to predict with, metrics to look at."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densepred.errors import DiskFullError, InputError
from densepred.files import atomic_write
from densepred.training import checkpoint, ranks
from densepred.training.learner import Learner
from densepred.training.run import BEST, PRETRAINING, SNAPSHOTS, Run

_DRAWN_EVERY = 10
"""Seconds between two pictures of the curves: one takes as long as some steps of a small network."""
_LOG = logging.getLogger(__name__)


class Keeper:
    """Writes the state of a training and reads it; of several processes the first writes.

    Args:
        run: the run directory.
        learner: whose weights are kept.
        state: all else that a training must know to go on, plain JSON data; restored in place.
        data: a hash of what is trained on, which must not change.

    Attributes:
        last: nothing is tried again: a full disk is an error, not a warning.
    """

    def __init__(self, run: Run, learner: Learner, state: dict[str, Any], data: str) -> None:
        self.run, self.learner, self.state, self.data = run, learner, state, data
        self.last, self._drawn = False, time.monotonic()

    def save(self) -> bool:
        """Write a checkpoint; was there room for it?"""
        tensors = self.learner.tensors()
        state = self.state | {"rows": self.run.rows, "data": self.data, "torch": torch.__version__}
        step = self.state["step"]
        return self._write("checkpoint", lambda: checkpoint.save(self.run.checkpoints, step, tensors, state))

    def publish(self) -> None:
        """Write the metrics and the weights."""
        weights = self.learner.weights()
        self._write("metrics", self._metrics)
        self._write("weights", lambda: self.run.save_weights(weights))

    def _metrics(self) -> None:
        """The table, and the curves at the end and where they were not drawn a moment ago."""
        self.run.save_metrics()
        if self.last or time.monotonic() - self._drawn > _DRAWN_EVERY:
            self.run.draw_curves()
            self._drawn = time.monotonic()

    def keep_best(self) -> bool:
        """Write the weights as the best ones so far; was there room for them?"""
        weights = self.learner.weights()
        return self._write("best weights", lambda: self.run.save_weights(weights, BEST))

    def snapshot(self, cycle: int) -> None:
        """Write the weights of a cycle's end as a run directory of its own, which predictions can take."""
        weights = self.learner.weights()
        folder = self.run.path / SNAPSHOTS / f"cycle-{cycle}"
        self._write("snapshot", lambda: _as_run(self.run, folder, weights))

    def restore(self) -> dict[str, dict[str, Tensor]] | None:
        """Take up the newest checkpoint: the state in place, the tensors returned; None if there is none.

        Raises:
            InputError: it is of other data.
        """
        found = checkpoint.newest(self.run.checkpoints)
        if found is None:
            return None
        tensors, state = found
        if state.pop("data") != self.data:
            made = f" (with densepred {self.run.plan.densepred_version})" if self.run.plan.densepred_version else ""
            what = f"the training cases, or how they are prepared, have changed since this run began{made}"
            raise InputError(what, "restore the files, go on with that version, or start a new run", self.run.path)
        if state.pop("torch") != torch.__version__:
            _LOG.warning("resuming under another version of torch: the end may differ in the last bits")
        self.run.rows[:] = state.pop("rows")
        self.state |= state
        return tensors

    def _write(self, what: str, action: Callable[[], object]) -> bool:
        """Do it; a full disk is a warning, and the next attempt may do, unless there is none."""

        def attempt() -> bool:
            try:
                action()
            except DiskFullError as error:
                if self.last:
                    raise
                _LOG.warning("no %s at step %d: %s", what, self.state["step"], error.what)
                return False
            return True

        return bool(ranks.alone(attempt))


def _as_run(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = Run(folder, run.config, run.plan)
    kept.save_recipe()
    if (run.path / PRETRAINING).is_file():
        atomic_write(folder / PRETRAINING, (run.path / PRETRAINING).read_bytes())
    kept.save_weights(weights)
