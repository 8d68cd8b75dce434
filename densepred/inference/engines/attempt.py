"""One case in the hands of a worker of a cluster, and ranges of its planes in those of others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from densepred.errors import ResourceError
from densepred.files import part_path, remove
from densepred.inference.engines.actor import PLACE, Wanted

if TYPE_CHECKING:
    from densepred.cases.case import Case

_LOG = logging.getLogger(__name__)
ATTEMPTS = 3
"""How often a case, or a range of one, is given to a worker, if that is lost each time."""
PATIENCE = 120.0
"""Seconds that a range waits for a worker; then the case is begun again by one alone."""
_GRACE = 20.0
"""Seconds in which a worker ends a case that is no longer wanted."""


class NoWorkerError(Exception):
    """No worker is left for a range."""


class Pool(Protocol):
    """Has the actors."""

    def idle(self) -> Any:
        """One without work; None if there is none now."""

    def give_back(self, actor: Any, lost: bool) -> None:
        """One whose work has ended."""


@dataclass(frozen=True)
class _Running:
    """A range and who computes it into which folder."""

    wanted: Wanted
    actor: Any
    ticket: str
    folder: Path


class Attempt:
    """Has a worker predict a case. It asks for others for ranges of it, and before it puts files in their places.

    Args:
        ray: the module.
        pool: has the other workers.
        actor: the worker.
        case: what it predicts.
    """

    def __init__(self, ray: Any, pool: Pool, actor: Any, case: Case) -> None:
        self._ray, self._pool, self._actor, self._case = ray, pool, actor, case
        self._ticket = os.urandom(8).hex()
        self._waiting: list[Wanted] = []
        self._running: dict[Any, _Running] = {}
        self._folders: list[Path] = []
        self._losses = 0
        self._since = 0.0

    def run(
        self,
        paths: Mapping[str, Path],
        helpers: int,
        progress: Callable[[int, int], None],
        before_placing: Callable[[], None],
    ) -> None:
        """Until the case is done.

        Args:
            paths: as for `Predictor.predict_file`, but absolute.
            helpers: how many others it may ask for.
            progress: called now and then.
            before_placing: called when all is predicted.

        Raises:
            DensepredError: the fault of the case.
            NoWorkerError: none was left for a range.
            RayError: the worker was lost.
        """
        done = self._actor.predict.remote(self._ticket, self._case, paths, helpers)
        try:
            self._follow(done, progress, before_placing)
        except self._ray.exceptions.RayError:
            raise
        except BaseException:
            self._drop(self._actor, self._ticket, done)
            raise
        finally:
            for reference, running in self._running.items():
                self._pool.give_back(running.actor, not self._drop(running.actor, running.ticket, reference))
            for folder in self._folders:
                remove(folder)

    def _follow(self, done: Any, progress: Callable[[int, int], None], before_placing: Callable[[], None]) -> None:
        asks = self._actor.asks.remote(self._ticket)
        while True:
            also = [] if asks is None else [asks]
            ready, _ = self._ray.wait([done, *also, *self._running], timeout=0.2)
            if done in ready:
                fault = self._ray.get(done)
                if fault is not None:
                    raise fault
                return
            for reference in [one for one in ready if one in self._running]:
                self._end(reference)
            if asks in ready:
                asked, asks = self._ray.get(asks), None
                if asked == PLACE:
                    before_placing()
                    self._ray.get(self._actor.answer.remote(self._ticket, True))
                elif asked is not None:
                    self._waiting.append(asked)
                    self._since = time.monotonic()
                    asks = self._actor.asks.remote(self._ticket)
            progress(0, 0)
            self._begin()

    def _begin(self) -> None:
        """Give the ranges that wait to workers without work."""
        while self._waiting and (actor := self._pool.idle()) is not None:
            wanted, ticket = self._waiting.pop(0), os.urandom(8).hex()
            folder = part_path(wanted.asked.scratch)
            self._folders.append(folder)
            reference = actor.predict_range.remote(ticket, wanted, folder)
            self._running[reference] = _Running(wanted, actor, ticket, folder)
            self._since = time.monotonic()
        if self._waiting and time.monotonic() - self._since > PATIENCE:
            raise NoWorkerError

    def _end(self, reference: Any) -> None:
        """Of a range: its planes are told to who asked; where its worker was lost, it waits for another."""
        running = self._running.pop(reference)
        try:
            found, lost = self._ray.get(reference), False
        except self._ray.exceptions.RayError as error:
            found, lost = None, True
            _LOG.warning("%s: lost the worker of a range (%s)", self._case.id, type(error).__name__)
        self._pool.give_back(running.actor, lost)
        if lost:
            self._losses += 1
            if self._losses == ATTEMPTS:
                raise lost_too_often(self._case)
            self._waiting.append(running.wanted)
            self._since = time.monotonic()
            return
        self._actor.filled.remote(self._ticket, running.wanted.number, found)

    def _drop(self, actor: Any, ticket: str, done: Any) -> bool:
        """End what is no longer wanted; False if the worker was lost."""
        try:
            actor.answer.remote(ticket, False)
            if self._ray.wait([done], timeout=_GRACE)[0]:
                self._ray.get(done)
        except self._ray.exceptions.RayError:
            return False
        return True


def lost_too_often(case: Case) -> ResourceError:
    """What is said of a case that has cost too many workers."""
    what = f"its worker was lost {ATTEMPTS} times, as happens when the machine has no memory left"
    return ResourceError(what, "use fewer workers, or look into the logs of Ray", case.images[0])
