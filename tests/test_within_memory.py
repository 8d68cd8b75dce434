"""Bands, budgets and exhausted memory: the values are those of the plain way."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densepred.cases.normalize import fit
from densepred.cases.preprocess import NormalizedVolume
from densepred.config.normalize import NoNormalization
from densepred.device import copied_to_cpu, is_exhausted
from densepred.errors import ResourceError
from densepred.inference import memory
from densepred.inference.compute import Compute, Ready, WithinMemory
from densepred.inference.many import in_batches
from densepred.inference.outputs import Predicted
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.inference.volume_pass import VolumePass
from densepred.models.build import create_model
from densepred.volumes import Volume
from tests.test_inferer import small_net

pytestmark = pytest.mark.usefixtures("one_thread")


def image_pass(shape: tuple[int, ...], spacing: tuple[float, ...] | None = None, blocks: int = 1) -> VolumePass:
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    array[(0, *(size // 3 for size in shape))] = np.nan
    volume = Volume.from_array(array, (1.0,) * len(shape))
    return VolumePass(NormalizedVolume(volume, fit(volume, [NoNormalization()])), volume.spacing, spacing, blocks)


def compute_of(dims: int, model: nn.Module | None = None, **settings: object) -> Compute:
    inferer = SlidingWindowInferer((8,) * dims, 0.5, device="cpu", **settings)  # type: ignore[arg-type]
    return Compute([(model or small_net(dims)).eval()], inferer)


def host(planes: Predicted) -> dict[str, np.ndarray]:
    invalid = np.zeros(planes.logits.shape[1:], bool) if planes.invalid is None else planes.invalid
    return {"logits": planes.logits.numpy().copy(), "invalid": invalid[None].copy()}


def whole(within: WithinMemory) -> dict[str, np.ndarray]:
    parts = list(within.slabs(host))
    assert [start for start, _, _ in parts] == [0, *(stop for _, stop, _ in parts[:-1])]
    return {kind: np.concatenate([arrays[kind] for *_, arrays in parts], 1) for kind in ("logits", "invalid")}


def budget_for(image: VolumePass, compute: Compute, lines: int) -> int:
    """The bytes that let bands have so many lines of the result."""
    (way,) = image.ways
    ready, grid = compute.ready(image.channels, way, 1), compute.inferer.grid(way.model_shape)
    row = max(way.model_shape[-1], image.shape[-1]) if len(image.shape) == 3 else 1
    needs = memory.needs(grid, image.result_shape[1], image.channels, ready.logits, False, row)
    return ready.fixed + memory.buffers(grid, (image.channels, *image.shape), ready.logits) + needs.bytes(lines)


class TestBands:
    @pytest.mark.parametrize(
        ("shape", "spacing", "blocks"),
        [
            ((20, 33, 9), None, 1),
            ((30, 41), None, 1),
            ((30, 41), None, 3),
            ((12, 34, 11), None, 2),
            ((20, 33, 9), (0.7, 1.3, 1.0), 1),
            ((20, 33, 9), (1.6, 0.6, 2.0), 1),
            ((31, 40), (1.4, 0.8), 1),
            ((31, 40), (1.4, 0.8), 4),
        ],
    )
    @pytest.mark.parametrize("lines", [3, 9])
    def test_a_small_budget_changes_no_bit(self, shape, spacing, blocks: int, lines: int) -> None:
        compute = compute_of(len(shape))
        expected = whole(WithinMemory(image_pass(shape, spacing, blocks), compute, 10**12))
        image = image_pass(shape, spacing, blocks)
        within = WithinMemory(image, compute, budget_for(image, compute, lines))
        found = whole(within)
        assert within.report.bands > 1
        assert within.report.foretold <= within.report.allowed
        for kind, array in expected.items():
            assert np.array_equal(found[kind], array), kind
        assert within.report.invalid == 1

    @pytest.mark.parametrize("resampling", ["cubic", "nnunet"])
    @pytest.mark.parametrize("wanted", [(0.7, 1.3, 1.0), (3.2, 0.9, 1.0), (1.0, 0.9, 3.3), (1.2, 3.4, 0.8)])
    def test_nor_does_it_with_other_filters(self, resampling: str, wanted: tuple[float, ...]) -> None:
        compute = compute_of(3)

        def made() -> VolumePass:
            plain = image_pass((20, 33, 12))
            return VolumePass(plain.source, (1.0,) * 3, wanted, resampling=resampling)

        expected, image = whole(WithinMemory(made(), compute, 10**12)), made()
        grid = compute.inferer.grid(image.ways[0].model_shape)
        held = memory.ring(image.rings, [grid], (1, 20, 33, 12))
        within = WithinMemory(image, compute, budget_for(image, compute, 5) + held)
        found = whole(within)
        assert within.report.bands > 1
        for kind, array in expected.items():
            assert np.array_equal(found[kind], array), kind

    def test_workers_that_share_a_budget_have_a_part_each_of_what_the_program_leaves(self) -> None:
        image, compute = image_pass((20, 33, 9)), compute_of(3)
        (ready,) = compute.ready_for(image)
        budget = budget_for(image, compute, 12)
        alone = WithinMemory(image, compute, budget)
        expected = whole(alone)
        shared = WithinMemory(image_pass((20, 33, 9)), compute, ready.base + 3 * (budget - ready.base), sharing=3)
        found = whole(shared)
        assert (shared.report.allowed, shared.report.bands) == (alone.report.allowed, alone.report.bands) == (budget, 3)
        assert np.array_equal(found["logits"], expected["logits"])

    def test_a_budget_without_room_for_a_line_is_refused_with_what_is_needed(self) -> None:
        within = WithinMemory(image_pass((20, 33, 9)), compute_of(3), 10_000_000)
        with pytest.raises(ResourceError, match=r"\d\.\d+ GB of memory are needed, 0\.01 GB are allowed"):
            whole(within)

    def test_a_budget_too_small_for_the_batch_makes_it_smaller_before_it_is_refused(self) -> None:
        expected = whole(WithinMemory(image_pass((20, 33, 9)), compute_of(3), None))
        compute, made = compute_of(3, batch=4), Compute._made

        def costly(self: Compute, inferer: SlidingWindowInferer, *rest: Any) -> Ready:
            return replace(made(self, inferer, *rest), fixed=2**40 * inferer.batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Compute, "_made", costly)
            within = WithinMemory(image_pass((20, 33, 9)), compute, 3 * 2**40)
            found = whole(within)
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5)
        assert within.report.batch == 2
        assert [note.rpartition("on with ")[2] for note in within.report.notes] == ["batch 2"]

    def test_whole_planes_that_come_together_on_disk_are_counted(self) -> None:
        shape, compute = (20, 33, 9), compute_of(3)
        image = image_pass(shape)
        budget = budget_for(image, compute, 12)
        plane = 33 * 9
        within = WithinMemory(image, compute, budget + memory.SPOOLED * 4 * plane, voxel=4)
        assert whole(within)["logits"].shape[1:] == shape
        assert within.report.bands == 3
        assert within.report.allowed - memory.SPOOLED * 4 * plane <= within.report.foretold <= within.report.allowed
        with pytest.raises(ResourceError, match=r"are needed"):
            whole(WithinMemory(image, compute, budget, voxel=400_000))
        all_lines = WithinMemory(image, compute, budget_for(image, compute, 33), voxel=400_000)
        assert whole(all_lines)["logits"].shape[1:] == shape  # which need no disk

    def test_the_foretold_memory_and_the_bands_are_said(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "densepred")
        image, compute = image_pass((20, 33, 9)), compute_of(3)
        whole(WithinMemory(image, compute, budget_for(image, compute, 12)))
        assert "windows in 3 bands on cpu, peak memory at most" in caplog.text

    @given(st.integers(1, 300), st.integers(1, 300), st.lists(st.integers(0, 300)))
    def test_bands_cover_all_lines_and_none_is_too_wide(self, lines: int, widest: int, edges: list[int]) -> None:
        found = memory.bands(lines, widest, edges)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == lines
        assert all(1 <= stop - start <= widest for start, stop in found)
        assert len(found) == -(-lines // widest)

    def test_progress_counts_the_windows_of_all_bands(self) -> None:
        image, compute, seen = image_pass((20, 33, 9)), compute_of(3), []
        within = WithinMemory(image, compute, budget_for(image, compute, 12))
        list(within.slabs(host, lambda *counts: seen.append(counts)))
        assert seen[-1] == (within.report.windows, within.report.windows)
        assert sorted(seen) == seen


class Failing(nn.Module):
    """Runs out of memory in calls of more than `most` windows, and from call `fails` on so many times."""

    def __init__(self, dims: int, most: int = 100, fails: range = range(0)) -> None:
        super().__init__()
        self.net, self.most, self.fails, self.calls = small_net(dims), most, fails, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.most or self.calls in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        out: Tensor = self.net(x)
        return out


class TestExhausted:
    def test_batches_become_smaller(self) -> None:
        expected = whole(WithinMemory(image_pass((20, 17, 9)), compute_of(3), None))
        within = WithinMemory(image_pass((20, 17, 9)), compute_of(3, Failing(3, most=3), batch=8), None)
        found = whole(within)
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=1e-5)
        assert within.report.batch == 2
        assert [note.rpartition("on with ")[2] for note in within.report.notes] == ["batch 4", "batch 2"]

    @pytest.mark.parametrize("blocks", [1, 2])
    @pytest.mark.parametrize("shape", [(30, 17, 9), (60, 18)])
    @pytest.mark.parametrize("fails", [range(2, 3), range(9, 10), range(12, 14)])
    def test_invalid_pixels_are_counted_once(self, shape: tuple[int, ...], blocks: int, fails: range) -> None:
        array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        array[0, ::3, 1::5] = np.nan
        volume = Volume.from_array(array, (1.0,) * len(shape))
        seen = NormalizedVolume(volume, fit(volume, [NoNormalization()]))
        image = VolumePass(seen, volume.spacing, blocks=blocks)
        within = WithinMemory(image, compute_of(len(shape), Failing(len(shape), fails=fails)), None)
        whole(within)
        assert len(within.report.notes) == len(fails)
        lines = shape[1] // blocks * blocks
        rows = shape[0] if len(shape) == 3 else shape[0] // blocks * blocks
        assert within.report.invalid == np.isnan(array[:, :rows, :lines]).sum()

    @pytest.mark.parametrize("at", [2, 9, 20])
    def test_then_bands_narrower_wherever_it_happens(self, at: int) -> None:
        expected = whole(WithinMemory(image_pass((30, 17, 9)), compute_of(3), None))
        within = WithinMemory(image_pass((30, 17, 9)), compute_of(3, Failing(3, fails=range(at, at + 2))), None)
        found = whole(within)
        assert np.array_equal(found["logits"], expected["logits"])
        assert within.report.bands >= 3
        assert all("narrower bands" in note for note in within.report.notes)
        assert len(within.report.notes) == 2

    def test_what_is_smaller_is_prepared_once(self) -> None:
        compute = compute_of(3, Failing(3, most=3), batch=8)
        for _ in range(2):
            whole(WithinMemory(image_pass((20, 17, 9)), compute, None))
        smaller = compute.smaller()
        assert smaller is not None
        assert smaller is compute.smaller()
        smallest = smaller.smaller()
        assert smallest is not None
        assert len(smallest._ready) == 1
        assert len(compute._runs) == 1, "one copy of the weights"

    def test_an_image_is_predicted_alike_whatever_came_before(self) -> None:
        """A batch rounds otherwise than another: what a case gives must not hang on the cases beside it."""
        compute = compute_of(3, Failing(3, most=3), batch=8)
        batches = []
        for shape in ((20, 17, 9), (8, 8, 8), (20, 17, 9)):
            within = WithinMemory(image_pass(shape), compute, None)
            whole(within)
            batches.append((within.report.batch, len(within.report.notes)))
        assert batches[0] == batches[2]
        assert within.compute is not compute
        assert WithinMemory(image_pass((8, 8, 8)), compute, None).compute is compute

    def test_then_the_cpu(self, caplog: pytest.LogCaptureFixture) -> None:
        expected = whole(WithinMemory(image_pass((20, 17, 9)), compute_of(3), None))
        never = compute_of(3, Failing(3, most=0))
        within = WithinMemory(image_pass((20, 17, 9)), replace(never, fallback=lambda: compute_of(3)), None)
        assert np.array_equal(whole(within)["logits"], expected["logits"])
        assert "memory ran out on" in caplog.text
        assert "went on with the CPU" in within.report.notes[-1]

    def test_else_it_is_an_error_that_says_so(self) -> None:
        within = WithinMemory(image_pass((20, 17, 9)), compute_of(3, Failing(3, most=0)), None)
        with pytest.raises(ResourceError, match=r"memory is exhausted .*20\.00 GiB"):
            whole(within)

    def test_other_errors_are_not_tried_again(self) -> None:
        class Broken(nn.Module):
            calls = 0

            def forward(self, x: Tensor) -> Tensor:
                Broken.calls += 1
                if Broken.calls > 1:
                    raise RuntimeError("shapes do not agree")
                return x

        with pytest.raises(RuntimeError, match="shapes do not agree"):
            whole(WithinMemory(image_pass((20, 17, 9)), compute_of(3, Broken()), None))
        assert Broken.calls == 2


def test_a_copy_for_the_cpu_shares_nothing() -> None:
    model = create_model("resnet18", dims=2, width=4, seed=0)
    copied = copied_to_cpu(model)
    assert type(copied) is type(model)
    for (name, one), (other, two) in zip(model.state_dict().items(), copied.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("reason", "exhausted"),
    [
        ("GET was unable to find an engine to execute this computation", True),
        ("cuDNN error: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", False),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_errors_that_tell_of_exhausted_memory(reason: str, exhausted: bool) -> None:
    assert is_exhausted(RuntimeError(reason)) == exhausted


def test_small_images_are_predicted_in_smaller_calls_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(calls) and len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            calls.append(len(x))
            return torch.cat([x, -x], 1)

    passes = [image_pass((8, 8)) for _ in range(7)]
    compute = compute_of(2, Small(), batch=4)
    found = in_batches([(one.source.volume, one) for one in passes], compute, large=lambda _: iter([]))
    logits = [next(planes).logits for _, planes in found]
    assert calls == [4, 2, 2, 2, 2, 2]  # one of each to prepare
    alone = whole(WithinMemory(passes[0], compute_of(2, Small(), batch=1), None))["logits"]
    assert len(logits) == 7
    assert all(np.array_equal(one.numpy(), alone) for one in logits)
    assert "memory ran out (CUDA out of memory): went on with batch 2 on cpu" in caplog.text


def test_no_image_is_lost_when_memory_runs_out_behind_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, looked = [image_pass((8, 8)) for _ in range(3)], []

    def finite(values: Tensor) -> Tensor:
        looked.append(values)
        if len(looked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(values)

    original = Tensor.isfinite
    monkeypatch.setattr(Tensor, "isfinite", finite)
    found = in_batches([(one.source.volume, one) for one in passes], compute_of(2, batch=3), lambda _: iter([]))
    volumes = [volume for volume, planes in found if next(planes) is not None]
    assert [volume is one.source.volume for volume, one in zip(volumes, passes, strict=True)] == [True] * 3
