"""One image by several workers, each with a range of its planes: the files of one worker, whatever happens."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from densepred import load
from densepred.cases.case import Case
from densepred.errors import DiskFullError, StoppedError
from densepred.inference.batch import predict
from densepred.inference.crew import Crew
from densepred.inference.engines.local import Local
from densepred.inference.outputs import Outputs
from densepred.inference.predictor import Predictor
from densepred.inference.ranges import divided
from densepred.inference.sliding_window import Part, SlidingWindowInferer
from densepred.inference.spool import Spool
from densepred.inference.volume_pass import VolumePass
from tests.acceptance.helpers import snapshot
from tests.disk_faults import attempt, available
from tests.test_resample_stream import predictor
from tests.untrained_runs import image, noise, run_of

KINDS = ("labels", "probabilities")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


def count_ranges(model: Predictor, used: list[Predictor]) -> None:
    """Note who predicts a range."""
    plain = model.predict_range
    model.predict_range = lambda *given: used.append(model) or plain(*given)  # type: ignore[method-assign, func-returns-value]


def case_of(folder: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Case:
    """An image of which every hundredth pixel does not count."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    array[rng.random(shape) < 0.01] = np.nan
    nibabel.save(nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], *[1] * (4 - len(shape))])), folder / "a.nii.gz")
    return Case("a", (folder / "a.nii.gz",))


def settled(model: Predictor, **changes: object) -> Predictor:
    """The same with other settings of the inference."""
    config = model.config.model_copy(update={"inference": model.config.inference.model_copy(update=changes)})
    return Predictor(model.models, config, model.plan, "")


def outcome(model: Predictor, case: Case, out: Path, others: list[Predictor]) -> tuple[dict[str, bytes], list[tuple]]:
    out.mkdir()
    told: list[tuple[int, int]] = []
    paths = {kind: out / f"{kind}.nii.gz" for kind in KINDS}
    model.predict_file(case, paths, lambda *now: told.append(now), None, others)
    return snapshot(out), told


@pytest.mark.parametrize(
    ("shape", "spacing", "wanted", "settings"),
    [
        ((61, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {}),
        ((61, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {"cutout": "3:60,1:12,0:9", "batch": 3}),
        ((47, 12, 9), (1.5, 0.7, 0.7), (1.0, 1.0, 1.0), {}),
        ((80, 9, 12), (1.0, 1.0, 1.0), (1.6, 0.7, 1.0), {"lines": 5}),
        ((90, 20), (1.0, 1.0), (1.0, 1.0), {"overlap": 0.7}),
        ((90, 20), (1.0, 1.0), (1.0, 1.0), {"bin": 3}),
        ((61, 47), (1.7, 0.6), (1.0, 1.0), {"blend": "none"}),
        ((50, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0), {"slices": 0, "batch": 4}),
        ((50, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0), {"slices": "all"}),
    ],
)
def test_the_bytes_are_those_of_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape, spacing, wanted, settings: dict[str, Any]
) -> None:
    case, plain, lines = case_of(tmp_path, shape, spacing), predictor(wanted, 8), settings.pop("lines", None)
    if lines:  # as if the memory had room for no more
        monkeypatch.setattr("densepred.inference.memory.widest", lambda *_: lines)
    models = [settled(plain, **settings) for _ in range(3)]
    alone, told_alone = outcome(models[0], case, tmp_path / "alone", [])
    used: list[Predictor] = []
    for model in models[1:]:
        count_ranges(model, used)
    for others in (models[1:2], models[1:]):
        used.clear()
        found, told = outcome(models[0], case, tmp_path / f"with{len(others)}", others)
        assert found == alone
        assert sorted(map(id, used)) == sorted(map(id, others))
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1] >= told_alone[-1][1]


