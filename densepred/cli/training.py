"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densepred.allocator import tune_allocator
from densepred.cli.base import Overrides, app, show
from densepred.errors import DensepredError, InputError

if TYPE_CHECKING:
    from densepred.config import Config


FindRate = Annotated[
    Path | None, typer.Option("--find-lr", help="only try learning rates, and draw the loss over them in this PNG")
]
OneBatch = Annotated[
    int | None, typer.Option("--overfit-one-batch", help="only learn one batch by heart, in so many steps", min=1)
]


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="the YAML of the recipe", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="new folder for the weights, logs and checkpoints")] = None,
    resume: Annotated[Path | None, typer.Option(help="folder of a stopped training, to go on with")] = None,
    find_lr: FindRate = None,
    overfit_one_batch: OneBatch = None,
) -> None:
    """Train a network, or go on with a training that was stopped."""
    tune_allocator()
    asked = {"--run": run, "--resume": resume, "--find-lr": find_lr, "--overfit-one-batch": overfit_one_batch}
    if sum(value is not None for value in asked.values()) != 1:
        fix = "give CONFIG --run FOLDER, or --resume FOLDER"
        raise InputError("train needs one of --run and --resume (or of --find-lr and --overfit-one-batch)", fix)
    if resume is not None:
        _go_on(resume, [word for word in (config, *(overrides or ())) if word is not None])
        return
    if config is None:
        option = next(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise InputError("train needs a recipe", f"write densepred train CONFIG {option}")
    from densepred.config import load

    recipe = load(config, overrides or ())
    if find_lr is not None:
        _find_rate(recipe, find_lr)
    elif overfit_one_batch is not None:
        _learn_one_batch(recipe, overfit_one_batch)
    elif run is not None:
        from densepred.training import loop, ranks

        path = loop.train(recipe, run).path
        if ranks.first():
            show(f"The training is in {path}")


def _go_on(resume: Path, words: list[str]) -> None:
    if words and "=" not in words[0]:
        raise InputError(f"--resume has its recipe in its folder, but got {words[0]}", "leave the recipe out")
    from densepred.training import loop, ranks

    path = loop.resume(resume, words).path
    if ranks.first():
        show(f"The training is in {path}")


def _find_rate(recipe: Config, picture: Path) -> None:
    from densepred.training.trials import find_rate

    found = find_rate(recipe, picture)
    if found.suggested is None:
        raise DensepredError("the loss fell at no learning rate", f"look at {picture}, and check the labels", picture)
    show(f"Suggested: optimizer.lr={found.suggested:.2g} (see {picture})")


def _learn_one_batch(recipe: Config, steps: int) -> None:
    from densepred.training.trials import overfit_one_batch, verdict

    learnt, text = verdict(overfit_one_batch(recipe, steps))
    if not learnt:
        raise DensepredError(text, "give it more steps, raise optimizer.lr, or look for a fault with densepred check")
    show(text)
