"""The plan: what prediction must know of the training data. It travels in the run directory as `plan.json`."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from densepred import __version__
from densepred.cases.case import Case
from densepred.cases.names import channel_names, class_names, ignored_values
from densepred.config import Config, Section
from densepred.config.base import Axes
from densepred.errors import DensepredError, InputError
from densepred.files import atomic_write
from densepred.volumes import open_volume, stack

FORMAT_VERSION = 1


class Plan(Section):
    """How files become the arrays that the network sees, and what its outputs mean."""

    format_version: int = FORMAT_VERSION
    """Form of this file; newer ones are refused."""
    densepred_version: str = ""
    """The version that made it."""
    dims: Literal[2, 3]
    """Spatial dimensions."""
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the input channels in their order."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Class names by index, background first."""
    values: tuple[int, ...]
    """The label value that is written for each class."""
    label_map: dict[int, int]
    """Label value in the files -> class index."""
    ignore: tuple[int, ...] = ()
    """Label values without a truth."""
    spacing: tuple[float, ...] | None = None
    """Voxel spacing of the network's input, slowest axis first; None: as the file."""
    typical_spacing: tuple[float, ...] | None = None
    """Median voxel spacing of the training cases as the network sees them, by which augmentation keeps shapes rigid."""
    normalize: Literal["zscore", "none"] = "zscore"
    """Intensities: per case and channel to mean 0 and variance 1, or as they are."""
    axes: Axes | None = None
    """Meaning of the axes of 4D NIfTI files."""

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(self.values) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but {len(self.values)} values")
        if any(self.label_map.get(value) != index for index, value in enumerate(self.values)):
            raise ValueError(f"label_map {self.label_map} does not lead from values {self.values} to 0, 1, ...")
        if not set(self.label_map.values()) <= set(range(len(self.classes))):
            raise ValueError(f"label_map {self.label_map} leads beyond the {len(self.classes)} classes")
        if self.spacing is not None and (len(self.spacing) != self.dims or not min(self.spacing) > 0):
            raise ValueError(f"spacing {self.spacing} is not {self.dims} positive numbers")
        return self

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
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'plan'}: {e['msg']}" for e in error.errors())
            raise InputError(f"no valid plan: {faults}", "restore the file from the run's backup", path) from error


def make_plan(config: Config, cases: list[Case]) -> Plan:
    """The plan of a training.

    Args:
        config: the recipe.
        cases: the training cases; their headers give the number of channels and the median spacing.

    Raises:
        InputError: classes are not named, or the names of the channels do not fit the files.
    """
    data, dims = config.data, config.model.dims
    names = class_names(data)
    if len(set(names.values())) < 2:
        fix = "name them, say data.classes={0: background, 1: lesion}; densepred check lists the values in the files"
        raise InputError(f"{len(set(names.values()))} classes are named, at least 2 are needed", fix)
    if not cases:
        raise InputError("no training case", "choose other folds, or add cases")
    classes, values, label_map = index_classes(names)
    median = median_spacing(cases, data.axes, dims)
    spacing = median if data.spacing == "median" else data.spacing
    return Plan(
        densepred_version=__version__,
        dims=dims,
        channels=_channels(channel_names(data), cases, data.axes),
        classes=classes,
        values=values,
        label_map=label_map,
        ignore=ignored_values(data),
        spacing=spacing,
        typical_spacing=spacing or median,
        normalize=data.normalize,
        axes=data.axes,
    )


def index_classes(names: Mapping[int, str]) -> tuple[tuple[str, ...], tuple[int, ...], dict[int, int]]:
    """Class names in the order of their first value, that value, and value -> index; values of one name are one class.

    Example:
        >>> index_classes({0: "background", 2: "kidney", 7: "kidney"})
        (('background', 'kidney'), (0, 2), {0: 0, 2: 1, 7: 1})
    """
    classes = tuple(dict.fromkeys(names.values()))
    values = tuple(next(value for value, name in names.items() if name == wanted) for wanted in classes)
    return classes, values, {value: classes.index(name) for value, name in names.items()}


def median_spacing(cases: list[Case], axes: str | None, dims: int) -> tuple[float, ...]:
    """The median over the cases along each axis, from their headers.

    Cases that cannot be opened are left out, as preparing them names each; only if all are so is it an error here.
    """
    spacings: list[tuple[float, ...]] = []
    fault: DensepredError | None = None
    for case in cases:
        try:
            with open_volume(case.images[0], axes) as volume:
                if volume.dims != dims:
                    what = f"{volume.dims} spatial axes, but model.dims is {dims}"
                    raise InputError(what, "set model.dims to the images' own", case.images[0], case.id)
                spacings.append(volume.spacing)
        except DensepredError as error:
            fault = error
    if fault is not None and not spacings:
        raise fault
    return tuple(statistics.median(sizes) for sizes in zip(*spacings, strict=True))


def _channels(names: tuple[str, ...], cases: list[Case], axes: str | None) -> tuple[str, ...]:
    """The names of the channels, as many as the first case has that can be opened."""
    for case in cases:
        with contextlib.suppress(DensepredError), stack([open_volume(path, axes) for path in case.images]) as volume:
            count = volume.shape[0]
            break
    else:
        raise InputError("no training case can be opened", "densepred check lists the faults", case=cases[0].id)
    if names and len(names) != count:
        what = f"{count} channels, but {len(names)} are named: {', '.join(names)}"
        raise InputError(what, "name each channel once", case.images[0], case.id)
    return names or tuple(f"channel {number}" for number in range(count))
