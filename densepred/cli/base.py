"""What all commands share: the application, printing, and the end of a command that failed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from densepred.errors import BUG, DensepredError, InputError

app = typer.Typer(
    help="Train, apply and judge networks that predict something for every voxel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[Path, typer.Argument(help="the YAML of the recipe", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings that win over the recipe", metavar="KEY=VALUE")]


class Checking(StrEnum):
    verify = "verify"
    ignore = "ignore"
    require = "require"


Checksum = Annotated[Checking, typer.Option("--checksum", help="of FITS files: compare those there are, or not")]


def show(*parts: object) -> None:
    """Print text and tables to stdout; a reader that went away (`| head`) ends the program quietly."""
    try:
        for part in parts:
            print(part if isinstance(part, str) else rendered(part), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


def rendered(part: object) -> str:
    from rich.console import Console

    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
    with console.capture() as capture:
        console.print(part, markup=False)
    return capture.get().rstrip("\n")


def table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("case", "severity"))
    for row in rows:
        table.add_row(*map(Text, row))
    show(table)


def say(text: str) -> None:
    """Print to stderr, control characters shown rather than sent: file names and YAML are not ours."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    try:
        if sys.stderr is not None:
            print(safe, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody reads it any more, or its disk is full: the work goes on
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def main() -> NoReturn:
    """Run the command line; faults of the user's end without a traceback, with the exit code of their kind."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: say(f"WARNING {message}")
    log, handler = logging.getLogger("densepred"), _Stderr()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        app(prog_name="densepred")
        sys.exit(0)
    except DensepredError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except PermissionError as error:
        what = f"cannot be read or written ({error.strerror})"
        say(str(InputError(what, "change its permissions, or choose another", error.filename)))
        sys.exit(InputError.exit_code)
    except Exception:
        traceback.print_exc()
        say("This is a bug in densepred: please report it with the lines above and `densepred version`.")
        sys.exit(BUG)
    finally:  # a program that calls this goes on with its own log
        log.removeHandler(handler)
        log.setLevel(level)
