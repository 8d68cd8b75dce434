"""One image by several workers: contiguous ranges of its planes, predicted at a time and put together in order.

A voxel has the same bits in every part it is predicted in, so the result is that of one worker. The first range goes
straight to who asks; the others wait on disk until it is their turn.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from densepred.cases.case import Case
from densepred.cases.fitted import Fitted
from densepred.device import needing_memory
from densepred.errors import StoppedError
from densepred.inference.compute import Reduce, Report, WithinMemory
from densepred.inference.faults import LESS_MEMORY
from densepred.inference.sliding_window import Part, Progress, SlidingWindowInferer
from densepred.inference.spool import Arrays, Spool
from densepred.inference.volume_pass import VolumePass

_LOG = logging.getLogger(__name__)
LEAST_ROWS = 2
"""Rows of windows that each worker is to have beyond those that two of them predict."""


@dataclass(frozen=True)
class Range:
    """What a worker needs to know to predict some planes of a case.

    Attributes:
        case: its files, which each worker opens for itself.
        kinds: of output.
        fitted: the normalisation, found once from the whole image.
        scratch: a file of the result: beside it lies what is kept meanwhile.
    """

    case: Case
    kinds: tuple[str, ...]
    fitted: Fitted
    scratch: Path


class Helper(Protocol):
    """Predicts ranges; a `Predictor` is one."""

    def prepare(self, image: VolumePass, variance: bool) -> None:
        """Get ready for the windows of an image, while the others do nothing."""

    def predict_range(self, asked: Range, progress: Progress, spool: Spool) -> Report:
        """Predict the planes of the spool into it; `progress` is called now and then, and may raise to end it."""


def divided(image: VolumePass, inferer: SlidingWindowInferer, workers: int) -> list[tuple[int, int]]:
    """The planes of the result in contiguous ranges, at most as many as workers, in which all have as much to do.

    They are cut where windows begin, so that few windows are predicted twice: those that reach over a cut.

    Args:
        image: what is predicted.
        inferer: the windows.
        workers: how many there are.
    """
    planes = image.result_shape[0]
    axes = [way.laid(inferer, [])[0].grid(way.model_shape).axes[0] for way in image.ways]
    axis = min(axes, key=lambda one: len(one.starts))
    starts = axis.starts
    middle = len(starts) // 2
    twice = middle - axis.touching(starts[middle], starts[middle] + 1)[0]
    count = max(min(workers, (len(starts) - twice) // LEAST_ROWS), 1)
    each = (len(starts) + (count - 1) * twice) / count
    rows = [round(number * each - (number - 1) * twice) for number in range(1, count)]
    cuts = sorted({0, planes, *(round(starts[row] * planes / axis.size) for row in rows)})
    return list(pairwise(cuts))


def together(
    within: WithinMemory, reduce: Reduce, asked: Range, others: Sequence[Helper], progress: Progress | None = None
) -> Generator[tuple[int, int, Arrays], None, None]:
    """Yield as `WithinMemory.slabs`, with the help of other workers where that pays.

    What one of them raises ends all, and is raised here. Closing the generator ends them, after the windows in hand.

    Args:
        within: the image; its report is that of all.
        reduce: from logits to what is wanted.
        asked: the case and what else the others need to know.
        others: workers that have nothing else to do.
        progress: called with the windows done and all, by one worker at a time.
    """
    image, inferer = within.image, within.compute.inferer
    first, *rest = divided(image, inferer, 1 + len(others))
    if not rest:
        yield from within.slabs(reduce, progress)
        return
    _LOG.info("%s: in %d ranges of planes, each by a worker", image.name, 1 + len(rest))
    lines = (0, image.result_shape[1])
    tally = _Tally(progress, [image.windows(inferer, Part(planes, lines)) for planes in (first, *rest)])
    within.report.ranges = 1 + len(rest)
    if within.sharing > 1:  # what each takes is measured before any of them fills the memory
        within.compute.ready_for(image)
    for other in others[: len(rest)]:
        other.prepare(image, "variance" in asked.kinds)
    with ExitStack() as stack:
        spools = [stack.enter_context(Spool(asked.scratch.parent, planes, image.result_shape[1:])) for planes in rest]
        tasks = [stack.enter_context(closing(_Task(tally))) for _ in rest]
        for number, (other, spool, task) in enumerate(zip(others, spools, tasks, strict=False), 1):
            task.start(partial(other.predict_range, asked, tally.hook(number), spool))
        with closing(within.slabs(reduce, tally.hook(0), first)) as slabs:
            yield from slabs
        for spool, task in zip(spools, tasks, strict=True):
            within.report.invalid += task.result().invalid
            yield from spool.slabs()


class _Task:
    """Something done in a thread, that is ended and waited for when it is closed."""

    def __init__(self, tally: _Tally) -> None:
        self._tally, self._future = tally, Future[Report]()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], Report]) -> None:
        def run() -> None:
            try:
                with needing_memory(LESS_MEMORY):
                    report = work()
                self._future.set_result(report)
            except BaseException as error:  # raised again by who waits for the result, or by the next call of a hook
                self._tally.end(error)
                self._future.set_exception(error)

        self._thread = threading.Thread(target=run, name="densepred-range", daemon=True)
        self._thread.start()

    def result(self) -> Report:
        """Waits for it."""
        return self._future.result()

    def close(self) -> None:
        self._tally.end(StoppedError("no longer wanted"))
        if self._thread is not None:
            self._thread.join()


class _Tally:
    """The windows of all ranges, told to one hook; and the first error, which every worker meets at its next window."""

    def __init__(self, progress: Progress | None, totals: Sequence[int]) -> None:
        self._progress, self._totals, self._done = progress, list(totals), [0] * len(totals)
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def hook(self, number: int) -> Progress:
        """For one of the ranges."""

        def hook(done: int, total: int) -> None:
            with self._lock:
                if self._error is not None:
                    raise self._error
                self._done[number], self._totals[number] = done, total or self._totals[number]
                if self._progress is not None:
                    self._progress(sum(self._done), sum(self._totals))

        return hook

    def end(self, error: BaseException) -> None:
        """Let all meet an error, unless there was one before."""
        self._error = self._error or error
