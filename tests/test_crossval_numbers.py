"""The arithmetic of a cross-validation: intervals, temperatures, reliability, samples, and rules of decision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import bootstrap

from densepred.cases.case import Case
from densepred.crossval.calibration import DOUBT, Sample, fit_temperature, loss, reliability
from densepred.crossval.decisions import _and_no_class_loses, more_than_noise
from densepred.crossval.sampling import PER_CASE, Drawn, sample_case
from densepred.inference.predictor import load
from densepred.metrics.bootstrap import gain, interval, means, resampled
from tests.untrained_runs import image, noise, run_of

GENERATOR = np.random.default_rng(0)


def test_the_interval_is_that_of_scipy() -> None:
    values = GENERATOR.beta(8, 2, 60)
    found = interval(values[:, None], [str(n) for n in range(60)])
    peer = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.n == 60
    spread = peer.high - peer.low
    assert abs(found.low - peer.low) < 0.08 * spread
    assert abs(found.high - peer.high) < 0.08 * spread


def test_cases_of_a_group_are_drawn_together_and_widen_the_interval() -> None:
    one = GENERATOR.normal(size=40)
    twice = np.repeat(one, 2)[:, None]
    alone = interval(one[:, None], [str(n) for n in range(40)])
    grouped = interval(twice, [str(n // 2) for n in range(80)])
    naive = interval(twice, [str(n) for n in range(80)])
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert naive.high - naive.low < 0.85 * (grouped.high - grouped.low)
    weights = resampled([str(n // 2) for n in range(80)])
    assert (weights.sum(1) == 80).all()
    assert (resampled(["a", "b"]) == resampled(["a", "b"])).all()


def test_means_leave_out_what_is_absent() -> None:
    values = np.array([[1.0, np.nan], [0.5, 0.2], [np.nan, 0.4]])
    assert means(values, np.ones((1, 3)))[0] == pytest.approx((0.75 + 0.3) / 2)
    weights = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    np.testing.assert_allclose(means(values, weights), [((2 * 1 + 0.5) / 3 + 0.2) / 2, 0.4])
    assert np.isnan(interval(np.full((3, 2), np.nan), list("abc")).value)


def test_one_case_or_group_has_no_interval() -> None:
    """However often it is drawn, it says the same; and nothing is decided on it."""
    nothing = np.full((9, 1), np.nan)
    before, after = np.vstack([[[0.5]], nothing]), np.vstack([[[0.6]], nothing])
    names = [str(n) for n in range(10)]
    for found in (interval(before, names), gain(before, after, names), interval(np.ones((2, 1)), ["a", "a"])):
        assert np.isnan([found.low, found.high]).all()
        assert np.isfinite(found.value)
    assert more_than_noise(before, after, names)[0] is False
    several = np.vstack([np.full((4, 1), 0.5), np.full((6, 1), np.nan)])
    assert more_than_noise(several, several + 0.1, names)[0] is False, "four of ten groups have a score"
    several[4] = 0.5
    assert more_than_noise(several, several + 0.1, names)[0] is True


def test_a_paired_gain_is_seen_where_unpaired_scores_overlap() -> None:
    before = GENERATOR.uniform(0.2, 1, (30, 2))
    found = gain(before, before + 0.01, [str(n) for n in range(30)])
    assert found.low == pytest.approx(0.01)
    assert found.high == pytest.approx(0.01)
    assert gain(before, before, [str(n) for n in range(30)]).signed() == "+0.0000 (+0.0000 to +0.0000, n = 30)"


def test_rules_take_what_is_more_than_noise_and_harms_no_class() -> None:
    groups = [str(n) for n in range(40)]
    before = GENERATOR.uniform(0.4, 0.9, (40, 2))
    better = before + GENERATOR.normal(0.02, 0.02, before.shape)
    noisy = before + GENERATOR.normal(0.0, 0.02, before.shape)
    uneven = before + np.array([[0.05, -0.01]])
    assert more_than_noise(before, better, groups)[0]
    assert not more_than_noise(before, noisy, groups)[0]
    assert not more_than_noise(before, before, groups)[0]
    assert more_than_noise(before, uneven, groups)[0]
    assert not _and_no_class_loses(before, uneven, groups)[0]
    assert _and_no_class_loses(before, better, groups)[0]
    assert not more_than_noise(before[:4], before[:4] + 0.1, groups[:4])[0]  # four cases prove nothing
    assert not more_than_noise(before, better, ["same"] * 40)[0]


def sample(name: str, count: int, heat: float, classes: int = 3) -> Sample:
    """Logits whose truth is drawn with the probabilities at a temperature."""
    logits = GENERATOR.normal(0, 3, (count, classes))
    shares = softmax(logits / heat, axis=1)
    truth = (shares.cumsum(1) > GENERATOR.random((count, 1))).argmax(1)
    weight = GENERATOR.uniform(0.5, 1.5, count)
    contested = softmax(logits, axis=1)[:, 0] < 1 - DOUBT
    return Sample(name, logits.astype(np.float32), truth, weight / weight.sum(), contested)


@pytest.mark.parametrize("heat", [0.6, 1.0, 2.3])
def test_the_temperature_is_scipys_and_that_of_the_truth(heat: float) -> None:
    samples = [sample(str(n), 3000, heat) for n in range(4)]

    def total(temperature: float) -> float:
        found = 0.0
        for one in samples:
            shares = log_softmax(one.logits.astype(np.float64) / temperature, axis=1)
            found -= (one.weight * shares[np.arange(len(one.truth)), one.truth]).sum()
        return found

    peer = minimize_scalar(total, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
    found = fit_temperature(samples)
    assert found == pytest.approx(peer, rel=1e-5)
    assert found == pytest.approx(heat, rel=0.08)
    assert sum(loss(one, found) for one in samples) == pytest.approx(total(found), rel=1e-12)
    assert sum(loss(one, found) for one in samples) <= total(1.0)


def test_reliability_is_by_hand() -> None:
    one = sample("a", 20000, 2.0)
    found, shares = reliability([one], 1.0), softmax(one.logits.astype(np.float64), axis=1)
    confidence, right = shares.max(1), shares.argmax(1) == one.truth
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            weight = one.weight[inside]
            error += abs((weight * (confidence[inside] - right[inside])).sum())
    assert found.error == pytest.approx(error, rel=1e-9)
    assert reliability([one], 2.0).error < found.error / 5
    assert found.share.sum() == pytest.approx(1)


def test_doubts_chosen_by_the_model_stay_calibrated() -> None:
    """Of a model that is right as often as it says, the doubtful voxels are so too."""
    samples = [sample(str(n), 20000, 1.0) for n in range(3)]
    assert reliability(samples, 1.0, contested=True).error < 0.01
    assert reliability([sample("b", 20000, 2.5)], 1.0, contested=True).error > 0.05


def test_drawn_voxels_do_not_depend_on_the_slabs() -> None:
    keys, logits = GENERATOR.random(1000), GENERATOR.normal(size=(2, 1000)).astype(np.float32)
    truth = np.arange(1000)
    whole, parts = Drawn(50), Drawn(50)
    whole.add(keys, logits, truth)
    for start in range(0, 1000, 130):
        at = slice(start, start + 130)
        parts.add(keys[at], logits[:, at], truth[at])
    assert whole.seen == parts.seen == 1000
    for one, other in zip(whole.voxels, parts.voxels, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(whole.voxels[1], np.sort(np.argsort(keys)[:50]))


def test_a_sample_stands_for_the_whole_case(tmp_path: Path) -> None:
    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "star"})
    picture = image(tmp_path / "large.nii.gz", noise(5, 120))
    truth = image(tmp_path / "large_label.nii.gz", (noise(5, 120) > 15).astype(np.uint8))
    predictor, case = load(run), Case("large", (picture,), truth)
    found = sample_case(predictor, case)
    assert found is not None
    assert found.weight.sum() == pytest.approx(1)
    assert found.contested.sum() == PER_CASE
    logits = predictor.predict(picture, outputs="logits").numpy()
    shares = softmax(logits.astype(np.float64), axis=0)
    labels = (noise(5, 120) > 15).astype(int)
    exact = -np.log(np.take_along_axis(shares, labels[None], 0)).mean()
    assert loss(found, 1.0) == pytest.approx(exact, rel=0.05)
    contested = shares[0] < 1 - DOUBT
    assert found.weight[found.contested].sum() == pytest.approx(contested.mean(), abs=1e-3)
    again = sample_case(load(run, ["inference.memory=4GB"]), case)
    assert again is not None
    np.testing.assert_array_equal(again.logits, found.logits)
