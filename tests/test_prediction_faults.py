"""Predictions that run out of memory or disk, or whose files or threads fail: they end or degrade, and lose nothing."""

from __future__ import annotations

import errno
import logging
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.config import Config
from densepred.errors import RESOURCES, SOME_FAILED, InputError
from densepred.inference import compute, faults
from densepred.inference.batch import BatchResult, predict
from densepred.inference.compute import Compute
from densepred.inference.predictor import load
from densepred.volumes import Volume, open_volume
from densepred.volumes.streams import PlainBytes
from tests.prediction_faults import Ask, contents, ended
from tests.untrained_runs import image, noise, run_of

WIDE = ["inference.window=[64, 64]", "inference.overlap=0.25"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, ask: Ask) -> tuple[Path, list[Path], dict[str, bytes]]:
    """118 classes of rows of 8000 pixels: 242 MB of sums, where whole planes are held."""
    root = tmp_path_factory.mktemp("wide")
    run = run_of(root, ".nii.gz", {value: f"class {value}" for value in range(118)})
    rng = np.random.default_rng(0)
    wide = image(root / "in" / "wide.nii.gz", rng.normal(size=(70, 8000)).astype(np.float32))
    small = image(root / "in" / "small.nii.gz", rng.normal(size=(70, 80)).astype(np.float32))
    plain = ask(run, [small, wide], root / "plain", overrides=[*WIDE, "inference.memory=100GB"])
    assert plain.status == 0, plain.said
    assert "bands" not in plain.said
    return run, [small, wide], contents(root / "plain")


class TestMemoryOfTheMachine:
    @pytest.mark.parametrize("budget", [[], ["inference.memory=100GB"]], ids=["foretold", "ran out"])
    def test_narrower_bands_give_the_same_bytes(self, wide, ask: Ask, tmp_path: Path, budget: list[str]) -> None:
        run, inputs, plain = wide
        found = ask(run, inputs, tmp_path, overrides=[*WIDE, *budget], megabytes=330)
        assert found.status == 0, found.said
        assert contents(tmp_path) == plain
        assert re.search(r"wide.nii.gz: \d+ windows in \d+ bands on cpu, peak memory at most", found.said)
        assert ("went on with narrower bands" in found.said) == bool(budget)

    @pytest.mark.parametrize("budget", [[], ["inference.memory=100GB"]], ids=["foretold", "ran out"])
    def test_where_nothing_fits_the_case_ends_with_one_message(
        self, wide, ask: Ask, tmp_path: Path, budget: list[str]
    ) -> None:
        run, (small, _), plain = wide
        huge = image(tmp_path / "huge.nii.gz", np.zeros((300, 30_000), np.float32))
        found = ask(run, [huge, small], tmp_path / "both", overrides=[*WIDE, *budget], megabytes=60)
        assert found.status == SOME_FAILED, found.said
        assert contents(tmp_path / "both") == {"small.nii.gz": plain["small.nii.gz"]}
        assert found.said.count("ERROR huge: the memory is exhausted (") == 1
        assert "Traceback" not in found.said
        found = ask(run, [huge], tmp_path / "one", overrides=[*WIDE, *budget], megabytes=60)
        assert found.status == RESOURCES, found.said
        assert contents(tmp_path / "one") == {}


class Starved:
    """In the place of a network on a GPU whose memory does not suffice, for more than `most` windows or lines."""

    def __init__(self, made: Any, most: int) -> None:
        self.made, self.most = made, most
        self.backend, self.shape, self.describe = made.backend, made.shape, made.describe

    def taking(self, shape: Any) -> None:
        """Each batch has one of its own."""

    def __call__(self, windows: Tensor) -> Tensor:
        if windows.any() and len(windows) > self.most:  # what is tried out first is zero
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        logits: Tensor = self.made(windows)
        return logits


