"""From a case to the arrays the network sees: normalised, resampled, labels as class indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np

from densepred.cases.case import Case
from densepred.cases.labels import IGNORE, map_labels, unknown_of
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

if TYPE_CHECKING:
    pass

__all__ = [
    "NormalizedVolume",
    "Prepared",
    "grid_fault",
    "map_labels",
    "normalized",
    "open_image",
    "prepared",
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
    if plan.slices is not None and volume.dims != plan.image_dims:
        what = f"{volume.dims} spatial axes, and patch.axis is for volumes, which have {plan.image_dims}"
        raise InputError(what, "leave out patch.axis, or give volumes", volume.path, case.id)
    check_image(volume, plan, case.id, None if plan.slices is None else True)
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


Sink = Callable[[np.ndarray], object]
"""Takes planes in order."""


class Prepared:
    """An opened case whose arrays come out plane by plane; a few megabytes of it are in memory, whatever its size.

    Args:
        image: as the network sees it, but for its grid.
        label: on the same grid, or None.
        plan: says how values become classes and to which spacing all is resampled.
        case: for messages.
        maps: of targets, whose planes follow those of the image, or None.

    Attributes:
        shape: of the image that comes out with these, `(C, *spatial)`.
        spacing: of its voxels.
    """

    def __init__(
        self, image: NormalizedVolume, label: Volume | None, plan: Plan, case: Case, maps: Maps | None = None
    ) -> None:
        self._image, self._label, self._plan, self._case, self._maps = image, label, plan, case, maps
        self._target = target_spacing(plan, image.spacing)
        self.spacing = self._target or image.spacing
        spatial = image.shape[1:]
        if self._target is not None:
            spatial = resampled_shape(spatial, image.spacing, self._target)
        self.shape = (image.shape[0] + (len(plan.truth_channels) if maps else 0), *spatial)

    def write(self, image: Sink, label: Sink) -> None:
        """Give out all planes: of the image float32 `(C, n, *rest)`, of the label int16 `(n, *rest)`.

        Where voxels are not told apart, the label is 0 where the image is valid.

        Raises:
            InputError: damaged files, or label values that no class has.
        """
        if self.shape[1:] != self._image.shape[1:]:
            image, label = self._resampling(image, label)
        thickness = slab_thickness(self._image.shape)
        slabs = None if self._label is None else self._label.slabs(thickness)
        for start in range(0, self._image.shape[1], thickness):
            stop = min(start + thickness, self._image.shape[1])
            values, valid = self._image.read((slice(None), slice(start, stop)))
            image(values if self._maps is None else np.concatenate([values, self._maps.planes(start, stop, valid)]))
            if not self._plan.classes:
                label(
                    np.zeros(values.shape[1:], np.int16)
                    if valid is None
                    else np.where(valid, 0, IGNORE).astype(np.int16)
                )
            if slabs is not None:
                assert self._label is not None
                classes = _classes(next(slabs)[2][0], self._label, self._plan, self._case)
                if valid is not None:
                    classes[~valid] = IGNORE
                label(classes)
        if slabs is not None:
            next(slabs, None)  # which verifies the file

    def _resampling(self, image: Sink, label: Sink) -> tuple[Sink, Sink]:
        """What takes planes on the grid of the files, and gives them on to these on the new one."""
        import torch  # takes a second; checking files needs none of it

        from densepred.cases.regrid import Regrid, kernels_for
        from densepred.cases.relabel import Relabel

        assert self._target is not None
        grids = (self._image.shape[1:], self.shape[1:])
        spacings = (self._plan.resampling, self._image.spacing, self._target)
        regrid = Regrid(*grids, kernels=kernels_for(*spacings))
        relabel = Relabel(*grids, kernels_for(*spacings, labels=True))

        def of_image(planes: np.ndarray) -> None:
            most = regrid.piece(len(planes))
            for start in range(0, planes.shape[1], most):
                regrid.add(torch.from_numpy(np.require(planes[:, start : start + most], np.float32, ["C", "W"])))
                if regrid.done < regrid.ready:
                    image(settled(regrid.take(regrid.ready).numpy(), 0 if self._maps is None else len(self._plan.maps)))

        def of_label(planes: np.ndarray) -> None:
            relabel.add(planes)
            if relabel.done < relabel.ready:
                label(relabel.take(relabel.ready))

        return of_image, of_label


def target_spacing(plan: Plan, spacing: Sequence[float]) -> tuple[float, ...] | None:
    """The spacing that an image is resampled to; None: its own. Across planes nothing is."""
    if plan.spacing is None or plan.slices is None:
        return plan.spacing
    assert plan.slices != "all"
    return (*plan.spacing[: plan.slices], spacing[plan.slices], *plan.spacing[plan.slices :])


@contextmanager
def prepared(case: Case, plan: Plan) -> Iterator[Prepared]:
    """Open a case, look once at its intensities, and check that its files belong together.

    Raises:
        DensepredError: files that are damaged, do not belong together or do not fit the plan; it names the case.
    """
    try:
        with ExitStack() as stack:
            volume = stack.enter_context(open_image(case, plan))
            label = maps = None
            if case.maps:
                maps = stack.enter_context(open_maps(case, plan, volume))
            if case.label is not None and plan.classes:
                label = stack.enter_context(plan.reading.open_plane(case.label))
                _check_grids(volume, label, case)
            yield Prepared(normalized(volume, plan), label, plan, case, maps)
    except DensepredError as error:
        raise error.of_case(case.id) from error


def preprocess(case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of a case, whole in memory.

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
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    with prepared(case, plan) as one:
        one.write(images.append, labels.append)
    return np.concatenate(images, 1), np.concatenate(labels) if labels else None


def foreground(case: Case, plan: Plan, channel: int) -> Iterator[np.ndarray]:
    """The values of one channel, as in the file, in the voxels of all classes but the background; parts `(n,)`.

    Raises:
        DensepredError: as `preprocess`.
    """
    try:
        with open_image(case, plan) as volume:
            assert case.label is not None
            with plan.reading.open_plane(case.label) as label:
                _check_grids(volume, label, case)
                thickness = slab_thickness(volume.shape)
                for (*_, values), (*_, truth) in zip(volume.slabs(thickness), label.slabs(thickness), strict=True):
                    yield values[channel][_classes(truth[0], label, plan, case) > 0]
    except DensepredError as error:
        raise error.of_case(case.id) from error


def _check_grids(image: Volume, label: Volume, case: Case) -> None:
    fault = grid_fault(image, label)
    if fault is not None:
        raise InputError(*fault, case.label, case.id)


def _classes(values: np.ndarray, label: Volume, plan: Plan, case: Case) -> np.ndarray:
    """Class indices of a part of a label; of values without a class the error gives the counts in the whole."""
    try:
        return map_labels(values, plan, case)
    except InputError as error:
        parts = (slab[0] for *_, slab in label.slabs(slab_thickness(label.shape)))
        raise unknown_of(parts, plan, case) from error
