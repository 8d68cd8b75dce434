"""Counts and ratios against hand-made values, MONAI and identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from densepred.metrics import METRICS, confusion, dice, iou, precision, recall

TABLE = np.array([[50, 3, 2, 0], [5, 20, 0, 0], [0, 4, 16, 0], [0, 0, 0, 0]])


def test_ratios_by_hand() -> None:
    assert dice(TABLE)[:3] == pytest.approx([100 / 110, 40 / 52, 32 / 38])
    assert iou(TABLE)[:3] == pytest.approx([50 / 60, 20 / 32, 16 / 22])
    assert precision(TABLE)[:3] == pytest.approx([50 / 55, 20 / 27, 16 / 18])
    assert recall(TABLE)[:3] == pytest.approx([50 / 55, 20 / 25, 16 / 20])


def test_a_class_in_neither_has_no_score() -> None:
    assert all(np.isnan(metric(TABLE)[3]) for metric in METRICS.values())


def test_one_side_empty_scores_zero_where_it_can() -> None:
    missed, invented = np.array([[5, 0], [3, 0]]), np.array([[5, 3], [0, 0]])
    for table in (missed, invented):
        assert dice(table)[1] == iou(table)[1] == 0
    assert (recall(missed)[1], precision(invented)[1]) == (0, 0)
    assert np.isnan(precision(missed)[1])
    assert np.isnan(recall(invented)[1])


def test_counts_are_exact_beyond_float32() -> None:
    size = 2**24 + 3
    truth, prediction = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    truth[-1], prediction[-2:] = 1, 1
    counts = confusion(truth, prediction, 2)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[2**24 + 1, 1], [0, 1]]
    many = counts * 2**37
    right, wrong = 2**24 + 1, 1
    assert recall(many)[0] == right / (right + wrong)
    assert precision(many)[1] == 1 / (1 + wrong)
    assert iou(many)[0] == right / (right + wrong)
    assert dice(many)[0] == 2 * right / (2 * right + wrong)


def test_equal_to_monai() -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 4, (2, 9, 8, 7))
    prediction[:5] = truth[:5]
    truth[truth == 3] = 2
    prediction[prediction == 3] = 2
    counts = confusion(truth, prediction, 4)
    hot = [torch.eye(4)[torch.as_tensor(labels)].movedim(-1, 0)[None] for labels in (prediction, truth)]
    np.testing.assert_allclose(dice(counts), metrics.compute_dice(*hot)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(iou(counts), metrics.compute_iou(*hot)[0].numpy(), rtol=1e-6)
    parts = metrics.get_confusion_matrix(*hot)
    for name, ours in (("precision", precision), ("recall", recall)):
        theirs = metrics.compute_confusion_matrix_metric(name, parts)[0].numpy()
        np.testing.assert_allclose(ours(counts)[:3], theirs[:3], rtol=1e-6)


@given(arrays(np.int8, array_shapes(max_side=6), elements=st.integers(-1, 4)), st.randoms(use_true_random=False))
def test_counts_add_up(truth: np.ndarray, random: object) -> None:
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    prediction = rng.integers(0, 5, truth.shape)
    whole = confusion(truth, prediction, 5)
    assert whole.sum() == (truth >= 0).sum()
    slabs = zip(np.array_split(truth, 3), np.array_split(prediction, 3), strict=True)
    np.testing.assert_array_equal(whole, sum(confusion(ours, theirs, 5) for ours, theirs in slabs))
    np.testing.assert_array_equal(whole.sum(1), [(truth == value).sum() for value in range(5)])
    overlap = iou(whole)
    np.testing.assert_allclose(dice(whole), 2 * overlap / (1 + overlap))


def test_ignored_voxels_are_not_looked_at() -> None:
    truth, prediction = np.array([0, 1, 9, 9]), np.array([0, 1, 77, -5])
    assert confusion(truth, prediction, 2, ignore=9).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("truth", "prediction", "error", "words"),
    [
        (np.zeros(3, int), np.zeros(4, int), ValueError, r"one shape.*\(3,\) and \(4,\)"),
        (np.array([0, 3]), np.zeros(2, int), ValueError, r"truth must lie in \[0, 3\)"),
        (np.zeros(2, int), np.array([0, -1]), ValueError, r"prediction must lie in \[0, 3\)"),
        (np.zeros(2), np.zeros(2, int), TypeError, "truth must hold integers, got float64"),
    ],
)
def test_wrong_arguments_are_named(
    truth: np.ndarray, prediction: np.ndarray, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        confusion(truth, prediction, 3)
