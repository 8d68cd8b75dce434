"""Whatever ends a case, as an error of the one form."""

from __future__ import annotations

import logging
import traceback

from densepred.cases.case import Case
from densepred.errors import DensepredError, InputError

_LOG = logging.getLogger(__name__)
LESS_MEMORY = "lower inference.window or inference.batch"


def fault_of(error: Exception, case: Case) -> DensepredError:
    """The error of a case, without what led to it: the frames would hold arrays and open files as long as it is kept.

    A fault of the program is logged with its traceback.
    """
    if isinstance(error, DensepredError):
        error.__cause__ = error.__context__ = None
        return error.of_case(case.id).with_traceback(None)
    if isinstance(error, OSError):
        what, fix = f"cannot be read ({error.strerror})", "check the file and its permissions"
        return InputError(what, fix, error.filename, case.id)
    _LOG.error("case %s\n%s", case.id, "".join(traceback.format_exception(error)))
    what, fix = f"{type(error).__name__}: {error}", "this may be a bug: please report it"
    return DensepredError(what, fix, case.images[0], case.id)
