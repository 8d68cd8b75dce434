"""Work shared by a few threads: for what libraries do in C, without Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)


def in_turn(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` by a few threads, in order and with few items under way; the calling thread takes the items.

    Args:
        work: done by any thread; what it raises is raised in its turn.
        items: a list of less than two needs no thread.

    Example:
        >>> list(in_turn(abs, [-1, 2, -3]))
        [1, 2, 3]
    """
    if THREADS == 1 or (isinstance(items, list) and len(items) < 2):
        yield from map(work, items)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
