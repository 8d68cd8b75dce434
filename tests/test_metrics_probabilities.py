"""ROC and precision-recall curves, calibration and Brier score against SciPy's, scikit-learn's and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from densepred.metrics import Calibration, Ranking


def scores(seed: int = 0, count: int = 3000, digits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random(count) < 0.3).astype(int)
    values = 1 / (1 + np.exp(-rng.normal(1.5 * truth, 1)))
    return (values if digits is None else values.round(digits)), truth


@pytest.mark.parametrize("digits", [None, 1])
def test_auc_equals_scipys_rank_test(digits: int | None):
    values, truth = scores(digits=digits)
    found = Ranking.of(values.reshape(30, -1), truth.reshape(30, -1))
    wins = mannwhitneyu(values[truth == 1], values[truth == 0]).statistic
    assert found.auc == pytest.approx(wins / (truth.sum() * (1 - truth).sum()), rel=1e-12)
    false, true, thresholds = found.roc
    assert found.auc == pytest.approx(np.trapezoid(true, false), rel=1e-12)
    for at in (0, 1, len(thresholds) // 2, -1):
        called = values >= thresholds[at]
        assert true[at] == called[truth == 1].mean()
        assert false[at] == called[truth == 0].mean()


@pytest.mark.parametrize("digits", [None, 1])
def test_curves_equal_scikit_learns(digits: int | None):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, of the extra peers")
    values, truth = scores(digits=digits)
    found = Ranking.of(values, truth)
    false, true, thresholds = metrics.roc_curve(truth, values, drop_intermediate=False)
    for ours, theirs in zip(found.roc, (false, true, thresholds), strict=True):
        np.testing.assert_allclose(ours, theirs)
    precision, recall, thresholds = metrics.precision_recall_curve(truth, values)
    ours = found.precision_recall
    np.testing.assert_allclose(ours[0][::-1], precision[:-1])
    np.testing.assert_allclose(ours[1][::-1], recall[:-1])
    np.testing.assert_allclose(ours[2][::-1], thresholds)
    assert found.average_precision == pytest.approx(metrics.average_precision_score(truth, values))
    assert found.auc == pytest.approx(metrics.roc_auc_score(truth, values))
    probabilities = np.stack([1 - values, values])
    assert Calibration.of(probabilities, truth).brier == pytest.approx(2 * metrics.brier_score_loss(truth, values))


def test_rates_at_a_false_positive_rate_are_those_of_a_real_threshold():
    found = Ranking.of(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), np.array([1, 0, 1, 1, 0, 0]))
    assert [found.tpr_at(fpr) for fpr in (0, 0.3, 1 / 3, 0.6, 1)] == [1 / 3, 1 / 3, 1, 1, 1]
    assert found.average_precision == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found.auc == pytest.approx(7 / 9)


def test_counts_of_slabs_add_up_exactly_and_binned_within_their_bound():
    values, truth = scores(1)
    whole = Ranking.of(values, truth)
    parts = [Ranking.of(*pair) for pair in zip(np.split(values, 5), np.split(truth, 5), strict=True)]
    total = sum(parts[1:], parts[0])
    for name in ("scores", "positive", "negative"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    assert whole.auc_error == 0
    for bins in (10, 256, 2**16):
        binned = Ranking.of(values, truth, bins)
        assert binned.positive.sum() == truth.sum()
        assert abs(binned.auc - whole.auc) <= binned.auc_error
        false, true, thresholds = binned.roc
        at = bins // 3
        assert true[at] == (values >= thresholds[at])[truth == 1].mean()
        assert false[at] == (values >= thresholds[at])[truth == 0].mean()
    assert Ranking.of(values, truth, 2**16).auc_error < 1e-4
    with pytest.raises(ValueError, match="must have the same bins, got 0 and 10"):
        _ = whole + Ranking.of(values, truth, 10)


def test_counts_beyond_floats_are_exact():
    """2^40 pairs of each side: products that float64 cannot hold, and int64 neither."""
    big = 2**40 + 1
    found = Ranking(np.array([0.0, 0.5, 1.0]), np.array([1, 0, big]), np.array([big, 1, 0]))
    assert found.auc == (2 * big * (big + 1) + big) / (2 * (big + 1) ** 2)


def test_what_is_not_known_is_left_out():
    values, truth = scores(2, 50)
    holes, marked = values.copy(), truth.copy()
    holes[::5], marked[1::5] = np.nan, -1
    kept = np.ones(50, bool)
    kept[::5] = kept[1::5] = False
    assert Ranking.of(holes, marked).auc == Ranking.of(values[kept], truth[kept]).auc
    both = np.stack([1 - holes, holes])
    ours = Calibration.of(both, marked)
    theirs = Calibration.of(np.stack([1 - values, values])[:, kept], truth[kept])
    assert (ours.error, ours.brier) == (theirs.error, theirs.brier)


def test_a_side_that_does_not_occur_has_no_curve():
    for truth in (np.zeros(4, int), np.full(4, -1)):
        found = Ranking.of(np.arange(4) / 4, truth)
        assert math.isnan(found.auc)
        assert math.isnan(found.tpr_at(0.1))
        assert math.isnan(found.average_precision)
    nothing = Calibration.of(np.full((2, 3), np.nan), np.zeros(3, int))
    assert all(math.isnan(value) for value in (nothing.error, nothing.worst, nothing.brier))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(4,\)"):
        Ranking.of(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="truth must be 1 inside, 0 outside"):
        Ranking.of(np.zeros(3), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] for bins, got \[0, 2\]"):
        Ranking.of(np.array([0.0, 2.0]), np.array([0, 1]), 8)
    with pytest.raises(ValueError, match=r"labels must lie in \[-1, 2\), got \[0, 2\]"):
        Calibration.of(np.full((2, 2), 0.5), np.array([0, 2]))
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\], got \[-3, 4\]"):
        Calibration.of(np.array([[-3.0], [4.0]]), np.array([0]))
    with pytest.raises(ValueError, match="bins must be as many"):
        _ = Calibration.of(np.eye(2), np.array([0, 1])) + Calibration.of(np.eye(2), np.array([0, 1]), 5)


def test_calibration_by_hand():
    """Four of ten are right at a confidence of 0.8, all five at 0.6: (10 * 0.4 + 5 * 0.4) / 15."""
    values = np.array([0.8] * 10 + [0.6] * 5)
    truth = np.array([1] * 4 + [0] * 6 + [1] * 5)
    found = Calibration.of(np.stack([1 - values, values]), truth)
    assert found.error == pytest.approx(0.4)
    assert found.worst == pytest.approx(0.4)
    confidence, accuracy = found.reliability
    known = ~np.isnan(confidence)
    np.testing.assert_allclose(confidence[known], [0.6, 0.8])
    np.testing.assert_allclose(accuracy[known], [1.0, 0.4])
    assert found.brier == pytest.approx(2 * (4 * 0.04 + 6 * 0.64 + 5 * 0.16) / 15)


def test_probabilities_of_regions_have_no_calibration_of_classes():
    with pytest.raises(ValueError, match="must sum to 1 over the classes"):
        Calibration.of(np.array([[0.99], [0.95], [0.02]]), np.array([1]))


def test_calibration_error_equals_a_sum_over_bins_and_adds_up():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), (6, 50)).transpose(2, 0, 1)
    labels = rng.integers(0, 4, (6, 50))
    found = Calibration.of(shares, labels)
    confidence, right = shares.max(0).ravel(), (shares.argmax(0) == labels).ravel()
    expected = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.error == pytest.approx(expected)
    hot = np.eye(4)[labels].transpose(2, 0, 1)
    assert found.brier == pytest.approx(((shares - hot) ** 2).sum(0).mean())
    parts = [Calibration.of(shares[:, at], labels[at]) for at in (slice(0, 2), slice(2, 6))]
    total = parts[0] + parts[1]
    np.testing.assert_array_equal(total.counts, found.counts)
    np.testing.assert_array_equal(total.right, found.right)
    assert (total.error, total.brier) == (pytest.approx(found.error), pytest.approx(found.brier))


def test_true_probabilities_are_calibrated():
    rng = np.random.default_rng(3)
    values = rng.random(200_000)
    truth = (rng.random(200_000) < values).astype(int)
    assert Calibration.of(np.stack([1 - values, values]), truth).error < 0.01
    sharper = values**2 / (values**2 + (1 - values) ** 2)
    assert Calibration.of(np.stack([1 - sharper, sharper]), truth).error > 0.05
