"""The patch section: what one training sample is, and where it is taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from densepred.config.base import Positive, Section, Share


class PatchConfig(Section):
    """What one training sample is, and where it is taken."""

    size: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2, max_length=3)] = (96, 96, 96)
    """Patch size in voxels, slowest axis first."""
    batch: Positive = 2
    """Patches per step."""
    foreground: Share = 0.33
    """Share of a batch's patches centred on a voxel of a class, drawn by `classes` (at least one if above 0)."""
    classes: dict[int, Annotated[float, Field(ge=0)]] | Literal["balanced"] = "balanced"
    """How often patches are centred on each label value, `{1: 2, 2: 1}`; others never. balanced: all alike but 0."""
    labelled: Share = 0.0
    """Least share of a patch with a truth, where labels have gaps; a patch without any is never drawn."""
    axis: Literal[0, 1, 2, "all"] | None = None
    """A 2D model learns from planes of volumes: the axis they lie across, or all in turn."""
