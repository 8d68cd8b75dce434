"""The command that shows augmented samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densepred.cli.base import Overrides, Recipe, app, show


@app.command()
def preview(
    config: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="the picture to write")] = Path("preview.png"),
    cases: Annotated[int, typer.Option(min=1, max=20, help="rows: training cases")] = 4,
    draws: Annotated[int, typer.Option(min=1, max=20, help="columns beside the original")] = 5,
) -> None:
    """Draw training patches as augmentation changes them, with the outlines of their labels."""
    from densepred.config import load

    recipe = load(config, overrides or ())
    from densepred.augment.preview import preview as drawn
    from densepred.figures import save_png
    from densepred.files import writable_folder

    writable_folder(out.parent)
    save_png(drawn(recipe, cases, draws), out)
    show(str(out))
