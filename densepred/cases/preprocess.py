"""From a case to the arrays the network sees: normalised, resampled, labels as class indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

from densepred.cases.case import Case
from densepred.cases.labels import IGNORE, map_labels
from densepred.cases.plan import Plan
from densepred.cases.resample import resample, resample_labels, resampled_shape
from densepred.errors import DensepredError, InputError
from densepred.volumes import GEOMETRY_TOLERANCE, Volume, corner_offset, open_volume, stack
from densepred.volumes.volume import full_key

__all__ = [
    "NormalizedVolume",
    "Statistics",
    "grid_fault",
    "map_labels",
    "open_image",
    "preprocess",
    "resample",
    "resample_labels",
    "resampled_shape",
    "slab_thickness",
    "statistics",
]

MIN_VALID = 0.5
"""Share of a channel's voxels that must be finite."""
_CONSTANT = 1e-12  # a deviation below this share of the mean is rounding
_SLAB_VOXELS = 1 << 21

Key = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True)
class Statistics:
    """Of each channel: mean and standard deviation of its finite voxels, and how many they are."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    valid: tuple[int, ...]


def statistics(volume: Volume, normalize: str = "zscore") -> Statistics:
    """One pass over a volume, slab by slab in float64, on finite voxels; the file is verified on the way.

    Args:
        volume: `(C, *spatial)`.
        normalize: "zscore", or "none", which gives mean 0 and deviation 1.

    Raises:
        InputError: fewer than half of a channel's voxels are finite, or values too large to square.

    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    if normalize not in ("zscore", "none"):
        raise ValueError(f"normalize must be zscore or none, got {normalize!r}")
    channels = volume.shape[0]
    count, mean, square = (np.zeros(channels) for _ in range(3))
    for _, _, slab in volume.slabs(slab_thickness(volume.shape)):
        for channel in range(channels):
            values = slab[channel].astype(np.float64).ravel()
            values = values[np.isfinite(values)]
            if values.size:
                total, delta = count[channel] + values.size, values.mean() - mean[channel]
                with np.errstate(over="ignore", invalid="ignore"):
                    square[channel] += np.square(values - values.mean()).sum()
                    square[channel] += delta**2 * count[channel] * values.size / total
                mean[channel] += delta * values.size / total
                count[channel] = total
    voxels = int(np.prod(volume.shape[1:]))
    _check_valid(count, square, voxels, volume)
    if normalize == "none":
        mean, square = np.zeros(channels), count
    std = np.sqrt(square / count)
    std[std <= _CONSTANT * np.abs(mean)] = 0
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()), tuple(count.astype(int).tolist()))


def _check_valid(count: np.ndarray, square: np.ndarray, voxels: int, volume: Volume) -> None:
    for channel, valid in enumerate(count):
        if valid == 0 or valid < MIN_VALID * voxels:
            what = f"{voxels - int(valid)} of {voxels} voxels of channel {channel} are NaN or infinite"
            raise InputError(what, "cut the image to its valid part, or leave the case out", volume.path)
        if not np.isfinite(square[channel]):
            raise InputError(f"values of channel {channel} are too large (over 1e150)", "rescale it", volume.path)


