"""Batches on the workers of Ray, started on this machine: the same bytes, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from densepred.errors import InputError, WorkersError
from densepred.inference.batch import predict
from densepred.inference.engines.cluster import RayCluster, _Pool
from densepred.inference.manifest import Manifest
from tests.acceptance.helpers import ROOT, cases_done, snapshot
from tests.untrained_runs import image, noise, run_of

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'densepred[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SLOW = ["inference.overlap=0.8"]
"""A while for each case, so that there is a middle to kill something in."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six images, of which `c` is damaged."""
    folder = tmp_path_factory.mktemp("in")
    paths = [image(folder / f"{name}.nii.gz", noise(seed, 112)) for seed, name in enumerate("abcdef")]
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    return paths


@pytest.fixture(scope="module")
def local(run: Path, inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without Ray makes."""
    out = tmp_path_factory.mktemp("local")
    predict(run, inputs, out, SLOW)
    return snapshot(out)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine with two cores, for several batches."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    env = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    before = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env=env)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


def actors() -> list[psutil.Process]:
    """The processes of workers that have a predictor, below this one."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ray::Actor" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def when(moment: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not moment():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.usefixtures("cluster")
def test_two_workers_make_what_one_device_makes(run: Path, inputs: list[Path], local: dict[str, bytes], tmp_path: Path):
    result = predict(run, inputs, tmp_path / "out", SLOW, engine=RayCluster(["cpu", "cpu"]))
    assert (result.done, list(result.failed)) == ([*"abdef"], ["c"])
    assert "truncated" in result.failed["c"].what
    assert snapshot(tmp_path / "out") == local


@pytest.mark.usefixtures("cluster")
def test_the_loss_of_a_worker_is_made_good(
    run: Path, inputs: list[Path], local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One is killed in the middle of a case, another after it was allowed to put its file in its place."""
    out, begin, killed = tmp_path / "out", Manifest.begin, []

    def kill(process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        killed.append(process.pid)

    def begun(self: Manifest, entry: dict, files: object) -> None:
        begin(self, entry, files)
        if entry["id"] == "e" and len(killed) == 1:
            for process in actors():
                kill(process)

    def in_the_middle() -> None:
        found: list[Path] = []

        def one() -> bool:
            found[:] = out.glob(".*.part.a.nii.gz")
            return len(found) == 1

        when(one)
        kill(psutil.Process(int(found[0].name.split(".")[1])))

    monkeypatch.setattr(Manifest, "begin", begun)
    killer = threading.Thread(target=in_the_middle)
    killer.start()
    result = predict(run, inputs, out, SLOW, engine=RayCluster(["cpu", "cpu"]))
    killer.join()
    assert len(killed) >= 2
    assert (result.done, list(result.failed)) == ([*"abdef"], ["c"])
    assert snapshot(out) == local
    when(lambda: not actors())


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("who", ["helper", "owner"])
def test_one_image_goes_to_two_workers_of_which_one_is_lost(
    run: Path, inputs: list[Path], local: dict[str, bytes], tmp_path: Path, who: str
):
    """The helper predicts a range of its planes into a folder of its own; who takes its place has another."""
    out, ranges, killed = tmp_path / "out", set(), []

    def watch() -> None:
        when(lambda: any((path / "labels").exists() for path in out.glob(".*.part.a.nii.gz")))
        parts = {path.is_dir(): path for path in out.glob(".*.part.a.nii.gz")}
        ranges.add(parts[True])
        owner = int(parts[False].name.split(".")[1])
        for process in actors():
            if (process.pid == owner) == (who == "owner"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                killed.append(process.pid)
        when(lambda: ranges.update(path for path in out.glob(".*.part.*") if path.is_dir()) or done.is_set())

    done, watching = threading.Event(), threading.Thread(target=watch)
    watching.start()
    result = predict(run, inputs[:1], out, SLOW, engine=RayCluster(["cpu", "cpu"]))
    done.set()
    watching.join()
    assert result.done == ["a"]
    assert len(killed) == 1
    assert len(ranges) == 2
    assert (out / "a.nii.gz").read_bytes() == local["a.nii.gz"]
    assert not list(out.glob(".*.part.*"))
    when(lambda: not actors())


@pytest.mark.usefixtures("cluster")
def test_without_a_worker_for_a_range_one_does_all(
    run: Path, inputs: list[Path], local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    idle = _Pool.idle

    def last_one_kept(self: _Pool) -> object:
        actor = idle(self)
        if actor is not None and not self._idle:
            self.give_back(actor, False)
            return None
        return actor

    monkeypatch.setattr(_Pool, "idle", last_one_kept)
    monkeypatch.setattr("densepred.inference.engines.attempt.PATIENCE", 0.5)
    assert predict(run, inputs[:1], tmp_path / "out", SLOW, engine=RayCluster(["cpu", "cpu"])).done == ["a"]
    assert caplog.text.count("begins it again alone") == 1
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == local["a.nii.gz"]
    when(lambda: not actors())


@pytest.mark.usefixtures("cluster")
def test_what_cannot_work_ends_the_batch(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="room for 2 workers"):
        predict(run, inputs, tmp_path / "out", engine=RayCluster(["cpu"] * 3))
    with pytest.raises(InputError, match=r"room for 0 workers \(cuda"):
        predict(run, inputs, tmp_path / "out", engine=RayCluster(["cuda"]))
    with pytest.raises(InputError, match="Ray chooses"):
        RayCluster(["cuda:0", "cuda:1"])
    monkeypatch.setattr("densepred.inference.predictor.Predictor.config_hash", "0" * 64)
    with pytest.raises(WorkersError, match="another model"):
        predict(run, inputs, tmp_path / "out", engine=RayCluster(["cpu"]))
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_driver_that_ends_leaves_nothing_behind_and_a_rerun_finishes(
    run: Path, inputs: list[Path], local: dict[str, bytes], tmp_path: Path, number: int, code: int
):
    out = tmp_path / "out"
    arguments = ["predict", run, *inputs, *SLOW, "--out", out, "--engine", "ray", "--devices", "cpu*2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "densepred", *map(str, arguments)]
    driver = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        when(lambda: cases_done(out) >= 1 or driver.poll() is not None)
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(number)
        said = driver.communicate(timeout=120)[1]
    finally:
        driver.kill()
    assert driver.returncode == code, said
    assert ("stopped by a signal" in said) == (number == signal.SIGTERM)
    agents = [process for process in started if "Agent" in " ".join(_command(process))]
    assert len(agents) < len(started)
    assert not psutil.wait_procs(set(started) - set(agents), timeout=120)[1]
    for process in agents:  # Ray's own look for their parent once a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    done = cases_done(out)
    rest = predict(run, inputs, out, SLOW)
    assert len(rest.skipped) >= done >= 1
    assert sorted(rest.done + rest.skipped) == [*"abdef"]
    assert snapshot(out) == local


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="ray is not installed"):
        RayCluster()
