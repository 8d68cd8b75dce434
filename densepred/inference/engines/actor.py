"""What a worker of a cluster runs: it reads the run directory by itself, and predicts one case, or range, at a time."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from densepred.cases.case import Case
from densepred.errors import DensepredError, StoppedError, WorkersError

if TYPE_CHECKING:
    from densepred.inference.compute import Report
    from densepred.inference.ranges import Range
    from densepred.inference.spool import Layout, Spool
    from densepred.inference.volume_pass import VolumePass

PLACE = "place"
"""What a worker asks when all is predicted: whether to put the files in their places."""
_WAIT = 0.1  # seconds after which one who waits for a range looks whether it is still wanted


class Identity(NamedTuple):
    """What decides on the bytes of results besides the model and the images."""

    device: str
    precision: str
    densepred: str
    torch: str


class Wanted(NamedTuple):
    """A range that is to be predicted by another: which of its case, and what the other needs to know."""

    number: int
    asked: Range
    planes: tuple[int, int]
    rest: tuple[int, ...]


class Filled(NamedTuple):
    """A range that was predicted: how, and where its planes lie."""

    report: Report
    folder: Path
    layout: Layout


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
        self._wanted: dict[str, list[Wanted]] = {}
        self._filled: dict[tuple[str, int], Filled | DensepredError] = {}
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

    def predict(self, ticket: str, case: Case, paths: Mapping[str, Path], helpers: int) -> DensepredError | None:
        """Predict a case; returns its fault.

        Args:
            ticket: names this attempt. Earlier ones are dropped, whatever became of them.
            case: its images and planes.
            paths: as for `Predictor.predict_file`.
            helpers: workers that may be asked for ranges.
        """
        from densepred.inference.faults import fault_of

        others = [_Distant(self, ticket, number) for number in range(helpers)]
        try:
            with self._working(ticket):
                self._predictor.predict_file(
                    case, paths, lambda *_: self.go_on(ticket), lambda: self._ask(ticket), others
                )
            return None
        except Exception as error:
            return fault_of(error, case)
        finally:
            self._set(ticket, "ended")

    def predict_range(self, ticket: str, wanted: Wanted, folder: Path) -> Filled | DensepredError:
        """Predict a range of a case into files in a folder of its own; or returns its fault.

        Args:
            ticket: as for `predict`.
            wanted: the range.
            folder: is made; it is removed by who reads it.
        """
        from densepred.inference.faults import fault_of
        from densepred.inference.spool import Spool

        try:
            with self._working(ticket), Spool(folder, wanted.planes, wanted.rest, kept=True) as spool:
                report = self._predictor.predict_range(wanted.asked, lambda *_: self.go_on(ticket), spool)
                return Filled(report, folder, spool.layout)
        except Exception as error:
            return fault_of(error, wanted.asked.case)
        finally:
            self._set(ticket, "ended")

    @contextmanager
    def _working(self, ticket: str) -> Iterator[None]:
        from densepred.device import needing_memory
        from densepred.inference.faults import LESS_MEMORY

        with self._changed:
            earlier = {one: "dropped" for one, state in self._states.items() if state != "ended" and one != ticket}
            self._states |= earlier
            self._states.setdefault(ticket, "running")
            self._changed.notify_all()
        with self._one:
            if self._fault is not None:
                raise self._fault
            with needing_memory(LESS_MEMORY):
                yield

    def asks(self, ticket: str) -> Wanted | str | None:
        """Wait for what an attempt asks: for a range, or whether to place its files; None if it ends before."""
        with self._changed:
            self._states.setdefault(ticket, "running")  # that it may be dropped, if it does not begin here
            wanted = self._wanted.setdefault(ticket, [])
            self._changed.wait_for(lambda: wanted or self._states[ticket] in ("asks", "dropped", "ended"))
            if self._states[ticket] == "asks":
                return PLACE
            return wanted.pop(0) if wanted and self._states[ticket] == "running" else None

    def filled(self, ticket: str, number: int, found: Filled | DensepredError) -> None:
        """What became of a range."""
        with self._changed:
            self._filled[ticket, number] = found
            self._changed.notify_all()

    def want(self, ticket: str, wanted: Wanted) -> None:
        """Have another predict a range."""
        with self._changed:
            self._wanted.setdefault(ticket, []).append(wanted)
            self._changed.notify_all()

    def found(self, ticket: str, number: int) -> Filled | DensepredError | None:
        """What became of a range, after a short wait; None if it is not known yet."""
        with self._changed:
            self._changed.wait_for(lambda: (ticket, number) in self._filled, _WAIT)
            return self._filled.pop((ticket, number), None)

    def answer(self, ticket: str, place: bool) -> None:
        """Whether to put the files in their places; `False` ends an attempt wherever it is."""
        self._set(ticket, "placing" if place else "dropped")

    def _set(self, ticket: str, state: str) -> None:
        with self._changed:
            self._states[ticket] = state
            self._changed.notify_all()

    def go_on(self, ticket: str) -> None:
        """Raises StoppedError if an attempt is no longer wanted."""
        if self._states[ticket] == "dropped":
            raise StoppedError("no longer wanted")

    def _ask(self, ticket: str) -> None:
        with self._changed:
            self.go_on(ticket)
            self._set(ticket, "asks")
            self._changed.wait_for(lambda: self._states[ticket] != "asks")
            self.go_on(ticket)


class _Distant:
    """Another worker, as seen by one that predicts a case: it is reached by way of the driver.

    Args:
        actor: the one that predicts the case.
        ticket: of its attempt.
        number: which of the others.
    """

    def __init__(self, actor: Actor, ticket: str, number: int) -> None:
        self._actor, self._ticket, self._number = actor, ticket, number

    def prepare(self, image: VolumePass, variance: bool) -> None:
        """It has a memory of its own."""

    def predict_range(self, asked: Range, progress: Callable[[int, int], None], spool: Spool) -> Report:
        """As `Predictor.predict_range`, elsewhere."""
        self._actor.want(self._ticket, Wanted(self._number, asked, spool.planes, spool.rest))
        while (found := self._actor.found(self._ticket, self._number)) is None:
            progress(0, 0)
        if isinstance(found, DensepredError):
            raise found
        spool.adopt(found.folder, found.layout)
        return found.report
