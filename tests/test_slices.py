"""2D models on volumes: against a plain loop over the planes, and with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densepred import SlidingWindowInferer, load
from densepred import config as configuration
from densepred.cases.cache import prepare
from densepred.cases.resample import resample
from densepred.errors import DensepredError, InputError
from densepred.inference.batch import predict
from densepred.inference.forward import Model
from densepred.inference.slices import Shared, Slicewise, across, averaged
from densepred.inference.slices import stream as logits_of
from densepred.inference.sliding_window import Part, Progress
from densepred.inference.volume_pass import VolumePass
from densepred.volumes import Volume, open_volume
from tests.case_files import case_of, plan
from tests.untrained_runs import run_of


def network() -> nn.Module:
    """Neither linear nor the same for turned images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, (3, 5), padding=(1, 2))).eval()


def volume_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loop(inferer: SlidingWindowInferer, model: nn.Module, image: Tensor, axis: int) -> Tensor:
    """The planes one by one."""
    planes = [inferer(model, plane.contiguous()) for plane in image.unbind(axis + 1)]
    return torch.stack(planes, axis + 1)


def whole(slabs: Iterator[tuple[int, int, Tensor]]) -> Tensor:
    parts, done = [], 0
    for start, stop, slab in slabs:
        assert start == done
        assert slab.shape[1] == stop - start
        parts.append(slab)
        done = stop
    return torch.cat(parts, 1)