def slab_thickness(shape: tuple[int, ...]) -> int:
    """Planes of a volume `(C, *spatial)` that fill a few megabytes."""
    return max(1, _SLAB_VOXELS * shape[1] // int(np.prod(shape)))


class NormalizedVolume:
    """A lazy view of a volume with normalised float32 values.

    NaN and infinite voxels give 0, and a constant channel gives zeros.

    Example:
        >>> volume = Volume.from_array(np.arange(8.0).reshape(2, 2, 2), (1.0, 1.0, 1.0))
        >>> NormalizedVolume(volume, statistics(volume))[:, 0:1].shape
        (1, 1, 2, 2)
    """

    def __init__(self, volume: Volume, statistics: Statistics) -> None:
        if len(statistics.mean) != volume.shape[0]:
            raise ValueError(f"statistics are of {len(statistics.mean)} channels, the volume has {volume.shape[0]}")
        self.volume, self.statistics = volume, statistics
        self.shape, self.spacing, self.dtype = volume.shape, volume.spacing, np.dtype(np.float32)
        self._mean = np.array(statistics.mean)
        self._factor = np.array([1 / std if std > 0 else 0.0 for std in statistics.std])

    def __getitem__(self, key: Key) -> np.ndarray:
        values = self.volume[key]
        return self.apply(values, full_key(key, self.shape)[0])

    def apply(self, values: np.ndarray, channel: int | slice = slice(None)) -> np.ndarray:
        """Normalise voxels that were read already, `(C, ...)`, or those of one channel."""
        mean, factor = np.atleast_1d(self._mean[channel]), np.atleast_1d(self._factor[channel])
        planes = values if isinstance(channel, slice) else values[np.newaxis]
        out = np.empty(planes.shape, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for index in np.ndindex(planes.shape[:2]):  # plane by plane, for the memory's sake
                out[index] = (planes[index] - mean[index[0]]) * factor[index[0]]
        if values.dtype.kind == "f":
            out[~np.isfinite(planes)] = 0
        return out.reshape(values.shape)

    def slabs(self, thickness: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Read forward: yields `(z0, z1, slab)`, then verifies the file."""
        for start in range(0, self.shape[1], thickness):
            stop = min(start + thickness, self.shape[1])
            yield start, stop, self[:, start:stop]
        self.volume.verify()


def open_image(case: Case, plan: Plan) -> Volume:
    """The image of a case with its channels `(C, *spatial)`.

    Raises:
        InputError: another number of channels or axes than the plan's.
    """
    volume = stack([open_volume(path, plan.axes) for path in case.images])
    check_image(volume, plan, case.id)
    return volume


def check_image(volume: Volume, plan: Plan, case: str | None = None) -> None:
    """Refuse an image that the model was not made for.

    Raises:
        InputError: another number of channels or axes than the plan's.
    """
    if volume.dims != plan.dims:
        what = f"{volume.dims} spatial axes, the model has {plan.dims}"
        raise InputError(what, f"give images of {plan.dims} axes, or set model.dims", volume.path, case)
    if volume.shape[0] != len(plan.channels):
        expected = f"{len(plan.channels)} channels [{', '.join(plan.channels)}]"
        what = f"the model expects {expected}, here are {volume.shape[0]}"
        raise InputError(what, "give the same channels in the same order", volume.path, case)


def grid_fault(image: Volume, label: Volume) -> tuple[str, str] | None:
    """What is wrong between an image and its label, and what to do; None where they lie on one grid."""
    if label.shape[0] != 1:
        return f"a label with {label.shape[0]} channels", "give one channel of class values"
    if label.shape[1:] != image.shape[1:]:
        return f"shape {label.shape[1:]}, but the image has {image.shape[1:]}", "resample the label to the image's grid"
    offset = corner_offset(image, label)
    if not offset <= GEOMETRY_TOLERANCE:
        what = f"the corners of label and image lie {offset:.3g} voxels apart (allowed: {GEOMETRY_TOLERANCE:g})"
        return what, "resample the label to the image's grid, or mend the header that is wrong"
    return None


def preprocess(case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of a case.

    Args:
        case: its files.
        plan: how to read them.

    Returns:
        The image, float32 `(C, *spatial)`, invalid voxels 0; the label, int16 `(*spatial)` with -1 where there is no
        truth or where any channel is invalid, or None if the case has none.

    Raises:
        DensepredError: files that are damaged, do not belong together or do not fit the plan; it names the case.
    """
    try:
        with open_image(case, plan) as volume:
            label = _read_label(case, plan, volume) if case.label else None
            image = _read_image(volume, plan, label)
            spacing = volume.spacing
    except DensepredError as error:
        raise error.of_case(case.id) from error
    if plan.spacing is not None:
        shape = resampled_shape(image.shape[1:], spacing, plan.spacing)
        image = resample(image, shape)
        label = None if label is None else resample_labels(label, shape)
    return image, label


def _read_image(volume: Volume, plan: Plan, label: np.ndarray | None) -> np.ndarray:
    """Normalised voxels; `label` is set to -1 where they are invalid."""
    found = statistics(volume, plan.normalize)
    normalized, voxels = NormalizedVolume(volume, found), int(np.prod(volume.shape[1:]))
    image = np.empty(volume.shape, np.float32)
    for start, stop, slab in volume.slabs(slab_thickness(volume.shape)):
        image[:, start:stop] = normalized.apply(slab)
        if label is not None and min(found.valid) < voxels:
            label[start:stop][~np.isfinite(slab).all(0)] = IGNORE
    return image


def _read_label(case: Case, plan: Plan, image: Volume) -> np.ndarray:
    assert case.label is not None
    with open_volume(case.label) as label:
        fault = grid_fault(image, label)
        if fault is not None:
            raise InputError(*fault, case.label, case.id)
        return map_labels(label.numpy()[0], plan, case)
