"""Commands that plan."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from densepred.cli.base import app, say, show, table
from densepred.errors import SOME_FAILED, InputError


class Rules(StrEnum):
    densepred = "densepred"
    nnunet = "nnunet"


@app.command()
def plan(
    source: Annotated[
        Path, typer.Argument(help="a YAML with a section data, or a folder of images and labels", metavar="DATA")
    ],
    out: Annotated[Path, typer.Option(help="the recipe to write")],
    rules: Annotated[Rules, typer.Option(help="ours, or nnU-Net's numbers")] = Rules.densepred,
    memory: Annotated[str | None, typer.Option(help="the most to take, such as 8GB")] = None,
    budget: Annotated[str | None, typer.Option(help="time for the training, such as 2h")] = None,
    configuration: Annotated[str | None, typer.Option(help="2d, 3d_fullres or 3d_lowres")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the recipe that is there")] = False,
) -> None:
    """Make a recipe for a data set, and say what the training will cost here."""
    from densepred.config.base import parse_size
    from densepred.config.training import parse_duration

    try:
        most = None if memory is None else float(parse_size(memory))
        time = None if budget is None else parse_duration(budget)
    except ValueError as error:
        raise InputError(str(error), "see `densepred plan --help`") from error
    from densepred.planning import tables
    from densepred.planning.planner import Wish, plan

    made = plan(source, out, Wish(rules.value, most, time, configuration), overwrite)
    table(("the data", ""), tables.of_fingerprint(made.fingerprint))
    table(("the choice", ""), tables.of_choice(made.chosen, made.config))
    table(("the cost", ""), tables.of_cost(made.cost, made.config))
    show(*made.notes, str(made.path))
    for problem in made.fingerprint.faults:
        if problem.severity == "error":
            say(str(problem.error))
    if any(problem.severity == "error" for problem in made.fingerprint.faults):
        raise typer.Exit(SOME_FAILED)
