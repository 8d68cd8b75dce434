"""Commands about networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densepred.cli.base import Overrides, app, say, show, table
from densepred.errors import InputError

if TYPE_CHECKING:
    from densepred.models.dense import Model


@app.command()
def summary(
    config: Annotated[
        Path, typer.Argument(help="the YAML of the recipe, or a training's folder", metavar="CONFIG|RUN")
    ],
    overrides: Overrides = None,
    pictures: Annotated[Path | None, typer.Option(help="folder for pictures: receptive field, checkerboard")] = None,
) -> None:
    """Show the layers of a network, its size and its cost."""
    model, size = _trained(config) if config.is_dir() else _untrained(config, overrides or (), pictures is None)
    from densepred.models.summary import summarize

    show(summarize(model, size).table())
    if pictures is not None:
        from densepred.files import writable_folder
        from densepred.model_figures import draw_checkerboard, draw_receptive_field
        from densepred.models.inspect import checkerboard, effective_receptive_field

        folder = writable_folder(pictures)
        field = effective_receptive_field(model, size)
        show(str(draw_receptive_field(field, folder / "receptive_field.png")))
        show(str(draw_checkerboard(checkerboard(model, size), folder / "checkerboard.png")))


def _trained(run: Path) -> tuple[Model, tuple[int, ...]]:
    from densepred.inference.predictor import load

    predictor = load(run)
    return predictor.model, predictor.config.patch.size


def _untrained(path: Path, overrides: Sequence[str], meta: bool) -> tuple[Model, tuple[int, ...]]:
    """The network of a recipe; on the meta device nothing is allocated."""
    from densepred.config import load

    recipe = load(path, overrides)
    import torch

    from densepred.cases.names import channel_names, class_names
    from densepred.inference.heads import untrained_heads_of
    from densepred.models.build import build

    data, classes = recipe.data, 0
    channels = _count(lambda: len(channel_names(data)), 1, "channels") + data.validity.channel
    if data.segments:
        classes = _count(lambda: len(set(class_names(data).values())), 2, "classes")
    for name, target in data.targets.items():
        if target.classes == "auto":
            _count(lambda: 0, 2, f"classes of {name}")
    with torch.device("meta" if meta else "cpu"):
        heads = untrained_heads_of(recipe, classes)
        return build(recipe.model, channels, heads, recipe.training.seed), recipe.patch.size


def _count(counted: Callable[[], int], default: int, what: str) -> int:
    """What the data set says of its channels or classes, or a default where it is silent or absent."""
    try:
        number = counted()
    except InputError:
        number = 0
    if not number:
        say(f"The number of {what} is not known without the data set: shown for {default}.")
    return number or default


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="part of a name, or a glob such as 'timm.*next*'")] = None,
    encoders: Annotated[bool, typer.Option("--encoders", help="encoders only")] = False,
    decoders: Annotated[bool, typer.Option("--decoders", help="decoders only")] = False,
    networks: Annotated[bool, typer.Option("--networks", help="whole networks only")] = False,
) -> None:
    """List the networks that can be built, with their dimensions and parameters."""
    from densepred.models.listing import rows

    asked = {"encoder": encoders, "decoder": decoders, "network": networks}
    kinds = [kind for kind, wanted in asked.items() if wanted or not any(asked.values())]
    found = [row for kind in kinds for row in rows(kind, pattern)]
    if not found:
        which = " or ".join(kinds)
        raise InputError(f"no {which} matches {pattern!r}", "`densepred models` lists all of our own and the libraries")
    columns = ("name", "kind", "dims", "parameters", "remark")
    table(columns, [[r.name, r.kind, *r.cells(), r.remark] for r in found])
