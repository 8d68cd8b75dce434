"""Preparing batches ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[..., T], arguments: Iterable[tuple[int, ...]], workers: int) -> Iterator[T]:
    """Yield make(*a) for each a in order; `workers` threads run up to two results each ahead. 0 computes in place."""
    if workers == 0:
        for item in arguments:
            yield make(*item)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="densepred-batches") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in arguments:
                waiting.append(pool.submit(make, *item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
