"""What the sections of a recipe are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Axes = Literal["xyz", "xyzc", "xyzt", "yx", "yxc", "zyx", "cyx", "czyx"]
"""The axes of a file: in NIfTI's own order (x first), in all others' as the array is stored (slowest first)."""
Positive = Annotated[int, Field(gt=0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
PerStage = Annotated[tuple[Positive | Annotated[tuple[Positive, ...], Field(strict=False)], ...], Field(strict=False)]
"""One number, or one number per axis, for each stage."""
Range = Annotated[tuple[float, float], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
