"""From a case to the arrays the network sees: normalised, resampled, labels as class indices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import EllipsisType

import numpy as np

from densepred.cases.case import Case
from densepred.cases.labels import IGNORE, map_labels
from densepred.cases.normalize import Fitted, fit
from densepred.cases.plan import Plan
from densepred.cases.quantiles import slab_thickness
from densepred.cases.resample import resample, resample_labels, resampled_shape
from densepred.cases.targets import Maps, open_maps, settled
from densepred.config import ValidityConfig
from densepred.errors import DensepredError, InputError
from densepred.volumes import GEOMETRY_TOLERANCE, Volume, corner_offset
from densepred.volumes.channels import sky_offset
from densepred.volumes.fits_header import WCS_TOLERANCE
from densepred.volumes.grid import Box
from densepred.volumes.volume import full_key, span

__all__ = [
    "NormalizedVolume",
    "grid_fault",
    "map_labels",
    "normalized",
    "open_image",
    "preprocess",
    "resample",
    "resample_labels",
    "resampled_shape",
    "slab_thickness",
]

Key = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def normalized(volume: Volume, plan: Plan) -> NormalizedVolume:
    """What the network sees of an image; its intensities are looked at once, slab by slab, and the file is verified.

    Raises:
        InputError: fewer valid pixels than the plan asks for.
    """
    validity, voxels = plan.reading.validity, int(np.prod(volume.shape[1:]))
    fitted = fit(volume, plan.normalize, median=validity.fill == "median")
    for channel, valid in enumerate(fitted.valid):
        if valid < validity.least * voxels:
            what = f"{voxels - valid} of {voxels} voxels of channel {channel} are invalid (NaN, infinite or masked)"
            fix = f"cut the image to its valid part, leave it out, or lower data.validity.least ({validity.least:g})"
            raise InputError(what, fix, volume.path)
    return NormalizedVolume(volume, fitted, validity)


class NormalizedVolume:
    """A lazy view of a volume with normalised float32 values, `(C, *spatial)`.

    Args:
        volume: the image, NaN or infinite where pixels do not count.
        fitted: what normalises it.
        validity: what stands at those pixels, and whether their map is one more channel.
        box: the part of the image that is the view, normalised as in the whole; all of it by default.

    Example:
        >>> volume = Volume.from_array(np.arange(8.0).reshape(2, 2, 2), (1.0, 1.0, 1.0))
        >>> NormalizedVolume(volume, fit(volume, [ZScore()]))[:, 0:1].shape
        (1, 1, 2, 2)
    """

    def __init__(
        self, volume: Volume, fitted: Fitted, validity: ValidityConfig | None = None, box: Box | None = None
    ) -> None:
        self.volume, self.fitted, self.validity = volume, fitted, validity or ValidityConfig()
        self.box = box or tuple((0, size) for size in volume.shape[1:])
        self.shape = (volume.shape[0] + self.validity.channel, *(stop - start for start, stop in self.box))
        self.spacing, self.dtype = volume.spacing, np.dtype(np.float32)

    def __getitem__(self, key: Key) -> np.ndarray:
        return self.read(key)[0]

    def read(self, key: Key) -> tuple[np.ndarray, np.ndarray | None]:
        """Normalised voxels, and which of them are valid in all channels (bool); None where integers always are."""
        first, *rest = full_key(key, self.shape)
        spans = [span(index, size) for index, size in zip(rest, self.shape[1:], strict=True)]
        inner = [index for _, _, index in spans]
        where = [slice(a + at, b + at) for (a, b, _), (at, _) in zip(spans, self.box, strict=True)]
        if self.validity.fill == "nearest":  # which may lie outside of what is asked for, in its row
            inner[-1] = _within(inner[-1], where[-1])
            where[-1] = slice(0, self.volume.shape[-1])
        values = self.volume[(slice(None), *where)]
        valid = np.isfinite(values).all(0) if values.dtype.kind == "f" else None
        out = self._filled(values, valid, tuple(where))
        return out[(first, *inner)], None if valid is None else valid[tuple(inner)]

    def cutout(self, box: Box) -> NormalizedVolume:
        """A part of the image, normalised as in the whole."""
        return NormalizedVolume(self.volume, self.fitted, self.validity, box)

    def _filled(self, values: np.ndarray, valid: np.ndarray | None, where: tuple[slice, ...]) -> np.ndarray:
        out = self.fitted.forward(values, where)
        if valid is not None and not valid.all():
            out = self.fitted.fill(out, self.validity.fill, where)
        if not self.validity.channel:
            return out
        plane = np.ones(out.shape[1:], np.float32) if valid is None else valid.astype(np.float32)
        return np.concatenate([out, plane[np.newaxis]])

    def slabs(self, thickness: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Read forward: yields `(z0, z1, slab)`, then verifies the file."""
        for start in range(0, self.shape[1], thickness):
            stop = min(start + thickness, self.shape[1])
            yield start, stop, self[:, start:stop]
        self.volume.verify()


