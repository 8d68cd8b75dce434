"""How far a long task is: a bar with the time left on a terminal, a plain line now and then elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

_bars: list[Progress] = []  # the display that a task inside another one joins


class Advance(Protocol):
    """Called after each part of the work."""

    def __call__(self, n: int = 1, **info: object) -> None:
        """Count `n` more parts as done; `info` is shown beside them, such as `loss=0.3`."""


@contextlib.contextmanager
def progress(total: int, label: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of a task.

    Args:
        total: number of parts.
        label: what is being done.
        done: parts that were done before.

    Example:
        >>> with progress(3, "cases") as advance:
        ...     for _ in range(3):
        ...         advance(1)
    """
    with (_bar if _is_terminal() else _lines)(total, label, done) as advance:
        yield advance


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def _bar(total: int, label: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    outermost = not _bars
    if outermost:
        name, info = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[info]}"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), info)
        _bars.append(Progress(*columns, console=Console(stderr=True)))
        _bars[0].start()
    bar = _bars[0]
    task = bar.add_task(label, total=total, completed=done, info="")

    def advance(n: int = 1, **info: object) -> None:
        bar.update(task, advance=n, info=_text(info)) if info else bar.advance(task, n)

    try:
        yield advance
    finally:
        if outermost:
            bar.stop()
            _bars.clear()
        else:
            bar.remove_task(task)


@contextlib.contextmanager
def _lines(total: int, label: str, done: int) -> Iterator[Advance]:
    began = said = time.monotonic()
    before = done

    def advance(n: int = 1, **info: object) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if now - said < LINE_EVERY:
            return
        said = now
        left = clock((now - began) / (done - before) * (total - done)) if done > before else "unknown time"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed: work on
            sys.stderr.write(", ".join(filter(None, [f"{label}: {done}/{total}", f"{left} left", _text(info)])) + "\n")
            sys.stderr.flush()

    yield advance


def clock(seconds: float) -> str:
    """A duration for reading.

    Example:
        >>> clock(3750)
        '1 h 02 min'
    """
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _text(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in info.items())


__all__ = ["LINE_EVERY", "Advance", "clock", "progress"]
