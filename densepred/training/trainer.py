"""The training loop: steps, validation, checkpoints, and the checks that stop a training gone wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densepred.cases.cache import CachedCase
from densepred.device import needing_memory, pick_device, pick_precision
from densepred.errors import DiskFullError, InputError, ResourceError, StoppedError
from densepred.files import atomic_write
from densepred.progress import progress
from densepred.signals import StopSignals
from densepred.training import checkpoint
from densepred.training.engine import Engine, seeded
from densepred.training.finetune import start_from_pretrained
from densepred.training.logging import EventLog
from densepred.training.objective import Drawn, make_objective
from densepred.training.optim import MovingAverage, learning_rate, make_optimizer
from densepred.training.prefetch import prefetch
from densepred.training.run import BEST, Run

ISOLATED = 3
"""Steps in a row whose loss may be non-finite (they are skipped) before training stops."""
_LOG = logging.getLogger(__name__)


class Trainer:
    """Trains the network of a run on cached cases; every step is a function of (seed, step) and the weights before it.

    Args:
        run: the run directory.
        train: cases to learn from.
        validation: cases to score on; may be empty.
    """

    def __init__(self, run: Run, train: list[CachedCase], validation: list[CachedCase]) -> None:
        config, plan = run.config, run.plan
        self.run, self.config, self.validation = run, config, validation
        self.device = pick_device(config.training.device)
        self.precision = pick_precision(config.training.precision, self.device)
        self.objective = make_objective(config, plan, train, self.device, self.precision)
        self.model = self.objective.network()
        if config.model.pretrained and not any(run.checkpoints.glob("step-*")):
            start_from_pretrained(self.model, run)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.average = MovingAverage(self.model, config.optimizer.ema)
        self.total = config.training.epochs * config.training.steps
        self.data_hash = hashlib.sha256(" ".join(sorted(case.key for case in train)).encode()).hexdigest()
        self.state: dict[str, Any] = {"step": 0, "losses": [], "norms": [], "skipped": 0, "best": None, "seconds": 0.0}
        self.stop = StopSignals()
        self.engine: Engine

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint if there is one."""
        self._restore()
        self.run.save_recipe()  # with what a resumed training was given anew, now that it can go on
        self.engine = Engine(self.model, self.optimizer, self.device, self.precision, self.config.training.form)
        self.average.state = {name: value.to(self.device) for name, value in self.average.state.items()}
        first, steps = self.state["step"], self.config.training.steps
        order = ((step // steps, step % steps) for step in range(first, self.total))
        batches = prefetch(self.objective.draw, order, self.config.training.workers)
        log = EventLog(self.run.path, first, self.config.training.tensorboard)
        with self.stop, log, progress(self.total, "training", done=first) as advance:
            if len(self.run.rows) < first // steps:  # stopped while this epoch was validated
                self._end_epoch(log)
            for step, batch in zip(range(first, self.total), batches, strict=True):
                started = time.monotonic()
                with needing_memory("lower patch.size or patch.batch, in a new run"):
                    self._step(step, batch, log)
                self.state["seconds"] += time.monotonic() - started
                self.state["step"] = step + 1
                losses = self.state["losses"]
                info = {"epoch": step // steps + 1, "loss": losses[-1] if losses else math.nan}
                if (step + 1) % steps == 0:
                    info |= self._end_epoch(log)
                elif (step + 1) % self.config.training.checkpoint_every == 0:
                    self._save()
                advance(1, **info)
                if self.stop.signal is not None and step + 1 < self.total:
                    self._stopped(self._save())
        self._publish()

    def _stopped(self, saved: bool) -> None:
        step = f"step {self.state['step']} of {self.total}"
        state = f"the state after {step} is saved" if saved else f"the state after {step} could not be saved"
        fix = f"go on with densepred train --resume {self.run.path}"
        raise StoppedError(f"stopped by a signal; {state}", self.stop.exit_code, fix)

    def _step(self, step: int, batch: Drawn, log: EventLog) -> None:
        """One step; a non-finite loss or gradient skips the update."""
        config = self.config.optimizer
        torch.manual_seed(seeded(self.config.training.seed, step))
        image, targets = self.objective.tensors(batch, slice(None), self.device)
        rate = learning_rate(config, step, self.total)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        loss, norm = self.engine.gradient(image, lambda outputs: self.objective.loss(outputs, targets), config.clip)
        if step == 0:
            self._check_first(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # running statistics took the batch in
            self._nonfinite(step, batch, loss, norm)
            return
        self.state["skipped"] = 0
        self.engine.update(rate)
        self.average.update(self.model, step)
        self.state["losses"].append(loss)
        self.state["norms"].append(norm)
        log.scalars(step, {"loss": loss, "lr": rate, "grad_norm": norm})

    def _check_first(self, loss: float) -> None:
        expected = self.objective.at_chance
        if math.isfinite(loss) and loss > 3 * expected:
            _LOG.warning(
                "the first loss is %.2f where chance gives %.2f: check the labels and the normalisation", loss, expected
            )

    def _nonfinite(self, step: int, batch: Drawn, loss: float, norm: float) -> None:
        self.engine.discard()
        self.state["skipped"] += 1
        record = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "cases": list(batch.ids),
            "seeds": [int(s) for s in batch.seeds],
        }
        atomic_write(self.run.path / "nonfinite.json", json.dumps(record, indent=1))
        _LOG.warning("step %d skipped: loss %s, gradient norm %s, cases %s", step, loss, norm, ", ".join(batch.ids))
        if self.state["skipped"] > ISOLATED:
            count, last = self.state["skipped"], ", ".join(batch.ids)
            what = f"the loss is not finite ({count} steps in a row, the last on {last}; seeds in nonfinite.json)"
            fix = "look at these cases with densepred check, or lower optimizer.lr in a new run"
            raise ResourceError(what, fix, self.run.path)

    def _end_epoch(self, log: EventLog) -> dict[str, float]:
        """Close the epoch's row, validate if it is due, and write what people look at.

        The state is saved before and after, so that a kill during the validation costs only the validation.
        """
        saved = self._save()
        training, epoch = self.config.training, self.state["step"] // self.config.training.steps
        losses, norms = self.state["losses"], self.state["norms"]
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.state["step"],
            "loss": float(np.mean(losses)) if losses else math.nan,
            "lr": learning_rate(self.config.optimizer, self.state["step"] - 1, self.total),
            "grad_norm": float(np.mean(norms)) if norms else math.nan,
            "seconds": round(self.state["seconds"], 2),
        }
        scores: dict[str, float] = {}
        if self.validation and (epoch % training.validate_every == 0 or epoch == training.epochs):
            with needing_memory("lower inference.window or inference.batch, in a new run"):
                scores = self._validate(saved)
            log.scalars(self.state["step"], scores)
        self.run.rows.append(row | scores)
        self.state |= {"losses": [], "norms": []}
        merit = self.objective.merit(scores)
        better = math.isfinite(merit) and (self.state["best"] is None or merit > self.state["best"])
        if better and self._write("best weights", lambda: self.run.save_weights(self._weights(), BEST)):
            self.state["best"] = merit
        self._publish()
        self._save()
        return {"score": merit} if math.isfinite(merit) else {}

    def _validate(self, saved: bool) -> dict[str, float]:
        """The scores of the validation cases, with the weights that would be kept."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self._weights())

        def watch(done: int, total: int) -> None:
            if self.stop.signal is not None:
                self._stopped(saved)

        return self.objective.scores([self.objective.judge(model, case, watch) for case in self.validation])

    def _weights(self) -> dict[str, Tensor]:
        """The weights to validate and keep: the moving average if there is one."""
        return self.average.state if self.config.optimizer.ema else self.model.state_dict()

    def _publish(self) -> None:
        self._write("metrics", self.run.save_metrics)
        self._write("weights", lambda: self.run.save_weights(self._weights()))

    def _save(self) -> bool:
        """Write a checkpoint; was there room for it?"""
        tensors = {
            "model": self.model.state_dict(),
            "average": self.average.state,
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
        }
        state = self.state | {"rows": self.run.rows, "data": self.data_hash, "torch": torch.__version__}
        step = self.state["step"]
        return self._write("checkpoint", lambda: checkpoint.save(self.run.checkpoints, step, tensors, state))

    def _write(self, what: str, action: Callable[[], object]) -> bool:
        """Do it; a full disk is a warning, and the next attempt may do, until the training is at its end."""
        try:
            action()
        except DiskFullError as error:
            if self.state["step"] == self.total:
                raise
            _LOG.warning("no %s at step %d: %s", what, self.state["step"], error.what)
            return False
        return True

    def _restore(self) -> None:
        found = checkpoint.newest(self.run.checkpoints)
        if found is None:
            return
        tensors, state = found
        if state.pop("data") != self.data_hash:
            made = f" (with densepred {self.run.plan.densepred_version})" if self.run.plan.densepred_version else ""
            what = f"the training cases, or how they are prepared, have changed since this run began{made}"
            raise InputError(what, "restore the files, go on with that version, or start a new run", self.run.path)
        if state.pop("torch") != torch.__version__:
            _LOG.warning("resuming under another version of torch: the end may differ in the last bits")
        self.run.rows[:] = state.pop("rows")
        self.state = state
        self.model.load_state_dict(tensors["model"])
        self.average.state = tensors["average"]
        checkpoint.load_optimizer(self.optimizer, tensors["optimizer"])
