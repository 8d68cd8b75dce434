"""Reading ahead and writing behind, each in a thread of its own, with its errors raised where they belong."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
_WAIT = 0.1  # seconds after which a thread looks whether it is still wanted


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made in a thread of their own, up to `depth` of them before they are asked for.

    An error of `items` is raised when its turn comes. Closing the iterator ends the thread, after the item in hand.

    Example:
        >>> list(ahead(iter(range(3))))
        [0, 1, 2]
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not unwanted.is_set():
            try:
                made.put((item, error), timeout=_WAIT)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                put(item, None)
                if unwanted.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # raised again where the item was to be taken
            put(None, error)

    thread = threading.Thread(target=run, name="densepred-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            del item
    finally:
        unwanted.set()
        thread.join()


class Behind(Generic[T]):
    """Calls a function with one item after the other in a thread of its own, while the caller goes on.

    An error of the function is raised at the next item, or at the end of the block, which waits for all items unless an
    error ends it.

    Args:
        work: the function.
        depth: how many items may wait.

    Example:
        >>> seen = []
        >>> with Behind(seen.append) as put:
        ...     put(1)
        >>> seen
        [1]
    """

    def __init__(self, work: Callable[[T], Any], depth: int = 2) -> None:
        self._work = work
        self._waiting: queue.Queue[tuple[T] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="densepred-behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __call__(self, item: T) -> None:
        self._raise()
        self._waiting.put((item,))  # the thread takes items even after an error, so this ends

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # what waits is no longer wanted
            self._error = self._error or error
        self._waiting.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._work(*item)
                except BaseException as error:  # raised again in the caller's thread
                    self._error = error
            del item

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, _RaisedError()
            raise error


class _RaisedError(Exception):
    """Stands for an error that was raised already, so that nothing more is done."""