def stream(
    inferer: SlidingWindowInferer,
    model: Model,
    source: Any,
    spacing: Sequence[float],
    wanted: Sequence[float] | None,
    slices: int | str,
    progress: Progress | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Slabs of all of a volume."""
    image = VolumePass(Valid(source), spacing, wanted, slices=slices)
    placed = replace(inferer, device="cpu")
    ready = [way.laid(placed, [model]) for way in image.ways]
    for planes in image.planes(ready, Part.whole(image.shape), progress):
        yield planes.start, planes.stop, planes.logits


class Valid:
    """A source all of whose voxels are valid."""

    def __init__(self, source: Any) -> None:
        self.source, self.shape = source, source.shape

    def read(self, key: Any) -> tuple[Any, None]:
        return self.source[key], None


class Forward:
    """A source that can be read once, forward."""

    def __init__(self, array: Tensor) -> None:
        self.array, self.shape, self.read = array, array.shape, 0

    def __getitem__(self, key: Any) -> Tensor:
        start, stop, _ = key[1].indices(self.shape[1])
        assert start == self.read, "read twice, or not in order"
        self.read = stop
        return self.array[:, start:stop]


@pytest.mark.parametrize("blend", ["gaussian", "constant", "gaussian_monai"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_a_loop_over_the_planes(axis: int, blend: str) -> None:
    model, image = network(), volume_of(2, 13, 17, 11)
    for window, batch in (((8, 6), 1), ((6, 8), 4), ((32, 32), 5), ((5, 40), 40)):
        inferer = SlidingWindowInferer(window, 0.5, blend, batch, mirror_axes=(1,))
        expected = loop(inferer, model, image, axis)
        found = whole(stream(inferer, model, Forward(image), (1.0,) * 3, None, axis))
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 14)] * 3), st.integers(1, 9), st.integers(2, 9))
def test_all_is_the_mean_of_the_three(shape: tuple[int, ...], batch: int, window: int) -> None:
    model, image = network(), volume_of(2, *shape)
    inferer = SlidingWindowInferer(window, 0.5, batch=batch)
    expected = torch.stack([loop(inferer, model, image, axis) for axis in range(3)]).double().mean(0)
    found = whole(stream(inferer, model, Forward(image), (1.0,) * 3, None, "all"))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_planes_are_batched_and_none_is_wasted() -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    inferer = SlidingWindowInferer((16, 16), 0.5, batch=8)
    for axis in range(3):
        seen.clear()
        whole(stream(inferer, Counting(), volume_of(1, 16, 16, 16), (1.0,) * 3, None, axis))
        assert seen == [8, 8]
    laid, _ = across(inferer, [nn.Identity()], 0, 17)
    assert laid.window == (6, 16, 16)  # 3 windows, one plane twice


def test_planes_are_resampled_in_their_own_axes_alone() -> None:
    model, image = network(), volume_of(2, 9, 12, 10)
    inferer = SlidingWindowInferer((16, 16), 0.5, batch=3)
    found = whole(stream(inferer, model, Forward(image), (2.0, 1.0, 3.0), (1.0, 2.0), 1))
    fine = torch.from_numpy(resample(image.numpy(), (18, 12, 15)))
    expected = resample(loop(inferer, model, fine, 1).numpy(), (9, 12, 10))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [60, 180])
def test_memory_does_not_grow_with_depth(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Shared] = []
    monkeypatch.setattr("densepred.inference.volume_pass.Shared", lambda *args: made.append(Shared(*args)) or made[-1])
    monkeypatch.setattr("densepred.inference.window_pass.READ_BYTES", 4 * 2 * 12 * 10 * 3)  # three planes at a time
    inferer, peaks = SlidingWindowInferer((8, 8), 0.5, batch=4), []
    source = Forward(volume_of(2, depth, 12, 10))
    for _ in stream(inferer, network(), source, (1.0,) * 3, None, "all", lambda *_: peaks.append(made[0].held)):
        pass
    assert 0 < max(peaks) <= 8 + 3 + 3  # a window, and the blocks at its ends
    assert made[0].held == 0


def test_progress_counts_the_windows_of_all_three() -> None:
    told: list[tuple[int, int]] = []
    inferer = SlidingWindowInferer((8, 8), 0.5, batch=2)
    whole(stream(inferer, network(), volume_of(2, 9, 12, 10), (1.0,) * 3, None, "all", lambda *now: told.append(now)))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}


def test_a_stream_that_is_left_lets_go_of_its_parts() -> None:
    closed: list[int] = []

    def slabs(number: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
        try:
            for start in range(0, 12, step):
                yield start, start + step, torch.full((1, step), float(number))
        finally:
            closed.append(number)

    merged = averaged([slabs(0, 1), slabs(3, 4), slabs(6, 3)])
    start, stop, slab = next(merged)
    assert (start, stop, slab.tolist()) == (0, 1, [[3.0]])
    merged.close()  # type: ignore[attr-defined]
    assert sorted(closed) == [0, 3, 6]


@pytest.mark.parametrize("lengths", [(4, 3), (3, 4)])
def test_streams_of_other_planes_are_refused(lengths: Sequence[int]) -> None:
    streams = [((z, z + 1, torch.zeros(1, 1)) for z in range(length)) for length in lengths]
    with pytest.raises(ValueError, match="must cover the same planes, got others from plane 3 on"):
        list(averaged(streams))


def test_a_shared_source_is_read_once_and_forward() -> None:
    image = volume_of(1, 20, 3)
    shared = Shared(Forward(image), 2)
    fast, slow = shared.views
    assert torch.equal(fast[:, 0:7], image[:, 0:7])
    assert torch.equal(slow[:, 0:2], image[:, 0:2])
    assert torch.equal(fast[:, 7:9], image[:, 7:9])
    assert shared.held == 9
    assert torch.equal(slow[:, 2:12], image[:, 2:12])
    assert shared.held == 3  # what the fast one has not had
    with pytest.raises(ValueError, match=r"forward from 12, got 3\.\.5"):
        slow[:, 3:5]
    with pytest.raises(ValueError, match="axis must be 0, 1 or 2"):
        Slicewise(nn.Identity(), 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("slices"), ".nii.gz", {0: "sky", 1: "star"})


def test_a_volume_is_predicted_from_file_to_file(run: Path, tmp_path: Path) -> None:
    image = volume_of(19, 20, 18).numpy()
    image[3, 4:6] = np.nan
    Volume.from_array(image, (3.0, 1.0, 1.0)).save(tmp_path / "v.nii.gz")
    overrides = ["inference.slices=all", "inference.batch=4", "inference.outputs=[labels, entropy]"]
    assert predict(run, [tmp_path / "v.nii.gz"], tmp_path / "out", overrides).failed == {}
    axes = [load(run, [f"inference.slices={axis}"]).predict(image, outputs="logits").numpy() for axis in range(3)]
    found = load(run, overrides).predict(tmp_path / "v.nii.gz", outputs="logits").numpy()
    np.testing.assert_allclose(found, np.mean(axes, 0), rtol=0, atol=1e-5)
    with open_volume(tmp_path / "out" / "v.nii.gz") as labels:
        valid = np.isfinite(image)
        assert labels.spacing == (3.0, 1.0, 1.0)
        assert np.array_equal(labels.numpy()[0][valid], found.argmax(0)[valid])
    assert (tmp_path / "out" / "entropy" / "v.nii.gz").exists()


def test_an_image_is_still_an_image(run: Path) -> None:
    image = volume_of(20, 18).numpy()
    sliced = load(run, ["inference.slices=0"])
    assert np.array_equal(sliced.predict(image).numpy(), load(run).predict(image).numpy())


def test_a_volume_without_the_setting_is_refused_with_it(run: Path) -> None:
    with pytest.raises(InputError, match="3 spatial axes, the model has 2") as caught:
        load(run).predict(volume_of(5, 20, 18).numpy(), (1.0, 1.0, 1.0))
    assert "inference.slices=0, 1 or 2" in caught.value.fix


def test_slices_are_for_2d_models() -> None:
    with pytest.raises(DensepredError, match=r"slices are for 2D models, and model\.dims is 3"):
        configuration.check({"data": {"root": "x", "dataset": "y"}, "inference": {"slices": 0}}, {}, "test")


@pytest.mark.parametrize("slices", [0, 1, 2, "all"])
def test_a_stored_case_is_judged_by_its_planes(tmp_path: Path, slices: int | str) -> None:
    """As a training validates: each plane through the model by itself, or the mean over the axes."""
    torch.manual_seed(0)
    image = np.random.default_rng(0).normal(size=(9, 12, 11)).astype(np.float32)
    made = plan(dims=2, slices=slices, normalize=("none",))
    case = prepare([case_of(tmp_path, image, np.zeros(image.shape, np.uint8))], made, tmp_path / "cache")[0]
    model, calls = nn.Conv2d(1, 3, 3, padding=1), []
    inferer = SlidingWindowInferer((16, 16), batch=4, device="cpu", precision="float32")
    found = list(logits_of(inferer, model, case.image, slices, lambda *at: calls.append(at)))
    assert [start for start, _, _ in found] == [0, *(stop for _, stop, _ in found[:-1])]
    volume = torch.from_numpy(image)[None, None]
    axes = (0, 1, 2) if slices == "all" else (int(slices),)
    with torch.no_grad():
        expected = torch.stack([Slicewise(model, axis)(volume)[0] for axis in axes]).mean(0)
    torch.testing.assert_close(torch.cat([slab for _, _, slab in found], 1), expected, atol=1e-5, rtol=0)
    assert calls[-1][0] == calls[-1][1] == max(total for _, total in calls)


def test_without_slices_it_is_the_inferers_own_stream() -> None:
    model, image = nn.Conv3d(1, 2, 1), torch.randn(1, 7, 6, 5)
    inferer = SlidingWindowInferer((4, 4, 4), device="cpu")
    pairs = zip(logits_of(inferer, model, image, None), inferer.stream(model, image), strict=True)
    assert all(torch.equal(one[2], two[2]) for one, two in pairs)
