"""The command line: one command per verb. Each parses, calls and prints; what it does lives elsewhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from densepred.allocator import tune_allocator
from densepred.errors import BUG, DensepredError, InputError

if TYPE_CHECKING:
    from densepred.models.dense import Model

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


class _Checksum(StrEnum):
    verify = "verify"
    ignore = "ignore"
    require = "require"


class _Engine(StrEnum):
    local = "local"
    ray = "ray"


Checksum = Annotated[_Checksum, typer.Option("--checksum", help="of FITS files: compare those there are, or not")]


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="hippocampus, or another set of the Medical Segmentation Decathlon")],
    out: Annotated[Path | None, typer.Option(help="folder for it; data/NAME if not given")] = None,
) -> None:
    """Download a public data set (nothing else uses the network)."""
    from densepred.downloads import fetch

    _show(str(fetch(name, out or Path("data") / name)))


@app.command()
def check(config: Recipe, overrides: Overrides = None) -> None:
    """Look for faults in a data set. Nothing is trained."""
    from densepred.config import load

    recipe = load(config, overrides or ())
    from densepred.cases.check import check

    report = check(recipe.data, recipe.model.dims)
    if report.rows:
        columns = ("case", "severity", "file", "what", "fix")
        _table(columns, [[str(getattr(row, column) or "") for column in columns] for row in report.rows])
    _show(str(report.summary))
    raise typer.Exit(0 if report.ok else InputError.exit_code)


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

        _show(f"The training is in {loop.train(recipe, run).path}")
        return
    words = [word for word in (config, *(overrides or ())) if word is not None]
    if words and "=" not in words[0]:
        raise InputError(f"--resume has its recipe in its folder, but got {words[0]}", "leave the recipe out")
    from densepred.training import loop

    assert resume is not None
    _show(f"The training is in {loop.resume(resume, words).path}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="folder of a training", metavar="RUN")],
    words: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="files, folders, globs, lists; inference.KEY=...")
    ],
    out: Annotated[Path, typer.Option(help="folder for the predictions")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files changed or not made here")] = False,
    cutout: Annotated[str | None, typer.Option(help="the part to predict: y0:y1,x0:x1 or ra,dec,size")] = None,
    bins: Annotated[int, typer.Option("--bin", min=1, help="average over blocks of so many pixels a side")] = 1,
    bids: Annotated[bool, typer.Option("--bids", help="name the results as BIDS derivatives")] = False,
    others: Annotated[list[Path] | None, typer.Option("--with", help="another training, to average with")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="do a share of the cases, such as 3/8")] = None,
    devices: Annotated[str | None, typer.Option(help="spread cases, or one, over 0,1 (GPUs) or cpu*4")] = None,
    engine: Annotated[_Engine, typer.Option(help="compute here, or on the workers of Ray")] = _Engine.local,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster, or auto; else Ray starts here")] = None,
) -> None:
    """Segment files; what is done already stays as it is."""
    from densepred.inference.engines import engine_of
    from densepred.inference.shards import Shard

    share, computing = None if shard is None else Shard.parse(shard), engine_of(engine, devices, address)
    tune_allocator()
    from densepred.inference import batch

    overrides = [word for word in words if re.match(r"[a-z_]+\.[\w.]+=", word) and not Path(word).exists()]
    inputs = [word for word in words if word not in overrides]
    if cutout is not None:
        quoted = cutout.replace("'", "''")
        overrides.append(f"inference.cutout='{quoted}'")
    overrides += [] if bins == 1 else [f"inference.bin={bins}"]
    result = batch.predict([run, *(others or ())], inputs, out, overrides, overwrite, bids, share, computing)
    for error in result.failed.values():
        _say(str(error))
    _show(str(result))
    raise typer.Exit(result.exit_code)


@app.command()
def evaluate(
    predictions: Annotated[str, typer.Argument(help="folder of the predicted labels, or a pattern with {id}")],
    labels: Annotated[
        str, typer.Argument(help="folder of the true labels, or a pattern such as 'dir/{id}_seg.nii.gz'")
    ],
    out: Annotated[Path, typer.Option(help="folder for the scores and pictures")],
    images: Annotated[Path | None, typer.Option(help="folder of the images, to draw under the contours")] = None,
    axes: Annotated[str | None, typer.Option(help="axes of the labels where open: zyx, xyzt ...")] = None,
    checksum: Checksum = _Checksum.verify,
) -> None:
    """Score predictions and draw the worst and the median case."""
    from densepred import evaluation

    scores = evaluation.evaluate(predictions, labels, out, axes=axes, checksum=checksum)
    pictures = evaluation.draw_cases(scores, out, images)
    for failure in scores.failures:
        _say(str(InputError(failure.what, failure.fix, failure.file, failure.case)))
    _show(scores.table(), *map(str, pictures))
    raise typer.Exit(scores.exit_code)


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

    _show(summarize(model, size).table())
    if pictures is not None:
        from densepred.files import writable_folder
        from densepred.model_figures import draw_checkerboard, draw_receptive_field
        from densepred.models.inspect import checkerboard, effective_receptive_field

        folder = writable_folder(pictures)
        field = effective_receptive_field(model, size)
        _show(str(draw_receptive_field(field, folder / "receptive_field.png")))
        _show(str(draw_checkerboard(checkerboard(model, size), folder / "checkerboard.png")))


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
    from densepred.models.build import build

    channels = _count(lambda: len(channel_names(recipe.data)), 1, "channels")
    classes = _count(lambda: len(set(class_names(recipe.data).values())), 2, "classes")
    with torch.device("meta" if meta else "cpu"):
        return build(recipe.model, channels, classes, recipe.training.seed), recipe.patch.size


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
    _table(columns, [[r.name, r.kind, *r.cells(), r.remark] for r in found])


@app.command()
def info(
    file: Annotated[str, typer.Argument(help="an image, such as ct.nii.gz or mosaic.fits[SCI]", metavar="FILE")],
    axes: Annotated[str | None, typer.Option(help="its axes where they are open, such as zyx")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw its middle slice to")] = None,
    labels: Annotated[str | None, typer.Option(help="a label map of it, to outline in the picture")] = None,
    checksum: Checksum = _Checksum.verify,
) -> None:
    """Show the geometry and the statistics of an image file."""
    from densepred import info as information

    if labels is not None and picture is None:
        raise InputError("--labels are outlined in a picture, and none is asked for", "add --picture middle.png")
    _show(information.info(file, axes, checksum).table())
    if picture is not None:
        information.draw(file, picture, axes, labels, checksum)
        _show(str(picture))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="an image file, or a part of it in brackets", metavar="IN")],
    target: Annotated[Path, typer.Argument(help="the file to write, in the format of its suffix", metavar="OUT")],
    axes: Annotated[str | None, typer.Option(help="the axes of IN where they are open, such as zyx")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    checksum: Checksum = _Checksum.verify,
) -> None:
    """Copy an image into another format; what that cannot hold is said."""
    from densepred.convert import convert as copy

    copy(source, target, axes, overwrite, checksum)
    _show(str(target))


@app.command()
def catalogue(
    labels: Annotated[str, typer.Argument(help="a label map; a part of it in brackets", metavar="LABELS")],
    image: Annotated[str | None, typer.Argument(help="what to measure the objects on", metavar="[IMAGE]")] = None,
    *,
    out: Annotated[Path, typer.Option(help="the .csv, .ecsv or .fits to write")],
    instances: Annotated[bool, typer.Option("--instances", help="each value is one object")] = False,
    connectivity: Annotated[int | None, typer.Option(help="neighbours of a voxel: 4, 8; in 3D 6, 18, 26")] = None,
    min_size: Annotated[int, typer.Option(min=1, help="voxels of the smallest object to list")] = 1,
    background: Annotated[int, typer.Option(help="the value of what is no object")] = 0,
    axes: Annotated[str | None, typer.Option(help="the axes of the files where they are open, such as zyx")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    checksum: Checksum = _Checksum.verify,
) -> None:
    """List the objects of a label map with places, shapes and intensities."""
    from densepred.catalogue import catalogue as measure

    found = measure(labels, image, out, instances, connectivity, min_size, background, axes, overwrite, checksum)
    _show(f"{len(found)} objects in {out}")


@app.command()
def schema() -> None:
    """Print the JSON schema of the recipes, for editors."""
    import json

    from densepred.config import Config

    _show(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the versions of densepred and its foundations."""
    import platform
    from importlib import metadata

    from densepred import __version__

    _show(f"densepred {__version__}", f"python {platform.python_version()} on {platform.platform()}")
    _show(*(f"{name} {metadata.version(name)}" for name in ("torch", "monai", "nibabel", "numpy")))


