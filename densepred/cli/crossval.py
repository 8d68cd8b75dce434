"""The command that cross-validates."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from densepred.allocator import tune_allocator
from densepred.cli.base import Overrides, app, say, show
from densepred.errors import InputError


@app.command()
def crossval(
    out: Annotated[Path, typer.Option(help="folder for the folds, their predictions, scores and decisions")],
    config: Annotated[str | None, typer.Argument(help="the YAML of the recipe", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    folds: Annotated[str | None, typer.Option(metavar="0,1,3", help="these folds only")] = None,
    devices: Annotated[str | None, typer.Option(help="a training at a time on each of 0,1 (GPUs) or cpu*2")] = None,
    combine: Annotated[
        bool, typer.Option("--combine", help="instead: score cross-validations together, and choose")
    ] = False,
) -> None:
    """Train all folds, score each case by the model that did not see it, and decide how to predict."""
    if config is None:
        raise InputError("crossval needs a recipe", f"write densepred crossval CONFIG --out {out}")
    numbers = None if folds is None else _numbers(folds)
    tune_allocator()
    for name in ("densepred.inference.compute", "densepred.cases.lists"):  # which tell of every case
        logging.getLogger(name).setLevel(logging.WARNING)
    if combine:
        from densepred.crossval import combine as combined

        if numbers is not None:
            raise InputError("--folds goes with a recipe", "leave it out: --combine takes the folds that are done")
        result = combined([config, *(overrides or ())], out, devices)
    else:
        from densepred.config import load

        recipe = load(config, overrides or ())
        from densepred.crossval import cross_validate

        result = cross_validate(recipe, out, (), numbers, devices)
    show(*result.tables, *result.lines)
    for line in result.failed:
        say(f"ERROR {line}")
    for case, what in result.verdict.failed.items():
        say(f"ERROR {case}: {what}")
    show(f"densepred predict {result.out} INPUT --out FOLDER predicts so")
    raise typer.Exit(result.exit_code)


def _numbers(text: str) -> list[int]:
    """The numbers of folds, as they are written on the command line.

    Raises:
        InputError: one of them is none.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 5 for word in words):
        raise InputError(f"--folds {text!r} is no list of folds", "write, say, --folds 0,1,3")
    return [int(word) for word in words]
