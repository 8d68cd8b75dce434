"""A normalisation with the parameters of one image: tiles of it, forward and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from densepred.cases.stretches import Positions, Stretch
from densepred.config.normalize import Normalize

Fill = Literal["zero", "median", "nearest"]
"""What stands where a voxel is invalid."""
_CHUNK_VOXELS = 1 << 18


class Fitted:
    """The normalisation of one image, with all its parameters. Made by `fit`.

    Attributes:
        shape: `(C, *spatial)` of the image.
        valid: finite voxels of each channel.

    Example:
        >>> from densepred.cases.normalize import fit
        >>> from densepred.config.normalize import Percentile
        >>> from densepred.volumes import Volume
        >>> volume = Volume.from_array(np.array([[0.0, 2.0], [np.nan, 4.0]]), (1.0, 1.0))
        >>> fitted = fit(volume, [Percentile(low=0, high=100)])
        >>> fitted.forward(volume[:, :1], np.s_[:1, :]).tolist()
        [[[0.0, 0.5]]]
        >>> fitted.valid
        (3,)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        chosen: Sequence[Normalize],
        stretches: Sequence[Stretch],
        valid: Sequence[int],
        medians: Sequence[float] | None = None,
    ) -> None:
        self.shape, self.valid = shape, tuple(valid)
        self._chosen, self._stretches = tuple(chosen), tuple(stretches)
        self._medians = None if medians is None else tuple(medians)

    def forward(self, values: np.ndarray, where: tuple[slice, ...]) -> np.ndarray:
        """Normalise.

        Args:
            values: `(C, n, *rest)` of any type, as they are in the file.
            where: the part of the image that they are, a slice for each spatial axis.

        Returns:
            float32 of the same shape, NaN where the value is not finite.

        Raises:
            ValueError: the shape is not that of `where` in the image.
        """
        out = np.empty(values.shape, np.float32)
        for channel, rows, places in self._chunks(values.shape, where):
            part = values[channel, rows]
            with np.errstate(invalid="ignore", over="ignore"):
                out[channel, rows] = self._stretches[channel].forward(part, places)
            if values.dtype.kind == "f":
                out[channel, rows][~np.isfinite(part)] = np.nan
        return out

    def inverse(self, normalized: np.ndarray, where: tuple[slice, ...]) -> np.ndarray:
        """The values that `forward` normalised: exact up to rounding where nothing was clipped.

        Args:
            normalized: `(C, n, *rest)`.
            where: the part of the image that they are, a slice for each spatial axis.

        Returns:
            float64 of the same shape. A constant channel gives its constant.

        Raises:
            ValueError: the shape is not that of `where` in the image.
        """
        out = np.empty(normalized.shape)
        for channel, rows, places in self._chunks(normalized.shape, where):
            part = normalized[channel, rows].astype(np.float64)
            out[channel, rows] = self._stretches[channel].inverse(part, places)
        return out

    def fill(self, normalized: np.ndarray, how: Fill, where: tuple[slice, ...]) -> np.ndarray:
        """Replace NaN, in place.

        Args:
            normalized: `(C, n, *rest)`, from `forward`.
            how: zero; median, what the median of the channel's valid voxels is normalised to; or nearest, the nearest
                valid voxel of the row (the last axis; the earlier of two), and 0 in a row without any.
            where: as it was given to `forward`; whole rows for nearest.

        Raises:
            ValueError: the medians were not asked of `fit`, or `how` is unknown.
        """
        invalid = np.isnan(normalized)
        if how not in ("zero", "median", "nearest"):
            raise ValueError(f"fill must be zero, median or nearest, got {how!r}")
        if how == "median" and self._medians is None:
            raise ValueError("fill is median, but fit was called without median=True")
        if how == "median" and self._medians is not None and invalid.any():
            medians = np.array(self._medians).reshape(-1, *[1] * (normalized.ndim - 1))
            normalized[invalid] = self.forward(np.broadcast_to(medians, normalized.shape), where)[invalid]
        elif how == "nearest":
            _fill_rows(normalized, invalid)
        else:
            normalized[invalid] = 0
        return normalized

    def pick(self, channels: Sequence[int]) -> Fitted:
        """The normalisation of some of the channels, in that order."""
        chosen, stretches = [self._chosen[c] for c in channels], [self._stretches[c] for c in channels]
        medians = None if self._medians is None else [self._medians[c] for c in channels]
        return Fitted((len(channels), *self.shape[1:]), chosen, stretches, [self.valid[c] for c in channels], medians)

    def describe(self) -> list[dict[str, object]]:
        """Of each channel: the settings, the parameters found (offset and scale, in the unit of the image; of boxes
        their range) and the number of valid voxels; for JSON."""
        each = zip(self._chosen, self._stretches, self.valid, strict=True)
        return [
            {"name": chosen.name, **chosen.model_dump(), **stretch.describe(), "valid": valid}
            for chosen, stretch, valid in each
        ]

    def _chunks(self, shape: tuple[int, ...], where: tuple[slice, ...]) -> Iterator[tuple[int, slice, Positions]]:
        """Parts of about a megabyte, so that float64 and temporary arrays stay small."""
        places = tuple(np.arange(*part.indices(size)) for part, size in zip(where, self.shape[1:], strict=True))
        expected = (self.shape[0], *(len(place) for place in places))
        if shape != expected:
            raise ValueError(f"values must have the shape {expected} of {where}, got {shape}")
        step = max(1, _CHUNK_VOXELS // max(1, int(np.prod(shape[2:]))))
        for channel in range(shape[0]):
            for start in range(0, shape[1], step):
                rows = slice(start, start + step)
                yield channel, rows, (places[0][rows], *places[1:])


def _fill_rows(values: np.ndarray, invalid: np.ndarray) -> None:
    """Each invalid voxel takes the nearest valid one of its row (the last axis)."""
    rows, bad = values.reshape(-1, values.shape[-1]), invalid.reshape(-1, values.shape[-1])
    hit = np.flatnonzero(bad.any(1))
    place, far = np.arange(rows.shape[1]), 2 * rows.shape[1]
    before = np.maximum.accumulate(np.where(bad[hit], -far, place), axis=1)
    after = np.minimum.accumulate(np.where(bad[hit], far, place)[:, ::-1], axis=1)[:, ::-1]
    nearest = np.where(place - before <= after - place, before, after)
    filled = np.take_along_axis(rows[hit], nearest.clip(0, rows.shape[1] - 1), axis=1)
    filled[bad[hit].all(1)] = 0
    rows[hit] = filled
    if not np.shares_memory(rows, values):
        values[...] = rows.reshape(values.shape)
