"""The slices that show a case best, turned the way readers of medical images or of FITS expect."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from densepred.errors import DensepredError
from densepred.evaluation.counting import paired_labels
from densepred.volumes import open_volume, paired
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.members import open_each
from densepred.volumes.volume import Volume

_SLAB_VOXELS = 1 << 20
_SIDES = ("SI", "AP", "RL")
"""The body's axes; of the two in a slice the earlier runs down, and both begin with the first letter's side."""
_ACROSS = ("axial", "coronal", "sagittal")
_MARGIN = 0.3  # of the size of what is labelled, shown around it
_LEAST = 24  # pixels shown at least


@dataclass(frozen=True)
class Plane:
    """One slice of image, truth and prediction, each (rows, columns).

    Args:
        pixel: height and width of a pixel.
        letters: the body's sides at the top and at the left, such as "SR"; empty where the file does not say.
    """

    title: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    pixel: tuple[float, float]
    letters: str

    @property
    def size(self) -> tuple[float, float]:
        """Height and width in the unit of the spacing."""
        return self.truth.shape[0] * self.pixel[0], self.truth.shape[1] * self.pixel[1]


def read_planes(
    truth: str | Path,
    prediction: str | Path,
    image: str | Path | None,
    values: Sequence[int] | None,
    axes: str | None = None,
    checksum: str = "verify",
) -> list[Plane]:
    """One slice across each axis, where the truth, or else the prediction, has most voxels of `values` (None: not 0).

    The files are read slab by slab. An image that is missing, damaged or of another shape is drawn black.
    """
    with open_volume(truth, axes, checksum) as true, open_volume(prediction, axes, checksum) as predicted:
        areas = [_areas(true, values), _areas(predicted, values)]
        shown = areas[0] if areas[0][0].any() else areas[1]
        at = [int(area.argmax()) if area.any() else len(area) // 2 for area in shown]
        box = [_span(ours + theirs) for ours, theirs in zip(*areas, strict=True)]
        labels = list(zip(_slices(true, at), _slices(predicted, at), strict=True))
        shape, spacing, codes = true.shape[1:], true.spacing, _codes(true)
        upward = isinstance(true.header, FitsHeader)
    images = _image_slices(image, shape, at, axes, checksum) or [np.zeros(ours.shape) for ours, _ in labels]
    planes = []
    for axis, (ours, theirs) in enumerate(labels):
        rows, columns = (other for other in range(len(shape)) if len(shape) == 2 or other != axis)
        title = f"{'zyx'[axis]} = {at[axis]}" if len(shape) == 3 else ""
        cut = box[rows], box[columns]
        plane = Plane(title, images[axis][cut], ours[cut], theirs[cut], (spacing[rows], spacing[columns]), "")
        planes.append(_upward(plane) if upward else _turned(plane, codes[rows] + codes[columns]))
    return planes


def fullest(
    truth: Path,
    prediction: Path,
    image: Path | None,
    values: Sequence[int] | None,
    axes: str | None = None,
    checksum: str = "verify",
) -> tuple[str, str, str | None]:
    """Truth, prediction and image to show of a case: of several, those where the truth has most voxels of `values`."""
    rows = paired_labels(truth, prediction, axes)
    at = 0
    if len(rows) > 1:
        counts = []
        with closing(open_each(truth, [row["truth"] for row in rows], axes, checksum)) as volumes:
            for volume in volumes:
                with volume:
                    counts.append(int(_areas(volume, values)[0].sum()))
        at = int(np.argmax(counts))
    chosen = rows[at]
    if image is None:
        return chosen["truth"], chosen["prediction"], None
    try:
        beside = paired({"truth": truth, "image": image}, {"truth": axes, "image": axes})
    except DensepredError:  # it is drawn without
        return chosen["truth"], chosen["prediction"], None
    shown = next((row["image"] for row in beside if row["truth"] == chosen["truth"]), None)
    return chosen["truth"], chosen["prediction"], shown


def _areas(volume: Volume, values: Sequence[int] | None) -> list[np.ndarray]:
    """Per spatial axis the number of voxels of `values` in each slice, int64; None: of any but 0."""
    areas = [np.zeros(size, np.int64) for size in volume.shape[1:]]
    for start, stop, slab in volume.slabs(_thickness(volume)):
        mask = slab[0] != 0 if values is None else np.isin(slab[0], values)
        for axis, area in enumerate(areas):
            others = tuple(other for other in range(mask.ndim) if other != axis)
            area[slice(start, stop) if axis == 0 else slice(None)] += mask.sum(others)
    return areas


def _span(area: np.ndarray) -> slice:
    """The part of an axis to show: what is labelled and a margin; all of it if nothing is."""
    used = np.flatnonzero(area)
    if not used.size:
        return slice(0, len(area))
    length = used[-1] - used[0] + 1
    margin = max(length * _MARGIN, (_LEAST - length) / 2)
    return slice(max(0, int(used[0] - margin)), min(len(area), int(used[-1] + margin) + 1))


def _slices(volume: Volume, at: Sequence[int]) -> list[np.ndarray]:
    """The slice of channel 0 across each axis at index `at`, in one pass; the whole of a 2D image."""
    if volume.dims == 2:
        return [volume[0]]
    parts: list[list[np.ndarray]] = [[], [], []]
    for start, stop, slab in volume.slabs(_thickness(volume)):
        if start <= at[0] < stop:
            parts[0].append(slab[0, at[0] - start].copy())
        parts[1].append(slab[0, :, at[1]].copy())
        parts[2].append(slab[0, :, :, at[2]].copy())
    return [parts[0][0], np.concatenate(parts[1]), np.concatenate(parts[2])]


def _image_slices(
    path: str | Path | None, shape: tuple[int, ...], at: Sequence[int], axes: str | None, checksum: str
) -> list[np.ndarray] | None:
    if path is None:
        return None
    try:
        with open_volume(path, axes, checksum) as image:
            return _slices(image, at) if image.shape[1:] == shape else None
    except DensepredError:
        return None


def _thickness(volume: Volume) -> int:
    return max(1, _SLAB_VOXELS // int(np.prod(volume.shape[2:])))


def _codes(volume: Volume) -> list[str]:
    """The side of the body that each array axis runs to, such as ["S", "A", "R"]; empty strings if unknown."""
    from nibabel.orientations import aff2axcodes

    codes = [] if volume.affine is None else aff2axcodes(volume.affine)
    if not codes or None in codes:
        return [""] * volume.dims
    return [str(code) for code in reversed(codes[: volume.dims])]


def _upward(plane: Plane) -> Plane:
    """The first row at the bottom, as FITS is shown."""
    return replace(plane, image=plane.image[::-1], truth=plane.truth[::-1], prediction=plane.prediction[::-1])


def _turned(plane: Plane, codes: str) -> Plane:
    """Superior or anterior up, the body's right or front at the left; unchanged where the sides are unknown."""
    if not codes:
        return plane
    arrays, pixel = (plane.image, plane.truth, plane.prediction), plane.pixel
    ranks = [next(rank for rank, sides in enumerate(_SIDES) if code in sides) for code in codes]
    if ranks[0] > ranks[1]:
        arrays, pixel = (arrays[0].T, arrays[1].T, arrays[2].T), pixel[::-1]
        ranks, codes = ranks[::-1], codes[::-1]
    turn = tuple(slice(None, None, -1 if code in "SAR" else 1) for code in codes)
    across = _ACROSS[({0, 1, 2} - set(ranks)).pop()]
    title = f"{across}, {plane.title}" if plane.title else across
    letters = _SIDES[ranks[0]][0] + _SIDES[ranks[1]][0]
    return Plane(title, arrays[0][turn], arrays[1][turn], arrays[2][turn], pixel, letters)
