"""The augment section: random changes of training patches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from densepred.config.base import Range, Section, Share


class RandomConfig(Section):
    """How often, and how far."""

    probability: Share
    """Share of the samples it is applied to."""
    range: Range
    """Smallest and largest strength."""


class AugmentConfig(Section):
    """Random changes of training patches, on whole batches on the device."""

    flip: Annotated[tuple[int, ...], Field(strict=False)] = (0, 1, 2)
    """Spatial axes mirrored with probability one half each; leave out axes along which left and right differ."""
    rotation: RandomConfig = RandomConfig(probability=0.2, range=(-30.0, 30.0))
    """Rotation about each axis, in degrees."""
    scaling: RandomConfig = RandomConfig(probability=0.2, range=(0.7, 1.4))
    """Zoom, the same for all axes."""
    noise: RandomConfig = RandomConfig(probability=0.1, range=(0.0, 0.3))
    """Gaussian noise, standard deviation in units of the normalised image."""
    brightness: RandomConfig = RandomConfig(probability=0.15, range=(0.75, 1.25))
    """Factor on the intensities."""
    contrast: RandomConfig = RandomConfig(probability=0.15, range=(0.75, 1.25))
    """Factor on the distance from the mean, kept within the sample's range."""
    gamma: RandomConfig = RandomConfig(probability=0.3, range=(0.7, 1.5))
    """Power on the intensities scaled to 0..1; mean and deviation are kept."""
