"""The plan: what prediction must know of the training data. It travels in the run directory as `plan.json`."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from densepred import __version__
from densepred.cases.case import Case
from densepred.cases.names import channel_names, class_names, ignored_values
from densepred.cases.normalize import fit_dataset
from densepred.cases.reading import VALIDITY, Reading
from densepred.cases.targets import Covariate, Target, make_covariates, make_targets
from densepred.config import Config, DataConfig, Section
from densepred.config.data import ChannelConfig, Resampling
from densepred.config.normalize import CTWindow, NoNormalization, Normalize
from densepred.config.tasks import kind_of
from densepred.errors import DensepredError, InputError
from densepred.files import atomic_write

FORMAT_VERSION = 3
"""2: `reading`, and `normalize` for each channel. 3: `targets`, `covariates`, `regions`, `instances`; no classes."""


class Plan(Section):
    """How files become the arrays that the network sees, and what its outputs mean."""

    format_version: int = FORMAT_VERSION
    """Form of this file; newer ones are refused."""
    densepred_version: str = ""
    """The version that made it."""
    dims: Literal[2, 3]
    """Spatial dimensions."""
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the network's input channels in their order; the validity, where it is one, is the last."""
    classes: tuple[str, ...]
    """Class names by index, background first; none where voxels are not told apart."""
    values: tuple[int, ...]
    """The label value that is written for each class."""
    label_map: dict[int, int]
    """Label value in the files -> class index."""
    ignore: tuple[int, ...] = ()
    """Label values without a truth."""
    instances: bool = False
    """Labels number objects: every value above 0 is class 1."""
    regions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Regions that are predicted instead of the classes: name -> the indices of the classes it is made of."""
    targets: dict[str, Target] = Field(default_factory=dict)
    """What is predicted besides the classes."""
    covariates: tuple[Covariate, ...] = ()
    """Numbers of a table that the network sees beside the image, in their order."""
    spacing: tuple[float, ...] | None = None
    """Voxel spacing of the network's input, slowest axis first; None: as the file."""
    typical_spacing: tuple[float, ...] | None = None
    """Median voxel spacing of the training cases as the network sees them, by which augmentation keeps shapes rigid."""
    resampling: Resampling = "linear"
    """How images get to `spacing`, and results back."""
    slices: Literal[0, 1, 2, "all"] | None = None
    """A model of planes learnt from volumes: the axis that the planes lie across, or all; None: from images."""
    normalize: Annotated[tuple[Normalize, ...], Field(strict=False)]
    """For each channel of the images how intensities are normalised, with what was fitted to the training cases."""
    reading: Reading = Reading()
    """How files become images."""

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(self.classes) < 2 and (self.classes or not self.targets):
            raise ValueError(f"{len(self.classes)} classes, at least 2 are needed")
        if len(self.values) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but {len(self.values)} values")
        if any(self.label_map.get(value) != index for index, value in enumerate(self.values)):
            raise ValueError(f"label_map {self.label_map} does not lead from values {self.values} to 0, 1, ...")
        if not set(self.label_map.values()) <= set(range(len(self.classes))):
            raise ValueError(f"label_map {self.label_map} leads beyond the {len(self.classes)} classes")
        if self.spacing is not None and (len(self.spacing) != self.dims or not min(self.spacing) > 0):
            raise ValueError(f"spacing {self.spacing} is not {self.dims} positive numbers")
        if self.slices is not None and self.dims != 2:
            raise ValueError(f"slices {self.slices}, but a model of {self.dims} axes")
        if len(self.normalize) != len(self.image_channels):
            raise ValueError(f"{len(self.normalize)} normalisations for {len(self.image_channels)} channels")
        return self

    @property
    def image_channels(self) -> tuple[str, ...]:
        """The channels that come from files: all but the validity."""
        return self.channels[: len(self.channels) - self.reading.validity.channel]

    @property
    def image_dims(self) -> int:
        """The spatial axes of the images: one more than the model's where it learns from planes of volumes."""
        return self.dims if self.slices is None else self.dims + 1

    @property
    def flag_channels(self) -> tuple[int, ...]:
        """The channels that hold ones and zeros rather than intensities: planes of flags, and the validity."""
        flags = [index for index, bits in enumerate(self.reading.bits) if bits]
        return (*flags, *range(len(self.image_channels), len(self.channels)))

    @property
    def maps(self) -> tuple[str, ...]:
        """The targets that are maps of numbers."""
        return tuple(name for name, target in self.targets.items() if target.kind == "regression")

    @property
    def truth_channels(self) -> tuple[int, ...]:
        """The channels of a prepared case after the image's: of each map the numbers, and where they are known."""
        return tuple(range(len(self.channels), len(self.channels) + 2 * len(self.maps)))

    @property
    def invalid(self) -> int:
        """The label value that is written where a pixel is invalid: the first ignored one, else the background's."""
        return (*self.ignore, *self.values, 0)[0]

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            InputError: unreadable, of a newer format, or inconsistent.
        """
        try:
            text = Path(path).read_text("utf-8")
            content = json.loads(text)
            made = content["format_version"]
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", "give the folder of a training run", path) from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("no plan of a training", "restore the file from the run's backup", path) from error
        if not isinstance(made, int) or made > FORMAT_VERSION:
            by = content.get("densepred_version") or "a newer densepred"
            what = f"made in format {made} by {by}; this version reads up to {FORMAT_VERSION}"
            raise InputError(what, "upgrade densepred", path)
        try:
            return cls.model_validate_json(json.dumps(_of_format_1(content) if made < 2 else content))
        except (KeyError, TypeError) as error:
            raise InputError(f"no valid plan: {error}", "restore the file from the run's backup", path) from error
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'plan'}: {e['msg']}" for e in error.errors())
            raise InputError(f"no valid plan: {faults}", "restore the file from the run's backup", path) from error


def _of_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had one normalisation for all channels, and axes for all of `reading`."""
    new = {key: value for key, value in content.items() if key != "axes"}
    one = content.get("normalize", "zscore")
    reading = {"axes": content.get("axes")}
    return new | {"normalize": [one] * len(content["channels"]), "reading": reading, "format_version": FORMAT_VERSION}


