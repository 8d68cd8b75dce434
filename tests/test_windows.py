"""The grid of windows and their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from densepred.inference.windows import WindowGrid, even_starts, fixed_starts, gaussian_kernel, monai_gaussian_map


def test_even_starts_follow_nnunet() -> None:
    assert even_starts(110, 64, 0.5) == (0, 23, 46)  # the example in nnU-Net's own source
    assert even_starts(64, 64, 0.5) == (0,)
    assert even_starts(10, 64, 0.5) == (0,)
    assert len(even_starts(600, 128, 0.5)) == 9  # 512 x 512 x 600 voxels: 9 x 7 x 7 = 441 windows
    assert len(even_starts(512, 128, 0.5)) == 7
    assert even_starts(10, 5, 0.8) == (0, 1, 2, 3, 4, 5)
    assert even_starts(3, 1, 0.9) == (0, 1, 2)  # never the same window twice


def test_fixed_starts_follow_monai() -> None:
    assert fixed_starts(110, 64, 0.5) == (0, 32, 46)
    assert fixed_starts(10, 64, 0.5) == (0,)
    assert fixed_starts(3, 1, 0.5) == (0, 1, 2)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 0.95), st.sampled_from([even_starts, fixed_starts]))
def test_starts_cover_the_axis_once_each(size: int, window: int, overlap: float, starts: Callable) -> None:
    found = starts(size, window, overlap)
    steps = np.diff(found)
    assert found[0] == 0
    assert found[-1] == max(size - window, 0)
    assert np.all((steps >= 1) & (steps <= window))


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.95))
def test_windows_at_multiples_overlap_as_wished(size: int, parts: int, multiple: int, overlap: float) -> None:
    (axis,) = WindowGrid.plan((size,), parts * multiple, overlap, multiple=multiple).axes
    steps = np.diff(axis.starts)
    assert all(start % multiple == 0 for start in axis.starts)
    assert axis.starts[-1] + axis.window == axis.padded
    assert np.all((steps >= 1) & (steps <= max(np.ceil(axis.window * (1 - overlap)), multiple)))


@given(
    st.integers(1, 200), st.integers(1, 70), st.integers(1, 40), st.floats(0, 0.95), st.sampled_from(["even", "fixed"])
)
def test_windows_at_multiples_leave_no_gap(size: int, window: int, multiple: int, overlap: float, spacing: str) -> None:
    """Even those that are smaller than the multiple, which grow to it."""
    (axis,) = WindowGrid.plan((size,), window, overlap, spacing, multiple).axes
    assert all(start % multiple == 0 for start in axis.starts)
    assert axis.window >= min(window, size)
    assert (np.diff(axis.starts) <= axis.window).all()
    assert axis.starts[-1] + axis.window == axis.padded


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_weights_over_a_voxel_add_up_to_one(overlap: float) -> None:
    axis = WindowGrid.plan((101,), 24, overlap).axes[0]
    total = np.zeros(101)
    for start, weights in zip(axis.starts, axis.weights(np.exp(-np.arange(24.0))), strict=True):
        total[start : start + 24] += weights
    np.testing.assert_allclose(total, 1, rtol=0, atol=3e-7)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 33])
def test_the_gaussian_is_nnunets(window: int) -> None:
    delta = np.zeros(window)
    delta[window // 2] = 1
    expected = gaussian_filter(delta, window / 8, mode="constant")
    np.testing.assert_allclose(gaussian_kernel(window), expected / expected.max(), rtol=1e-12)


@pytest.mark.parametrize("window", [(8, 8), (9, 6, 12), (1, 16, 16), (32, 32, 32)])
def test_the_clamped_gaussian_is_monais(window: tuple[int, ...]) -> None:
    from monai.data.utils import compute_importance_map

    expected = compute_importance_map(window, mode="gaussian", sigma_scale=0.125).numpy()
    np.testing.assert_allclose(monai_gaussian_map(window), expected, rtol=1e-5)


def test_the_windows_of_a_volume_come_in_the_order_of_their_places() -> None:
    grid = WindowGrid.plan((20, 12, 8), window=(10, 8, 8), overlap=0.5)
    corners = [grid.corner(index) for row in range(3) for index in grid.row(row)]
    assert corners == [(z, y, 0) for z in (0, 5, 10) for y in (0, 4)]
    assert len(grid) == 6
    assert len(WindowGrid.plan((600, 512, 512), 128, 0.5)) == 441
