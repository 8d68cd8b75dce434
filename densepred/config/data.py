"""The data section: which files make a case, which of their pixels count, and what their labels mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from densepred.config.base import Axes, Section, Share
from densepred.config.normalize import Normalize, ZScore
from densepred.config.tasks import StandardConfig, TargetConfig, named

TARGET = "target "
"""Begins the role of a file that is a target's truth."""
Bits = Annotated[tuple[Annotated[int, Field(gt=0)] | str, ...], Field(strict=False)]
"""Flags of a data-quality plane: their values (1, 2, 4 ...), or names that `validity.flags` gives to such."""

Resampling = Literal["linear", "cubic", "nnunet"]


class ChannelConfig(Section):
    """A channel of which more is to be said than its files."""

    file: str
    """Pattern of its files, with the part in brackets where they hold several images: `{id}.fits[DQ]`."""
    bits: Bits = ()
    """The file is a data-quality plane: the channel is 1 where any of these bits is set, else 0."""
    normalize: Normalize | None = None
    """Instead of `data.normalize`; bits are taken as they are."""


class ValidityConfig(Section):
    """Which pixels count besides being finite. The others are left out of statistics, loss, scores and labels."""

    mask: str | None = None
    """Pattern of the data-quality planes: `{id}_dq.fits`, `{id}.fits[DQ]`."""
    bits: Bits = ()
    """Flags that make a pixel invalid; with neither bits nor values, any value but 0 does."""
    values: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Values of the plane that make a pixel invalid, where they are codes rather than sums of flags."""
    flags: Annotated[dict[str, int], Field(strict=False)] = Field(default_factory=dict)
    """Names of the flags: {SATURATED: 256, COSMIC_RAY: 4096}."""
    weight: str | None = None
    """Pattern of weight or error planes: pixels whose weight is 0, negative, NaN or infinite are invalid."""
    fill: Literal["zero", "median", "nearest"] = "zero"
    """What the network sees at invalid pixels, after normalisation: 0, the median, or the nearest valid of the row."""
    channel: bool = False
    """Give the network the validity (1 or 0) as one more channel, the last."""
    least: Share = 0.5
    """Share of a channel's pixels that must be valid; a case with fewer fails."""


class DataConfig(Section):
    """Which files make the cases, what their labels mean, and how they are brought to one form."""

    root: str = "."
    """Folder that the patterns and the list are relative to (itself relative to the current folder)."""
    images: str | dict[str, str | ChannelConfig] | None = None
    """Pattern of the images: `imagesTr/*.nii.gz`, `{id}.fits[SCI]`; or a mapping name -> pattern, for channels."""
    labels: str | None = None
    """Pattern of the labels with `{id}`, such as `labelsTr/{id}.nii.gz`."""
    dataset: str | None = None
    """Instead of patterns: a Decathlon or nnU-Net `dataset.json`, or a CSV of id, image (or channels), label, group."""
    axes: Axes | None = None
    """Meaning of the files' axes where it is open: `xyzc` for 4D NIfTI with channels, `zyx` or `cyx` for FITS cubes."""
    checksum: Literal["verify", "ignore", "require"] = "verify"
    """Of FITS files: compare the checksums that are there, do not, or demand that there are some."""
    validity: ValidityConfig = ValidityConfig()
    """Which pixels count."""
    classes: Annotated[dict[int, str], Field(strict=False)] = Field(default_factory=dict)
    """Label value in the files -> class name, background first. Gaps are allowed; equal names merge values."""
    instances: bool = False
    """Labels number single objects: every value above 0 is the one class after the background."""
    regions: dict[str, Annotated[tuple[str, ...], Field(strict=False, min_length=1)]] = Field(default_factory=dict)
    """Instead of exclusive classes predict regions, which may overlap: name -> the classes it is made of."""
    targets: dict[str, TargetConfig] = Field(default_factory=dict)
    """What is to be predicted besides or instead of the classes: name -> maps of numbers, or a column of the table."""
    table: str | None = None
    """CSV with a column id, and of each image targets and covariates; by default `dataset` where that is a CSV."""
    covariates: Annotated[
        dict[str, StandardConfig | None],
        BeforeValidator(named, json_schema_input_type=list[str] | dict[str, StandardConfig | None]),
    ] = Field(default_factory=dict)
    """Columns of the table with numbers that the network sees beside the image, standardised by the training cases; or
    a mapping column -> {mean, deviation}."""
    ignore: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Label values that mark voxels without a truth: left out of loss and scores. Invalid pixels get the first one."""
    spacing: Annotated[tuple[float, ...], Field(strict=False)] | Literal["median"] | None = None
    """Voxel spacing to resample to, slowest axis first; `median` of the training cases; none keeps the grids."""
    resampling: Resampling = "linear"
    """How images get to `spacing`: linear or cubic, both antialiased; nnunet: cubic as nnU-Net does it."""
    normalize: Normalize = ZScore()
    """Intensities, over the valid voxels of each case and channel; `{name: asinh, softening: 3}` has settings."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of cross-validation folds, made by group and seed."""
    seed: int = 0
    """Seed of the folds."""
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """The fold kept for validation; `all` trains on every case and validates on none."""
    splits: str | None = None
    """File with given folds instead (a list of {train: [ids], val: [ids]}), relative to root."""
    group: str | None = None
    """Regular expression on the case id; its one group names the subject, who never spans two folds."""
    cache: str | None = None
    """Folder of the preprocessed cases; by default `cache` in the run directory."""

    def patterns(self) -> dict[str, str]:
        """Channel name -> pattern, in the order of the channels."""
        channels = self.images if isinstance(self.images, dict) else {"image": self.images or ""}
        return {name: one.file if isinstance(one, ChannelConfig) else one for name, one in channels.items()}

    def planes(self) -> dict[str, str]:
        """Of `mask` and `weight`, the patterns that are given."""
        found = {"mask": self.validity.mask, "weight": self.validity.weight}
        return {name: pattern for name, pattern in found.items() if pattern is not None}

    def maps(self) -> dict[str, str]:
        """Role of each target that is a map, `target NAME` -> its pattern."""
        return {f"{TARGET}{name}": target.file for name, target in self.targets.items() if target.file is not None}

    @property
    def segments(self) -> bool:
        """Whether classes of voxels are learnt: always, unless there are other targets and no labels."""
        listed = self.dataset is not None and self.dataset.lower().endswith(".json")
        return not self.targets or self.labels is not None or bool(self.classes) or listed

    @property
    def tabular(self) -> str | None:
        """The table, relative to root."""
        listed = self.dataset is not None and self.dataset.lower().endswith(".csv")
        return self.table or (self.dataset if listed else None)
