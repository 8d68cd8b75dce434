"""Commands about files and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densepred.cli.base import Checking, Checksum, Overrides, Recipe, app, show, table
from densepred.errors import InputError


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="hippocampus, or another set of the Medical Segmentation Decathlon")],
    out: Annotated[Path | None, typer.Option(help="folder for it; data/NAME if not given")] = None,
) -> None:
    """Download a public data set (else only weights that a recipe names are ever fetched)."""
    from densepred.downloads import fetch

    show(str(fetch(name, out or Path("data") / name)))


@app.command()
def check(config: Recipe, overrides: Overrides = None) -> None:
    """Look for faults in a data set. Nothing is trained."""
    from densepred.config import load

    recipe = load(config, overrides or ())
    from densepred.cases.check import check

    report = check(recipe.data, recipe.model.dims)
    if report.rows:
        columns = ("case", "severity", "file", "what", "fix")
        table(columns, [[str(getattr(row, column) or "") for column in columns] for row in report.rows])
    show(str(report.summary))
    raise typer.Exit(0 if report.ok else InputError.exit_code)


@app.command()
def info(
    file: Annotated[str, typer.Argument(help="an image, such as ct.nii.gz or mosaic.fits[SCI]", metavar="FILE")],
    axes: Annotated[str | None, typer.Option(help="its axes where they are open, such as zyx")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw its middle slice to")] = None,
    labels: Annotated[str | None, typer.Option(help="a label map of it, to outline in the picture")] = None,
    checksum: Checksum = Checking.verify,
) -> None:
    """Show the geometry and the statistics of an image file."""
    from densepred import info as information

    if labels is not None and picture is None:
        raise InputError("--labels are outlined in a picture, and none is asked for", "add --picture middle.png")
    if picture is not None:
        information.check_picture(picture, file, labels)
    show(information.info(file, axes, checksum).table())
    if picture is not None:
        information.draw(file, picture, axes, labels, checksum)
        show(str(picture))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="an image file, or a part of it in brackets", metavar="IN")],
    target: Annotated[Path, typer.Argument(help="the file to write, in the format of its suffix", metavar="OUT")],
    axes: Annotated[str | None, typer.Option(help="the axes of IN where they are open, such as zyx")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    checksum: Checksum = Checking.verify,
) -> None:
    """Copy an image into another format; what that cannot hold is said."""
    from densepred.convert import convert as copy

    copy(source, target, axes, overwrite, checksum)
    show(str(target))


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
    checksum: Checksum = Checking.verify,
) -> None:
    """List the objects of a label map with places, shapes and intensities."""
    from densepred.catalogue import catalogue as measure

    found = measure(labels, image, out, instances, connectivity, min_size, background, axes, overwrite, checksum)
    show(f"{len(found)} objects in {out}")
