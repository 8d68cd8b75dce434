"""Resampling while the planes stream by: the same as of the whole, and no deeper in memory than a few planes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.cases import regrid
from densepred.cases.plan import Plan
from densepred.cases.preprocess import normalized
from densepred.cases.regrid import Regrid
from densepred.cases.resample import resample, resampled_shape
from densepred.config import Config, DataConfig, InferenceConfig, ModelConfig, PatchConfig
from densepred.config.normalize import ZScore
from densepred.inference.compute import READ_AHEAD
from densepred.inference.predictor import Predictor
from densepred.inference.resample import Resampled, resample_slabs
from densepred.models.build import build, initialize
from densepred.volumes import Volume


class Recorder:
    """An array that notes which planes are read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.reads: list[tuple[int, int]] = []

    def __getitem__(self, key: Any) -> np.ndarray:
        self.reads.append(key[1].indices(self.shape[1])[:2])
        return self.array[key]


def interpolated(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Torch's own antialiased resampling in float64, one axis after the other."""
    out = torch.from_numpy(image).double()
    for axis, size in enumerate(shape, start=1):
        rows = out.movedim(axis, -1)
        flat = rows.reshape(1, 1, -1, rows.shape[-1])
        flat = F.interpolate(flat, (flat.shape[2], size), mode="bilinear", align_corners=False, antialias=True)
        out = flat.reshape(*rows.shape[:-1], size).movedim(-1, axis)
    return out.numpy()


def parts(size: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(cut % size for cut in cuts)})
    return list(pairwise(edges))


AXES = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=2, max_size=3)
CUTS = st.lists(st.integers(0, 99), max_size=4)


@settings(max_examples=60, deadline=None)
@given(AXES, st.integers(1, 2), CUTS, st.integers(1, 400))
def test_read_forward_it_equals_the_whole(
    axes: list[tuple[int, int]], channels: int, cuts: list[int], size: int
) -> None:
    shape, target = (tuple(pair[i] for pair in axes) for i in (0, 1))
    image = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
    source = Recorder(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regrid, "PIECE_BYTES", size * 4)
        moved = Resampled(source, target)
        found = torch.cat([moved[:, start:stop] for start, stop in parts(target[0], cuts)], 1).numpy()
        once = resample(image, target)
    np.testing.assert_allclose(found, interpolated(image, target), atol=1e-5)
    assert np.array_equal(found, once)
    assert np.array_equal(found, resample(image, target)), "bit for bit, whatever goes in at a time"
    starts, stops = zip(*source.reads, strict=True)
    assert (starts[0], stops[-1]) == (0, shape[0])
    assert starts[1:] == stops[:-1], "each plane once, in order"


@settings(max_examples=60, deadline=None)
@given(AXES, CUTS, st.integers(1, 400))
def test_slabs_come_out_as_the_whole(axes: list[tuple[int, int]], cuts: list[int], size: int) -> None:
    shape, target = (tuple(pair[i] for pair in axes) for i in (0, 1))
    image = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regrid, "PIECE_BYTES", size * 4)
        slabs = ((start, stop, torch.from_numpy(image[:, start:stop])) for start, stop in parts(shape[0], cuts))
        out = list(resample_slabs(slabs, Regrid(shape, target)))
    assert [start for start, _, _ in out] == [0, *(stop for _, stop, _ in out[:-1])]
    assert np.array_equal(torch.cat([slab for _, _, slab in out], 1).numpy(), resample(image, target))
    assert all(slab.shape[1] == stop - start for start, stop, slab in out)


