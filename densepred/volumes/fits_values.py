"""From stored numbers of FITS to values: BSCALE, BZERO, BLANK and byte order.

Reference: FITS standard 4.0, sections 4.4.2.5, 5.2.5 (unsigned integers) and 5.3 (BLANK).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from densepred.errors import InputError
from densepred.volumes.arrays import scaled_dtype
from densepred.volumes.fits_scan import TYPES, card

_FLOAT64_EXACT = 1 << 53


@dataclass(frozen=True)
class Values:
    """How the stored numbers become values of `dtype`: `scale * stored + zero`, NaN where `stored == blank`.

    Integers stay integers where nothing scales them, and where BZERO merely makes them unsigned (or signed bytes); with
    BLANK they are floats. Floats are float32 where their steps are as fine as those stored, else float64.
    """

    stored: np.dtype
    dtype: np.dtype
    scale: float = 1.0
    zero: float = 0.0
    blank: int | None = None

    def convert(self, raw: np.ndarray, out: np.ndarray) -> None:
        """Turn `raw`, of the stored type in any byte order, into values in `out`, of the same shape.

        Raises:
            ValueError: a 64-bit integer that float64 does not hold.
        """
        if self.dtype.kind != "f":
            out[...] = raw if self.zero == 0 else _flipped(raw, self.stored, self.dtype)
            return
        empty = None if self.blank is None else raw == self.blank
        if self.stored.itemsize == 8 and self.stored.kind == "i":
            _check_exact(raw, empty)
        out[...] = raw
        if self.scale != 1:
            out *= self.scale
        if self.zero != 0:
            out += self.zero
        if empty is not None:
            out[empty] = np.nan


def _flipped(raw: np.ndarray, stored: np.dtype, dtype: np.dtype) -> np.ndarray:
    """Stored + 2^(bits - 1), which turns the first bit over."""
    native = np.array(raw, stored)
    bits = native.view(f"u{stored.itemsize}")
    return np.bitwise_xor(bits, bits.dtype.type(1 << (8 * stored.itemsize - 1)), out=bits).view(dtype)


def _check_exact(raw: np.ndarray, empty: np.ndarray | None) -> None:
    too_large = (raw > _FLOAT64_EXACT) | (raw < -_FLOAT64_EXACT)
    if empty is not None:
        too_large &= ~empty
    if too_large.any():
        raise ValueError(f"integers beyond 2^53, like {raw[too_large][0]}, with BLANK or BSCALE fit no type exactly")


def values_of(header: fits.Header, bitpix: int, index: int, path: Path) -> Values:
    """The conversion that an image's header asks for.

    Raises:
        InputError: BSCALE or BZERO are no numbers, or BSCALE is 0.
    """
    stored = np.dtype(TYPES[bitpix])
    scale, zero = _number(header, "BSCALE", 1.0, index, path), _number(header, "BZERO", 0.0, index, path)
    if scale == 0:
        raise InputError(f"HDU {index}: BSCALE = 0 makes all values the same", "write the true BSCALE there", path)
    blank = _blank(header, stored, index, path)
    bits = 8 * stored.itemsize
    offset = -128 if bitpix == 8 else 1 << (bits - 1)
    if stored.kind in "iu" and blank is None and scale == 1 and zero in (0, offset):
        kind = stored.kind if zero == 0 else ("i" if bitpix == 8 else "u")
        return Values(stored, np.dtype(f"{kind}{stored.itemsize}"), scale, zero)
    return Values(stored, scaled_dtype(stored, scale, zero), scale, zero, blank)


def _number(header: fits.Header, name: str, default: float, index: int, path: Path) -> float:
    value = card(header, name, default, index, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise InputError(f"HDU {index}: impossible scaling: {name} = {value}", "write the true number there", path)
    return float(value)


def _blank(header: fits.Header, stored: np.dtype, index: int, path: Path) -> int | None:
    """BLANK, where the stored type is an integer; one that this type cannot hold marks nothing, with a warning."""
    value = card(header, "BLANK", None, index, path)
    if value is None or stored.kind == "f":
        return None
    limits = np.iinfo(stored)
    sound = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    if not sound or not limits.min <= int(value) <= limits.max:  # type: ignore[call-overload]
        warnings.warn(f"{path}: HDU {index}: BLANK = {value} is no {stored} and marks no pixel", stacklevel=5)
        return None
    return int(value)  # type: ignore[call-overload]
