"""Metrics that need more of a case than counts: distances between surfaces, and objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from densepred.errors import InputError
from densepred.evaluation.counting import UNKNOWN, Reading, each_pair, label_slabs, spacing_of
from densepred.metrics import Panoptic, SurfaceDistances, components, panoptic, surface_distances
from densepred.registry import lookup
from densepred.volumes.channels import on_grid
from densepred.volumes.volume import Volume

DISTANCES = ("hd", "hd95", "assd")
"""Metrics in a unit of length, of which less is better."""
MEASURES = {
    "hd": "Hausdorff distance",
    "hd95": "95th percentile of the Hausdorff distance",
    "assd": "average symmetric surface distance",
    "surface_dice": "share of the surfaces within the tolerance of each other",
    "pq": "panoptic quality",
    "rq": "F1 score of the objects found",
    "sq": "mean intersection over union of the objects found",
}
_OBJECTS = ("pq", "rq", "sq")


@dataclass(frozen=True)
class Wanted:
    """Which metrics are computed beside those of overlap.

    Args:
        metrics: names in `MEASURES`.
        tolerance: of `surface_dice`, in the unit of the distances.

    Raises:
        InputError: an unknown metric, one that stands twice, or a tolerance that is missing or below 0.

    Example:
        >>> Wanted(("hd95", "assd")).tolerance is None
        True
    """

    metrics: tuple[str, ...] = ()
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in self.metrics:
            try:
                lookup(MEASURES, name, "a metric")
            except ValueError as error:
                raise InputError(str(error), "dice, iou, precision and recall are always there") from error
        if len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"a metric stands twice in {', '.join(self.metrics)}", "name each once")
        if "surface_dice" in self.metrics and self.tolerance is None:
            fix = "give the distance that does not matter, such as --tolerance 1, in mm or the unit of the spacing"
            raise InputError("surface_dice has no meaning without a tolerance", fix)
        if self.tolerance is not None and not self.tolerance >= 0:
            raise InputError(f"the tolerance is a distance of 0 or more, not {self.tolerance:g}", "give such a one")

    @property
    def surfaces(self) -> bool:
        """Are surfaces looked at?"""
        return bool(set(self.metrics) - set(_OBJECTS))

    @property
    def objects(self) -> bool:
        """Are objects looked at?"""
        return bool(set(self.metrics) & set(_OBJECTS))


@dataclass(frozen=True)
class Measured:
    """The metrics of one class in one case.

    Args:
        values: by name; nan where there is none.
        parts: for those metrics that are ratios of sums, numerator and denominator, which add up over cases.
    """

    values: Mapping[str, float]
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def pooled(measured: Sequence[Measured], metric: str) -> float:
    """The metric of all cases taken together; nan for those that do not add up (hd, hd95)."""
    parts = [one.parts[metric] for one in measured if metric in one.parts]
    whole = sum(weight for _, weight in parts)
    return sum(value for value, _ in parts) / whole if whole else np.nan


def measure(
    truth: Path, prediction: Path, values: Sequence[int], merged: Mapping[int, int], wanted: Wanted, reading: Reading
) -> tuple[dict[int, Measured], str]:
    """The wanted metrics of each class of a case; each image is held in memory, in 2 bytes a voxel and file.

    Distances in several images of a file are taken together, and so are their objects.

    Args:
        truth: the label file.
        prediction: the predicted labels on the same grid.
        values: of the classes, the background left out.
        merged: values that count as another.
        wanted: the metrics.
        reading: which voxels do not count.

    Returns:
        class value -> metrics, and the unit of the distances: "mm", "um", or "" where the files do not say.

    Raises:
        InputError: as `count_pairs`, or several images have different units.
    """
    surfaces: dict[int, SurfaceDistances] = {}
    objects: dict[int, Panoptic] = {}
    units: set[str] = set()
    for expected, got in each_pair(truth, prediction, reading):
        spacing, unit = spacing_of(on_grid((expected, got)))
        units.add(unit)
        ours, theirs, known = _arrays(expected, got, (truth, prediction), values, merged, reading)
        for at, value in enumerate(values, start=1):
            pair = (ours != 0, theirs != 0) if reading.objects else (ours == at, theirs == at)
            if wanted.surfaces:
                found = surface_distances(*pair, spacing, known)
                surfaces[value] = surfaces[value] + found if value in surfaces else found
            if wanted.objects:
                true = ours if reading.objects else components(pair[0])
                predicted = theirs if reading.objects and not reading.parts else components(pair[1])
                objects[value] = objects.get(value, Panoptic()) + panoptic(true, predicted, known)
    if len(units) > 1:
        raise InputError("its images have different units of length", "score them apart", truth)
    return {value: _measured(surfaces.get(value), objects.get(value), wanted) for value in values}, units.pop()


def _arrays(
    expected: Volume,
    got: Volume,
    paths: tuple[Path, Path],
    values: Sequence[int],
    merged: Mapping[int, int],
    reading: Reading,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Truth and prediction as places in `values` from 1 (or as numbers of objects), and where they are known."""
    shape, kind = expected.shape[1:], np.int64 if reading.objects else np.int16
    found = np.zeros((2, *shape), kind)
    known = np.ones(shape, bool)
    every = np.array(sorted(values))
    order = np.argsort(np.asarray(values))
    start = 0
    for slabs in label_slabs(expected, got, *paths):
        rows = slice(start, start + slabs[0].shape[1])
        start = rows.stop
        nothing = [*reading.ignore, UNKNOWN]
        ignored, unseen = np.isin(slabs[0][0], nothing), slabs[1][0] == reading.invalid
        known[rows] = ~(ignored | unseen)
        if reading.objects:  # numbers of the prediction mean no class to ignore, and those of the truth not "invalid"
            found[0, rows], found[1, rows] = np.where(ignored, 0, slabs[0][0]), np.where(unseen, 0, slabs[1][0])
            continue
        for side, slab in enumerate(slabs):
            labels = np.where(np.isin(slab[0], nothing), 0, slab[0])
            for value, other in merged.items():
                labels[labels == value] = other
            at = np.searchsorted(every, labels).clip(max=len(every) - 1)
            found[side, rows] = np.where(every[at] == labels, order[at] + 1, 0)
    return found[0], found[1], None if known.all() else known


def _measured(surfaces: SurfaceDistances | None, objects: Panoptic | None, wanted: Wanted) -> Measured:
    values: dict[str, float] = {}
    parts: dict[str, tuple[float, float]] = {}
    if surfaces is not None:
        values |= {"hd": surfaces.hausdorff(), "hd95": surfaces.hausdorff(95), "assd": surfaces.average()}
        count = surfaces.to_truth.size + surfaces.to_prediction.size
        if not np.isnan(values["assd"]):
            parts["assd"] = (values["assd"] * count, float(count))
        if wanted.tolerance is not None:
            values["surface_dice"] = surfaces.surface_dice(wanted.tolerance)
            near, whole = surfaces.within(wanted.tolerance)
            parts["surface_dice"] = (float(near), float(whole))
    if objects is not None:
        values |= {"pq": objects.quality, "rq": objects.recognition, "sq": objects.segmentation}
        weight = objects.matched + (objects.missed + objects.invented) / 2
        parts |= {"pq": (objects.overlap, weight), "rq": (float(objects.matched), weight)}
        parts["sq"] = (objects.overlap, float(objects.matched))
    return Measured({name: values[name] for name in wanted.metrics}, parts)
