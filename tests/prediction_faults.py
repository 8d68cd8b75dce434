"""What the tests of failing predictions share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tests.prediction_trials import LONGEST, Outcome
from tests.trial_server import serving

Ask: TypeAlias = "Callable[..., Outcome]"


@contextmanager
def asking() -> Iterator[Ask]:
    """Gives what predicts in a process of its own, under limits; see `prediction_trials.Trial`."""
    with serving("tests.prediction_trials") as asked:
        yield lambda run, inputs, out, **limits: Outcome(
            **asked({"run": str(run), "inputs": [str(path) for path in inputs], "out": str(out), **limits})
        )


@contextmanager
def leaving_no_thread() -> Iterator[None]:
    """No thread is left over, half a minute after the block."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 30
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def ended(work: Callable[[], Any]) -> Any:
    """What work gives or raises; it must not hang."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(3 * LONGEST)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def contents(out: Path) -> dict[str, bytes]:
    """The results in a folder; nothing half done is among them."""
    assert not [path.name for path in out.rglob("*") if ".part." in path.name]
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.nii.gz"))}