def make_plan(config: Config, cases: list[Case]) -> Plan:
    """The plan of a training.

    Args:
        config: the recipe.
        cases: the training cases; their headers give the number of channels and the median spacing.

    Raises:
        InputError: classes are not named, or the names of the channels do not fit the files.
    """
    data, dims = config.data, config.model.dims
    names = class_names(data) if data.segments else {}
    if data.segments and len(set(names.values())) < 2:
        fix = "name them, say data.classes={0: background, 1: lesion}; densepred check lists the values in the files"
        raise InputError(f"{len(set(names.values()))} classes are named, at least 2 are needed", fix)
    if not cases:
        raise InputError("no training case", "choose other folds, or add cases")
    classes, values, label_map = index_classes(names)
    reading = Reading.of(data)
    slices = config.patch.axis
    median = _of_planes(median_spacing(cases, reading, dims + (slices is not None)), slices)
    spacing = median if data.spacing == "median" else data.spacing
    channels = _channels(channel_names(data), cases, reading)
    plan = Plan(
        densepred_version=__version__,
        dims=dims,
        channels=(*channels, *([VALIDITY] if data.validity.channel else [])),
        classes=classes,
        values=values,
        label_map=label_map,
        ignore=ignored_values(data) if data.segments else (),
        instances=data.instances,
        regions=_regions(data, classes),
        targets={name: Target(kind=kind_of(target)) for name, target in data.targets.items()},
        spacing=spacing,
        typical_spacing=spacing or median,
        resampling=data.resampling,
        slices=slices,
        normalize=_normalizations(data, len(channels)),
        reading=reading,
    )
    found = {"targets": make_targets(config, plan, cases), "covariates": make_covariates(data, cases)}
    return plan.model_copy(update={"normalize": _fitted(plan, cases), **found})