# How it is divided


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("planes", "overlap"), [(512, 0.5), (301, 0.25), (96, 0.5), (700, 0.8), (1000, 0.0), (130, 0.5)]
)
def test_all_have_as_much_to_do_and_little_is_done_twice(planes: int, overlap: float, workers: int) -> None:
    inferer = SlidingWindowInferer((96, 16, 16), overlap)
    source = np.broadcast_to(np.float32(0), (1, planes, 16, 16))
    whole = VolumePass(source, (1.0, 1.0, 1.0))  # type: ignore[arg-type]
    ranges = divided(whole, inferer, workers)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == planes
    rows, reach = inferer.grid((planes, 16, 16)).axes[0].starts, int(1 / (1 - overlap) + 0.99) - 1
    assert len(ranges) <= workers
    assert len(ranges) == workers or len(rows) - reach < 2 * (len(ranges) + 1)
    each = [whole.windows(inferer, Part(one, (0, 16))) for one in ranges]
    assert max(each) - min(each) <= 2
    assert sum(each) <= len(rows) + (len(ranges) - 1) * (reach + 1)
    assert {start for start, _ in ranges} <= set(rows)


def test_workers_help_only_where_no_case_waits_for_them() -> None:
    crew = Crew(["a", "b", "c", "d"], 2)  # type: ignore[list-item]
    crew.begun()
    with crew.team() as first:
        assert first == ("a", ["b"])
        crew.begun()
        with crew.team() as second:
            assert second == ("c", ["d"])
            taken: list[object] = []
            thread = threading.Thread(target=lambda: taken.append(crew.team().__enter__()))
            thread.start()
            thread.join(0.1)
            assert not taken  # none is free
        thread.join(10)
        assert taken == [("c", ["d"])]


# Batches


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [image(tmp_path / "in" / f"{name}.nii.gz", noise(seed, 96)) for seed, name in enumerate("ab")]


def test_a_batch_gives_its_last_cases_to_several(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "densepred")
    shares: list[int] = []
    monkeypatch.setattr("densepred.inference.engines.local.Local._check_threads", lambda _: None)
    plain = Predictor._within
    monkeypatch.setattr(
        Predictor,
        "_within",
        lambda self, *given: shares.append(self.sharing) or plain(self, *given),  # type: ignore[func-returns-value]
    )
    overrides = ["inference.outputs=[labels, probabilities]", "inference.memory=20GB"]
    one = predict(run, inputs, tmp_path / "one", overrides)
    assert shares == [1, 1]
    three = predict(run, inputs, tmp_path / "three", overrides, engine=Local(["cpu"] * 3))
    assert one.done == three.done == ["a", "b"]
    assert set(shares[2:]) == {3}
    assert re.search(r"in [23] ranges of planes", caplog.text)  # as many as are free when a case begins
    (tmp_path / "three" / "b.nii.gz").unlink()  # the other case is done before, and leaves its workers to this one
    again = predict(run, inputs, tmp_path / "three", overrides, engine=Local(["cpu"] * 3))
    assert (again.done, again.skipped) == (["b"], ["a"])
    assert "in 3 ranges of planes" in caplog.text
    assert snapshot(tmp_path / "three") == snapshot(tmp_path / "one")


TWO = Local(["cpu", "cpu"])


class FaultError(Exception):
    """Of a worker."""


