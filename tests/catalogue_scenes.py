"""A synthetic scene for tests of catalogues."""

from __future__ import annotations

import numpy as np

from densepred.volumes import Volume

SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "A_2_0": 3e-4, "A_1_1": -2e-4,
       "B_ORDER": 2, "B_0_2": -4e-4, "B_1_1": 1e-4}  # fmt: skip
"""A distortion for `fits_files.TAN`."""


def plain(array: np.ndarray) -> Volume:
    return Volume.from_array(array, (1.0,) * array.ndim)


def scene() -> tuple[np.ndarray, np.ndarray, list[tuple[float, ...]]]:
    """Elliptical Gaussians that do not overlap, cut at 4 sigma: image, segments, (x, y, a, b, theta in degrees)."""
    shapes = [(60.3, 50.8, 6.0, 3.0, 30.0), (180.2, 55.1, 8.0, 4.0, -50.0), (70.7, 180.4, 4.0, 4.0, 0.0),
              (190.5, 170.5, 9.0, 3.5, 89.0), (125.0, 120.0, 5.0, 2.0, 0.0)]  # fmt: skip
    y, x = np.mgrid[:240, :250].astype(float)
    image, segments = np.zeros(x.shape), np.zeros(x.shape, np.int32)
    for number, (x0, y0, a, b, theta) in enumerate(shapes, 1):
        turn = np.radians(theta)
        along = (x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)
        across = -(x - x0) * np.sin(turn) + (y - y0) * np.cos(turn)
        radius = (along / a) ** 2 + (across / b) ** 2
        image += np.where(radius < 25, 100 * number * np.exp(-radius / 2), 0)
        segments[radius < 25] = number
    return image, segments, shapes
