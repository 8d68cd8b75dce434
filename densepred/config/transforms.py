"""The transforms that an `augment` section may name, with their settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from densepred.config.base import Positive, Section, Share


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the smallest comes first")
    return limits


def _above_zero(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] <= 0:
        raise ValueError("both are greater than 0")
    return limits


def _not_negative(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] < 0:
        raise ValueError("both are 0 or more")
    return limits


def _share(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] <= 0 or limits[1] > 1:
        raise ValueError("shares are above 0 and at most 1")
    return limits


def _unfolded(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] < 0 or limits[1] > 0.4:
        raise ValueError("0 to 0.4: beyond it the grid may fold")
    return limits


def _acute(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] <= -80 or limits[1] >= 80:
        raise ValueError("between -80 and 80 degrees")
    return limits


Limits = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
PositiveLimits = Annotated[Limits, AfterValidator(_above_zero)]
LimitsFromZero = Annotated[Limits, AfterValidator(_not_negative)]
ShareLimits = Annotated[Limits, AfterValidator(_share)]
Axes = Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(strict=False)]


class Transform(Section):
    """A random change; `probability` is the share of the samples it happens to."""

    probability: Share


class Channelwise(Transform):
    """A change of intensities, which may differ from channel to channel."""

    per_channel: bool = False
    """Whether every channel draws its own strength; else a sample's channels share one."""
    channels: Share = 1.0
    """Share of a changed sample's channels that are changed, each drawn alone."""


class Flip(Transform):
    """Mirror axes, exactly; leave out axes along which left and right differ. `flip: [0, 1]` gives the axes alone."""

    probability: Share = 0.5
    """Share of the samples, for each axis alone."""
    axes: Axes = (0, 1, 2)
    """Spatial axes; those a 2D model lacks are passed over."""

    @model_validator(mode="before")
    @classmethod
    def _axes_alone(cls, data: Any) -> Any:
        return {"axes": data} if isinstance(data, list | tuple) else data


class QuarterTurns(Transform):
    """Turn by 90, 180 or 270 degrees in the plane of the last two axes, exactly; by 180 where they are not alike."""

    probability: Share = 0.75
    """Share of the samples: three of the four directions."""


class Rotation(Transform):
    """Turn rigidly, in world units, about the centre of the patch."""

    probability: Share = 0.2
    """Share of the samples."""
    range: Limits | Literal["auto"] = (-30.0, 30.0)
    """Degrees, drawn for each axis; `auto` is nnU-Net's choice by the patch: 30, in planes 180, 15 in long planes."""
    axes: Axes = (0, 1, 2)
    """Axes turned about (in 2D there is one)."""


class Scaling(Transform):
    """Enlarge (above 1) or shrink, equally often where the range allows both."""

    probability: Share = 0.2
    """Share of the samples."""
    range: PositiveLimits = (0.7, 1.4)
    """Factor on lengths."""
    per_axis: bool = False
    """Whether every axis draws its own factor."""


class Shear(Transform):
    """Shear along each axis by those after it, in world units; volumes are kept."""

    probability: Share = 0.2
    """Share of the samples."""
    range: Annotated[Limits, AfterValidator(_acute)] = (-10.0, 10.0)
    """Degrees, drawn for each pair of axes."""


class Shift(Transform):
    """Move, without wrapping around."""

    probability: Share = 0.2
    """Share of the samples."""
    range: Limits = (-0.1, 0.1)
    """Share of the patch's length, drawn for each axis."""


class Crop(Transform):
    """Enlarge a random part of the patch to the whole of it."""

    probability: Share = 0.2
    """Share of the samples."""
    range: ShareLimits = (0.7, 1.0)
    """Length of the part as a share of the patch's."""


class Elastic(Transform):
    """Bend smoothly: a cubic B-spline through nodes that are moved at random. It never folds."""

    probability: Share = 0.2
    """Share of the samples."""
    range: Annotated[Limits, AfterValidator(_unfolded)] = (0.05, 0.25)
    """Furthest move of a node, in units of the distance between nodes."""
    nodes: Annotated[float, Field(ge=2)] = 24.0
    """Distance between nodes, in voxels of the finest axis."""


class Dummy2d(Transform):
    """In patches thin along axis 0, keep rotation, scaling, shear, bending and low resolution within planes."""

    probability: Literal[1] = 1
    """Always."""
    ratio: Annotated[float, Field(gt=1)] = 3.0
    """Thin is where the longest axis has more than so many times the voxels of axis 0."""


class Noise(Channelwise):
    """Add Gaussian noise."""

    probability: Share = 0.1
    """Share of the samples."""
    range: LimitsFromZero = (0.0, 0.3)
    """Strength, in units of the normalised image."""
    of: Literal["deviation", "variance"] = "deviation"
    """What the range is of."""


class PoissonNoise(Channelwise):
    """Count photons: the darkest voxel of the patch has none, the brightest as many as the range says."""

    probability: Share = 0.1
    """Share of the samples."""
    range: PositiveLimits = (20.0, 500.0)
    """Photons at the brightest voxel; few are noisy. Drawn evenly in the logarithm."""


class RicianNoise(Channelwise):
    """Noise of magnitudes in MRI: the signal above the darkest voxel, with Gaussian noise in both its parts."""

    probability: Share = 0.1
    """Share of the samples."""
    range: LimitsFromZero = (0.0, 0.3)
    """Standard deviation of either part, in units of the normalised image."""


class Blur(Channelwise):
    """Gaussian blur."""

    probability: Share = 0.2
    """Share of the samples."""
    range: LimitsFromZero = (0.5, 1.0)
    """Standard deviation in voxels, drawn for each axis."""


