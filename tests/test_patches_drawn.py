"""Where patches are drawn: by class, where there is truth, from planes of volumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from densepred import config as configuration
from densepred.cases import store
from densepred.cases.cache import CachedCase, prepare
from densepred.cases.patches import Batch, PatchSampler, voxel
from densepred.config import PatchConfig
from densepred.errors import InputError
from tests.case_files import case_of, plan

SHAPE = (20, 24, 22)
IGNORED = 9


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def made(root: Path, label: np.ndarray, name: str = "a", **changes: object) -> CachedCase:
    """A cached case whose intensities are the index of the voxel."""
    image = np.arange(label.size, dtype=np.float32).reshape(label.shape) + 1
    settings = {"normalize": ("none",), "ignore": (IGNORED,), **changes}
    return prepare([case_of(root, image, label, name)], plan(**settings), root / "cache")[0]


def corners(batches: list[Batch], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Of the patches, `(n, dims)`, told by their first intensities."""
    first = np.concatenate([batch.image.reshape(len(batch.image), -1)[:, 0] for batch in batches])
    return np.column_stack(np.unravel_index(first.astype(int) - 1, shape))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in a small volume."""
    monkeypatch.setattr(store, "SMALL", 0)
    monkeypatch.setattr(store, "CHUNK_VOXELS", {2: 7, 3: 7})


@pytest.mark.usefixtures("small_chunks")
def test_every_voxel_of_a_class_is_as_likely(tmp_path: Path) -> None:
    """A chi-square test over all voxels: no sample of them stands for the others."""
    shape = (10, 12, 11)
    label = (generator(0).random(shape) < 0.06).astype(np.uint8)
    label[generator(1).random(shape) < 0.3] = IGNORED
    case = made(tmp_path, label)
    assert case.counts.shape == (2 * 2 * 2, 3)
    assert case.classes == {1: int((label == 1).sum())}
    assert case.labelled == int((label != IGNORED).sum())
    for index, inside in ((1, label == 1), (-1, label != IGNORED)):
        places = [tuple(at) for at in np.argwhere(inside).tolist()]
        draws = Counter(voxel(case, index, generator(seed)) for seed in range(6 * len(places)))
        assert set(draws) <= set(places)
        assert scipy.stats.chisquare([draws[at] for at in places]).pvalue > 1e-3


def test_no_voxel_is_out_of_reach_in_a_large_class(tmp_path: Path) -> None:
    label = np.ones((70, 80, 90), np.uint8)
    case = made(tmp_path, label)
    drawn = np.array([voxel(case, 1, generator(seed)) for seed in range(1500)])
    assert drawn.max(0).tolist() == [69, 79, 89] or (drawn.max(0) > np.array(label.shape) - 4).all()
    assert len({tuple(at) for at in drawn}) > 1490
    for axis, size in enumerate(label.shape):
        assert scipy.stats.kstest((drawn[:, axis] + 0.5) / size, "uniform").pvalue > 1e-3


def test_classes_are_drawn_by_weight(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[2:12, 2:12, 2:12], label[15, 15, 15] = 1, 2
    case = made(tmp_path, label)
    for weights, shares in (
        ({1: 1.0, 2: 3.0}, (0, 0.25, 0.75)),
        ({0: 1.0, 1: 1.0}, (0.5, 0.5, 0)),
        (None, (0, 0.5, 0.5)),
    ):
        sampler = PatchSampler([case], (1, 1, 1), 4, 1.0, 0, weights=weights)
        drawn = np.concatenate([sampler.batch(0, step).label.reshape(-1) for step in range(100)])
        assert [np.mean(drawn == index) for index in range(3)] == pytest.approx(shares, abs=0.08)


def test_a_recipe_names_label_values(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[:3], label[5:7] = 40, 80
    values = {"values": (0, 40, 80), "label_map": {0: 0, 40: 1, 80: 2}}
    case = made(tmp_path, label, **values)
    patch = PatchConfig(size=(1, 1, 1), batch=3, foreground=1.0, classes={80: 1})
    sampler = PatchSampler.of(patch, [case], plan(**values), 0, 10)
    assert (sampler.batch(0, 0).label == 2).all()
    with pytest.raises(InputError, match=r"\[7\] are no label values"):
        PatchSampler.of(PatchConfig(classes={7: 1}), [case], plan(**values), 0)


def test_the_share_of_centred_patches_is_kept_where_cases_lack_classes(tmp_path: Path) -> None:
    empty, full = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    full[3, 4, 5] = 1
    cases = [made(tmp_path, empty if number else full, f"c{number}") for number in range(4)]
    sampler = PatchSampler(cases, (3, 3, 3), 4, 0.5, 0, steps=20)
    batches = [sampler.batch(0, step) for step in range(20)]
    assert all(((batch.label == 1).reshape(4, -1).any(1) >= [False, False, True, True]).all() for batch in batches)
    others = Counter(name for batch in batches for name in batch.ids[:2])
    assert set(others.values()) == {10}, "the others take all cases in turn"
    alone = PatchSampler(cases, (3, 3, 3), 1, 0.25, 0, steps=20)
    found = [(alone.batch(epoch, step).label == 1).any() for epoch in range(3) for step in range(20)]
    assert sum(found) >= 15
    assert np.abs(np.cumsum(found) - 0.25 * np.arange(1, 61)).max() <= 4


def test_nothing_is_drawn_where_there_is_nothing_to_learn(tmp_path: Path) -> None:
    label = np.full(SHAPE, IGNORED, np.uint8)
    label[7, 3:9, 4:20] = 0
    case = made(tmp_path, label)
    sampler = PatchSampler([case], (5, 5, 5), 2, 0.5, 0)
    labels = np.concatenate([sampler.batch(0, step).label for step in range(60)]).reshape(120, -1)
    assert (labels >= 0).any(1).all()
    shares = {}
    for least in (0.0, 0.2):
        demanding = PatchSampler([case], (5, 5, 5), 2, 0.0, 0, labelled=least)
        labels = np.concatenate([demanding.batch(0, step).label for step in range(60)]).reshape(120, -1)
        shares[least] = (labels >= 0).mean(1)
    assert shares[0.2].min() == pytest.approx(0.2), "a whole plane of five"
    assert shares[0.0].min() < 0.12
    most = PatchSampler([case], (5, 5, 5), 2, 0.0, 0, labelled=0.9)  # which cannot be: the best of what was tried
    assert ((most.batch(0, 0).label >= 0).reshape(2, -1).mean(1) > 0.15).all()
    with pytest.raises(InputError, match="ERROR none: no voxel has a truth"):
        PatchSampler([made(tmp_path, np.full(SHAPE, IGNORED, np.uint8), "none")], (5, 5, 5), 1, 0.0, 0)


def test_few_gaps_leave_patches_where_they_are(tmp_path: Path) -> None:
    whole, gaps = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    gaps[:4, :4, :4] = IGNORED
    places = [
        corners([PatchSampler([made(tmp_path, label, name)], (6, 6, 6), 4, 0.0, 3).batch(0, step) for step in range(9)])
        for name, label in (("whole", whole), ("gaps", gaps))
    ]
    assert np.array_equal(*places)


@pytest.mark.parametrize("axis", [0, 1, 2, "all"])
def test_planes_of_volumes(tmp_path: Path, axis: int | str) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[5:8, 6:9, 10:12] = 1
    case = made(tmp_path, label, dims=2, slices=axis)
    sampler = PatchSampler([case], (9, 8), 4, 0.5, 0, axis=axis)  # type: ignore[arg-type]
    image, truth = np.arange(label.size).reshape(SHAPE) + 1, label
    seen: Counter[int] = Counter()
    for step in range(30):
        batch = sampler.batch(0, step)
        assert batch.image.shape == (4, 1, 9, 8)
        assert ((batch.label == 1).reshape(4, -1).any(1) >= [False, False, True, True]).all()
        for plane, classes in zip(batch.image[:, 0], batch.label, strict=True):
            corner = np.unravel_index(int(plane[0, 0]) - 1, SHAPE)
            steps = (int(plane[1, 0] - plane[0, 0]), int(plane[0, 1] - plane[0, 0]))
            across = {(22, 1): 0, (24 * 22, 1): 1, (24 * 22, 22): 2}[steps]
            sizes = [9, 8]
            sizes.insert(across, 1)
            box = tuple(slice(a, a + n) for a, n in zip(corner, sizes, strict=True))
            assert np.array_equal(image[box].reshape(9, 8), plane)
            assert np.array_equal(truth[box].reshape(9, 8), classes)
            seen[across] += 1
    assert set(seen) == ({0, 1, 2} if axis == "all" else {axis})
    assert min(seen.values()) >= 25


def test_planes_larger_than_the_case_are_padded(tmp_path: Path) -> None:
    case = made(tmp_path, np.ones(SHAPE, np.uint8), dims=2, slices=1)
    batch = PatchSampler([case], (30, 11), 2, 1.0, 0, axis=1).batch(0, 0)
    assert np.array_equal((batch.label == 1).all(2), np.tile((np.arange(30) >= 5) & (np.arange(30) < 25), (2, 1)))
    with pytest.raises(InputError, match="3 spatial axes, but patches of 2"):
        PatchSampler([case], (30, 11), 2, 1.0, 0)


def test_processes_share_a_batch(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[4:7] = 1
    cases = [made(tmp_path, label, f"c{number}") for number in range(3)]
    sampler = PatchSampler(cases, (4, 4, 4), 5, 0.4, 0, steps=7)
    whole, parts = sampler.batch(2, 3), [sampler.batch(2, 3, range(rank, 5, 2)) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        assert np.array_equal(part.image, whole.image[rank::2])
        assert np.array_equal(part.label, whole.label[rank::2])
        assert (part.ids, part.seeds) == (whole.ids[rank::2], whole.seeds[rank::2])


PLANES = "model: {dims: 2}\npatch: {size: [8, 8], axis: all}\n"


@pytest.mark.parametrize(
    ("data", "rest", "fault"),
    [
        ("", "patch: {axis: 0}", "patch.axis: planes are for 2D models: set model.dims=2"),
        (", spacing: median", PLANES, "patch.axis: planes across all axes have no one spacing"),
        ("", "patch: {classes: {3: 1}}", "patch.classes: [3] are no label values of data.classes"),
        ("", "patch: {classes: {1: 0}}", "patch.classes: one weight at least is greater than 0"),
        ("", "patch: {classes: evenly}", "patch.classes"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, data: str, rest: str, fault: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{dataset: d.json, classes: {{0: a, 1: b, 2: c}}{data}}}\n{rest}\n")
    with pytest.raises(InputError) as caught:
        configuration.load(path)
    assert f": {fault}" in str(caught.value)


def test_a_recipe_with_weights(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {dataset: d.json, classes: {0: a, 1: b, 2: c}}\npatch: {classes: {1: 2, 2: 0.5}}\n")
    assert configuration.load(path).patch.classes == {1: 2.0, 2: 0.5}
