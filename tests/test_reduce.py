"""Reductions of logits against SciPy, and at the edges of float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densepred.inference import reduce
from densepred.inference.forward import Forward

SHAPES = st.sampled_from([(2, 5), (2, 3, 4), (3, 1, 4, 5), (7, 2, 3, 4), (118, 2, 3)])


def drawn(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([0.01, 1.0, 10.0, 100.0]))
def test_probabilities_and_entropy_are_scipys(shape: tuple[int, ...], seed: int, scale: float) -> None:
    logits = drawn(shape, seed, scale)
    before = logits.clone()
    expected = scipy.special.softmax(logits.double().numpy(), axis=0)
    np.testing.assert_allclose(reduce.probabilities(logits).numpy(), expected, rtol=2e-5, atol=1e-7)
    entropy = reduce.entropy(logits)
    assert entropy.shape == (1, *shape[1:])
    np.testing.assert_allclose(entropy[0].numpy(), scipy.stats.entropy(expected, axis=0), rtol=1e-4, atol=2e-6)
    assert torch.equal(logits, before)


def test_entropy_is_there_where_a_class_is_nearly_certain() -> None:
    for margin in (5.0, 15.0, 25.0, 40.0):
        logits = torch.tensor([[0.0], [-margin]])
        p = math.exp(-margin) / (1 + math.exp(-margin))
        expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
        assert reduce.entropy(logits).item() == pytest.approx(expected, rel=0.05, abs=0)


def test_entropy_is_between_nothing_and_log_k() -> None:
    assert reduce.entropy(torch.zeros(118, 3)).max().item() == pytest.approx(math.log(118), rel=1e-6)
    impossible = torch.tensor([[0.0], [-math.inf], [0.0]])  # a block in which a class has no share
    assert reduce.entropy(impossible).item() == pytest.approx(math.log(2), rel=1e-6)
    certain = reduce.entropy(torch.tensor([[3e38], [-3e38]]))
    assert certain.item() == 0
    assert not math.copysign(1, certain.item()) < 0


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_are_the_values_of_the_likeliest_class(kind: torch.dtype) -> None:
    logits, values = drawn((4, 3, 5, 6), 1, 1.0), torch.tensor([0, 7, 2, 120], dtype=kind)
    labels = reduce.labels(logits, values)
    assert labels.dtype == kind
    assert np.array_equal(labels[0].numpy(), values.numpy()[logits.numpy().argmax(0)])


@pytest.mark.parametrize("shape", [(3, 11, 5, 6), (2, 7, 33), (25, 9, 13, 17), (118, 5, 9, 31)])
def test_how_planes_are_cut_changes_no_bit(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, values = drawn(shape, 6, 3.0), torch.arange(shape[0], dtype=torch.uint8)
    whole = {"entropy": reduce.entropy(logits), "probabilities": reduce.probabilities(logits)}
    whole["labels"] = reduce.labels(logits, values)
    for planes in (1, 2, 4):
        slabs = logits.split(planes, 1)
        monkeypatch.setattr(reduce, "PIECE", planes * logits[:, 0].nbytes)
        for kind, expected in whole.items():
            of = (lambda x: reduce.labels(x, values)) if kind == "labels" else getattr(reduce, kind)
            assert torch.equal(torch.cat([of(slab) for slab in slabs], 1), expected), kind
            assert torch.equal(of(logits), expected), kind


def test_of_equal_logits_the_first_class_wins() -> None:
    assert reduce.labels(torch.zeros(3, 2), torch.tensor([5, 6, 7])).tolist() == [[5, 5]]
    with pytest.raises(ValueError, match=r"values must have shape \(3,\), got \(2,\)"):
        reduce.labels(torch.zeros(3, 2), torch.tensor([0, 1]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(2, 5), st.floats(0, 1e-3))
def test_the_variance_is_numpys_also_of_what_hardly_differs(count: int, classes: int, apart: float) -> None:
    parts = drawn((count, classes, 3, 4), 2, apart).double() + 0.7
    spread = reduce.Spread()
    for part in parts.float():
        spread.add(part)
    expected = parts.float().double().numpy().var(0).mean(0, keepdims=True)
    np.testing.assert_allclose(spread.variance(0).numpy(), expected, rtol=1e-3, atol=1e-7 * apart)


def test_the_mean_of_models_and_views_is_that_of_each_alone() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Conv2d(2, 3, 3, padding=1) for _ in range(3)]
    window = drawn((2, 2, 5, 6), 3, 1.0)
    with torch.no_grad():
        views = [m(window.flip(axes)).flip(axes) for axes in ((), (2,), (3,), (2, 3)) for m in models]
        found = Forward(models, (0, 1), None, True, torch.float32)(window)
    assert found.shape == (2, 4, 5, 6)
    np.testing.assert_allclose(found[:, :3].numpy(), torch.stack(views).mean(0).numpy(), atol=1e-6)
    probabilities = scipy.special.softmax(torch.stack(views).double().numpy(), axis=2)
    np.testing.assert_allclose(found[:, 3].numpy(), probabilities.var(0).mean(1), atol=1e-6)


def test_split_takes_the_last_channel_only_where_it_is_there() -> None:
    slab = drawn((4, 2, 3), 4, 1.0)
    logits, none = reduce.split(slab, False)
    assert none is None
    assert logits is slab
    logits, variance = reduce.split(slab, True)
    assert variance is not None
    assert torch.equal(torch.cat([logits, variance]), slab)
