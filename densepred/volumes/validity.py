"""Which pixels count: data-quality planes and weights, applied to an image as it is read.

An invalid pixel reads as NaN, which is what every later step (statistics, loss, scores, output) leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from densepred.errors import InputError
from densepred.volumes.channels import check_grids
from densepred.volumes.volume import Key, Volume, full_key

__all__ = ["Flags", "flag_plane", "masked"]


@dataclass(frozen=True)
class Flags:
    """Which values of a data-quality plane are meant: those with any of `bits` set, and those among `values`.

    With neither, every value but 0. A plane's own invalid pixels (BLANK) are always meant.

    Example:
        >>> Flags(bits=1 | 256).meant(np.array([0, 1, 2, 257])).tolist()
        [False, True, False, True]
    """

    bits: int = 0
    values: tuple[int, ...] = ()

    def meant(self, plane: np.ndarray) -> np.ndarray:
        """Bool, of the shape of `plane`.

        Raises:
            ValueError: the plane holds fractions.
        """
        blank = None
        if plane.dtype.kind == "f":
            blank = np.isnan(plane)
            whole = np.where(blank, 0, plane)
            if not (whole == np.rint(whole)).all():
                raise ValueError(f"holds fractions, such as {whole[whole != np.rint(whole)][0]:g}")
            plane = whole.astype(np.int64)
        if not self.bits and not self.values:
            found = plane != 0
        else:
            found = np.isin(plane, self.values) if self.values else np.zeros(plane.shape, bool)
            found |= (plane.astype(np.int64, copy=False) & self.bits) != 0
        return found if blank is None else found | blank


def flag_plane(volume: Volume, flags: Flags) -> Volume:
    """A channel of a data-quality plane: float32, 1 where the flags are set, else 0."""
    _check_plane(volume, "mask")
    return Volume(_FlagArray(volume, flags), volume.spacing, volume.affine, volume.header, volume.path)


def masked(
    volume: Volume, mask: Volume | None = None, flags: Flags | None = None, weight: Volume | None = None
) -> Volume:
    """An image whose pixels are NaN, in all channels, where its planes say that they do not count.

    Args:
        volume: `(C, *spatial)`; integers become floats that hold them exactly.
        mask: a data-quality plane `(1, *spatial)` on the same grid.
        flags: which of its values are bad; by default all but 0.
        weight: weights or errors `(1, *spatial)`: what is not above 0 and finite is invalid.

    Raises:
        InputError: a plane with another shape, geometry or number of channels; on reading, a mask with fractions.

    Example:
        >>> image = Volume.from_array(np.ones((2, 2), np.float32), (1.0, 1.0))
        >>> quality = Volume.from_array(np.array([[0, 4], [1, 0]]), (1.0, 1.0))
        >>> masked(image, quality, Flags(bits=4))[0].tolist()
        [[1.0, nan], [1.0, 1.0]]
    """
    planes = {"mask": mask, "weight": weight}
    given = {role: plane for role, plane in planes.items() if plane is not None}
    for role, plane in given.items():
        _check_plane(plane, role)
        check_grids(volume, plane, f"image and {role}")
    if not given:
        return volume
    array = _MaskedArray(volume, mask, flags or Flags(), weight)
    return Volume(array, volume.spacing, volume.affine, volume.header, volume.path, unit=volume.unit)


def _check_plane(plane: Volume, role: str) -> None:
    if plane.shape[0] != 1:
        what = f"a {role} of {plane.shape[0]} channels, where one plane is expected"
        raise InputError(what, "choose one of its images in brackets", plane.path)


def _meant(volume: Volume, flags: Flags, key: Sequence[int | slice]) -> np.ndarray:
    try:
        return flags.meant(volume[(0, *key)])
    except ValueError as error:
        raise InputError(f"no data-quality plane: {error}", "give the plane of flags", volume.path) from error


class _FlagArray:
    def __init__(self, volume: Volume, flags: Flags) -> None:
        self._volume, self._flags = volume, flags
        self.shape, self.dtype = volume.shape, np.dtype(np.float32)

    def __getitem__(self, key: Key) -> np.ndarray:
        first, *rest = full_key(key, self.shape)
        plane = _meant(self._volume, self._flags, rest).astype(np.float32)
        return plane if isinstance(first, int) else plane[np.newaxis][first]

    def verify(self) -> None:
        self._volume.verify()

    def close(self) -> None:
        self._volume.close()


class _MaskedArray:
    def __init__(self, volume: Volume, mask: Volume | None, flags: Flags, weight: Volume | None) -> None:
        self._volume, self._mask, self._flags, self._weight = volume, mask, flags, weight
        self.shape = volume.shape
        self.dtype = np.result_type(volume.dtype, np.float32)

    def __getitem__(self, key: Key) -> np.ndarray:
        first, *rest = full_key(key, self.shape)
        values = np.array(self._volume[(first, *rest)], self.dtype)  # a copy: a volume in memory gives views
        bad = np.zeros(values.shape[len(values.shape) - sum(isinstance(item, slice) for item in rest) :], bool)
        if self._mask is not None:
            bad |= _meant(self._mask, self._flags, rest)
        if self._weight is not None:
            weight = self._weight[(0, *rest)]
            bad |= ~((weight > 0) & np.isfinite(weight))
        values[..., bad] = np.nan
        return values

    def verify(self) -> None:
        for volume in self._all():
            volume.verify()

    def close(self) -> None:
        for volume in self._all():
            volume.close()

    def _all(self) -> list[Volume]:
        return [volume for volume in (self._volume, self._mask, self._weight) if volume is not None]
