"""Predictions that a full disk, an error of the caller's or Ctrl-C ends: files are whole or absent, a rerun goes on."""

from __future__ import annotations

import errno
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from densepred.cases.case import Case
from densepred.errors import RESOURCES, DiskFullError, StoppedError
from densepred.inference import image_predictor
from densepred.inference.batch import predict
from densepred.inference.outputs import Outputs, reduced
from densepred.inference.predictor import Predictor, load
from densepred.inference.work import Work
from tests.disk_faults import available
from tests.prediction_faults import Ask, contents, ended
from tests.untrained_runs import image, noise, run_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


@pytest.fixture(scope="module")
def plain(run: Path, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict]:
    if why := available():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("full")
    inputs = [image(folder / f"{name}.nii.gz", noise(seed, 64)) for seed, name in enumerate("abc")]
    assert ask(run, inputs, folder / "out", widest=20).status == 0
    return inputs, contents(folder / "out")


class TestFullDisk:
    @pytest.mark.parametrize("full_at", [*range(1, 12), 15, 20, 30, 40, 50])
    def test_what_is_done_stays_and_a_rerun_goes_on(
        self, run: Path, ask: Ask, plain, tmp_path: Path, full_at: int
    ) -> None:
        inputs, expected = plain
        found = ask(run, inputs, tmp_path, widest=20, full_at=full_at)
        assert found.struck is not None
        assert not found.struck.startswith("hung")
        assert "Traceback" not in found.said, found.struck
        assert contents(tmp_path).items() <= expected.items()
        assert found.status == RESOURCES, found
        assert re.search(r"ERROR .*: the disk is full \(\d+ MB free\)\n  fix: free some space", found.said)
        again = ask(run, inputs, tmp_path, widest=20)
        assert again.status == 0, again.said
        assert contents(tmp_path) == expected

    @pytest.mark.usefixtures("threads")
    def test_in_the_middle_of_a_case(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = [image(tmp_path / "in" / f"{name}.nii.gz", noise(seed, 96)) for seed, name in enumerate("ab")]
        write, count = Outputs.write, []

        def full(self: Outputs, arrays: Any) -> None:
            count.append(1)
            if len(count) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, arrays)

        monkeypatch.setattr(Outputs, "write", full)
        with pytest.raises(DiskFullError) as caught:
            ended(lambda: predict(run, inputs, tmp_path / "out"))
        assert caught.value.file == tmp_path / "out" / "a.nii.gz"
        assert contents(tmp_path / "out") == {}
        assert "the disk is full" in (tmp_path / "out" / "failures.tsv").read_text()


@pytest.mark.usefixtures("threads")
class TestInterrupted:
    @pytest.fixture
    def case(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Predictor, Case, Path]:
        """A case whose reading and writing take longer than the network."""
        write = Outputs.write

        def slowly(self: Outputs, arrays: Any) -> None:
            time.sleep(0.02)
            write(self, arrays)

        monkeypatch.setattr(Outputs, "write", slowly)
        monkeypatch.setattr("densepred.inference.window_pass.READ_BYTES", 1 << 12)
        path = image(tmp_path / "in" / "x.nii.gz", noise(1, 128))
        (tmp_path / "out").mkdir()
        return load(run), Case("x", (path,)), tmp_path / "out" / "x.nii.gz"

    def test_an_error_of_the_reduction(self, case, monkeypatch: pytest.MonkeyPatch) -> None:
        predictor_, one, path = case
        count: list[int] = []

        def odd(*args: Any) -> Any:
            count.append(1)
            if len(count) == 4:
                raise ArithmeticError("odd")
            return reduced(*args)

        monkeypatch.setattr(image_predictor, "reduced", odd)
        with pytest.raises(ArithmeticError, match="odd"):
            ended(lambda: predictor_.predict_file(one, {"labels": path}))
        assert not list(path.parent.iterdir())
        predictor_.predict_file(one, {"labels": path})
        assert [entry.name for entry in path.parent.iterdir()] == ["x.nii.gz"]

    @pytest.mark.parametrize("error", [ArithmeticError("odd"), KeyboardInterrupt()])
    def test_an_error_of_the_hook(self, case, error: BaseException) -> None:
        predictor_, one, path = case

        def hook(done: int, total: int) -> None:
            if done > 60:
                raise error

        with pytest.raises(type(error)):
            ended(lambda: predictor_.predict_file(one, {"labels": path}, hook))
        assert not list(path.parent.iterdir())

    def test_ctrl_c_in_a_program(self, case) -> None:
        predictor_, one, path = case
        with pytest.raises(KeyboardInterrupt):
            predictor_.predict_file(one, {"labels": path}, lambda done, _: done > 60 and signal.raise_signal(2))
        assert not list(path.parent.iterdir())

    @pytest.mark.parametrize("times", [1, 2])
    def test_ctrl_c_in_a_batch(
        self, case, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        """Once, it ends at a good moment; twice, at once."""
        _, one, path = case
        assert predict(run, [one.images[0]], tmp_path / "plain").done == ["x"]
        watch = Work._watch

        def struck(self: Work, done: int = 0, windows: int = 0) -> None:
            for _ in range(times if done > 60 else 0):
                signal.raise_signal(signal.SIGINT)
            watch(self, done, windows)

        monkeypatch.setattr(Work, "_watch", struck)
        with pytest.raises(StoppedError if times == 1 else KeyboardInterrupt):
            predict(run, [one.images[0]], path.parent)
        monkeypatch.setattr(Work, "_watch", watch)
        assert contents(path.parent) == {}
        assert predict(run, [one.images[0]], path.parent).done == ["x"]
        assert contents(path.parent) == contents(tmp_path / "plain")
