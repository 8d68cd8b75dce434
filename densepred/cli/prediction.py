"""Commands that predict, and judge predictions."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from densepred.allocator import tune_allocator
from densepred.cli.base import Checking, Checksum, app, say, show
from densepred.errors import InputError

if TYPE_CHECKING:
    from densepred.evaluation import Scores, ValueScores


class Engine(StrEnum):
    local = "local"
    ray = "ray"


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="folder of a training or a cross-validation", metavar="RUN")],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="files, folders, globs, lists; inference.KEY=..., data.axes=..., data.table=..."
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for the predictions")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files changed or not made here")] = False,
    cutout: Annotated[str | None, typer.Option(help="the part to predict: y0:y1,x0:x1 or ra,dec,size")] = None,
    bins: Annotated[int, typer.Option("--bin", min=1, help="average over blocks of so many pixels a side")] = 1,
    bids: Annotated[bool, typer.Option("--bids", help="name the results as BIDS derivatives")] = False,
    others: Annotated[list[Path] | None, typer.Option("--with", help="another training, to average with")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="do a share of the cases, such as 3/8")] = None,
    devices: Annotated[str | None, typer.Option(help="spread cases, or one, over 0,1 (GPUs) or cpu*4")] = None,
    engine: Annotated[Engine, typer.Option(help="compute here, or on the workers of Ray")] = Engine.local,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster, or auto; else Ray starts here")] = None,
) -> None:
    """Predict files: label maps, maps of numbers, or a table; what is done already stays as it is."""
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
        say(str(error))
    show(str(result))
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
    checksum: Checksum = Checking.verify,
    metrics: Annotated[str, typer.Option(help="more: hd95,hd,assd,surface_dice,pq,rq,sq; see the page Metrics")] = "",
    tolerance: Annotated[float | None, typer.Option(help="of surface_dice, in mm or the spacing's unit")] = None,
    instances: Annotated[bool, typer.Option("--instances", help="values are numbers of objects of one class")] = False,
) -> None:
    """Score predictions and draw the worst and the median case. Tables (CSV) are of whole images."""
    from densepred import evaluation
    from densepred.evaluation.pairing import find_files

    if predictions.endswith(".csv"):
        whole = evaluation.evaluate_table(predictions, labels)
        show(whole.table(), *map(str, whole.save(out)))
        raise typer.Exit(whole.exit_code)
    more = [name.strip() for name in metrics.split(",") if name.strip()]
    if evaluation.is_of_values(more):
        values = evaluation.evaluate_values(predictions, labels, more, out, axes, checksum)
        _told(values, evaluation.draw_curves(values, out))
    pictured = None if images is None else find_files(images, "images")  # a slip of the pen is told at once
    scores = evaluation.evaluate(
        predictions,
        labels,
        out,
        axes=axes,
        checksum=checksum,
        metrics=more,
        tolerance=tolerance,
        instances=instances,
    )
    _told(scores, evaluation.draw_cases(scores, out, pictured))


def _told(scores: Scores | ValueScores, pictures: list[Path]) -> NoReturn:
    for failure in scores.failures:
        say(str(InputError(failure.what, failure.fix, failure.file, failure.case)))
    show(*scores.tables(), *map(str, pictures))
    raise typer.Exit(scores.exit_code)
