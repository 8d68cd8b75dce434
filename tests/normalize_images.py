"""Images, methods and short cuts for the tests of normalisation."""

from __future__ import annotations

import numpy as np

from densepred.cases.fitted import Fitted
from densepred.cases.normalize import fit
from densepred.config.normalize import (
    Anscombe,
    Asinh,
    Background,
    CTWindow,
    NoNormalization,
    Normalize,
    Percentile,
    Robust,
    ZScale,
    ZScore,
)
from densepred.volumes import Volume

RNG = np.random.default_rng(0)
PER_CASE = [ZScore(), Robust(), Background(mesh=16), Asinh(softening=0.3), ZScale(), Percentile()]
FIXED = [CTWindow(low=-50, high=160, mean=40, std=30), Anscombe(gain=1.5, offset=-40), NoNormalization()]
INVERTIBLE = [*PER_CASE[:-1], Percentile(clip=False), Anscombe(gain=1.5, offset=-40), NoNormalization()]


def name_of(method: Normalize) -> str:
    return method.name


def fitted(array: np.ndarray, *chosen: Normalize, median: bool = False, thickness: int | None = None) -> Fitted:
    """`array` is `(C, *spatial)`."""
    return fit(Volume(array, (1.0,) * (array.ndim - 1)), chosen, median, thickness)


def whole(array: np.ndarray) -> tuple[slice, ...]:
    return (slice(None),) * (array.ndim - 1)


def forward(array: np.ndarray, *chosen: Normalize) -> np.ndarray:
    return fitted(array, *chosen).forward(array, whole(array))


def picture(shape: tuple[int, ...] = (1, 70, 60), dtype: str = "f4") -> np.ndarray:
    """Skewed values around 100, a few of them invalid in floats."""
    out = (RNG.gamma(3, 12, shape) + 60).astype(dtype)
    if out.dtype.kind == "f":
        out[..., 3, 5:9], out[..., 10, 10], out[..., 11, 10] = np.nan, np.inf, -np.inf
    return out


def valid(array: np.ndarray) -> np.ndarray:
    return array[np.isfinite(array)].astype(np.float64)
