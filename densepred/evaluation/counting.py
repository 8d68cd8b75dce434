"""How often each pair of true and predicted value occurs in two label files, read slab by slab."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from densepred.errors import InputError
from densepred.metrics import confusion
from densepred.volumes import paired
from densepred.volumes.arrays import micrometres
from densepred.volumes.channels import check_grids, on_grid
from densepred.volumes.members import open_each
from densepred.volumes.volume import Volume

Pairs: TypeAlias = "Counter[tuple[int, int]]"
MAX_CLASSES = 1024
ROUNDING = 1e-3
"""How far a label stored as a fraction may be from an integer."""
UNKNOWN = -(2**62)
"""Stands for a truth that is NaN: it does not count."""
_SLAB_VOXELS = 1 << 20


class Voxel(NamedTuple):
    """The size of a voxel, and its unit: "mm3" or "um3", in 2D "mm2" or "um2"; nan and "" where no unit is known."""

    size: float
    unit: str


class Reading(NamedTuple):
    """How the values of two label files are read.

    Args:
        ignore: voxels whose truth has one of these values do not count; a prediction of one is background.
        invalid: the predicted value of voxels that were not predicted.
        axes: what the axes of both files hold, where that is open.
        checksum: of FITS files, as for `open_volume`.
        objects: values are numbers of objects, which are all of class 1.
        parts: but those of the prediction are classes: its objects are the connected parts of what is no background.
    """

    ignore: frozenset[int] = frozenset()
    invalid: int | None = None
    axes: str | None = None
    checksum: str = "verify"
    objects: bool = False
    parts: bool = False


def count_pairs(truth: Path, prediction: Path, reading: Reading = Reading()) -> tuple[Pairs, Voxel]:  # noqa: B008
    """Count the voxels of every pair (true value, predicted value); memory does not depend on the depth.

    Args:
        truth: the label file; several images of it ("x.fits[SCI,all]", frames with axes "xyzt") are counted together.
        prediction: the predicted labels on the same grid, or the same grids.
        reading: which voxels do not count; `invalid` keeps its own place in the counts all the same.

    Returns:
        the counts, and the size of a voxel, of the prediction where the truth says none; unknown where that of several
        images differs.

    Raises:
        InputError: the grids, the places on the sky or the numbers of images differ, the values are not labels, or a
            file is damaged.
    """
    pairs: Pairs = Counter()
    sizes: set[Voxel] = set()
    for expected, got in each_pair(truth, prediction, reading):
        for ours, theirs in label_slabs(expected, got, truth, prediction):
            ignore = reading.ignore
            if reading.objects:  # numbers that are ignored become unknown, so that no class 1 is meant by them
                ours = np.where(np.isin(ours, [*ignore, UNKNOWN]), UNKNOWN, ours != 0)
                theirs, ignore = np.where(theirs == reading.invalid, theirs, theirs != 0), frozenset()
            pairs.update(_count(ours, theirs, ignore, reading.invalid))
        sizes.add(voxel_of(on_grid((expected, got))))
    _check_classes(len({value for pair in pairs for value in pair}))
    return pairs, sizes.pop() if len(sizes) == 1 else Voxel(math.nan, "")


def each_pair(truth: Path, prediction: Path, reading: Reading, wide: bool = False) -> Iterator[tuple[Volume, Volume]]:
    """The images of two files that belong together, one after the other, open.

    Args:
        truth, prediction, reading: as for `count_pairs`.
        wide: there may be several channels, which label maps have not.

    Raises:
        InputError: as `count_pairs`.
    """
    rows = paired_labels(truth, prediction, reading.axes)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(open_each(path, [row[role] for row in rows], reading.axes, reading.checksum)))
            for role, path in (("truth", truth), ("prediction", prediction))
        ]
        for expected, got in zip(*streams, strict=True):
            with expected, got:
                if not wide:
                    check_single(expected)
                    check_single(got)
                _check_grids(expected, got, prediction)
                yield expected, got


def label_slabs(
    expected: Volume, got: Volume, truth: Path, prediction: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The labels of two volumes on one grid, int64 (1, n, ...) each, read forward; `UNKNOWN` where the truth is NaN."""
    for ours, theirs in slabs(expected, got):
        yield integers(ours, truth, UNKNOWN), integers(theirs, prediction)


