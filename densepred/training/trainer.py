"""The training loop: steps, validation, checkpoints, and the checks that stop a training gone wrong."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from densepred.cases.cache import CachedCase
from densepred.config import parse_duration
from densepred.device import needing_memory, pick_device, pick_precision
from densepred.errors import ResourceError, StoppedError
from densepred.files import atomic_write
from densepred.progress import Advance, progress
from densepred.signals import StopSignals
from densepred.training import ranks
from densepred.training.finetune import recall_pretraining, start_from_pretrained
from densepred.training.keeper import Keeper
from densepred.training.learner import Learner
from densepred.training.objective import Drawn, make_objective
from densepred.training.prefetch import prefetch
from densepred.training.run import Run
from densepred.training.schedules import Course
from densepred.training.trackers import Trackers, names
from densepred.training.watch import dead_shares, gradient_norms, stage_names

ISOLATED = 3
"""Steps in a row whose loss may be non-finite (they are skipped) before training stops."""
_SHOWN = ("epoch", "step", "loss", "lr", "grad_norm")
"""Of the columns of metrics.csv what is shown step by step, and need not be for an epoch."""
_LOG = logging.getLogger(__name__)


class Trainer:
    """Trains the network of a run on cached cases; every step is a function of (seed, step) and the weights before it.

    Args:
        run: the run directory.
        train: cases to learn from.
        validation: cases to score on; may be empty.

    Raises:
        DensepredError: the recipe cannot be trained; see `densepred.train`.
    """

    def __init__(self, run: Run, train: list[CachedCase], validation: list[CachedCase]) -> None:
        config = run.config
        self.run, self.config, self.validation = run, config, validation
        device = ranks.join(pick_device(config.training.device))
        precision = pick_precision(config.training.precision, device)
        self.objective = make_objective(config, run.plan, train, device, precision)
        for case in validation:
            self.objective.check(case)
        model = self.objective.network()
        begun = any(run.checkpoints.glob("step-*"))
        if config.model.pretrained:
            (recall_pretraining if begun else start_from_pretrained)(model, run)
        self.learner = Learner(config, self.objective, model, device, precision)
        self.stages = stage_names(model)
        data = hashlib.sha256(" ".join(sorted(case.key for case in train)).encode()).hexdigest()
        self.state: dict[str, Any] = {
            "step": 0,
            "losses": [],
            "norms": [],
            "skipped": 0,
            "best": None,
            "seconds": 0.0,
            "waited": 0.0,
            "elapsed": 0.0,
            "reserve": 0.0,
            "reached": 0.0,
            "averaged": 0,
            "taken": 0,
            "budget": None,
            "stages": {},
            "stepped": 0.0,
            "peak": None,
            "stale": 0,
            "flat": 0,
            "level": 1.0,
            "over": False,
        }
        self.keeper = Keeper(run, self.learner, self.state, data)
        budget = config.training.budget and parse_duration(config.training.budget)
        total = config.training.epochs * config.training.steps
        self.course = Course(total, config.optimizer.warmup, budget or None)
        self.stop = StopSignals()
        self.asked: int | None = None  # the signal that all processes know of
        self.log: Trackers
        self.began = 0.0

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint if there is one."""
        state, steps = self.state, self.config.training.steps
        self.learner.start(self.keeper.restore())
        self.learner.averaged, self.course.reserve = state["averaged"], state["reserve"]
        if state["budget"] == self.course.budget:
            self.course.reached = state["reached"]
        else:
            self.course.tick(state["elapsed"])
        state["budget"] = self.course.budget
        if ranks.first():
            self.run.save_recipe()  # with what a resumed training was given anew, now that it can go on
        first = state["step"]
        order = ((step // steps, step % steps) for step in itertools.count(first))
        if self.course.budget is None:
            order = itertools.islice(order, max(self.course.total - first, 0))  # type: ignore[assignment]
        batches = prefetch(self.objective.draw, order, self.config.training.workers)
        self.began = time.monotonic() - state["elapsed"]
        shown = names(self.config) if ranks.first() else ()
        with self.stop, Trackers(shown, self.run.path, first, self.config) as self.log, self._progress() as advance:
            closed = self.run.rows[-1]["step"] if self.run.rows else 0
            if first > closed and (first % steps == 0 or self._over()):  # stopped while this epoch was validated
                self._end_epoch()
            while not self._over():
                self._turn(batches, advance)
        self.keeper.last = True
        self.keeper.publish()

    def _progress(self) -> Any:
        course = self.course
        if not ranks.first():
            return contextlib.nullcontext(lambda n=1, **info: None)
        if course.budget is None:
            return progress(course.total, "training", done=self.state["step"])
        return progress(round(course.budget), "training (s)", done=round(self.state["elapsed"]))

    def _over(self) -> bool:
        return self.state["over"] or self.course.over(self.state["step"])

    def _turn(self, batches: Iterator[Drawn], advance: Advance) -> None:
        """One step, and what is due after it."""
        training, state, step = self.config.training, self.state, self.state["step"]
        started, cycle = time.monotonic(), self.course.cycle(self.config.optimizer, step)
        drawn = next(batches)
        waited = time.monotonic() - started
        with needing_memory("lower patch.size or patch.batch, or raise training.accumulate, in a new run"):
            self._step(step, drawn)
        took = time.monotonic() - started
        state["waited"], state["stepped"] = state["waited"] + waited, state["stepped"] + took
        state["seconds"] += took - waited
        state["step"] = step + 1
        before = self.state["elapsed"]
        self._agree()
        info = {"epoch": step // training.steps + 1, "loss": state["losses"][-1] if state["losses"] else math.nan}
        if self.course.cycle(self.config.optimizer, step + 1) > cycle:
            self.keeper.snapshot(cycle + 1)
        if (step + 1) % training.steps == 0 or self._over():
            info |= self._end_epoch()
        elif (step + 1) % training.checkpoint_every == 0:
            self.keeper.save()
        advance(1 if self.course.budget is None else round(state["elapsed"]) - round(before), **info)
        if self.asked is not None and not self._over():
            self._stopped(self.keeper.save())

    def _agree(self) -> None:
        """Let all processes know of a signal and of the time alike."""
        elapsed = time.monotonic() - self.began if ranks.first() else 0.0
        signal, elapsed = ranks.largest(float(self.stop.signal or 0), elapsed)
        self._heard(signal)
        self.course.tick(elapsed)
        self.state |= {"elapsed": elapsed, "reached": self.course.reached}

    def _heard(self, signal: float) -> None:
        """What is agreed on stands apart: a signal that comes meanwhile is not lost, and no process stops alone."""
        self.asked = int(signal) or None
        if self.asked is not None:
            self.stop.signal = self.asked

    def _stopped(self, saved: bool) -> None:
        step = f"step {self.state['step']}" + (f" of {self.course.total}" if self.course.budget is None else "")
        state = f"the state after {step} is saved" if saved else f"the state after {step} could not be saved"
        fix = f"go on with densepred train --resume {self.run.path}"
        raise StoppedError(f"stopped by a signal; {state}", self.stop.exit_code, fix)

    def _step(self, step: int, drawn: Drawn) -> None:
        """One step; a non-finite loss or gradient skips the update."""
        optimizer, learner = self.config.optimizer, self.learner
        buffers = [buffer.clone() for buffer in learner.model.buffers()]
        rate = self.course.rate(optimizer, step) * self.state["level"]
        loss, norm = learner.gradients(step, drawn)
        if step == 0:
            self._check_first(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            for buffer, before in zip(learner.model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # running statistics took the batch in
            self._nonfinite(step, drawn, loss, norm)
            return
        self.state["skipped"] = 0
        if (step + 1) % self.config.training.steps == 0:
            clipped = max(norm / optimizer.clip, 1.0) if optimizer.clip else 1.0
            norms = gradient_norms(learner.model, self.stages)
            self.state["stages"] = {name: value * clipped for name, value in norms.items()}
        learner.update(step, rate, averaging=self._averaging())
        self.state["averaged"] = learner.averaged
        self.state["losses"].append(loss)
        self.state["norms"].append(norm)
        self.log.scalars(step, {"loss": loss, "lr": rate, "grad_norm": norm})

    def _averaging(self) -> bool:
        """Are the epochs' weights averaged evenly by now?"""
        swa = self.config.optimizer.swa
        return swa > 0 and self.course.share(self.state["step"]) >= 1 - swa

    def _check_first(self, loss: float) -> None:
        expected = self.objective.at_chance
        if math.isfinite(loss) and loss > 3 * expected:
            _LOG.warning(
                "the first loss is %.2f where chance gives %.2f: check the labels and the normalisation", loss, expected
            )

    def _nonfinite(self, step: int, drawn: Drawn, loss: float, norm: float) -> None:
        self.learner.engine.discard()
        self.state["skipped"] += 1
        record = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "cases": list(drawn.ids),
            "seeds": [int(s) for s in drawn.seeds],
        }
        if ranks.first():
            atomic_write(self.run.path / "nonfinite.json", json.dumps(record, indent=1))
            text = ", ".join(drawn.ids)
            _LOG.warning("step %d skipped: loss %s, gradient norm %s, cases %s", step, loss, norm, text)
        if self.state["skipped"] > ISOLATED:
            count, last = self.state["skipped"], ", ".join(drawn.ids)
            what = f"the loss is not finite ({count} steps in a row, the last on {last}; seeds in nonfinite.json)"
            fix = "look at these cases with densepred check, or lower optimizer.lr in a new run"
            raise ResourceError(what, fix, self.run.path)

    def _end_epoch(self) -> dict[str, float]:
        """Close the epoch's row, validate if it is due, and write what people look at.

        The state is saved before and after, so that a kill during the validation costs only the validation.
        """
        started, state, training = time.monotonic(), self.state, self.config.training
        epoch = math.ceil(state["step"] / training.steps)
        if self._averaging() and state["taken"] < epoch:
            self.learner.take()
            state |= {"averaged": self.learner.averaged, "taken": epoch}
        saved = self.keeper.save()
        model = self.learner.judged()
        row = self._row(epoch, model)
        scores: dict[str, float] = {}
        untimed = self.course.budget is not None and not self.course.reserve
        if self.validation and (epoch % training.validate_every == 0 or self._over() or untimed):
            with needing_memory("lower inference.window or inference.batch, in a new run"):
                scores = self._validate(model, saved)
        self.log.scalars(state["step"], {key: value for key, value in row.items() if key not in _SHOWN} | scores)
        self.run.rows.append(row | scores)
        state |= {"losses": [], "norms": [], "stages": {}, "waited": 0.0, "stepped": 0.0}
        merit = self.objective.merit(scores)
        better = math.isfinite(merit) and (state["best"] is None or merit > state["best"])
        if better and self.keeper.keep_best():
            state["best"] = merit
        if scores:
            self._judge(merit)
        self.keeper.last = self._over()
        self.keeper.publish()
        if self.course.budget is not None:
            self.course.keep(ranks.largest(time.monotonic() - started)[0])
            state["reserve"] = self.course.reserve
            if scores or not self.validation:  # else the end could come without one: a step more tells the time
                self._agree()
        self.keeper.save()
        return {"score": merit} if math.isfinite(merit) else {}

    def _row(self, epoch: int, model: nn.Module) -> dict[str, Any]:
        state, step = self.state, self.state["step"]
        losses, norms = state["losses"], state["norms"]
        drawn = self.objective.draw(*divmod(step - 1, self.config.training.steps))
        inputs, _ = self.objective.tensors(drawn, self.learner.samples[0], self.learner.device)
        dead = dead_shares(model, [inputs], self.stages)
        return {
            "epoch": epoch,
            "step": step,
            "loss": float(np.mean(losses)) if losses else math.nan,
            "lr": self.course.rate(self.config.optimizer, step - 1) * state["level"],
            "grad_norm": float(np.mean(norms)) if norms else math.nan,
            "seconds": round(state["seconds"], 2),
            "waiting": round(state["waited"] / max(state["stepped"], 1e-9), 4),
            **{f"grad_norm_{name}": value for name, value in state["stages"].items()},
            **{f"dead_{name}": value for name, value in dead.items()},
        }

    def _judge(self, merit: float) -> None:
        """Has the score not grown for too long? Then the rate drops, or the training is over."""
        state, optimizer, patience = self.state, self.config.optimizer, self.config.training.patience
        if math.isfinite(merit) and (state["peak"] is None or merit > state["peak"]):
            state |= {"peak": merit, "stale": 0, "flat": 0}
            return
        state |= {"stale": state["stale"] + 1, "flat": state["flat"] + 1}
        if optimizer.schedule == "plateau" and state["flat"] >= optimizer.plateau:
            state |= {"level": state["level"] * optimizer.drop, "flat": 0}
        if patience is not None and state["stale"] >= patience:
            state["over"] = True
            _LOG.info("the score has not grown in %d validations: the training ends here", patience)

    def _validate(self, model: nn.Module, saved: bool) -> dict[str, float]:
        """The scores of the validation cases, which are shared out to the processes."""

        def watch(done: int, total: int) -> None:
            if self.stop.signal is not None and ranks.count() == 1:
                self._stopped(saved)

        judged = []
        for start in range(0, len(self.validation), ranks.count()):
            mine = start + ranks.rank()
            if mine < len(self.validation):
                judged.append(self.objective.judge(model, self.validation[mine], watch))
            if ranks.count() > 1:
                self._heard(ranks.largest(float(self.stop.signal or 0))[0])
                if self.asked is not None:
                    self._stopped(saved)
        return self.objective.scores(ranks.collected(judged))
