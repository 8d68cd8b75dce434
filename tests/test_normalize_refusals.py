"""What normalisation refuses; the window of a data set; what is kept for records."""

from __future__ import annotations

import json

import numpy as np
import pytest

from densepred.cases.normalize import fit_dataset
from densepred.config.normalize import (
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
from densepred.errors import InputError
from tests.normalize_images import FIXED, PER_CASE, RNG, fitted, forward, name_of, picture, whole


@pytest.mark.parametrize("method", [*PER_CASE, *FIXED], ids=name_of)
def test_images_without_a_valid_voxel_are_refused(method: Normalize) -> None:
    array = np.full((2, 4, 5), np.nan)
    array[0] = 1
    with pytest.raises(InputError, match="no voxel of channel 1 is finite"):
        fitted(array, method, method)


@pytest.mark.parametrize("method", [Robust(), Asinh(), Percentile(high=90), ZScale(), Background(mesh=8)], ids=name_of)
def test_images_that_are_mostly_one_value_have_no_scale(method: Normalize) -> None:
    """Nothing is divided by zero, and no image becomes blank in silence."""
    array = np.zeros((1, 64, 64), np.float32)
    array[0, 5, :30] = 4
    with pytest.raises(InputError, match=f"{method.name} finds no scale in channel 0: values span 0 to 4"):
        fitted(array, method)
    assert forward(array, ZScore()).any()


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(InputError, match="channel 0 are too large"):
        fitted(np.array([[[1e200, 1.0]]]), ZScore())
    with pytest.raises(InputError, match="channel 0 under none are too large for float32"):
        fitted(np.array([[[1e60, 1.0]]]), NoNormalization())


def test_wrong_calls_are_refused() -> None:
    array = picture()
    with pytest.raises(ValueError, match="one method for each of 1 channels, got 2"):
        fitted(array, ZScore(), ZScore())
    with pytest.raises(ValueError, match="complete it with fit_dataset"):
        fitted(array, CTWindow(low=3))
    found = fitted(array, ZScore())
    with pytest.raises(ValueError, match=r"must have the shape \(1, 4, 60\)"):
        found.forward(array, np.s_[:4, :])
    with pytest.raises(ValueError, match="median=True"):
        found.fill(array, "median", whole(array))


# the data set


def test_ct_window_is_completed_from_the_training_set() -> None:
    cases = [RNG.normal(60, 80, size).astype(kind) for size, kind in ((3000, "i2"), (900, "f4"), (10, "f8"))]
    reads = []

    def foreground() -> list[np.ndarray]:
        reads.append(1)
        return [*cases, np.array([np.nan, np.inf])]

    found = fit_dataset(CTWindow(), foreground)
    values = np.concatenate(cases).astype(np.float64)
    assert (found.low, found.high) == tuple(np.quantile(values.astype("f4").astype("f8"), (0.005, 0.995)))
    assert (found.mean, found.std) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    assert len(reads) == 2
    assert fit_dataset(found, foreground) == found
    given_window = fit_dataset(CTWindow(low=-100, high=200), foreground)
    assert len(reads) == 3
    assert (given_window.low, given_window.high, given_window.mean) == (-100, 200, found.mean)


@pytest.mark.parametrize(
    ("values", "what"), [([], "no foreground voxel"), ([5, 5, 5], "spans 5 to 5 with deviation 0"), ([1, 2], "150 to")]
)
def test_training_sets_without_foreground_are_refused(values: list[float], what: str) -> None:
    with pytest.raises(InputError, match=what):
        fit_dataset(CTWindow(low=150) if "150" in what else CTWindow(), lambda: [np.array(values, np.float32)])


def test_parameters_are_json() -> None:
    array = picture((9, 40, 33))
    described = fitted(array, *PER_CASE, *FIXED).describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described[3]["softening"] == 0.3
    assert described[2]["boxes"] == [1, 2, 2]
