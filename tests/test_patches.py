"""Patch sampling."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.cache import CachedCase, prepare
from densepred.cases.patches import Batch, PatchSampler
from densepred.errors import InputError
from tests.case_files import case_of, plan

SHAPE = (10, 12, 14)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Five cases whose intensities are the index of the voxel (not normalised); the last has no foreground."""
    root, cases = tmp_path_factory.mktemp("patches"), []
    for number in range(5):
        label = np.zeros(SHAPE, np.uint8)
        if number < 4:
            label[number : number + 2, 2:9, 3:10] = 1
            label[9, 11, 13] = 2
        image = np.arange(label.size, dtype=np.float32).reshape(SHAPE) + 1
        cases.append(case_of(root, image, label, name=f"c{number}"))
    return prepare(cases, plan(normalize=("none",)), root / "cache")


def same(a: Batch, b: Batch) -> bool:
    arrays = np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)
    return arrays and (a.ids, a.seeds) == (b.ids, b.seeds)


def test_shapes_and_types(cached: list[CachedCase]) -> None:
    batch = PatchSampler(cached, (4, 5, 6), 3, 0.33, 0).batch(0, 0)
    assert (batch.image.shape, batch.image.dtype) == ((3, 1, 4, 5, 6), np.float32)
    assert (batch.label.shape, batch.label.dtype) == ((3, 4, 5, 6), np.int16)
    assert len(batch.ids) == len(set(batch.seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in batch.seeds)


def test_a_batch_depends_on_seed_epoch_and_step_alone(cached: list[CachedCase]) -> None:
    sampler = PatchSampler(cached, (4, 5, 6), 3, 0.33, 7, steps=10)
    order = [(epoch, step) for epoch in range(3) for step in range(10)]
    expected = {at: sampler.batch(*at) for at in order}
    with ThreadPoolExecutor(4) as pool:
        fresh = PatchSampler(cached, (4, 5, 6), 3, 0.33, 7, steps=10)
        found = dict(zip(order[::-1], pool.map(lambda at: fresh.batch(*at), order[::-1]), strict=True))
    assert all(same(found[at], expected[at]) for at in order)
    seeds = {seed for batch in expected.values() for seed in batch.seeds}
    assert len(seeds) == 90
    assert not same(PatchSampler(cached, (4, 5, 6), 3, 0.33, 8, steps=10).batch(0, 0), expected[0, 0])


def test_negative_seeds_are_seeds(cached: list[CachedCase]) -> None:
    drawn = [PatchSampler(cached, (4, 5, 6), 1, 0.0, seed).batch(0, 0).seeds for seed in (-1, 0, 1)]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("batch", "steps"), [(2, 5), (3, 5), (4, 3)])