class Brightness(Channelwise):
    """Multiply the intensities; above and below 1 equally often."""

    probability: Share = 0.15
    """Share of the samples."""
    range: PositiveLimits = (0.75, 1.25)
    """Factor."""


class BrightnessShift(Channelwise):
    """Add a constant."""

    probability: Share = 0.15
    """Share of the samples."""
    range: Limits = (-0.2, 0.2)
    """What is added, in units of the normalised image."""


class Contrast(Channelwise):
    """Multiply the distance from the mean, within the patch's smallest and largest value."""

    probability: Share = 0.15
    """Share of the samples."""
    range: PositiveLimits = (0.75, 1.25)
    """Factor; above and below 1 equally often."""


class Gamma(Channelwise):
    """A power of the intensities scaled to 0..1; mean and deviation are kept."""

    probability: Share = 0.3
    """Share of the samples."""
    range: PositiveLimits = (0.7, 1.5)
    """Exponent; above and below 1 equally often."""


class InvertedGamma(Gamma):
    """The same on the negative image."""

    probability: Share = 0.1
    """Share of the samples."""


class LowResolution(Channelwise):
    """Take fewer voxels (the nearest) and go back linearly."""

    probability: Share = 0.25
    """Share of the samples."""
    range: ShareLimits = (0.5, 1.0)
    """Share of the voxels left along each axis."""


class BiasField(Channelwise):
    """Multiply the signal above the darkest voxel by a smooth field: the exponential of a polynomial."""

    probability: Share = 0.2
    """Share of the samples."""
    range: LimitsFromZero = (0.0, 0.4)
    """Largest coefficient."""
    order: Annotated[int, Field(ge=1, le=4)] = 3
    """Degree of the polynomial."""


class Cutout(Transform):
    """Put the mean of each channel into boxes."""

    probability: Share = 0.1
    """Share of the samples."""
    range: ShareLimits = (0.1, 0.3)
    """Sides of a box as shares of the patch's."""
    boxes: Positive = 1
    """How many."""
    ignore: bool = False
    """Whether voxels in a box lose their label; else the network is to infer it from around."""


class CutMix(Transform):
    """Put a box of another sample of the batch into image and label."""

    probability: Share = 0.2
    """Share of the samples."""
    range: ShareLimits = (0.2, 0.6)
    """Sides of the box as shares of the patch's."""


class MixUp(Transform):
    """Blend in another sample of the batch; labels of classes stay, and the share is drawn so that this is right."""

    probability: Share = 0.2
    """Share of the samples."""
    alpha: Annotated[float, Field(gt=0)] = 0.2
    """The sample's own share is drawn from Beta(1 + alpha, alpha)."""


class Albumentations(Transform):
    """A transform of the library albumentations, for 2D (`pip install 'densepred[image2d]'`)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    """Its class, such as RandomGridShuffle."""
    probability: Share = 0.5
    """Share of the samples."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Its arguments, as plain values."""


TRANSFORMS: dict[str, type[Transform]] = {
    "dummy_2d": Dummy2d,
    "flip": Flip,
    "quarter_turns": QuarterTurns,
    "rotation": Rotation,
    "scaling": Scaling,
    "shear": Shear,
    "shift": Shift,
    "crop": Crop,
    "elastic": Elastic,
    "noise": Noise,
    "poisson_noise": PoissonNoise,
    "rician_noise": RicianNoise,
    "blur": Blur,
    "brightness": Brightness,
    "brightness_shift": BrightnessShift,
    "contrast": Contrast,
    "gamma": Gamma,
    "inverted_gamma": InvertedGamma,
    "low_resolution": LowResolution,
    "bias_field": BiasField,
    "cutout": Cutout,
    "albumentations": Albumentations,
    "cutmix": CutMix,
    "mixup": MixUp,
}
NAMES = {kind: name for name, kind in TRANSFORMS.items()}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "light": [{name: {}} for name in ("flip", "rotation", "scaling", "noise", "brightness", "contrast", "gamma")],
    "nnunet": [
        {"dummy_2d": {}},
        {"rotation": {"range": "auto"}},
        {"scaling": {}},
        {"noise": {"range": [0.0, 0.1], "of": "variance"}},
        {"blur": {"per_channel": True, "channels": 0.5}},
        {"brightness": {"per_channel": True}},
        {"contrast": {"per_channel": True}},
        {"low_resolution": {"per_channel": True, "channels": 0.5}},
        {"inverted_gamma": {"per_channel": True}},
        {"gamma": {"per_channel": True}},
        {"flip": {}},
    ],
    "microscopy": [
        {"flip": {}},
        {"rotation": {"probability": 0.5, "range": [-180.0, 180.0], "axes": [0]}},
        {"scaling": {"probability": 0.4}},
        {"elastic": {}},
        {"bias_field": {}},
        {"blur": {"range": [0.5, 1.5]}},
        {"poisson_noise": {"probability": 0.2}},
        {"noise": {"range": [0.0, 0.15]}},
        {"brightness": {}},
        {"contrast": {"range": [0.65, 1.5]}},
        {"gamma": {}},
    ],
    "astronomy": [
        {"flip": {}},
        {"quarter_turns": {}},
        {"noise": {"probability": 0.2, "range": [0.0, 0.1]}},
        {"brightness_shift": {"probability": 0.2, "range": [-0.1, 0.1]}},
    ],
    "none": [],
}
"""`nnunet` has the numbers of nnU-Net v2 (nnUNetTrainer.get_training_transforms); `astronomy` interpolates nowhere,
since that would blur what is one pixel wide like stars."""