def _within(index: int | slice, part: slice) -> int | slice:
    """`index` of a part of a row, as one of the whole row; spans have steps of 1 or are what is left of a slice."""
    if isinstance(index, int):
        return part.start + index
    places = range(part.start, part.stop)[index]
    stop: int | None = places[-1] + (1 if places.step > 0 else -1) if places else part.start
    return slice(places.start, None if stop is not None and stop < 0 else stop, places.step)


def open_image(case: Case, plan: Plan) -> Volume:
    """The image of a case with its channels `(C, *spatial)`; see `Reading.open_case`.

    Raises:
        InputError: another number of channels or axes than the plan's.
    """
    volume = plan.reading.open_case(case)
    check_image(volume, plan, case.id)
    return volume


def check_image(volume: Volume, plan: Plan, case: str | None = None, sliced: bool | None = None) -> None:
    """Refuse an image that the model was not made for.

    Args:
        volume: the image.
        plan: the model's.
        case: its id.
        sliced: in prediction, whether a 2D model may be given the planes of a volume.

    Raises:
        InputError: another number of channels or axes than the plan's.
    """
    by_planes = sliced is not None and (volume.dims, plan.dims) == (3, 2)
    if volume.dims != plan.dims and not (by_planes and sliced):
        what = f"{volume.dims} spatial axes, the model has {plan.dims}"
        fix = f"give images of {plan.dims} axes, or set model.dims"
        if by_planes:
            fix = "say inference.slices=0, 1 or 2 for its planes across that axis, or all; or give images of 2 axes"
        raise InputError(what, fix, volume.path, case)
    if volume.shape[0] != len(plan.image_channels):
        expected = f"{len(plan.image_channels)} channels [{', '.join(plan.image_channels)}]"
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
    offset = sky_offset(image, label)
    if not offset <= WCS_TOLERANCE:
        what = f"label and image lie {offset:.3g} pixels apart by their world coordinates (allowed: {WCS_TOLERANCE:g})"
        return what, "resample the label to the image's grid, or mend the header that is wrong"
    return None


def preprocess(case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of a case.

    Args:
        case: its files.
        plan: how to read them.

    Returns:
        The image, float32 `(C, *spatial)`, invalid voxels 0, and after it the maps of targets, where the case has any
        (see `densepred.cases.targets`); the label, int16 `(*spatial)` with -1 where there is no truth or where any
        channel is invalid, or None if the case has none.

    Raises:
        DensepredError: files that are damaged, do not belong together or do not fit the plan; it names the case.
    """
    try:
        with open_image(case, plan) as volume:
            label = _read_label(case, plan, volume) if case.label and plan.classes else None
            with open_maps(case, plan, volume) if case.maps else nullcontext() as maps:
                image = _read_image(volume, plan, label, maps)
            spacing = volume.spacing
    except DensepredError as error:
        raise error.of_case(case.id) from error
    if plan.spacing is not None:
        shape = resampled_shape(image.shape[1:], spacing, plan.spacing)
        image = settled(resample(image, shape), len(plan.maps) if case.maps else 0)
        label = None if label is None else resample_labels(label, shape)
    return image, label


def foreground(case: Case, plan: Plan, channel: int) -> Iterator[np.ndarray]:
    """The values of one channel, as in the file, in the voxels of all classes but the background; parts `(n,)`.

    Raises:
        DensepredError: as `preprocess`.
    """
    try:
        with open_image(case, plan) as volume:
            label = _read_label(case, plan, volume)
            for start, stop, slab in volume.slabs(slab_thickness(volume.shape)):
                yield slab[channel][label[start:stop] > 0]
    except DensepredError as error:
        raise error.of_case(case.id) from error


def _read_image(volume: Volume, plan: Plan, label: np.ndarray | None, maps: Maps | None) -> np.ndarray:
    """Normalised voxels, and the maps after them; where they are invalid `label` is set to -1."""
    source = normalized(volume, plan)
    channels = source.shape[0]
    image = np.empty((channels + (2 * len(plan.maps) if maps else 0), *source.shape[1:]), np.float32)
    thickness = slab_thickness(volume.shape)
    for start in range(0, volume.shape[1], thickness):
        stop = min(start + thickness, volume.shape[1])
        image[:channels, start:stop], valid = source.read((slice(None), slice(start, stop)))
        if label is not None and valid is not None:
            label[start:stop][~valid] = IGNORE
        if maps is not None:
            image[channels:, start:stop] = maps.planes(start, stop, valid)
    return image


def _read_label(case: Case, plan: Plan, image: Volume) -> np.ndarray:
    assert case.label is not None
    with plan.reading.open_plane(case.label) as label:
        fault = grid_fault(image, label)
        if fault is not None:
            raise InputError(*fault, case.label, case.id)
        return map_labels(label.numpy()[0], plan, case)