def slabs(expected: Volume, got: Volume) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slabs (C, n, ...) of two volumes on one grid, read forward."""
    thickness = max(1, _SLAB_VOXELS // (int(np.prod(expected.shape[2:])) * max(expected.shape[0], got.shape[0])))
    for (_, _, ours), (_, _, theirs) in zip(expected.slabs(thickness), got.slabs(thickness), strict=True):
        yield ours, theirs


def paired_labels(truth: Path, prediction: Path, axes: str | None = None) -> list[dict[str, str]]:
    """The images of two label files that belong together, in the order of the truth; see `volumes.paired`.

    Returns:
        For each image, "truth" and "prediction" as paths for `open_volume`.

    Raises:
        InputError: the files stand for other numbers of images, or for other versions.
    """
    paths = {"truth": truth, "prediction": prediction}
    rows = paired(paths, dict.fromkeys(paths, axes))
    for role, other in (("truth", "prediction"), ("prediction", "truth")):
        if len({row[role] for row in rows}) < len(rows):  # one image that went with each
            what = f"stands for one image, and {paths[other]} for {len(rows)}"
            raise InputError(what, "choose as many of each, as in x.fits[SCI,all]", paths[role])
    return rows


def check_single(labels: Volume) -> None:
    """Refuse label maps of several channels.

    Raises:
        InputError: as above.
    """
    if labels.shape[0] != 1:
        what = f"labels have one channel, this file has {labels.shape[0]}"
        raise InputError(what, "give a label map", labels.path)


def _check_grids(truth: Volume, prediction: Volume, path: Path) -> None:
    """Refuse volumes that do not lie voxel on voxel."""
    if truth.shape[1:] != prediction.shape[1:]:
        what = f"the prediction is {prediction.shape[1:]} and its label {truth.shape[1:]} voxels (Z, Y, X)"
        raise InputError(what, "predict the image that this label was drawn on", path)
    check_grids(truth, prediction, "label and prediction")


def spacing_of(volume: Volume) -> tuple[tuple[float, ...], str]:
    """The spacing in mm, or um where the file's unit is smaller, and this unit; as it is and "" where none is known."""
    unit = micrometres(volume)
    if unit is None:
        return volume.spacing, ""
    name, factor = ("mm", unit / 1e3) if unit >= 1e3 else ("um", unit)
    return tuple(size * factor for size in volume.spacing), name


def voxel_of(volume: Volume) -> Voxel:
    """The size of a voxel of a volume."""
    spacing, unit = spacing_of(volume)
    return Voxel(float(np.prod(spacing)), f"{unit}{volume.dims}") if unit else Voxel(math.nan, "")


def integers(slab: np.ndarray, path: Path, unknown: int | None = None) -> np.ndarray:
    """A slab of label values as int64; values stored as fractions are rounded if they are nearly integers.

    Raises:
        InputError: others; NaN too, unless it is `unknown`.
    """
    if slab.dtype.kind in "iub":
        return slab.astype(np.int64)
    if unknown is not None and (missing := np.isnan(slab)).any():
        return np.where(missing, unknown, integers(np.where(missing, 0, slab), path))
    rounded = np.rint(slab)
    wrong = ~(np.abs(slab - rounded) <= ROUNDING)
    if wrong.any():
        what = f"not labels: {int(wrong.sum())} voxels of a slab are no integers, e.g. {slab[wrong][0]:g}"
        raise InputError(what, "give label maps, not images or probabilities", path)
    return rounded.astype(np.int64)


def _check_classes(count: int) -> None:
    """Refuse instance maps, whose table of pairs would fill the memory."""
    if count > MAX_CLASSES:
        what = f"{count} different label values, at most {MAX_CLASSES} are scored: are these instances?"
        raise InputError(what, "give label maps of classes, or say that values are objects (--instances)")


def _count(truth: np.ndarray, prediction: np.ndarray, ignore: frozenset[int], invalid: int | None) -> Pairs:
    """Count the pairs of two int64 arrays of one shape."""
    if ignore or (truth == UNKNOWN).any():
        known = ~np.isin(truth, [*ignore, UNKNOWN])
        truth, prediction = truth[known], prediction[known]
        prediction = np.where(np.isin(prediction, list(ignore - {invalid})), 0, prediction)
    if not truth.size:
        return Counter()
    low, high = min(truth.min(), prediction.min()), max(truth.max(), prediction.max())
    if high - low < MAX_CLASSES:
        values = np.arange(low, high + 1)
        rows, columns = truth - low, prediction - low
    else:
        values = np.union1d(truth, prediction)
        rows, columns = np.searchsorted(values, truth), np.searchsorted(values, prediction)
        _check_classes(len(values))
    counts = confusion(rows, columns, len(values))
    return Counter({(int(values[i]), int(values[j])): int(counts[i, j]) for i, j in np.argwhere(counts)})
