"""How intensities are normalised: one section per method.

A method is given by its name, `normalize: zscore`, or with its settings, `normalize: {name: asinh, softening: 3}`.
All but ct_window, anscombe and none take their parameters from each case: once, from the valid (finite) voxels of the
whole image. A constant channel then becomes zeros.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from densepred.config.base import Section

Percent = Annotated[float, Field(ge=0, le=100)]
Above = Annotated[float, Field(gt=0)]


class _PerCase(Section):
    """What all methods share that take their parameters from the case."""

    joint: bool | Literal["scale"] = False
    """Parameters per channel; `true`: one set for all channels, from all their voxels; `scale`: offsets per channel
    and one scale for all, the root mean square of theirs, so that colours are kept."""


class ZScore(_PerCase):
    """(x - mean) / standard deviation."""

    name: Literal["zscore"] = "zscore"


class Robust(_PerCase):
    """(x - median) / (interquartile range / 1.349): a few bright voxels do not move it."""

    name: Literal["robust"] = "robust"


class Background(_PerCase):
    """(x - B(x, y)) / sigma(x, y): the local background and its noise, as SExtractor estimates them; for wide fields.

    In 3D every plane has its own map.
    """

    name: Literal["background"] = "background"
    mesh: Annotated[int, Field(ge=8)] = 128
    """Side of a box, in pixels, about (boxes of equal size fill the image): larger than the objects, smaller than the
    structure of the background."""
    clip: Annotated[float, Field(ge=1)] = 3.0
    """Pixels further than so many standard deviations from the median of their box are left out, repeatedly."""


class Asinh(_PerCase):
    """asinh((x - b) / (a s)) / asinh(1 / a): linear near the background, logarithmic far above; keeps the sign.

    b is the median and s the interquartile range / 1.349 of the valid voxels.
    """

    name: Literal["asinh"] = "asinh"
    softening: Above = 1.0
    """a: where the linear part ends, in units of the noise s."""


class ZScale(_PerCase):
    """Linear, 0 and 1 at the limits that IRAF's zscale finds; values beyond them are not clipped."""

    name: Literal["zscale"] = "zscale"
    contrast: Annotated[float, Field(gt=0, le=1)] = 0.25
    """By this the slope of the sorted sample is divided; smaller makes the limits wider."""
    samples: Annotated[int, Field(ge=100)] = 1000
    """Voxels on a regular grid over the valid ones from which the limits are found."""


class Percentile(_PerCase):
    """Linear, 0 and 1 at two percentiles of the valid voxels."""

    name: Literal["percentile"] = "percentile"
    low: Percent = 0.5
    """Percentile that becomes 0."""
    high: Percent = 99.5
    """Percentile that becomes 1; 100 is the one brightest voxel."""
    clip: bool = True
    """Values beyond the percentiles become 0 or 1; this cannot be undone."""

    @model_validator(mode="after")
    def _ordered(self) -> Percentile:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class CTWindow(Section):
    """Clip to a window of HU, then (x - mean) / std, the same for every case, as nnU-Net normalises CT.

    What is left out is taken from the foreground of the training cases and kept with the model.
    """

    name: Literal["ct_window"] = "ct_window"
    low: float | None = None
    """Lower end of the window; by default the 0.5th percentile of the foreground."""
    high: float | None = None
    """Upper end of the window; by default the 99.5th percentile of the foreground."""
    mean: float | None = None
    """By default the mean of the foreground before clipping."""
    std: Above | None = None
    """By default the standard deviation of the foreground before clipping."""

    @model_validator(mode="after")
    def _ordered(self) -> CTWindow:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self

    @property
    def complete(self) -> bool:
        """Whether no number is left to be found."""
        return None not in (self.low, self.high, self.mean, self.std)


class Anscombe(Section):
    """2 sqrt(n + 3/8) of the counts n = gain (x - offset): Poisson noise becomes about 1; n below -3/8 gives 0."""

    name: Literal["anscombe"] = "anscombe"
    gain: Above = 1.0
    """Counts (electrons, photons) per unit of the image."""
    offset: float = 0.0
    """Value of the image at no counts, such as the bias level."""


class NoNormalization(Section):
    """The values as they are: for calibrated units."""

    name: Literal["none"] = "none"


PerCase = ZScore | Robust | Background | Asinh | ZScale | Percentile
"""Methods whose parameters are found in each case."""
_Any = Annotated[PerCase | CTWindow | Anscombe | NoNormalization, Field(discriminator="name")]
_Name = Literal["zscore", "robust", "background", "asinh", "zscale", "percentile", "ct_window", "anscombe", "none"]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Normalize = Annotated[_Any, BeforeValidator(_named, json_schema_input_type=_Any | _Name)]
"""One method, given by its name or as a mapping with `name`.

Example:
    >>> from pydantic import TypeAdapter
    >>> TypeAdapter(Normalize).validate_python("asinh").softening
    1.0
"""
