"""Doing something with the next items in a thread while the present ones are worked on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
_LOOK = 0.2
"""Seconds after which one who waits looks whether to go on."""


class Ahead(Generic[T, U]):
    """Items in their order, each with what a thread made of it; several threads may take them.

    Args:
        items: what to go through.
        make: called with each in the thread; what it raises comes with the item.
        depth: how many are made ahead.
    """

    def __init__(self, items: Iterable[T], make: Callable[[T], U], depth: int) -> None:
        self._items, self._make = items, make
        self._made: queue.Queue[tuple[T, Future[U]] | None] = queue.Queue(depth)
        self._ended = False

    @contextlib.contextmanager
    def running(self) -> Iterator[Ahead[T, U]]:
        """Start the thread; it ends with the context, after the item in hand."""
        threading.Thread(target=self._run, name="densepred-ahead", daemon=True).start()
        try:
            yield self
        finally:
            self._ended = True

    def take(self, watch: Callable[[], None]) -> tuple[T, Future[U]] | None:
        """The next item and what came of it; None when there is none left. `watch` may raise to end the waiting."""
        while True:
            watch()
            with contextlib.suppress(queue.Empty):
                taken = self._made.get(timeout=_LOOK)
                if taken is None:
                    self._put(None)  # for the others who take
                return taken

    def _run(self) -> None:
        for item in self._items:
            future: Future[U] = Future()
            try:
                future.set_result(self._make(item))
            except BaseException as error:
                future.set_exception(error)
            self._put((item, future))
            del future
            if self._ended:
                return
        self._put(None)

    def _put(self, item: tuple[T, Future[U]] | None) -> None:
        while not self._ended:
            with contextlib.suppress(queue.Full):
                return self._made.put(item, timeout=_LOOK)