class TestMemoryOfTheDevice:
    BOTH = ("inference.outputs=[labels, probabilities]", "inference.batch=4", "inference.device=auto")

    def compared(
        self, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, plain: dict[str, np.ndarray]
    ) -> str:
        caplog.clear()
        caplog.set_level(logging.INFO, "densepred")
        assert predict(run, [tmp_path / "x.nii.gz"], tmp_path / "out", self.BOTH, overwrite=True).done == ["x"]
        shares = plain["probabilities/x.nii.gz"]
        found = values(tmp_path / "out" / "probabilities" / "x.nii.gz")
        np.testing.assert_allclose(found, shares, rtol=0, atol=1e-5 if "cuda" not in caplog.text else 1e-4)
        clear = np.abs(shares[0] - shares[1]) > 1e-3
        assert np.array_equal(values(tmp_path / "out" / "x.nii.gz")[0][clear], plain["x.nii.gz"][0][clear])
        assert clear.mean() > 0.9
        return caplog.text

    @pytest.fixture
    def plain(self, run: Path, tmp_path: Path) -> dict[str, np.ndarray]:
        image(tmp_path / "x.nii.gz", noise(3, 96))
        cpu = ["inference.device=cpu", *self.BOTH[:2]]
        assert predict(run, [tmp_path / "x.nii.gz"], tmp_path / "plain", cpu).done == ["x"]
        return {name: values(tmp_path / "plain" / name) for name in ("x.nii.gz", "probabilities/x.nii.gz")}

    @pytest.mark.parametrize(
        ("most", "ways"),
        [
            (2, ["batch 2"]),
            (0, ["batch 2", "batch 1", *["narrower bands"] * 6, "the CPU"]),
        ],
    )
    def test_smaller_batches_then_bands_then_the_cpu(
        self, run, tmp_path, caplog, monkeypatch: pytest.MonkeyPatch, plain, most: int, ways: list[str]
    ) -> None:
        computing, prepare = compute.computing, compute.prepare
        starved = [True]
        monkeypatch.setattr("densepred.inference.image_predictor.pick_device", lambda name: torch.device("cpu"))

        def with_fallback(models: Any, config: Config, device: torch.device) -> Compute:
            def on_cpu() -> Compute:
                starved[0] = False
                return computing(models, config, torch.device("cpu"))

            made = computing(models, config, device)
            made.fallback = on_cpu
            return made

        def prepared(*args: Any) -> Any:
            return Starved(prepare(*args), most) if starved[0] else prepare(*args)

        monkeypatch.setattr("densepred.inference.image_predictor.computing", with_fallback)
        monkeypatch.setattr(compute, "prepare", prepared)
        said = self.compared(run, tmp_path, caplog, plain)
        note = r"x\.nii\.gz: memory ran out on cpu \(CUDA out of memory\. Tried .*\): went on with (.*)"
        assert re.findall(note, said) == ways

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    @pytest.mark.parametrize("megabytes", [40, 4])
    def test_a_gpu_with_little_memory(
        self, run, tmp_path, caplog, plain, monkeypatch: pytest.MonkeyPatch, megabytes: int
    ) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        everything = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + megabytes * 1e6) / everything)
        try:
            said = self.compared(run, tmp_path, caplog, plain)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert megabytes > 4 or "memory ran out on cuda" in said


def values(path: Path) -> np.ndarray:
    with open_volume(path, "xyc" if "probabilities" in path.parts else None) as volume:
        return volume.numpy().astype(np.float32)


def damaged(path: Path, kind: str) -> Path:
    """A gzipped file that shows its damage only where it ends."""
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    return path


@pytest.mark.usefixtures("threads")
class TestReading:
    def three(self, run: Path, folder: Path, size: int = 96, suffix: str = ".nii.gz") -> list[Path]:
        return [image(folder / f"{name}{suffix}", noise(seed, size)) for seed, name in enumerate("axz")]

    def failed(self, run: Path, inputs: list[Path], out: Path) -> str:
        """The message of the case x; the others are done."""
        result: BatchResult = ended(lambda: predict(run, inputs, out))
        assert (result.done, list(result.failed), result.exit_code) == (["a", "z"], ["x"], SOME_FAILED)
        assert sorted(contents(out)) == ["a.nii.gz", "z.nii.gz"]
        assert "x.nii" in (out / "failures.tsv").read_text()
        assert result.failed["x"].__traceback__ is None
        return str(result.failed["x"])

    @pytest.mark.parametrize(("kind", "what"), [("truncated", "truncated: holds"), ("crc", "checksum does not match")])
    def test_a_file_that_is_damaged_at_its_end(self, run: Path, tmp_path: Path, kind: str, what: str) -> None:
        inputs = self.three(run, tmp_path / "in")
        damaged(inputs[1], kind)
        said = self.failed(run, inputs, tmp_path / "out")
        assert f"ERROR x: {inputs[1]}: " in said
        assert what in said

    @pytest.mark.parametrize("passes", [False, True])
    def test_a_disk_that_fails_while_windows_are_computed(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool
    ) -> None:
        inputs, read, tries = self.three(run, tmp_path / "in", suffix=".nii"), PlainBytes.read_into, []

        def failing(self: PlainBytes, offset: int, target: np.ndarray, stream: int = 0) -> None:
            mine = self.path == inputs[1] and threading.current_thread().name == "densepred-ahead"
            if mine and not (passes and len(tries) == 3):
                tries.append(1)
                raise InputError("cannot be read (EIO)", "", self.path) from OSError(errno.EIO, "Input/output error")
            read(self, offset, target, stream)

        monkeypatch.setattr(PlainBytes, "read_into", failing)
        monkeypatch.setattr(faults, "PAUSES", (0.01, 0.01, 0.01))
        if passes:
            assert ended(lambda: predict(run, inputs, tmp_path / "out")).done == ["a", "x", "z"]
        else:
            assert f"ERROR x: {inputs[1]}: cannot be read" in self.failed(run, inputs, tmp_path / "out")
            assert len(tries) == 4

    def test_a_source_that_raises_in_the_middle(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Odd:
            shape, dtype = (1, 4000, 64), np.dtype(np.float32)

            def __getitem__(self, key: Any) -> np.ndarray:
                rows = range(4000)[key[1]]
                if rows.stop > 3000 and threading.current_thread().name == "densepred-ahead":
                    raise OSError(errno.EIO, "Input/output error")
                return np.ones((1, len(rows), 64), np.float32) * np.arange(64, dtype=np.float32)

        monkeypatch.setattr("densepred.inference.window_pass.READ_BYTES", 1 << 16)
        with pytest.raises(OSError, match="Input/output error"):
            ended(lambda: load(run).predict(Volume(Odd(), (1.0, 1.0))))
