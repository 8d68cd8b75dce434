"""The process that trains one fold: `python -m densepred.crossval.fold CONFIG RUN FOLD DEVICE`.

It ends as `densepred train` does, with the same exit codes, and is asked to stop when its parent is gone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from densepred import config as configuration
from densepred.crossval.recipe import of_fold
from densepred.errors import BUG, DONE, SIGTERM, DensepredError, LockedError

RECIPES_OWN = "-"
"""As DEVICE: the one that the recipe names."""
_PATIENCE = 60.0
"""Seconds for a fold of an earlier cross-validation to save its state, once that is gone."""
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main(recipe: str, run: str, fold: str, device: str, parent: str) -> int:
    """Train, or go on; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was gone before it could be asked for
        return SIGTERM
    from densepred.allocator import tune_allocator

    tune_allocator()
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            _train(Path(recipe), Path(run), int(fold), None if device == RECIPES_OWN else device)
            return DONE
        except LockedError as error:
            if time.monotonic() > until:
                return _told(error)
            time.sleep(0.2)
        except DensepredError as error:
            return _told(error)
        except Exception:
            traceback.print_exc()
            return BUG


def _told(error: DensepredError) -> int:
    sys.stderr.write(f"{error}\n")
    return error.exit_code


def _train(recipe: Path, run: Path, fold: int, device: str | None) -> None:
    from densepred.training import loop

    if any((run / "checkpoints").glob("step-*")):
        loop.resume(run, [] if device is None else [f"training.device={device}"])
    else:
        loop.train(of_fold(configuration.load(recipe), fold, device), run)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
