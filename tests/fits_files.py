"""Small FITS files for tests, written by astropy, sound and otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

RNG = np.random.default_rng(0)
TAN = {
    **{"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CUNIT1": "deg", "CUNIT2": "deg", "RADESYS": "ICRS"},
    **{"CRVAL1": 150.1, "CRVAL2": 2.2, "CRPIX1": 20.5, "CRPIX2": 12.5, "CDELT1": -0.2 / 3600, "CDELT2": 0.2 / 3600},
}
"""A tangential projection of 0.2 arcsec a pixel, north up."""


def pixels(shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    """Values that fit any type."""
    return np.asarray(RNG.integers(0, 100, shape), dtype)


def save(path: Path, values: np.ndarray | None, **cards: Any) -> Path:
    """A primary HDU."""
    fits.PrimaryHDU(values, fits.Header(cards)).writeto(path, overwrite=True)
    return path


def save_many(path: Path, *hdus: Any, **options: Any) -> Path:
    """An empty primary HDU and others behind it."""
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path, overwrite=True, **options)
    return path


def image(values: np.ndarray, name: str = "", version: int = 1, **cards: Any) -> fits.ImageHDU:
    """An image HDU."""
    return fits.ImageHDU(values, fits.Header(cards), name=name, ver=version)


def raw(path: Path, stored: np.ndarray, **cards: Any) -> Path:
    """A primary HDU of integers just as they are, with BSCALE, BZERO and BLANK as given, past astropy's help."""
    fits.PrimaryHDU(stored).writeto(path, overwrite=True)
    return patched(path, **cards)


def patched(path: Path, index: int = 0, **cards: Any) -> Path:
    """A file with cards of one HDU overwritten or added, past astropy's checks; the data stay as they are."""
    content = bytearray(path.read_bytes())
    with fits.open(path, disable_image_compression=True) as file:
        start, end = (file[index].fileinfo()[name] for name in ("hdrLoc", "datLoc"))
        header = file[index].header.copy()
    for name, value in cards.items():
        header[name] = value
    text = header.tostring().encode("ascii")
    content[start:end] = text
    path.write_bytes(content)
    return path


def astropy_values(path: Path, index: int = 0) -> np.ndarray:
    """What astropy reads, without its warnings."""
    with warnings.catch_warnings(action="ignore"), fits.open(path, memmap=False) as file:
        return np.array(file[index].data)
