"""The workers of a batch, given out to its cases: one for each, and at the end several for one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from densepred.inference.engines import Worker


class Crew:
    """Workers, one for each case; those that no case is left for help with the last ones.

    Args:
        workers: all.
        waiting: cases that none of them has begun.
    """

    def __init__(self, workers: Sequence[Worker], waiting: int) -> None:
        self._free, self._waiting = list(workers), waiting
        self._changed = threading.Condition()

    def begun(self) -> None:
        """A case that was waiting no longer is."""
        with self._changed:
            self._waiting -= 1

    @contextmanager
    def team(self) -> Iterator[tuple[Worker, list[Worker]]]:
        """A worker for a case, as soon as there is one, and its share of those that are free beyond other cases."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            share = max(len(self._free) // (1 + self._waiting), 1)
            taken, self._free = self._free[:share], self._free[share:]
        try:
            yield taken[0], taken[1:]
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()