@pytest.mark.parametrize("target", [(50, 6, 7), (13, 9, 5), (20, 6, 7)])
def test_it_can_be_read_anywhere_and_again(target: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(size=(1, 20, 6, 7)).astype(np.float32)
    source, whole = Recorder(image), resample(image, target)
    moved = Resampled(source, target)
    for start, stop in ((3, 5), (4, 9), (0, 1), (9, target[0]), (0, target[0]), (5, 5), (target[0], target[0])):
        assert np.array_equal(moved[:, start:stop].numpy(), whole[:, start:stop])
    source.reads.clear()
    assert moved[:, 9:10].shape == (1, 1, *target[1:])
    assert source.reads[0][0] > 0, "what lies before is not read"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("target", [(50, 6, 12), (13, 9, 5)])
def test_a_gpu_gives_the_same_to_rounding(target: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).normal(size=(2, 20, 8, 7)).astype(np.float32)
    moved = Resampled(image, target, "cuda")[:, :]
    assert moved.is_cuda
    np.testing.assert_allclose(moved.cpu().numpy(), resample(image, target), atol=1e-6)
    slabs = iter([(0, 3, torch.from_numpy(image[:, :3]).cuda()), (3, 20, torch.from_numpy(image[:, 3:]).cuda())])
    back = torch.cat([slab for _, _, slab in resample_slabs(slabs, Regrid((20, 8, 7), target, "cuda"))], 1)
    assert torch.equal(back, moved), "bit for bit, whatever goes in at a time"


def test_other_ways_of_reading_are_refused() -> None:
    moved = Resampled(torch.zeros(1, 4, 4), (2, 2))
    for key in ((0, slice(0, 1)), (slice(None), slice(0, 2, 2))):
        with pytest.raises(ValueError, match="only whole planes"):
            moved[key]
    with pytest.raises(ValueError, match="shape must be 2 positive numbers"):
        Resampled(torch.zeros(1, 4, 4), (2, 0))


@pytest.mark.parametrize("target", [(15, 40, 40), (600, 40, 40), (200, 20, 60)])
def test_only_a_few_planes_are_held(target: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrid, "PIECE_BYTES", 4 * 40 * 40)
    image = np.random.default_rng(0).normal(size=(1, 200, 40, 40)).astype(np.float32)
    moved = Resampled(image, target)
    for start in range(0, target[0], 7):
        moved[:, start : start + 7]
    ring = moved._regrid._ring
    assert ring is not None
    taps = regrid.Taps.of(200, target[0]).index.shape[1]
    assert ring.shape[1] <= taps + 1
    assert ring.untyped_storage().nbytes() <= 4 * 40 * 60 * (taps + 1)


def test_an_output_plane_never_comes_before_its_own_input_plane_is_read() -> None:
    """There and back: whoever asks which voxels of an original plane are invalid finds it read."""
    for size in range(1, 60):
        for target in range(1, 90):
            there, back = regrid.Taps.of(size, target).index.amax(1), regrid.Taps.of(target, size).index.amax(1)
            assert bool((there[back] >= torch.arange(size)).all())
            assert int(there[-1]) == size - 1


def predictor(spacing: tuple[float, ...], window: int, channels: int = 1) -> Predictor:
    dims: Literal[2, 3] = 2 if len(spacing) == 2 else 3
    config = Config(
        data=DataConfig(images="*.nii.gz", labels="{id}.nii.gz"),
        model=ModelConfig(dims=dims, channels=(4, 8)),
        patch=PatchConfig(size=(window,) * dims),
        inference=InferenceConfig(window=(window,) * dims, device="cpu", precision="float32"),
    )
    plan = Plan(
        dims=dims,
        channels=tuple(f"c{i}" for i in range(channels)),
        classes=("background", "one", "two"),
        values=(0, 1, 2),
        label_map={0: 0, 1: 1, 2: 2},
        ignore=(9,),
        spacing=spacing,
        normalize=(ZScore(),) * channels,
    )
    return Predictor(initialize(build(config.model, channels, 3), 0), config, plan, "")


CASES = [
    ((37, 20, 23), (1.5, 0.7, 0.7), (1.0, 1.0, 1.0)),
    ((37, 20, 23), (1.0, 1.0, 1.0), (1.5, 0.7, 0.7)),
    ((41, 17, 18), (1.0, 2.0, 0.9), (3.1, 1.3, 0.9)),
    ((40, 17, 16), (2.0, 0.5, 0.5), (1.3, 1.0, 0.5)),
    ((40, 16, 18), (1.0, 0.7, 1.4), (1.0, 1.0, 1.0)),
    ((61, 47), (0.6, 1.7), (1.0, 1.0)),
    ((61, 47), (1.7, 0.6), (1.0, 1.0)),
]


@pytest.mark.parametrize(("shape", "spacing", "own"), CASES)
def test_prediction_equals_the_plain_path(
    shape: tuple[int, ...], spacing: tuple[float, ...], own: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(len(shape))
    image = generator.normal(100, 20, (2, *shape)).astype(np.float32)
    image[:, 2:4], image[0, -1], image[1, 9, 3:5] = np.nan, np.inf, np.nan  # whole planes, of one channel, and a few
    model = predictor(own, 12, channels=2)
    with caplog.at_level(logging.WARNING):
        planes = list(model.stream(Volume.from_array(image, spacing)))
    seen = normalized(Volume.from_array(image, spacing), model.plan)[:, :]
    moved = torch.from_numpy(interpolated(seen, resampled_shape(shape, spacing, own))).float()
    expected = interpolated(model.inferer(model.model, moved).numpy(), shape)
    found = torch.cat([part.logits for part in planes], 1)
    assert [part.start for part in planes] == [0, *(part.stop for part in planes[:-1])]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * np.abs(expected).max())
    empty = [np.zeros((p.stop - p.start, *shape[1:]), bool) if p.invalid is None else p.invalid for p in planes]
    invalid = ~np.isfinite(image).all(0)
    assert np.array_equal(np.concatenate(empty), invalid)
    assert f"{invalid.sum()} pixels do not count" in caplog.text
    labels = model.predict(Volume.from_array(image, spacing)).numpy()[0]
    top = np.sort(expected, 0)
    clear = (top[-1] - top[-2] > 1e-3) & ~invalid
    assert clear.mean() > 0.5
    assert np.array_equal(labels[clear], expected.argmax(0)[clear])
    assert (labels[invalid] == 9).all()


@pytest.mark.parametrize("spacing", [0.5, 1.3, 3.0])
def test_reading_runs_ahead_by_a_window_and_no_more(spacing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regrid, "PIECE_BYTES", 4 * 8 * 8)
    model, image = predictor((1.0, 1.0, 1.0), 8), np.zeros((1, 300, 8, 8), np.float32)
    image += np.arange(300, dtype=np.float32)[:, None, None]
    source = Recorder(image)
    planes = model.stream(Volume(source, (spacing, 1.0, 1.0)))  # normalisation reads it all before
    ahead = [source.reads[-1][1] - part.stop for part in planes]
    pieces = (READ_AHEAD + 1) * 4  # each the step from one window to the next
    assert max(ahead) <= (8 + 2 + pieces) * max(1, 1 / spacing) + 3
    assert len(ahead) > 5
