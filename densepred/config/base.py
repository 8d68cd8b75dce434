"""What the sections of a recipe are made of."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Axes = Literal["xyz", "xyzc", "xyzt", "yx", "yxc", "zyx", "cyx", "czyx", "zcyx", "zyxc"]
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

    @classmethod
    def inside(cls, key: int | str) -> type[Section] | None:
        """The section below a key, for naming the places of faults; None where the key holds a plain value."""
        field = cls.model_fields.get(str(key))
        kind = field.annotation if field else None
        return kind if isinstance(kind, type) and issubclass(kind, Section) else None

    @classmethod
    def inside_names(cls, key: int | str) -> type[Section] | None:
        """The section below each name below a key, where that holds a mapping of names to sections."""
        field = cls.model_fields.get(str(key))
        kinds = get_args(field.annotation) if field and get_origin(field.annotation) is dict else ()
        found = [kind for kind in (*kinds[1:], *get_args(kinds[-1])) if isinstance(kind, type)] if kinds else []
        return next((kind for kind in found if issubclass(kind, Section)), None)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: int | str) -> int:
    """Bytes of "2GB", "500 MB", "1.5GiB" or a number.

    Raises:
        ValueError: anything else.

    Example:
        >>> parse_size("1.5GB")
        1500000000
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B)?\s*", str(text).upper())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no amount of memory: write it as 2GB, 500MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _memory(text: str) -> str:
    parse_size(text)
    return text


Memory = Annotated[str, AfterValidator(_memory)]
"""An amount of memory, such as 2GB."""
