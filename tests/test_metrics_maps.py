"""Errors of maps against SciPy's and NumPy's, and spectra of maps whose spectra are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr

from densepred.metrics import MapErrors, Spectra


def pair(seed: int = 0, shape: tuple[int, ...] = (40, 30)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(5, 2, shape)
    return truth, 0.7 * truth + rng.normal(0, 1, shape)


def test_errors_equal_numpys_and_scipys():
    truth, prediction = pair()
    found = MapErrors.of(truth, prediction)
    assert found.mse == pytest.approx(((truth - prediction) ** 2).mean())
    assert found.rmse == pytest.approx(np.sqrt(((truth - prediction) ** 2).mean()))
    assert found.mae == pytest.approx(np.abs(truth - prediction).mean())
    assert found.bias == pytest.approx((prediction - truth).mean())
    assert found.pearson == pytest.approx(pearsonr(truth.ravel(), prediction.ravel()).statistic)
    assert found.r2 == pytest.approx(1 - ((truth - prediction) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_what_is_not_known_is_left_out_and_parts_add_up():
    truth, prediction = pair(1)
    known = np.random.default_rng(2).random(truth.shape) < 0.7
    expected = MapErrors.of(truth[known], prediction[known])
    holes = np.where(known, truth, np.nan)
    halves = np.where(known, prediction, np.nan)
    for found in (MapErrors.of(holes, prediction), MapErrors.of(truth, halves), MapErrors.of(truth, prediction, known)):
        assert found == expected
    parts = [
        MapErrors.of(ours, theirs) for ours, theirs in zip(np.split(holes, 4), np.split(prediction, 4), strict=True)
    ]
    total = sum(parts, MapErrors())
    assert total.count == expected.count
    for name in ("mse", "mae", "bias", "pearson", "r2"):
        assert getattr(total, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_a_large_mean_costs_no_digits():
    rng = np.random.default_rng(0)
    truth = 1e9 + rng.normal(size=10_000)
    prediction = truth + rng.normal(size=10_000)
    total = sum(
        (MapErrors.of(*halves) for halves in zip(np.split(truth, 4), np.split(prediction, 4), strict=True)), MapErrors()
    )
    expected = pearsonr(truth - 1e9, prediction - 1e9).statistic
    assert total.pearson == pytest.approx(expected, rel=1e-6)


def test_errors_of_nothing_and_of_constants():
    nothing = MapErrors.of(np.full(3, np.nan), np.zeros(3))
    assert all(math.isnan(getattr(nothing, name)) for name in ("mse", "rmse", "mae", "bias", "pearson", "r2"))
    assert math.isnan(MapErrors.of(np.ones(3), np.arange(3.0)).pearson)
    with pytest.raises(ValueError, match=r"one shape, got \(3,\), \(4,\)"):
        MapErrors.of(np.zeros(3), np.zeros(4))


def test_constants_are_so_to_rounding():
    """The mean of three times 0.1 is no tenth."""
    found = MapErrors.of(np.full(3, 0.1), np.full(3, 0.7))
    assert np.isnan([found.pearson, found.r2]).all()
    nearly = MapErrors.of(1e6 + np.array([0.0, 1e-3]), np.array([1.0, 2.0]))
    assert nearly.pearson == pytest.approx(1)


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    """C(l) = variance times the area of a pixel, at every l; the mean over all modes is exact (Parseval)."""
    rng = np.random.default_rng(0)
    pixel = 2 * np.pi / 180 / 60
    maps = [rng.normal(0, 3, (64, 48)) for _ in range(8)]
    total = sum((Spectra.of(one, one, pixel, 10) for one in maps[1:]), Spectra.of(maps[0], maps[0], pixel, 10))
    power = total.power[0]
    np.testing.assert_allclose(power, 9 * pixel**2, rtol=5 / np.sqrt(total.modes.min() / 2))
    every = Spectra.of(maps[0], maps[0], pixel, np.array([1.0, 1e9]))
    assert every.modes.sum() == 64 * 48 - 1
    area = maps[0].size * pixel**2
    assert every.truth.sum() / area == pytest.approx(maps[0].var(), rel=1e-12)


def test_a_wave_stands_at_its_multipole():
    """Waves of 6 and 8 per side of a square of side L: |l| = 2 pi 10 / L."""
    size, pixel = 64, 0.01
    y, x = np.mgrid[:size, :size] / size
    wave = np.cos(2 * np.pi * (6 * y + 8 * x))
    found = Spectra.of(wave, wave, pixel, 24)
    at = int(np.nanargmax(found.power[0]))
    expected = 2 * np.pi * 10 / (size * pixel)
    assert found.edges[at] <= expected < found.edges[at + 1]
    assert found.truth[at] / found.truth.sum() == pytest.approx(1)
    tall = Spectra.of(wave, wave, (pixel, 2 * pixel), np.linspace(1, 700, 200))
    expected = 2 * np.pi * np.hypot(6, 4) / (size * pixel)
    at = int(np.nanargmax(np.nan_to_num(tall.power[0])))
    assert tall.edges[at] <= expected < tall.edges[at + 1]


def test_ratio_and_correlation_are_those_of_what_was_added():
    """A prediction of gain g plus noise of power N: P ratio g^2 + N/P, r = g sqrt(P) / sqrt(g^2 P + N)."""
    rng = np.random.default_rng(1)
    total = None
    for _ in range(40):
        truth, noise = rng.normal(0, 2, (32, 32)), rng.normal(0, 1, (32, 32))
        found = Spectra.of(truth, 0.6 * truth + noise, edges=6)
        total = found if total is None else total + found
    assert total is not None
    np.testing.assert_allclose(total.ratio, 0.36 + 1 / 4, rtol=0.08)
    np.testing.assert_allclose(total.correlation, 0.6 * 2 / np.sqrt(0.36 * 4 + 1), rtol=0.03)
    assert (np.diff(total.frequency) > 0).all()
    opposite = Spectra.of(truth, -truth, edges=6)
    np.testing.assert_allclose(opposite.correlation, -1)


def test_holes_do_not_bias_the_power_of_white_noise():
    rng = np.random.default_rng(4)
    total = None
    for _ in range(20):
        map_ = rng.normal(0, 1, (48, 48))
        map_[10:25, 5:30] = np.nan
        found = Spectra.of(map_, np.nan_to_num(map_), edges=5)
        total = found if total is None else total + found
    assert total is not None
    np.testing.assert_allclose(total.power[0], 1, rtol=0.1)
    np.testing.assert_allclose(total.correlation, 1)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be \(Y, X\) alike, got \(4, 4\) and \(4, 5\)"):
        Spectra.of(np.zeros((4, 4)), np.zeros((4, 5)))
    with pytest.raises(ValueError, match="no pixel in common"):
        Spectra.of(np.full((4, 4), np.nan), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="edges must rise"):
        Spectra.of(np.zeros((4, 4)), np.zeros((4, 4)), edges=np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="the same edges"):
        _ = Spectra.of(np.ones((4, 4)), np.ones((4, 4)), edges=2) + Spectra.of(
            np.ones((4, 4)), np.ones((4, 4)), edges=1
        )
