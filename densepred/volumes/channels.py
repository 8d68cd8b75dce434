"""Several single-channel files as the channels of one volume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from densepred.errors import InputError
from densepred.volumes.fits_header import WCS_TOLERANCE, FitsHeader, wcs_offset
from densepred.volumes.volume import (
    GEOMETRY_TOLERANCE,
    Key,
    Volume,
    check_memory,
    corner_offset,
    full_key,
    is_sizeless,
    span,
)


class ChannelStack:
    """The channels of several volumes one after the other, read on demand: `(sum of C, *spatial)`."""

    def __init__(self, volumes: Sequence[Volume]) -> None:
        self._volumes = list(volumes)
        self._channels = [(volume, channel) for volume in volumes for channel in range(volume.shape[0])]
        self.shape = (len(self._channels), *volumes[0].shape[1:])
        self.dtype = np.result_type(*(volume.dtype for volume in volumes))

    def __getitem__(self, key: Key) -> np.ndarray:
        first, *rest = full_key(key, self.shape)
        lengths = [stop - start for start, stop, _ in map(span, rest, self.shape[1:])]
        start, stop, inner = span(first, self.shape[0])
        check_memory((stop - start) * int(np.prod(lengths)) * self.dtype.itemsize, self._volumes[0].path)
        chosen = self._channels[start:stop][inner]
        if isinstance(chosen, tuple):
            return np.asarray(chosen[0][chosen[1], *rest], self.dtype)
        if not chosen:
            return np.empty((0, *self.shape[1:]), self.dtype)[:, *rest]
        for number, (volume, channel) in enumerate(chosen):
            values = volume[channel, *rest]
            if number == 0:
                out = np.empty((len(chosen), *values.shape), self.dtype)
            out[number] = values
        return out

    def verify(self) -> None:
        """Verify every file; see `Volume.verify`."""
        for volume in self._volumes:
            volume.verify()

    def close(self) -> None:
        """Close every file."""
        for volume in self._volumes:
            volume.close()


def stack(volumes: Sequence[Volume]) -> Volume:
    """One volume of the channels of several, which must lie on one grid: that of `on_grid`. The path is the first's.

    Args:
        volumes: at least one; usually the single-channel files of one case.

    Raises:
        InputError: the shapes differ, or corners lie over `GEOMETRY_TOLERANCE` voxels apart; of FITS images, corners or
            centre over `WCS_TOLERANCE` pixels by their world coordinates, where both have them.
        ValueError: there are no volumes.

    Example:
        >>> t1, t2 = (Volume.from_array(np.zeros((4, 5, 6)), (1.0, 1.0, 1.0)) for _ in range(2))
        >>> stack([t1, t2]).shape
        (2, 4, 5, 6)
    """
    if not volumes:
        raise ValueError("volumes must hold at least one volume, got none")
    first = volumes[0]
    for other in volumes[1:]:
        check_grids(first, other, "channels")
    if len(volumes) == 1:
        return first
    unit, like = first.unit if all(other.unit == first.unit for other in volumes) else "", on_grid(volumes)
    return Volume(ChannelStack(volumes), like.spacing, like.affine, like.header, first.path, unit=unit)


def on_grid(volumes: Sequence[Volume]) -> Volume:
    """Of volumes on one grid the first whose file says how large its voxels are, or where; the first if none does."""
    told = (one for one in volumes if not is_sizeless(one) or getattr(one.header, "has_wcs", False))
    return next(told, volumes[0])


def check_grids(first: Volume, other: Volume, which: str = "channels") -> None:
    """Refuse two volumes that do not lie pixel on pixel.

    Args:
        first: the one that is taken to be right.
        other: the one to compare.
        which: what they are, for the message.

    Raises:
        InputError: as `stack`.
    """
    names = f"{first.path or 'the first'} and {other.path or 'another'}"
    if other.shape[1:] != first.shape[1:]:
        what = f"{which} differ in shape: {names} are {first.shape[1:]} and {other.shape[1:]}"
        raise InputError(what, "resample them to one grid", other.path)
    offset = corner_offset(first, other)
    if not offset <= GEOMETRY_TOLERANCE:
        what = f"{which} differ in geometry: corners of {names} lie {offset:.3g} voxels apart"
        raise InputError(what, "resample them to one grid, or mend the header that is wrong", other.path)
    offset = sky_offset(first, other)
    if not offset <= WCS_TOLERANCE:
        parts = [f"{one.path}[{one.header.index}]" for one in (first, other) if isinstance(one.header, FitsHeader)]
        what = f"{which} differ in world coordinates: {' and '.join(parts)} lie {offset:.3g} pixels apart"
        raise InputError(what, "resample them to one grid, or mend the header that is wrong", other.path)


def sky_offset(first: Volume, other: Volume) -> float:
    """Pixels by which two FITS images of one shape lie apart on the sky; 0 where one has no world coordinates."""
    ours, theirs = first.header, other.header
    both = isinstance(ours, FitsHeader) and isinstance(theirs, FitsHeader)
    return wcs_offset(ours, theirs) if both else 0.0  # type: ignore[arg-type]
