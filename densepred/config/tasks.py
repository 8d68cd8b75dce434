"""What is learnt besides label maps: the targets of the data section, and the section heads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from densepred.config.base import Positive, Section


class TargetConfig(Section):
    """Something to predict besides the classes of `data.labels`: a map of numbers, or a column of `data.table`."""

    file: str | None = None
    """Pattern of the maps with `{id}`: a number for each voxel of the image, NaN where it is not known."""
    column: str | None = None
    """Instead: a column of `data.table`, a value for each image; an empty cell is not known."""
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2)] | Literal["auto"] | None = None
    """Of a column that holds classes their names, as they stand there; `auto` for those of the training cases."""
    unit: str = ""
    """What the numbers are measured in; it is written beside predictions."""
    standardize: bool = True
    """Learn numbers less the mean, over the deviation, of the training cases; predictions are in the unit again."""
    mean: float | None = None
    """Instead of that of the training cases, together with `deviation`."""
    deviation: Annotated[float, Field(gt=0)] | None = None
    """Likewise."""


class StandardConfig(Section):
    """What makes a covariate standard, instead of what the training cases give."""

    mean: float
    """Is taken from the number."""
    deviation: Annotated[float, Field(gt=0)]
    """The rest is divided by it."""


def named(value: Any) -> Any:
    """A list of names as a mapping of them to nothing.

    Example:
        >>> named(["age", "sex"])
        {'age': None, 'sex': None}
    """
    names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return dict.fromkeys(value) if names else value


class HeadConfig(Section):
    """How one target is predicted, and how much it counts."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of its loss in the sum over all heads."""
    loss: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of its terms: mean_squared, mean_absolute, huber, gaussian_nll or cross_entropy; by default the usual."""
    positive: bool = False
    """Numbers above zero only."""
    variance: bool = False
    """Predict the noise too, of each number its variance (loss gaussian_nll)."""
    hidden: Positive = 32
    """Width of the small network that sees the covariates."""


SEGMENTATION = "segmentation"
"""Name of the head that learns `data.labels`."""
LOSSES = {
    "regression": ("mean_squared", "mean_absolute", "huber", "gaussian_nll"),
    "scalar": ("mean_squared", "mean_absolute", "huber", "gaussian_nll"),
    "classification": ("cross_entropy",),
    "segmentation": (),
}
"""What `heads.NAME.loss` may name, by the kind of the target; that of the segmentation is the section loss."""


def kind_of(target: TargetConfig) -> Literal["regression", "classification", "scalar"]:
    """What a target is: a map of numbers, a class or a number for the whole image.

    Example:
        >>> kind_of(TargetConfig(column="age"))
        'scalar'
    """
    if target.file is not None:
        return "regression"
    return "scalar" if target.classes is None else "classification"
