"""From the sums of objects to the columns of a catalogue: places, shapes and intensities.

Reference for a, b and theta: Bertin and Arnouts 1996, A&AS 117, 393 (SExtractor), section 10.1 of its manual:
A_IMAGE, B_IMAGE and THETA_IMAGE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densepred.catalogue.sums import Sums
from densepred.catalogue.world import World

_PIXEL = 1 / 12
"""The variance of a uniform distribution over one pixel."""


@dataclass(frozen=True)
class Field:
    """One column.

    Args:
        name: of the column.
        values: `(N,)`.
        description: what it is.
        unit: such as "deg"; "" for counts, indices and what is in pixels.
    """

    name: str
    values: np.ndarray
    description: str
    unit: str = ""


def columns(sums: Sums, shape: Sequence[int], world: World | None, unit: str = "") -> list[Field]:
    """The columns after those that name the object.

    Args:
        sums: of the objects, in the order of the rows.
        shape: `(*spatial)` of the volume.
        world: gives world coordinates and sizes, where there is one.
        unit: of the values of the image.
    """
    out = [Field("voxels", sums.voxels, "number of voxels")]
    centre, covariance = _moments(sums, 0)
    if world is not None and world.size_unit:
        name, where = ("area", "pixel") if len(shape) == 2 else ("volume", "voxel")
        text = f"voxels times the {name} of a {where} at the centroid"
        out.append(Field(name, sums.voxels * world.sizes(centre), text, world.size_unit))
    out += _places(centre, world, "")
    for axis, letter in enumerate("zyx"[-len(shape) :]):
        out.append(Field(f"min_{letter}", sums.low[:, axis], f"first index along {letter}"))
        out.append(Field(f"max_{letter}", sums.high[:, axis], f"last index along {letter}, included"))
    out += _shapes(covariance, "")
    edge = (sums.low == 0).any(1) | (sums.high == np.array(shape) - 1).any(1)
    out.append(Field("edge", edge, "touches the edge of the array, so may be cut off"))
    for channel in range(1, sums.total.shape[1]):
        suffix = "" if sums.total.shape[1] == 2 else f"_{channel - 1}"
        part = _intensities(sums, channel, world, unit)
        out += [Field(field.name + suffix, field.values, field.description, field.unit) for field in part]
    return out


def _moments(sums: Sums, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroid `(N, d)` and covariance `(N, d, d)` of the weights of a channel; NaN where they sum to 0."""
    weight = sums.weight[:, channel, None]
    with np.errstate(all="ignore"):
        mean = np.where(weight > 0, sums.linear[:, channel] / weight, np.nan)
        covariance = sums.square[:, channel] / weight[..., None] - mean[..., :, None] * mean[..., None, :]
    return sums.low + mean, covariance


def _places(centre: np.ndarray, world: World | None, prefix: str) -> list[Field]:
    of = "of the values over 0" if prefix else "of the voxels"
    out = [
        Field(f"{prefix}centroid_{letter}", centre[:, axis], f"centroid {of} along {letter}; the first index is 0")
        for axis, letter in enumerate("zyx"[-centre.shape[1] :])
    ]
    if world is None:
        return out
    frame = f" ({world.frame})" if world.frame else ""
    found = world.coordinates(centre)
    for axis, (name, unit) in enumerate(zip(world.names, world.units, strict=True)):
        out.append(Field(prefix + name, found[:, axis], f"{name}{frame} of the centroid {of}", unit))
    return out


def _shapes(covariance: np.ndarray, prefix: str) -> list[Field]:
    dims = covariance.shape[-1]
    pairs = [(first, second) for first in range(dims) for second in range(first, dims)]  # of the axes x, y, z
    out = [
        Field(
            f"{prefix}cov_{'xyz'[first]}{'xyz'[second]}",
            covariance[:, -1 - first, -1 - second],
            "second central moment in pixels squared",
        )
        for first, second in pairs
    ]
    axes, theta = ellipse(covariance)
    for number, name in enumerate("abc"[:dims]):
        out.append(Field(prefix + name, axes[:, number], "semi-axis in pixels: standard deviation along it"))
    if dims == 2:
        out.append(Field(f"{prefix}theta", theta, "angle from the axis x to the semi-axis a, towards y", "deg"))
    return out


def ellipse(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Semi-axes and position angle from second central moments, as SExtractor defines them.

    Where the determinant is below (1/12)^d, which thinner objects than a pixel have, 1/12 is added along each axis.

    Args:
        covariance: `(N, d, d)` in pixels squared, the axes in the order of the array.

    Returns:
        The semi-axes `(N, d)` in pixels, the largest first, and the angle `(N,)` in degrees, over -90 to 90, from the
        last axis (x) to the largest semi-axis, towards y; 0 in 3D. NaN where the moments are.

    Example:
        >>> axes, theta = ellipse(np.array([[[1.0, 0.0], [0.0, 4.0]]]))
        >>> axes.tolist(), theta.tolist()
        ([[2.0, 1.0]], [0.0])
    """
    dims = covariance.shape[-1]
    known = np.isfinite(covariance).all((1, 2))
    safe = np.where(known[:, None, None], covariance, np.eye(dims))
    thin = np.linalg.det(safe) < _PIXEL**dims
    safe = safe + np.where(thin, _PIXEL, 0.0)[:, None, None] * np.eye(dims)
    axes = np.sqrt(np.maximum(np.linalg.eigvalsh(safe)[:, ::-1], 0))
    theta = np.zeros(len(safe))
    if dims == 2:
        theta = np.degrees(np.arctan2(2 * safe[:, 0, 1], safe[:, 1, 1] - safe[:, 0, 0]) / 2)
    return np.where(known[:, None], axes, np.nan), np.where(known, theta, np.nan)


def _intensities(sums: Sums, channel: int, world: World | None, unit: str) -> list[Field]:
    valid, total = sums.valid[:, channel], sums.total[:, channel]
    some = valid > 0
    mean = np.divide(total, valid, out=np.full(len(valid), np.nan), where=some)
    invalid = sums.voxels - valid.astype(np.int64)
    centre, covariance = _moments(sums, channel)
    return [
        Field("sum", np.where(some, total, np.nan), "sum of the finite values", unit),
        Field("mean", mean, "mean of the finite values", unit),
        Field("max", np.where(some, sums.peak[:, channel], np.nan), "largest finite value", unit),
        Field("invalid", invalid, "voxels without a finite value"),
        *_places(centre, world, "weighted_"),
        *_shapes(covariance, "weighted_"),
    ]