def _count(counted: Callable[[], int], default: int, what: str) -> int:
    """What the data set says of its channels or classes, or a default where it is silent or absent."""
    try:
        number = counted()
    except InputError:
        number = 0
    if not number:
        _say(f"The number of {what} is not known without the data set: shown for {default}.")
    return number or default


def _show(*parts: object) -> None:
    """Print text and tables to stdout; a reader that went away (`| head`) ends the program quietly."""
    try:
        for part in parts:
            print(part if isinstance(part, str) else _rendered(part), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


def _rendered(part: object) -> str:
    from rich.console import Console

    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
    with console.capture() as capture:
        console.print(part, markup=False)
    return capture.get().rstrip("\n")


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("case", "severity"))
    for row in rows:
        table.add_row(*map(Text, row))
    _show(table)


def _say(text: str) -> None:
    """Print to stderr, control characters shown rather than sent: file names and YAML are not ours."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    print(safe, file=sys.stderr, flush=True)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def main() -> NoReturn:
    """Run the command line; faults of the user's end without a traceback, with the exit code of their kind."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: _say(f"WARNING {message}")
    log = logging.getLogger("densepred")
    log.addHandler(_Stderr())
    log.setLevel(logging.INFO)
    try:
        app(prog_name="densepred")
        sys.exit(0)
    except DensepredError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        _say("This is a bug in densepred: please report it with the lines above and `densepred version`.")
        sys.exit(BUG)


if __name__ == "__main__":
    main()
