"""Which HDUs an output has, and how its axes lie in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes import fits_cards
from densepred.volumes.fits_cards import Contents, Provenance
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.fits_legend import Legend, distortion_tables
from densepred.volumes.fits_sums import sealed
from densepred.volumes.fits_tiles import Image, Sealed, table_cards
from densepred.volumes.volume import Volume


@dataclass(frozen=True)
class Output:
    """The HDUs of an output.

    Args:
        primary: an empty primary HDU, or None where the first image is primary.
        images: they take the slabs.
        tables: small HDUs that the header refers to.
        source: where the header came from, if from FITS.
        shape: of every image, in numpy's order.
        squeezed: axes of length 1 of `shape` that the volume does not have.
        channels_axis: the axis of `shape` that holds channels, if any.
    """

    primary: tuple[Sealed, bytes] | None
    images: list[Image]
    tables: list[tuple[Sealed, bytes]]
    source: FitsHeader | None
    shape: tuple[int, ...]
    squeezed: tuple[int, ...]
    channels_axis: int | None


@dataclass(frozen=True)
class _Grid:
    """The stored axes of one image, and the cards kept for them."""

    shape: tuple[int, ...]
    squeezed: tuple[int, ...]
    channels_axis: int | None
    cards: fits.Header


def plan(
    like: Volume,
    dtype: np.dtype,
    channels: int,
    labels: bool,
    contents: Contents | None,
    legend: Legend | None,
    provenance: Provenance,
    tiles: bool,
    first: bool = True,
) -> Output:
    """The HDUs of an output on the grid of `like`; see `fits_writer.open_writer`. Only the first has a primary one.

    Raises:
        InputError: the header cannot be kept for the layout.
        ValueError: the volume is not of its header's shape, or there are not as many names as channels.
    """
    source = like.header if isinstance(like.header, FitsHeader) else None
    contents = contents or default_contents(like, dtype, channels, labels)
    if contents.names and len(contents.names) != channels:
        raise ValueError(f"names must name {channels} channels, got {list(contents.names)}")
    apart = channels > 1 and contents.layout == "hdus"
    extension = apart or tiles or not first or (source is not None and source.index > 0)
    grid = _grid(like, source, 1 if apart else channels, contents, inherit=extension)
    if source is not None and "DATASUM" in source.header:
        provenance = {"DPINSUM": str(source.header["DATASUM"]), **provenance}
    for card in _name_cards(contents, legend, apart).cards:
        grid.cards.append(card, end=True)
    images = []
    for number in range(channels if apart else 1):
        header = fits_cards.structure(grid.shape, dtype, extension, "Z" if tiles else "")
        name = contents.hdu_name(number) if apart else contents.name
        header = fits_cards.finished(
            table_cards(header) if tiles else header, contents, name, grid.cards, provenance, labels
        )
        span = range(number, number + 1) if apart else range(channels)
        images.append(Image(header, grid.shape, dtype, span, _position(grid)))
    primary = _primary(source, provenance) if extension and first else None
    tables = [] if source is None else distortion_tables(grid.cards, source.path)
    return Output(primary, images, tables, source, grid.shape, grid.squeezed, grid.channels_axis)


def default_contents(like: Volume, dtype: np.dtype, channels: int, labels: bool) -> Contents:
    """What the values are taken for if nobody says so."""
    if channels > 1 and channels != like.shape[0] and dtype.kind == "f" and not labels:
        return Contents(probability=True, layout="hdus")
    return Contents()


def _name_cards(contents: Contents, legend: Legend | None, apart: bool) -> fits.Header:
    if legend is not None:
        return fits_cards.name_cards("CLASS", sorted(legend.names.items()))
    keyword: Literal["CLASS", "CHAN"] = "CLASS" if contents.probability else "CHAN"
    return fits_cards.name_cards(keyword, () if apart else enumerate(contents.names))


def _grid(like: Volume, source: FitsHeader | None, channels: int, contents: Contents, inherit: bool) -> _Grid:
    """The axes of an image with `channels` channels: those of the source where it has them."""
    spatial = like.shape[1:]
    if source is None:
        cards = fits_cards.of_grid(like)
        grid = _Grid(spatial, (), None, cards)
    else:
        if tuple(source.shape[axis] for axis in source.spatial_axes) != spatial:
            raise ValueError(f"like must have the spatial shape of its header {source.shape}, got {like.shape}")
        cards = fits_cards.kept(source.header, inherit)
        grid = _Grid(source.shape, source.squeezed, source.channels_axis, cards)
    held = 1 if grid.channels_axis is None else grid.shape[grid.channels_axis]
    if channels > 1 and held == channels and not contents.probability:
        return grid
    if grid.channels_axis is not None:
        grid = _without_channels(grid, None if source is None else source.path)
    if channels == 1:
        return grid
    cards = fits_cards.with_axis(grid.cards, len(grid.shape) + 1, contents.axis_name)
    return _Grid((channels, *grid.shape), tuple(axis + 1 for axis in grid.squeezed), 0, cards)


def _without_channels(grid: _Grid, path: Path | None) -> _Grid:
    gone = grid.channels_axis
    assert gone is not None
    try:
        cards = fits_cards.without_axis(grid.cards, len(grid.shape) - gone)
    except InputError as error:
        error.file = path
        raise
    squeezed = tuple(axis - (axis > gone) for axis in grid.squeezed)
    return _Grid((*grid.shape[:gone], *grid.shape[gone + 1 :]), squeezed, None, cards)


def _position(grid: _Grid) -> int:
    if grid.channels_axis is None:
        return 0
    return sum(size > 1 for size in grid.shape[: grid.channels_axis])


def _primary(source: FitsHeader | None, provenance: Provenance) -> tuple[Sealed, bytes]:
    """An empty primary HDU: with the source's primary cards, if the image was in an extension of it."""
    body = fits.Header()
    if source is not None and source.index > 0 and source.path is not None:
        with fits.open(source.path, memmap=False) as file:
            body = fits_cards.kept(file[0].header, inherit=False)
    header = fits_cards.finished(fits_cards.structure((), np.dtype(np.uint8), False), None, None, body, provenance)
    block = sealed(header, 0)
    return (block, 0, 0), block
