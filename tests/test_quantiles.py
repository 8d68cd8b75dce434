"""Exact quantiles by counting, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from densepred.cases.quantiles import Quantiles, quantiles
from densepred.errors import InputError
from densepred.volumes import Volume

PROBABILITIES = (0.0, 0.005, 0.25, 1 / 3, 0.5, 0.75, 0.995, 1.0)
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "?")


def counted(parts: list[np.ndarray], probabilities: tuple[float, ...] = PROBABILITIES) -> tuple[tuple[float, ...], int]:
    """The quantiles and how many passes they took."""
    counting, passes = Quantiles(parts[0].dtype, probabilities), 1
    while True:
        for part in parts:
            counting.add(part)
        if counting.finish():
            return counting.values, passes
        passes += 1


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["f2", "f4", "f8"]),
        st.integers(1, 60),
        elements=st.floats(width=16, allow_nan=False).map(float),
    )
    | hnp.arrays("f4", st.integers(1, 60), elements=st.floats(width=32, allow_infinity=False, allow_nan=False))
    | hnp.arrays("f8", st.integers(1, 60), elements=st.floats(allow_infinity=False, allow_nan=False)),
    st.integers(1, 5),
)
def test_floats_of_any_size_equal_numpy(numbers: np.ndarray, pieces: int) -> None:
    """Negative zeros, denormals and both ends of the range among them."""
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        found, passes = counted(np.array_split(numbers, pieces))
        expected = np.quantile(numbers.astype(np.float64), PROBABILITIES)
    np.testing.assert_array_equal(found, expected)
    assert passes == (4 if numbers.dtype == "f8" else 2)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(INTEGERS).flatmap(lambda kind: hnp.arrays(kind, st.integers(1, 60))))
def test_integers_of_every_type_equal_numpy(numbers: np.ndarray) -> None:
    found, passes = counted([numbers])
    np.testing.assert_array_equal(found, np.quantile(np.sort(numbers).astype(np.float64), PROBABILITIES))
    assert passes == max(1, numbers.dtype.itemsize // 2)


def test_many_numbers_of_a_real_kind() -> None:
    numbers = np.random.default_rng(0).lognormal(3, 2, 300_001).astype(np.float32)
    numbers[::1000] *= -1
    found, _ = counted(np.array_split(numbers, 7))
    np.testing.assert_array_equal(found, np.quantile(numbers.astype(np.float64), PROBABILITIES))


def test_foreign_byte_order_is_read() -> None:
    numbers = np.array([-3.5, 0.25, 8, 1e-42], ">f4")
    assert counted([numbers], (0.0, 0.5, 1.0))[0] == (-3.5, (0.25 + float(np.float32(1e-42))) / 2, 8.0)


def test_volumes_are_read_slab_by_slab_without_their_invalid_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepred.cases.quantiles._SLAB_VOXELS", 30)
    array = np.random.default_rng(1).normal(5, 2, (2, 9, 4, 5)).astype(np.float32)
    array[1, ::2, 1], array[1, 0, 0, 0] = np.nan, -np.inf
    found = quantiles(Volume.from_array(array, (1.0, 1.0, 1.0)), 1, PROBABILITIES)
    valid = np.where(np.isfinite(array[1]), array[1], np.nan).astype(np.float64)
    np.testing.assert_array_equal(found, np.nanquantile(valid, PROBABILITIES))


def test_no_numbers_and_no_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="no voxel of channel 0 is finite"):
        quantiles(Volume.from_array(np.full((3, 3), np.nan), (1.0, 1.0)), 0, (0.5,))
    with pytest.raises(ValueError, match=r"probabilities must be from 0 to 1, got \(1.5,\)"):
        Quantiles(np.dtype("f4"), (1.5,))
    with pytest.raises(ValueError, match="no number"):
        Quantiles(np.dtype("f4"), (0.5,)).finish()
