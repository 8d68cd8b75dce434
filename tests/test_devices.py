"""Batches spread over several workers on this machine: the same bytes, faults that stay in place, an end in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from densepred.errors import DiskFullError, InputError, StoppedError
from densepred.inference import work
from densepred.inference.ahead import Ahead
from densepred.inference.batch import predict
from densepred.inference.engines import devices_of, engine_of
from densepred.inference.engines.local import Local
from densepred.inference.predictor import Predictor
from densepred.signals import StopSignals
from tests.acceptance.helpers import snapshot
from tests.untrained_runs import image, noise, run_of

TWO = Local(["cpu", "cpu"])
Predicting = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Six images, of which `c` is damaged."""
    paths = [image(tmp_path / "in" / f"{name}.nii.gz", noise(seed)) for seed, name in enumerate("abcdef")]
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    return paths


def replaced(monkeypatch: pytest.MonkeyPatch, make: Callable[[Predicting], Predicting]) -> None:
    monkeypatch.setattr(Predictor, "predict_file", make(Predictor.predict_file))


# The same, on several


def test_two_devices_make_what_one_makes(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = predict(run, inputs, tmp_path / "one")
    together, used = threading.Barrier(2), set()

    def meeting(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, *arguments: object) -> None:
            if self not in used:  # both are in their first case at the same time
                used.add(self)
                together.wait(30)
            plain(self, *arguments)

        return predict_file

    replaced(monkeypatch, meeting)
    two = predict(run, inputs, tmp_path / "two", engine=TWO)
    assert len(used) == 2
    assert (two.done, list(two.failed)) == (one.done, list(one.failed)) == ([*"abdef"], ["c"])
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")


def test_a_fault_stays_with_its_case(run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, *arguments: object) -> None:
            if arguments[0].id in "ae":  # type: ignore[attr-defined]
                raise ValueError("of this case")
            plain(self, *arguments)

        return predict_file

    replaced(monkeypatch, failing)
    result = predict(run, inputs, tmp_path / "out", engine=TWO)
    assert result.done == [*"bdf"]
    assert sorted(result.failed) == [*"ace"]
    assert "of this case" in result.failed["a"].what


def test_a_full_disk_ends_all(run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began: list[str] = []
    full, both = threading.Event(), threading.Barrier(2)

    def filling(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, case: object, paths: object, watch: Predicting, *_: object) -> None:
            began.append(case.id)  # type: ignore[attr-defined]
            both.wait(30)
            if case.id == "b":  # type: ignore[attr-defined]
                full.set()
                raise DiskFullError("the disk is full")
            assert full.wait(30)
            while True:  # its next window is its last
                watch(1, 2)

        return predict_file

    replaced(monkeypatch, filling)
    with pytest.raises(DiskFullError):
        predict(run, inputs, tmp_path / "out", engine=TWO)
    assert sorted(began) == ["a", "b"]
    assert (tmp_path / "out" / "failures.tsv").read_text().splitlines()[1].startswith("b\t")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_and_a_rerun_goes_on(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
):
    noted = threading.Event()
    plain_note = StopSignals._note

    def note(self: StopSignals, number: int, frame: FrameType | None) -> None:
        plain_note(self, number, frame)
        noted.set()

    def signalling(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, *arguments: object) -> None:
            if arguments[0].id == "d":  # type: ignore[attr-defined]
                os.kill(os.getpid(), number)
                assert noted.wait(30)  # the others may be done before the main thread hears of it
            plain(self, *arguments)

        return predict_file

    with monkeypatch.context() as patch:
        replaced(patch, signalling)
        patch.setattr(StopSignals, "_note", note)
        with pytest.raises(StoppedError, match=r"[1-4] done, 0 done before, [01] failed, 6 in all") as stopped:
            predict(run, inputs, tmp_path / "out", engine=TWO)
    assert stopped.value.exit_code == code
    assert not list((tmp_path / "out").glob(".*.part.*"))
    rest = predict(run, inputs, tmp_path / "out", engine=TWO)
    assert sorted(rest.done + rest.skipped) == [*"abdef"]
    assert f"signal: {len(rest.skipped)} done" in stopped.value.what


# Reading ahead


def test_the_next_case_is_read_while_this_one_is_computed(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = {path: threading.Event() for path in inputs}
    plain_sum = work.sha256

    def watched(path: Path) -> str:
        seen.get(path, threading.Event()).set()
        return plain_sum(path)

    def waiting(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, case: object, *arguments: object) -> None:
            following = inputs["abcdef".index(case.id) + 1 :][:1]  # type: ignore[attr-defined]
            assert all(seen[path].wait(30) for path in following if path.exists())
            plain(self, case, *arguments)

        return predict_file

    monkeypatch.setattr(work, "sha256", watched)
    replaced(monkeypatch, waiting)
    (tmp_path / "in" / "e.nii.gz").unlink()
    result = predict(run, inputs, tmp_path / "out")
    assert (result.done, sorted(result.failed)) == ([*"abdf"], ["c", "e"])
    assert "cannot be read (No such file" in result.failed["e"].what


def test_not_much_is_read_ahead():
    """A slow case does not let the thread run away over all inputs."""
    made: list[int] = []
    ahead = Ahead(range(50), made.append, 2)
    with ahead.running():
        first = ahead.take(lambda: None)
        assert first is not None
        assert first[0] == 0
        threading.Event().wait(0.3)
        assert len(made) <= 4
        taken = [item[0] for item in iter(lambda: ahead.take(lambda: None), None)]
        assert taken == [*range(1, 50)]
        assert ahead.take(lambda: None) is None


def test_a_signal_does_not_wait_for_the_reading(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ended, waited = threading.Event(), []

    def endless(path: Path) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        waited.append(ended.wait(120))
        return ""

    monkeypatch.setattr(work, "sha256", endless)
    with pytest.raises(StoppedError, match="0 done, 0 done before, 0 failed, 6 in all"):
        predict(run, inputs, tmp_path / "out")
    assert not waited, "what is being hashed is not waited for"
    ended.set()


def test_an_image_that_changes_meanwhile_gives_no_result(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def changing(plain: Predicting) -> Predicting:
        def predict_file(self: Predictor, *arguments: object) -> None:
            image(inputs[0], noise(9))
            plain(self, *arguments)

        return predict_file

    with monkeypatch.context() as patch:
        replaced(patch, changing)
        assert "changed while it was predicted" in predict(run, inputs[:1], tmp_path / "out").failed["a"].what
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert predict(run, inputs[:1], tmp_path / "out").done == ["a"]


# What is asked for


def test_devices_are_named():
    assert devices_of("0, 1") == ("cuda:0", "cuda:1")
    assert devices_of("cuda:2,cpu*2") == ("cuda:2", "cpu", "cpu")
    for wrong in ("", "gpu", "0,,1", "cuda:x", "cpu*0", "-1", "cpu*99999"):
        with pytest.raises(InputError, match="is no device"):
            devices_of(wrong)
    with pytest.raises(InputError, match="that of a Ray cluster"):
        engine_of("local", None, "auto")


def test_a_device_that_is_not_there_is_said_before_anything_is_read(run: Path, tmp_path: Path):
    with pytest.raises(InputError, match="torch sees"):
        predict(run, [tmp_path / "missing.nii.gz"], tmp_path / "out", engine=Local(["cuda:63"]))


def test_more_threads_than_cores_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    TWO._check_threads()
    assert "OMP_NUM_THREADS=3 would be faster" in caplog.text
    caplog.clear()
    Local(["cpu"])._check_threads()
    assert not caplog.text


def test_options_are_looked_at_before_torch_is_imported():
    text = "import sys, densepred.inference.engines.local, densepred.inference.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text]).returncode == 0
