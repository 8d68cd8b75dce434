"""What memory there is, how much is asked for, and lines kept on disk until their planes are whole."""

from __future__ import annotations

import errno
import gc
import mmap
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from densepred.config.base import parse_size
from densepred.errors import DiskFullError
from densepred.inference import memory
from densepred.inference.sliding_window import Part, SlidingWindowInferer
from densepred.inference.spool import Spool
from densepred.inference.windows import WindowGrid
from tests.test_inferer import small_net
from tests.test_within_memory import budget_for, compute_of, image_pass


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
        thin = WindowGrid.plan((48, 800, 800), 256, 0.5)  # all planes are read at once, and no more than these are held
        assert memory.shared([thin, thin], (1, 48, 800, 800)) == 4 * 48 * 800 * 800
        assert memory.buffers(thin, (1, 48, 800, 800), 2) <= 3 * (1 << 26) + 3 * 4 * 48 * 800 * 800

    def test_whole_planes_do_not_wait_where_bands_see_few_lines(self) -> None:
        image = torch.zeros(1, 48, 64, 8)
        inferer = SlidingWindowInferer((64, 8, 8), 0.5)  # deeper than the image, which is widened
        one = inferer.passing(nn.Conv3d(1, 2, 1), image, Part((0, 48), (16, 20)))
        ((_, block),) = one._blocks(None)
        assert block.shape == (1, 64, one.stop - one.begin, 8)
        assert block.untyped_storage().nbytes() == 4 * block.numel()


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
        with mmap.mmap(-1, 320_000_000) as block:  # which no memory that was freed before is used for
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.5)
        assert 250e6 < peak() < 600e6


def test_windows_leave_nothing_small_behind() -> None:
    """It would lie scattered in the memory that is freed, and split it up: 1 GB more with 169 windows in a row."""
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, Tensor)}
    alive: list[int] = []

    def count(done: int, windows: int) -> None:
        if done % 8 == 0:
            alive.append(sum(isinstance(one, Tensor) and id(one) not in before for one in gc.get_objects()))

    for _ in SlidingWindowInferer((8, 8, 8)).stream(small_net(3).eval(), np.zeros((1, 8, 16, 40), np.float32), count):
        pass
    assert len(alive) == 3  # of 27 windows
    assert max(alive) - min(alive) <= 2


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

    def test_a_budget_changes_no_bit(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(memory, "resident", lambda: 10**8)  # measured anew it would differ by some pages
        caplog.set_level("INFO", "densepred")
        image, model = torch.randn(1, 30, 40, 9), small_net(3)
        inferer = SlidingWindowInferer((8, 8, 8))
        whole_planes = self.gathered(inferer.results(model, image, self.KINDS[:3]))
        within = budget_for(image_pass((30, 40, 9)), compute_of(3), 16)
        in_bands = self.gathered(inferer.results(model, image, self.KINDS[:3], memory=within))
        for kind, array in whole_planes.items():
            assert np.array_equal(in_bands[kind], array), kind
        assert re.search(r"windows in ([2-9]|\d\d+) bands", caplog.text)

    def test_unknown_kinds_and_sizes_are_refused(self) -> None:
        inferer = SlidingWindowInferer((8, 8, 8))
        with pytest.raises(ValueError, match=r"outputs must be some of labels, .* got edges"):
            inferer.results(small_net(3), torch.zeros(1, 8, 8, 8), ["edges"])
        with pytest.raises(ValueError, match="no amount of memory"):
            inferer.results(small_net(3), torch.zeros(1, 8, 8, 8), memory="much")
