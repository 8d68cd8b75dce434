"""Bands, budgets and exhausted memory: the values are those of the plain way."""

from __future__ import annotations

import errno
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densepred.cases.normalize import fit
from densepred.cases.preprocess import NormalizedVolume
from densepred.config.base import parse_size
from densepred.config.normalize import NoNormalization
from densepred.errors import DiskFullError, ResourceError
from densepred.inference import memory
from densepred.inference.compute import Compute, Ready, WithinMemory
from densepred.inference.outputs import Predicted
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.inference.spool import Spool
from densepred.inference.volume_pass import VolumePass
from densepred.inference.windows import WindowGrid
from densepred.volumes import Volume
from tests.test_inferer import small_net


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        assert len(smaller.smaller()._ready) == 1  # type: ignore[union-attr]

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


class TestWhatCanBeHad:
    def groups(self, root: Path, versions: dict[str, dict[str, object]]) -> list[int]:
        for name, content in versions.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("\n".join(f"{key} {value}".strip() for key, value in content.items()))
        return memory.left_in_groups(root, root / "own")

    def test_all_groups_around_the_process_count_and_read_files_do_not(self, tmp_path: Path) -> None:
        left = self.groups(
            tmp_path,
            {
                "own": {"0::/slurm/job_7/step_0": ""},
                "slurm/job_7/step_0/memory.max": {"max": ""},
                "slurm/job_7/step_0/memory.current": {"500": ""},
                "slurm/job_7/step_0/memory.stat": {"inactive_file": 100},
                "slurm/job_7/memory.max": {"1000": ""},
                "slurm/job_7/memory.current": {"990": ""},
                "slurm/job_7/memory.stat": {"anon": 200, "inactive_file": 700},
            },
        )
        assert left == [1000 - 990 + 700]

    def test_groups_of_version_1(self, tmp_path: Path) -> None:
        left = self.groups(
            tmp_path,
            {
                "own": {"9:cpu:/": "", "4:hugetlb,memory:/docker/not-seen-from-inside": "", "0::/": ""},
                "memory/memory.limit_in_bytes": {"2000": ""},
                "memory/memory.usage_in_bytes": {"1500": ""},
                "memory/memory.stat": {"inactive_file": 7, "total_inactive_file": 400},
            },
        )
        assert left == [2000 - 1500 + 400]

    def test_the_limit_of_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        used = int(line.split()[1]) * 1024
        monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (used + 50_000_000, 2**40))
        assert 0 < memory.available(torch.device("cpu")) <= 50_000_000

    def test_planes_larger_than_what_is_read_at_a_time_are_counted(self) -> None:
        grid = WindowGrid.plan((100, 8000, 8000), 64, 0.5)
        plane = 4 * 8000 * 8000
        assert memory.buffers(grid, (1, 100, 8000, 8000), 2) > 6 * plane
        few = WindowGrid.plan((10, 80, 80), 64, 0.5)
        assert memory.buffers(few, (1, 10, 80, 80), 2) <= (3 * 2 + 6) * 4 * 10 * 80 * 80
        assert memory.shared([grid, grid], (1, 100, 8000, 8000)) >= 64 * plane
        assert memory.shared([grid], (1, 100, 8000, 8000)) == 0


class TestSpool:
    def test_lines_in_any_order_come_out_as_planes(self, tmp_path: Path) -> None:
        array = np.random.default_rng(0).integers(0, 99, (2, 9, 7, 5)).astype(np.int16)
        with Spool(tmp_path, (3, 12), (7, 5)) as spool:
            for lines in ((4, 7), (0, 4)):
                for start, stop in ((3, 5), (5, 12)):
                    spool.write(start, lines, {"a": array[:, start - 3 : stop - 3, slice(*lines)]})
            slabs = list(spool.slabs())
        assert np.array_equal(np.concatenate([arrays["a"] for *_, arrays in slabs], 1), array)
        assert slabs[0][0] == 3
        assert slabs[-1][1] == 12
        assert not list(tmp_path.iterdir())

    def test_a_disk_without_room_for_another_file_is_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(**_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        with Spool(tmp_path, (0, 2), (7, 5)) as spool, pytest.raises(DiskFullError):
            spool.write(0, (0, 7), {"a": np.zeros((1, 2, 7, 5))})

    def test_what_one_keeps_another_adopts(self, tmp_path: Path) -> None:
        array = np.random.default_rng(0).normal(size=(2, 9, 7, 5)).astype(np.float32)
        with Spool(tmp_path / "kept", (3, 12), (7, 5), kept=True) as spool:
            spool.write(3, (0, 7), {"a": array})
        assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a"]
        with Spool(tmp_path, (3, 12), (7, 5)) as other:
            other.adopt(tmp_path / "kept", spool.layout)
            assert not list(tmp_path.iterdir())
            assert np.array_equal(np.concatenate([arrays["a"] for *_, arrays in other.slabs()], 1), array)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), (1000, 1000), ("12", 12), (" 1 tb", 10**12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "two", "2 PB", "-1GB", "0", "0GB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_size(text)


def test_the_peak_of_the_memory_is_seen() -> None:
    with memory.peak_of(torch.device("cpu")) as peak:
        block = np.ones(40_000_000)  # 320 MB
        del block
        assert 250e6 < peak() < 600e6


class TestResults:
    """Kinds of result of any model, without a run directory."""

    KINDS = ("labels", "probabilities", "logits", "regression", "entropy", "variance")

    @staticmethod
    def gathered(slabs: Iterator) -> dict[str, np.ndarray]:
        parts = list(slabs)
        return {kind: np.concatenate([arrays[kind] for *_, arrays in parts], 1) for kind in parts[0][2]}

    @pytest.mark.parametrize("shape", [(30, 17, 9), (41, 30)])
    def test_they_follow_from_the_logits(self, shape: tuple[int, ...]) -> None:
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        models = [small_net(len(shape)), nn.Sequential(small_net(len(shape)), nn.Tanh())]
        inferer = SlidingWindowInferer((8,) * len(shape), mirror_axes=(0,))
        logits = inferer([model.eval() for model in models], image).double().numpy()
        found = self.gathered(inferer.results(models, image.numpy(), self.KINDS))
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-6)
        assert np.array_equal(found["regression"], found["logits"])
        assert found["labels"].dtype == np.uint8
        assert np.array_equal(found["labels"][0], found["logits"].argmax(0))
        shares = scipy.special.softmax(logits, 0)
        np.testing.assert_allclose(found["probabilities"], shares, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["entropy"][0], scipy.stats.entropy(shares, axis=0), rtol=0, atol=1e-5)
        assert found["variance"].min() > 0

    def test_a_budget_changes_no_bit(self) -> None:
        image, model = torch.randn(1, 30, 40, 9), small_net(3)
        inferer = SlidingWindowInferer((8, 8, 8))
        whole_planes = self.gathered(inferer.results(model, image, self.KINDS[:3]))
        within = budget_for(image_pass((30, 40, 9)), compute_of(3), 16)
        in_bands = self.gathered(inferer.results(model, image, self.KINDS[:3], memory=within))
        for kind, array in whole_planes.items():
            assert np.array_equal(in_bands[kind], array), kind

    def test_unknown_kinds_and_sizes_are_refused(self) -> None:
        inferer = SlidingWindowInferer((8, 8, 8))
        with pytest.raises(ValueError, match=r"outputs must be some of labels, .* got edges"):
            inferer.results(small_net(3), torch.zeros(1, 8, 8, 8), ["edges"])
        with pytest.raises(ValueError, match="no amount of memory"):
            inferer.results(small_net(3), torch.zeros(1, 8, 8, 8), memory="much")
