"""The one error form and the exit codes.

A fault of the user's (a bad file, config or argument) is raised as a `DensepredError`; the command line prints it
without a traceback and exits with its code. Anything else that escapes is a bug of ours and exits 1.
"""

from __future__ import annotations

from pathlib import Path

DONE, BUG, USAGE, SOME_FAILED, NOTHING_DONE, UNSAFE, RESOURCES, LOCKED = 0, 1, 2, 3, 4, 5, 6, 75
SIGINT, SIGTERM = 130, 143


class DensepredError(Exception):
    """What went wrong, where, and the one action that mends it.

    Args:
        what: the fault, with the number that shows it.
        fix: one action for the user.
        file: the file at fault.
        case: the id of the case at fault.
    """

    exit_code = USAGE

    def __init__(self, what: str, fix: str = "", file: str | Path | None = None, case: str | None = None) -> None:
        super().__init__(what)
        self.what, self.fix, self.file, self.case = what, fix, file, case

    def __str__(self) -> str:
        where = ": ".join(str(part) for part in (self.case, self.file) if part is not None)
        head = f"ERROR {where}: {self.what}" if where else f"ERROR {self.what}"
        return f"{head}\n  fix: {self.fix}" if self.fix else head

    def of_case(self, case: str) -> DensepredError:
        """The same error, naming the case."""
        self.case = case
        return self


class InputError(DensepredError):
    """A configuration, argument or file that breaks the contract (exit 2)."""


class NetworkError(InputError, ValueError):
    """Options of a network that do not go together (exit 2)."""


class NothingDoneError(DensepredError):
    """No case could be processed: none found or all failed (exit 4)."""

    exit_code = NOTHING_DONE


class UnsafeError(DensepredError):
    """A file or path refused because it could do harm (exit 5)."""

    exit_code = UNSAFE


class ResourceError(DensepredError):
    """Disk, memory or device exhausted, or the arithmetic broke down, after all fall-backs (exit 6)."""

    exit_code = RESOURCES


class DiskFullError(ResourceError):
    """The disk or the quota is full: no other case will fare better."""


class WorkersError(ResourceError):
    """Nothing is left to compute with, or what there is computes something else: no other case will fare better."""


class LockedError(DensepredError):
    """Another run holds the folder (exit 75)."""

    exit_code = LOCKED


class StoppedError(DensepredError):
    """Stopped by a signal; the state is saved (exit 130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, what: str, exit_code: int = SIGTERM, fix: str = "") -> None:
        super().__init__(what, fix)
        self.exit_code = exit_code