def _regions(data: DataConfig, classes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    for name, members in data.regions.items():
        strange = [one for one in members if one not in classes]
        if strange:
            what = f"the region {name} is made of {', '.join(strange)}, but the classes are {', '.join(classes)}"
            raise InputError(what, "name classes in data.regions as they stand in data.classes or the list")
    return {name: tuple(map(classes.index, members)) for name, members in data.regions.items()}


def _of_planes(spacing: tuple[float, ...], slices: int | str | None) -> tuple[float, ...] | None:
    """The spacing in the planes across an axis; across all there is not one."""
    if slices is None or slices == "all":
        return spacing if slices is None else None
    return tuple(size for axis, size in enumerate(spacing) if axis != slices)


def _fitted(plan: Plan, cases: Sequence[Case]) -> tuple[Normalize, ...]:
    """The normalisations with what they take from the training set: the intensities of its foreground."""
    from densepred.cases.preprocess import foreground

    def values(channel: int) -> Iterator[np.ndarray]:
        return (part for case in cases for part in foreground(case, plan, channel))

    found: list[Normalize] = []
    for channel, one in enumerate(plan.normalize):
        found.append(fit_dataset(one, partial(values, channel)) if isinstance(one, CTWindow) else one)
    return tuple(found)


def _normalizations(data: DataConfig, channels: int) -> tuple[Normalize, ...]:
    """Each channel's: its own, none for planes of flags, or that of all."""
    if not isinstance(data.images, dict):
        return (data.normalize,) * channels
    of_flags = NoNormalization()
    named = [one if isinstance(one, ChannelConfig) else ChannelConfig(file=one) for one in data.images.values()]
    return tuple(one.normalize or (of_flags if one.bits else data.normalize) for one in named)


def index_classes(names: Mapping[int, str]) -> tuple[tuple[str, ...], tuple[int, ...], dict[int, int]]:
    """Class names in the order of their first value, that value, and value -> index; values of one name are one class.

    Example:
        >>> index_classes({0: "background", 2: "kidney", 7: "kidney"})
        (('background', 'kidney'), (0, 2), {0: 0, 2: 1, 7: 1})
    """
    classes = tuple(dict.fromkeys(names.values()))
    values = tuple(next(value for value, name in names.items() if name == wanted) for wanted in classes)
    return classes, values, {value: classes.index(name) for value, name in names.items()}


def median_spacing(cases: list[Case], reading: Reading, dims: int) -> tuple[float, ...]:
    """The median over the cases along each axis, from their headers.

    Cases that cannot be opened are left out, as preparing them names each; only if all are so is it an error here.
    """
    spacings: list[tuple[float, ...]] = []
    fault: DensepredError | None = None
    for case in cases:
        try:
            with reading.open(case.images[0]) as volume:
                if volume.dims != dims:
                    what = f"{volume.dims} spatial axes, but model.dims is {dims}"
                    raise InputError(what, "set model.dims to the images' own", case.images[0], case.id)
                spacings.append(volume.spacing)
        except DensepredError as error:
            fault = error
    if fault is not None and not spacings:
        raise fault
    return tuple(statistics.median(sizes) for sizes in zip(*spacings, strict=True))


def _channels(names: tuple[str, ...], cases: list[Case], reading: Reading) -> tuple[str, ...]:
    """The names of the channels, as many as the first case has that can be opened."""
    for case in cases:
        with contextlib.suppress(DensepredError), reading.open_case(case) as volume:
            count = volume.shape[0]
            break
    else:
        raise InputError("no training case can be opened", "densepred check lists the faults", case=cases[0].id)
    if names and len(names) != count:
        what = f"{count} channels, but {len(names)} are named: {', '.join(names)}"
        raise InputError(what, "name each channel once", case.images[0], case.id)
    return names or tuple(f"channel {number}" for number in range(count))
