"""Catalogues: a row for each object of a label map, with its place, shape and intensities, in world coordinates.

Example:
    >>> from densepred.catalogue import catalogue
    >>> table = catalogue("sources.fits", "mosaic.fits[SCI]", out="sources.ecsv")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

import densepred
from densepred.catalogue import table as tables
from densepred.catalogue.columns import Field, columns
from densepred.catalogue.objects import Components, Finder, Instances, codes_of
from densepred.catalogue.sums import Sums, joined, tally
from densepred.catalogue.world import world_of
from densepred.errors import InputError
from densepred.evaluation.records import Meaning, legend_of, meaning_of
from densepred.volumes import Volume, open_volume
from densepred.volumes.channels import check_grids

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["catalogue"]

Source: TypeAlias = "str | Path | Volume"
_SLAB_VALUES = 1 << 20
_PENDING = 1 << 16  # rows of parts that wait to be joined, beside twice the objects


def catalogue(
    labels: Source,
    image: Source | None = None,
    out: str | Path | None = None,
    instances: bool = False,
    connectivity: int | None = None,
    min_size: int = 1,
    background: int | Collection[int] = 0,
    axes: str | None = None,
    overwrite: bool = False,
    checksum: str = "verify",
) -> Table:
    """Measure the objects of a label map, in one pass over slabs; memory holds a slab and a row for each object.

    Values that are not finite are counted and left out. Negative ones have no weight in weighted centroid and moments.

    Args:
        labels: a file or volume of label values `(1, *spatial)`. NaN is background. Names of classes come from the
            volume, from the legend of a FITS file, or from `labels.json` beside the file.
        image: a file or volume on the same grid, `(C, *spatial)`, to measure the objects on.
        out: a new `.csv`, `.ecsv` or `.fits` to write.
        instances: each value is one object. Else the objects are the connected components of each value, numbered in
            the order of their first voxels, as `scipy.ndimage.label` does.
        connectivity: neighbours of a voxel: 4 or 8 in 2D, 6, 18 or 26 in 3D; by default 8 and 26.
        min_size: voxels below which an object is left out; the others keep their numbers.
        background: values of no object, besides those that `labels.json` or the FITS legend says are invalid.
        axes: what the axes of the files hold, where that is not plain.
        overwrite: replace an `out` that is there.
        checksum: of FITS files, as for `open_volume`.

    Returns:
        An astropy `Table` with a row for each object, units, and a description of each column; see docs/catalogues.md.

    Raises:
        InputError: a file is damaged, grids differ, values or `connectivity` are wrong, or `out` cannot be written.
        ValueError: `min_size` is below 1.

    Example:
        >>> labels = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], np.uint8)
        >>> found = catalogue(Volume.from_array(labels, (1.0, 1.0), labels=True))
        >>> found["voxels"].tolist(), found["centroid_x"].tolist()
        ([2, 1], [0.5, 3.0])
    """
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    meaning = Meaning() if isinstance(labels, Volume) else meaning_of([labels], _without_channels(axes))
    with ExitStack() as stack:
        truth = _open(labels, _without_channels(axes) or meaning.axes, checksum, stack)
        picture = None if image is None else _open(image, axes, checksum, stack)
        _check(truth, picture, out, overwrite)
        finder = Instances() if instances else Components(truth.dims, connectivity)
        sums = _measure(truth, picture, finder, _none(background, meaning))
        classes = truth.classes if isinstance(labels, Volume) else legend_of(truth) or meaning.classes
        found = _table(sums, truth, picture, min_size, None if instances else classes)
    found.meta |= {key: _name(of) for key, of in (("DPLABELS", labels), ("DPIMAGE", image)) if of is not None}
    if out is not None:
        tables.save(found, Path(out))
    return found


def _none(background: int | Collection[int], meaning: Meaning) -> set[int]:
    """The values of no object."""
    given = [background] if isinstance(background, int) else background
    return {*given, *meaning.ignore, *(() if meaning.invalid is None else [meaning.invalid])}


def _open(source: Source, axes: str | None, checksum: str, stack: ExitStack) -> Volume:
    return source if isinstance(source, Volume) else stack.enter_context(open_volume(source, axes, checksum))


def _without_channels(axes: str | None) -> str | None:
    """The axes of labels whose image has `axes`; plain ones need not be told."""
    return "zyx" if axes is not None and axes.replace("c", "") == "zyx" else None


def _name(source: Source) -> str:
    """What a file is called, without its folder: that is nobody else's business."""
    if isinstance(source, Volume):
        return "" if source.path is None else source.path.name
    return Path(source).name


def _check(labels: Volume, image: Volume | None, out: str | Path | None, overwrite: bool) -> None:
    if out is not None:
        tables.check_target(Path(out), [labels.path, None if image is None else image.path], overwrite)
    if labels.shape[0] != 1:
        what = f"labels have one channel, this file has {labels.shape[0]}"
        raise InputError(what, "give a label map", labels.path)
    if image is not None:
        check_grids(image, labels, "image and labels")


def _measure(labels: Volume, image: Volume | None, finder: Finder, none: Collection[int]) -> Sums:
    """The sums of all objects. Parts are joined now and then, so that they never are many more than the objects."""
    channels = 0 if image is None else image.shape[0]
    thickness = max(1, _SLAB_VALUES // ((1 + channels) * int(np.prod(labels.shape[2:]))))
    slabs = labels.slabs(thickness)
    pictures = ((0, 0, None) for _ in range(0, labels.shape[1], thickness)) if image is None else image.slabs(thickness)
    parts: list[Sums] = []
    rows = kept = 0
    for (start, _, slab), (_, _, picture) in zip(slabs, pictures, strict=True):
        parts.append(tally(finder.find(codes_of(slab[0], none, labels.path)), picture, start))
        rows += len(parts[-1].key)
        if rows > 2 * kept + _PENDING:
            parts = [joined(parts, finder.pairs)]
            finder.pairs.clear()
            rows = kept = len(parts[0].key)
    return joined(parts, finder.pairs)


def _table(sums: Sums, labels: Volume, image: Volume | None, min_size: int, classes: Mapping[int, str] | None) -> Table:
    """The table of the objects that are large enough; of instances where there are no `classes`."""
    if classes is not None:
        sums = sums.rows(np.argsort(sums.first))
    numbers = sums.code - 1 if classes is None else np.arange(1, len(sums.key) + 1)
    large = sums.voxels >= min_size
    numbers, sums = numbers[large], sums.rows(large)
    world = world_of([labels] if image is None else [labels, image])
    fields = _identity(numbers, sums.code - 1, classes) + columns(sums, labels.shape[1:], world, tables.unit_of(image))
    frame = {"FRAME": world.frame} if world is not None and world.frame else {}
    return tables.table_of(fields, {"DPVERS": densepred.__version__} | frame)


def _identity(numbers: np.ndarray, values: np.ndarray, classes: Mapping[int, str] | None) -> list[Field]:
    """The columns that say which object a row is."""
    if classes is None:
        return [Field("id", numbers, "label value of the object")]
    fields = [Field("id", numbers, "number of the object"), Field("class", values, "label value of its voxels")]
    if classes:
        known = np.array([classes.get(value, "") for value in values.tolist()] or [""], str)[: len(values)]
        fields.append(Field("name", known, "name of its class"))
    return fields
