"""How far a long task is: a bar with the time left on a terminal and in a notebook, else a plain line now and then."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

_bars: list[Progress] = []  # the display that a task inside or beside another one joins; once for each task
_joining = threading.Lock()


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
    with (_bar if _is_terminal() or _is_notebook() else _lines)(total, label, done) as advance:
        yield advance


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _is_notebook() -> bool:
    """Whether a bar can be drawn below a cell: in Jupyter, where its widgets are installed."""
    if "IPython" not in sys.modules or importlib.util.find_spec("ipywidgets") is None:
        return False
    from rich.console import Console

    return Console().is_jupyter


@contextlib.contextmanager
def counted(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a task of which one is told what is done, and how much it is in all.

    Args:
        label: what is being done.

    Example:
        >>> with counted("windows") as hook:
        ...     for done in (2, 4, 5):
        ...         hook(done, 5)
    """
    with contextlib.ExitStack() as stack:
        advance: Advance | None = None
        before = 0

        def hook(done: int, total: int) -> None:
            nonlocal advance, before
            advance = advance or stack.enter_context(progress(total, label))
            advance(done - before)
            before = done

        yield hook


@contextlib.contextmanager
def _bar(total: int, label: str, done: int) -> Iterator[Advance]:
    with _joining:
        bar = _bars[0] if _bars else _started()
        _bars.append(bar)
        task = bar.add_task(label, total=total, completed=done, info="")

    def advance(n: int = 1, **info: object) -> None:
        bar.update(task, advance=n, info=_text(info)) if info else bar.advance(task, n)

    try:
        yield advance
    finally:
        with _joining:
            _bars.remove(bar)
            if _bars:
                bar.remove_task(task)
            else:
                with contextlib.suppress(OSError, ValueError):  # the terminal is gone: work on
                    bar.stop()


def _started() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, info = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[info]}"))
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), info)
    bar = Progress(*columns, console=Console(stderr=True))
    bar.start()
    return bar


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


__all__ = ["LINE_EVERY", "Advance", "clock", "counted", "progress"]
