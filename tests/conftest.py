"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.prediction_faults import Ask

ROOT = Path(__file__).parent.parent
settings.register_profile("densepred", deadline=None, derandomize=True)  # machines are busy, and a fault comes again
settings.load_profile("densepred")


def pytest_configure() -> None:
    """Ctrl-C interrupts, as in a terminal: what a shell starts in the background begins with it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it each time that memory is tidied takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("DENSEPRED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set DENSEPRED_DATA)")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: operations as small as in most tests only lose time between threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """A child process in which predictions are made that may harm the one they run in."""
    from tests.prediction_faults import asking

    with asking() as asked:
        yield asked


@pytest.fixture(scope="module")
def forked_folds() -> Iterator[None]:
    """Folds that are cross-validated in this process train in forked ones."""
    from densepred.crossval import training
    from tests import forked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "subprocess", SimpleNamespace(Popen=forked.fold, DEVNULL=DEVNULL))
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """No thread of a prediction is left behind."""
    from tests.prediction_faults import leaving_no_thread

    with leaving_no_thread():
        yield


@pytest.fixture(autouse=True)
def _drawn_anew(request: pytest.FixtureRequest) -> None:
    """What a test draws of its module's RNG does not hang on the tests before it."""
    for generator in (getattr(request.module, "RNG", None), getattr(request.module, "GENERATOR", None)):
        if generator is not None:
            generator.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(autouse=True)
def _tracing_ends() -> Iterator[None]:
    """A test that fails while memory is traced does not leave that to the next."""
    yield
    tracemalloc.stop()


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """No test leaves another handler of a signal behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        if after[number] != handler:
            signal.signal(number, handler)
    assert after == before
