"""Whatever ends a case, as an error of the one form."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from densepred.cases.case import Case
from densepred.errors import DensepredError, InputError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
LESS_MEMORY = "lower inference.window or inference.batch"
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before what failed for a passing reason is tried again, the first, second and third time."""
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Of network file systems and failing disks."""


def retried(work: Callable[[], T], case: Case) -> T:
    """Do the work, and again where a file could not be read or written for a reason that may pass.

    Raises:
        OSError: it did not pass.
    """
    for pause in PAUSES:
        try:
            return work()
        except Exception as error:
            found = _passing(error)
            if found is None:
                raise
            _LOG.warning("%s: %s: trying again in %g s", case.id, found.strerror, pause)
            del error, found  # their frames hold arrays and files
        time.sleep(pause)
    return work()


def _passing(error: BaseException | None) -> OSError | None:
    """What may pass, of an error and those that led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return error
        error = error.__cause__
    return None


def fault_of(error: Exception, case: Case) -> DensepredError:
    """The error of a case, without what led to it: the frames would hold arrays and open files as long as it is kept.

    A fault of the program is logged with its traceback.
    """
    if isinstance(error, DensepredError):
        error.__cause__ = error.__context__ = None
        return error.of_case(case.id).with_traceback(None)
    if isinstance(error, OSError):
        file = Path(error.filename or case.images[0])  # a read or write that fails in its middle does not name it
        verb = "read" if error.filename is None or file in case.inputs else "read or written"
        what = f"cannot be {verb} ({error.strerror or error})"
        return InputError(what, "check the file and its permissions", file, case.id)
    _LOG.error("case %s\n%s", case.id, "".join(traceback.format_exception(error)))
    what, fix = f"{type(error).__name__}: {error}", "this may be a bug: please report it"
    return DensepredError(what, fix, case.images[0], case.id)
