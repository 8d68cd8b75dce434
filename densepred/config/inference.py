"""The inference section: how images are predicted."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from densepred.config.base import Device, Memory, Positive, Section

Output: TypeAlias = Literal["labels", "probabilities", "logits", "entropy", "variance", "regression", "noise"]


class InferenceConfig(Section):
    """Sliding-window prediction."""

    window: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """Window in voxels; by default the patch size."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the window shared by neighbours."""
    blend: Literal["gaussian", "gaussian_monai", "constant", "none"] = "gaussian"
    """Weights of overlapping windows: nnU-Net's Gaussian, MONAI's (clamped), equal, or none: one window per voxel."""
    batch: Positive | Literal["auto"] = "auto"
    """Windows per forward pass; fewer where memory runs out. auto: 4 on a GPU, 1 elsewhere."""
    memory: Memory | None = None
    """The most to take of the machine and of each GPU, by all workers there: `2GB`. By default most of what is free."""
    skip: Annotated[float, Field(ge=0)] | None = 0.0
    """Windows whose normalised values span at most so much are predicted once for all; 0 skips windows of one value."""
    mirror: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Axes mirrored for test-time augmentation; every subset is one more forward pass."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Logits are divided by it before they become probabilities, entropy or variance; `densepred crossval` fits it."""
    keep_largest: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Classes of which only the largest component stays in label maps, one after the other; `*`: all together."""
    slices: Literal[0, 1, 2, "all"] | None = None
    """Volumes by a 2D model: the axis that its images lie across, or all three, of whose logits the mean is taken."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware computes in it; sums are float32 always."""
    backend: Literal["auto", "torch", "compiled", "openvino"] = "torch"
    """What runs the network: auto takes another than torch where a short trial shows it to be faster and as exact."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    outputs: Annotated[tuple[Output, ...], Field(strict=False, min_length=1)] | None = None
    """Kinds of result, all but labels in a folder of their name; by default labels, or of numbers regression."""
    head: str | None = None
    """Of a model that predicts several things of each voxel, which is written; by default the first."""
    cutout: str | None = None
    """The part to predict: `y0:y1,x0:x1` (pixels from 0), or `ra,dec,size` on the sky; normalised as in the whole."""
    bin: Positive = 1
    """Side of the blocks of pixels in a plane over which probabilities are averaged before they are written."""
    record_paths: bool = False
    """Write whole paths of the input files into results rather than their names (FITS: DPINPUT and HISTORY)."""
    planes: Literal["required", "optional"] = "required"
    """Data-quality and weight planes, if the model was trained with them; without them every finite pixel counts."""
