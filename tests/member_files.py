"""A file of several images, written by astropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astropy.io import fits

from tests.fits_files import TAN, image, pixels, save_many


def exposure(path: Path, **options: Any) -> Path:
    """As the camera files of Hubble: two chips of other sizes, each with its error and its flags."""
    hdus = []
    for chip, rows in ((1, 12), (2, 9)):
        cards = {**TAN, "CRVAL1": 150.0 + chip, "CD1_1": -5.5e-5, "CD1_2": 1e-6, "CD2_1": 1e-6, "CD2_2": 5.5e-5}
        del cards["CDELT1"], cards["CDELT2"]
        cards |= {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 1e-5, "B_ORDER": 2}
        cards |= {"CCDCHIP": 3 - chip, "BUNIT": "ELECTRONS", "INHERIT": True}
        hdus.append(image(pixels((rows, 17)), "SCI", chip, **cards))
        hdus.append(image(pixels((rows, 17)), "ERR", chip, BUNIT="ELECTRONS"))
        hdus.append(image(pixels((rows, 17), "i2"), "DQ", chip))
    hdus.append(fits.BinTableHDU.from_columns([fits.Column("x", "J", array=[1, 2])], name="WCSCORR"))
    save_many(path, *hdus, checksum=True, **options)
    with fits.open(path, "update") as file:
        file[0].header["TELESCOP"] = "HST"
        file[0].add_checksum()
    return path