def test_each_case_occurs_equally_often(cached: list[CachedCase], batch: int, steps: int) -> None:
    sampler = PatchSampler(cached, (2, 2, 2), batch, 0.0, 0, steps)
    drawn = [name for epoch in range(5) for step in range(steps) for name in sampler.batch(epoch, step).ids]
    assert set(Counter(drawn).values()) == {batch * steps}
    turns = [drawn[at : at + 5] for at in range(0, len(drawn), 5)]
    assert all(sorted(turn) == ["c0", "c1", "c2", "c3", "c4"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_without_steps_each_epoch_starts_its_own_order(cached: list[CachedCase]) -> None:
    sampler = PatchSampler(cached, (2, 2, 2), 5, 0.0, 0)
    orders = [sampler.batch(epoch, 0).ids for epoch in range(6)]
    assert all(sorted(order) == ["c0", "c1", "c2", "c3", "c4"] for order in orders)
    assert len(set(orders)) > 1


def test_patches_are_cut_where_image_and_label_agree(cached: list[CachedCase]) -> None:
    by_id = {case.id: case for case in cached}
    sampler = PatchSampler(cached, (4, 5, 6), 4, 0.5, 3)
    for step in range(10):
        batch = sampler.batch(0, step)
        for slot, name in enumerate(batch.ids):
            corner = np.unravel_index(int(batch.image[slot, 0, 0, 0, 0]) - 1, SHAPE)
            window = tuple(slice(a, a + n) for a, n in zip(corner, (4, 5, 6), strict=True))
            assert np.array_equal(batch.image[slot, 0], by_id[name].image[0][window])
            assert np.array_equal(batch.label[slot], by_id[name].label[window])


@pytest.mark.parametrize(
    ("batch", "share", "centred"), [(2, 0.33, 1), (4, 0.33, 1), (6, 0.33, 2), (3, 0.01, 1), (3, 1.0, 3), (3, 0.0, 0)]
)
def test_the_last_samples_lie_on_foreground(cached: list[CachedCase], batch: int, share: float, centred: int) -> None:
    """A patch of one voxel shows exactly which voxel was drawn."""
    sampler = PatchSampler(cached[:4], (1, 1, 1), batch, share, 0)
    labels = np.stack([sampler.batch(0, step).label[:, 0, 0, 0] for step in range(150)])
    forced = labels[:, batch - centred :]
    assert (forced > 0).all()
    if centred:
        assert (forced == 2).mean() == pytest.approx(0.5, abs=0.12)  # one voxel in a hundred, yet drawn evenly
    if centred < batch:
        assert (labels[:, : batch - centred] == 0).mean() == pytest.approx(1 - 99 / 1680, abs=0.04)


def test_a_case_without_foreground_is_sampled_anywhere(cached: list[CachedCase]) -> None:
    sampler = PatchSampler(cached[4:], (1, 1, 1), 1, 1.0, 0)
    assert len({sampler.batch(0, step).image.item() for step in range(50)}) > 40


def test_patches_stay_inside_where_the_case_is_larger(cached: list[CachedCase]) -> None:
    sampler = PatchSampler(cached[:4], (6, 7, 8), 2, 1.0, 0)
    for step in range(20):
        batch = sampler.batch(0, step)
        assert (batch.label >= 0).all()
        assert (batch.image > 0).all()
        assert (batch.label > 0).reshape(2, -1).any(1).all()


def test_uniform_patches_reach_every_place(cached: list[CachedCase]) -> None:
    sampler = PatchSampler(cached, (9, 11, 13), 1, 0.0, 0)
    corners = Counter(float(sampler.batch(0, step).image[0, 0, 0, 0, 0]) for step in range(400))
    assert len(corners) == 8
    assert min(corners.values()) > 25


@pytest.mark.parametrize("size", [(14, 12, 14), (12, 20, 6), (11, 13, 15)])
def test_small_cases_are_centred_and_padding_is_ignored(cached: list[CachedCase], size: tuple[int, int, int]) -> None:
    batch = PatchSampler(cached[:1], size, 1, 1.0, 0).batch(0, 0)
    inside = np.zeros(size, bool)
    before = [max(p - n, 0) // 2 for p, n in zip(size, SHAPE, strict=True)]
    inside[tuple(slice(a, a + n) for a, n in zip(before, SHAPE, strict=True))] = True
    assert np.array_equal(batch.image[0, 0] > 0, inside)
    assert np.array_equal(batch.label[0] >= 0, inside)


def test_2d(tmp_path: Path) -> None:
    label = np.zeros((9, 11), np.uint8)
    label[4, 5] = 1
    cases = prepare([case_of(tmp_path, label * 5.0 + 1, label)], plan(dims=2), tmp_path / "cache")
    batch = PatchSampler(cases, (3, 3), 2, 1.0, 0).batch(0, 0)
    assert batch.image.shape == (2, 1, 3, 3)
    assert np.array_equal(batch.label[0], [[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def test_faults(cached: list[CachedCase]) -> None:
    with pytest.raises(InputError, match=r"ERROR c0: 3 spatial axes, but patches of 2: \(4, 4\)"):
        PatchSampler(cached, (4, 4), 1, 0.0, 0)
    with pytest.raises(ValueError, match="must be positive and foreground within 0 and 1, got 0 cases"):
        PatchSampler([], (4, 4), 1, 0.0, 0)