@pytest.mark.parametrize("who", ["helper", "owner"])
def test_the_fault_of_a_range_is_that_of_the_case(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """The others end at their next window, and the case says what was the matter."""
    plain, failed = Outputs.write, threading.Event()

    def helper(self: Predictor, asked: object, progress: Any, spool: Spool) -> Any:
        if who == "helper":
            failed.set()
            raise FaultError("of this range")
        try:
            while True:
                progress(1, 100)
                time.sleep(0.01)
        except StoppedError:
            failed.set()
            raise

    def write(self: Outputs, arrays: Any) -> None:
        if who == "owner":
            raise FaultError("of the writer")
        assert failed.wait(30)
        plain(self, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_range", helper)
        patch.setattr(Outputs, "write", write)
        found = predict(run, inputs[:1], tmp_path / "out", engine=TWO)
    assert {"helper": "FaultError: of this range", "owner": "FaultError: of the writer"}[who] in found.failed["a"].what
    assert failed.is_set()
    assert not [path for path in (tmp_path / "out").iterdir() if ".part." in path.name or path.suffix == ".gz"]
    assert not [thread for thread in threading.enumerate() if thread.name == "densepred-range"]
    assert predict(run, inputs, tmp_path / "out", engine=TWO).done == ["a", "b"]


@pytest.mark.skipif(available() != "", reason=available())
@pytest.mark.parametrize("last", [1, 3, 6, 20, 100])
def test_a_full_disk_ends_the_case_wherever_it_is_met(run: Path, inputs: list[Path], tmp_path: Path, last: int) -> None:
    one, two, out = load(run), load(run), tmp_path / "out"
    out.mkdir()

    def work() -> str:
        try:
            one.predict_file(Case("a", (inputs[0],)), {"probabilities": out / "a.nii.gz"}, None, None, [two])
        except DiskFullError:
            return f"full, {threading.active_count()} thread"
        return "done"

    trial = attempt(work, out, last, "full")
    assert trial.struck is not None
    assert (trial.status, trial.said) == (0, "full, 1 thread"), trial
    assert not list(out.iterdir())


@pytest.mark.skipif(available() != "", reason=available())
@pytest.mark.parametrize("last", [20, 30, 40])
def test_a_kill_leaves_no_result_and_a_rerun_does_it(run: Path, inputs: list[Path], tmp_path: Path, last: int) -> None:
    out = tmp_path / "out"
    trial = attempt(lambda: str(predict(run, inputs[:1], out, engine=TWO)), out, last, "kill")
    assert trial.status == -signal.SIGKILL, trial
    assert not (out / "a.nii.gz").exists()
    assert predict(run, inputs[:1], out, engine=TWO).done == ["a"]
    predict(run, inputs[:1], tmp_path / "plain")
    assert snapshot(out) == snapshot(tmp_path / "plain")


SIGNALLED = """
import os, sys, threading
from densepred.errors import StoppedError
from densepred.inference.batch import predict
from densepred.inference.engines.local import Local
from densepred.inference.predictor import Predictor
from densepred.signals import StopSignals

run, image, out, number = sys.argv[1:]
plain, note, noted = Predictor.predict_range, StopSignals._note, threading.Event()

def noting(self, *given):
    note(self, *given)
    noted.set()

def signalling(self, *given):
    os.kill(os.getpid(), int(number))
    assert noted.wait(60)  # all may be done before the main thread hears of it
    return plain(self, *given)

StopSignals._note = noting

Predictor.predict_range = signalling
try:
    predict(run, [image], out, engine=Local(["cpu", "cpu"]))
except StoppedError as stopped:
    print(stopped.exit_code, stopped.what)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_ranges(run: Path, inputs: list[Path], tmp_path: Path, number: int, code: int) -> None:
    """In a process of its own, so that no other test's threads or handlers meet the signal."""
    command = [sys.executable, "-c", SIGNALLED, run, inputs[0], tmp_path / "out", str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{code} stopped by a signal: 0 done, 0 done before, 0 failed, 1 in all")
    assert not list((tmp_path / "out").glob("*.gz"))


def test_cases_of_another_setting_have_a_worker_each(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [image(tmp_path / "in" / f"{name}.nii.gz", noise(seed)) for seed, name in enumerate("abcdef")]
    handed: list[int] = []
    plain = Predictor.predict_file

    def noting(
        self: Predictor, case: Case, paths: Any, progress: Any = None, before: Any = None, others: Any = ()
    ) -> None:
        handed.append(len(others))
        plain(self, case, paths, progress, before, others)

    monkeypatch.setattr(Predictor, "predict_file", noting)
    predict(run, many, tmp_path / "out", engine=TWO)
    handed.clear()
    assert len(predict(run, many, tmp_path / "out", ["inference.overlap=0.25"], engine=TWO).done) == 6
    assert handed[0] == 0
