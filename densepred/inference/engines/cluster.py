"""Workers of a Ray cluster, or of Ray on this machine; the only module that imports ray.

The driver, which runs the batch, tells a worker which case to predict; the worker reads the run directory and the
images and writes the results by itself, so all machines see the same paths. Before it puts files in their places it
asks the driver, which first notes that in the manifest: a worker whose driver is gone puts nothing anywhere.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densepred.errors import InputError, WorkersError
from densepred.files import sweep_parts
from densepred.inference.engines.actor import Actor, Identity
from densepred.inference.engines.attempt import ATTEMPTS, Attempt, NoWorkerError, lost_too_often

if TYPE_CHECKING:
    from densepred.cases.case import Case
    from densepred.inference.predictor import Predictor

_LOG = logging.getLogger(__name__)
_STORE = 100 * 2**20
"""Bytes of Ray's store of objects on this machine: only messages go through it."""


class RayCluster:
    """One actor for each GPU; without GPUs, one for as many cores as this process has threads.

    Every worker computes with as many threads as this process would, because the last bits of a result depend on their
    number; `OMP_NUM_THREADS` sets it.

    Args:
        devices: "cpu" or "cuda", as many as there are to be workers; none for all that the cluster has.
        address: of the cluster's head, such as "auto" or "10.0.0.1:6379"; Ray is started on this machine without it.

    Raises:
        InputError: ray is not installed, or the devices are not the same or have numbers, which Ray gives.
    """

    device: str | None = "cpu"
    """The driver computes nothing."""

    def __init__(self, devices: Sequence[str] = (), address: str | None = None) -> None:
        self._devices, self._address = tuple(devices), address
        if len(set(devices)) > 1 or any(device not in ("cpu", "cuda") for device in devices):
            what = f"Ray chooses the devices of its workers, but got {', '.join(devices)}"
            raise InputError(what, "write one kind, as many as there are to be workers: cuda*8 or cpu*4")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        try:
            import ray
        except ImportError as error:
            raise InputError("ray is not installed", "pip install 'densepred[ray]'") from error
        self._ray = ray

    @contextmanager
    def workers(
        self, runs: Sequence[Path], overrides: Sequence[str], predictor: Predictor
    ) -> Iterator[Sequence[_Remote]]:
        """Start the actors; a case is given to one that is ready."""
        import torch

        with self._connected():
            threads, kind = torch.get_num_threads(), self._kind()
            count = self._count(kind, threads)
            needs = {"num_cpus": 1, "num_gpus": 1} if kind == "cuda" else {"num_cpus": threads, "num_gpus": 0}
            made = self._ray.remote(Actor).options(max_restarts=-1, max_concurrency=4, **needs)
            hashes = (predictor.weights_hash, predictor.config_hash)
            arguments = (tuple(str(run.absolute()) for run in runs), tuple(overrides), kind, threads, hashes)
            pool = _Pool(self._ray, [made.remote(*arguments) for _ in range(count)])
            try:
                yield [_Remote(self._ray, pool) for _ in range(count)]
            finally:
                pool.close()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Connect, or start Ray here and stop it afterwards; Ray takes SIGTERM for itself, and gives it back."""
        if self._ray.is_initialized():
            yield
            return
        ours: dict[str, Any] = {"address": self._address}
        if self._address is None:
            ours = {"address": "local", "include_dashboard": False, "object_store_memory": _STORE}
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(logging_level=logging.WARNING, **ours)
        except (ConnectionError, ValueError, RuntimeError) as error:
            what = f"no Ray cluster can be reached: {str(error).partition(chr(10))[0]}"
            raise InputError(what, "start one with `ray start --head`, or leave --address out") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            self._ray.shutdown()

    def _kind(self) -> str:
        return self._devices[0] if self._devices else "cuda" if self._ray.cluster_resources().get("GPU") else "cpu"

    def _count(self, kind: str, threads: int) -> int:
        """How many workers there are to be.

        Raises:
            InputError: more than the machines can hold, or none.
        """
        room = self._room(kind, threads)
        count = len(self._devices) or room
        if not 1 <= count <= room:
            what = f"the cluster has room for {room} workers ({kind}, {threads} threads), but {count} are asked for"
            raise InputError(what, "name fewer in --devices, or set OMP_NUM_THREADS to fewer threads")
        return count

    def _room(self, kind: str, threads: int) -> int:
        """How many workers the machines can hold."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if kind == "cuda":
            return sum(int(min(has.get("GPU", 0), has.get("CPU", 0))) for has in machines)
        return sum(int(has.get("CPU", 0)) // threads for has in machines)


class _Pool:
    """The actors, those that are starting and those without work.

    Args:
        ray: the module.
        actors: just made.
    """

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self._ray, self._all = ray, list(actors)
        self._starting = {actor.identity.remote(): actor for actor in actors}
        self._idle: list[Any] = []
        self._same: Identity | None = None
        self._lock = threading.Lock()

    def take(self, watch: Callable[[], None]) -> Any:
        """An actor without work, as soon as there is one; `watch` may raise to end the waiting.

        Raises:
            WorkersError: none is left, or one would compute something else than the others.
        """
        said = time.monotonic()
        while True:
            watch()
            if (actor := self.idle()) is not None:
                return actor
            if time.monotonic() - said > 30:
                said = time.monotonic()
                _LOG.warning("waiting for a worker: %d are not up yet", len(self._starting))
            time.sleep(0.05)

    def idle(self) -> Any:
        """An actor without work; None if there is none now.

        Raises:
            WorkersError: as `take`.
        """
        with self._lock:
            self._look()
            return self._idle.pop() if self._idle else None

    def give_back(self, actor: Any, lost: bool) -> None:
        """One whose case has ended; one that was lost starts anew."""
        with self._lock:
            if lost:
                self._starting[actor.identity.remote()] = actor
            else:
                self._idle.append(actor)

    def close(self) -> None:
        """End all."""
        for actor in self._all:
            self._ray.kill(actor)

    def _look(self) -> None:
        ready, _ = self._ray.wait([*self._starting], timeout=0) if self._starting else ([], [])
        for reference in ready:
            actor = self._starting.pop(reference)
            try:
                identity = self._ray.get(reference)
            except self._ray.exceptions.ActorUnavailableError:
                self._starting[actor.identity.remote()] = actor
                continue
            except self._ray.exceptions.RayError as error:
                what = f"a worker cannot start: {str(error).strip().rpartition(chr(10))[2]}"
                fix = "all machines need the same densepred and see the same paths"
                raise WorkersError(what, fix) from error
            if not isinstance(identity, Identity):
                raise identity
            self._same = self._same or identity
            if identity != self._same:
                what = f"workers would compute different things: {self._same}; {identity}"
                raise WorkersError(what, "name inference.precision, and install the same versions everywhere")
            self._idle.append(actor)


class _Remote:
    """What looks like a predictor and has an actor do the work.

    Args:
        ray: the module.
        pool: has the actors.
    """

    def __init__(self, ray: Any, pool: _Pool) -> None:
        self._ray, self._pool = ray, pool

    def predict_file(
        self,
        case: Case,
        paths: Mapping[str, Path],
        progress: Callable[[int, int], None],
        before_placing: Callable[[], None],
        others: Sequence[_Remote],
    ) -> None:
        """As `Predictor.predict_file`; a case, or a range of it, whose worker is lost is given to another.

        Raises:
            ResourceError: it was lost each time.
        """
        there = {kind: path.absolute() for kind, path in paths.items()}
        losses, helpers = 0, len(others)
        while losses < ATTEMPTS:
            actor, lost = self._pool.take(lambda: progress(0, 0)), False
            try:
                return Attempt(self._ray, self._pool, actor, case).run(there, helpers, progress, before_placing)
            except NoWorkerError:
                helpers = 0
                _LOG.warning("%s: no worker is left for its ranges, so one begins it again alone", case.id)
            except self._ray.exceptions.RayError as error:
                lost, losses = True, losses + 1
                _LOG.warning("%s: lost its worker (%s)", case.id, type(error).__name__)
                for path in there.values():
                    sweep_parts(path.parent, {path.name})
            finally:
                self._pool.give_back(actor, lost)
        raise lost_too_often(case)
