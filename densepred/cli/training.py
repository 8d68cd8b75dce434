"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densepred.allocator import tune_allocator
from densepred.cli.base import Overrides, app, show
from densepred.errors import InputError


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="the YAML of the recipe", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="new folder for the weights, logs and checkpoints")] = None,
    resume: Annotated[Path | None, typer.Option(help="folder of a stopped training, to go on with")] = None,
) -> None:
    """Train a network, or go on with a training that was stopped."""
    tune_allocator()
    if (resume is None) == (run is None):
        raise InputError("train needs one of --run and --resume", "give CONFIG --run FOLDER, or --resume FOLDER")
    if run is not None:
        if config is None:
            raise InputError("train needs a recipe", f"write densepred train CONFIG --run {run}")
        from densepred.config import load

        recipe = load(config, overrides or ())
        from densepred.training import loop

        show(f"The training is in {loop.train(recipe, run).path}")
        return
    words = [word for word in (config, *(overrides or ())) if word is not None]
    if words and "=" not in words[0]:
        raise InputError(f"--resume has its recipe in its folder, but got {words[0]}", "leave the recipe out")
    from densepred.training import loop

    assert resume is not None
    show(f"The training is in {loop.resume(resume, words).path}")
