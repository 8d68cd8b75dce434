"""Two hundred small cases with fifteen faulty ones: what is written, what is said, what a run loses that is ended."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from densepred.inference.batch import predict
from densepred.inference.engines.local import Local
from densepred.inference.shards import Shard
from tests.acceptance.helpers import ROOT, cases_done, snapshot
from tests.forked import Forked
from tests.untrained_runs import image, noise, run_of

GOOD, FAULTY = 185, 15


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


def header_of(raw: bytes, place: int, values: list[float], kind: str) -> bytes:
    """A file with other numbers in its header."""
    data = bytearray(raw)
    data[place : place + len(values) * np.dtype(kind).itemsize] = np.array(values, kind).tobytes()
    return bytes(data)


def spoil(folder: Path) -> dict[str, str]:
    """Fifteen faulty inputs, each of another kind: name -> what is said of it. One of them is not there at all."""
    whole = image(folder / "sample.nii.gz", noise(1)).read_bytes()
    raw = gzip.decompress(whole)
    (folder / "sample.nii.gz").unlink()
    flipped, trailer = bytearray(whole), bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    trailer[-6] ^= 1
    contents = {
        "truncated.nii.gz": (whole[: len(whole) // 2], "truncated: holds 1416 of 2656 bytes"),
        "short.nii": (raw[:-100], "truncated: holds 2556 of 2656 bytes"),
        "flip.nii.gz": (bytes(flipped), "the checksum does not match"),
        "trailer.nii.gz": (bytes(trailer), "the checksum does not match"),
        "page.nii.gz": (b"<html>please log in</html>", "no NIfTI file: starts with '<html>"),
        "empty.nii.gz": (b"", "the file is empty"),
        "sizes.nii": (header_of(raw, 40, [2, -24, 24, 1, 1, 1, 1, 1], "<i2"), "impossible sizes: dim = [2, -24"),
        "bomb.nii": (header_of(raw, 40, [2, 32000, 32000, 1, 1, 1, 1, 1], "<i2"), "holds 2656 of 4096000352 bytes"),
        "type.nii": (header_of(raw, 70, [777], "<i2"), "unknown datatype code 777"),
        "spacing.nii": (header_of(raw, 76, [1, 0, np.nan], "<f4"), "impossible spacing"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    image(folder / "nan.nii.gz", np.full((24, 24), np.nan, np.float32))
    for name, shape in (("solid", (24, 24, 9)), ("channels", (24, 24, 1, 1, 2))):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    others = {"nan": "no voxel of channel 0 is finite", "solid": "3 spatial axes, the model has 2"}
    others |= {"channels": "5 axes", "loop": "Too many levels of symbolic links", "missing": "No such file"}
    return {name.partition(".")[0]: what for name, (_, what) in contents.items()} | others


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, str]]:
    """The files, among them one that is not there, and what is to be said of the faulty ones."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(GOOD):
        image(folder / f"case{number:03d}.nii.gz", noise(number))
    said = spoil(folder)
    assert len(said) == FAULTY
    return [*sorted(folder.iterdir()), folder / "missing.nii.gz"], said


@pytest.fixture(scope="module")
def whole(run: Path, inputs: tuple[list[Path], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("out") / "whole"
    result = predict(run, inputs[0], out)
    assert (len(result.done), len(result.failed), result.exit_code) == (GOOD, FAULTY, 3)
    return out


def test_each_fault_has_a_row_and_the_rest_is_done(inputs: tuple[list[Path], dict[str, str]], whole: Path):
    lines = [line.split("\t") for line in (whole / "failures.tsv").read_text().splitlines()[1:]]
    found = {case: (file, what, fix) for case, file, what, fix in lines}
    assert found.keys() == inputs[1].keys()
    for case, part in inputs[1].items():
        file, what, fix = found[case]
        assert part in what
        assert Path(file).name.startswith(case)
        assert fix
    assert len(list(whole.glob("case*.nii.gz"))) == GOOD


def test_a_rerun_touches_nothing(
    run: Path, inputs: tuple[list[Path], dict[str, str]], whole: Path, monkeypatch: pytest.MonkeyPatch
):
    before, stamps = snapshot(whole), {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.suffix}
    placed: list[Path] = []
    monkeypatch.setattr("densepred.files.os.replace", lambda part, path: placed.append(path))
    result = predict(run, inputs[0], whole, engine=Local(["cpu", "cpu"]))
    assert (len(result.skipped), len(result.failed), result.done, placed) == (GOOD, FAULTY, [], [])
    assert snapshot(whole) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def end(number: int, moment: int, *arguments: object) -> tuple[int, str]:
    """Signal a command when its folder has so many cases done; its exit code and what it said."""
    out = Path(str(arguments[arguments.index("--out") + 1]))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = Forked("densepred", arguments, env, (said.fileno(), said.fileno()))
        try:
            while process.poll() is None and cases_done(out) < moment:
                time.sleep(0.005)
            process.send_signal(number)
            code = process.wait(60)
        finally:
            process.kill()
        said.seek(0)
        return code, said.read()


@pytest.mark.slow
def test_runs_that_are_ended_lose_the_case_in_hand_at_most(
    run: Path, inputs: tuple[list[Path], dict[str, str]], whole: Path, tmp_path: Path
):
    """Killed, stopped in both ways, and killed with two cases in hand; each goes on where the last was ended."""
    out, oracle, before = tmp_path / "out", snapshot(whole), 0
    arguments = ["predict", run, *inputs[0], "--out", out]
    ends = [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
    for turn, (number, code) in enumerate(ends):
        more = ["--devices", "cpu,cpu"] if turn == 3 else []
        moment = before + (7, 31, 18, 40)[turn]
        ended, said = end(number, moment, *arguments, *more)
        assert ended == code, said
        before, done = cases_done(out), {entry["id"] for entry in entries(out) if "begun" not in entry}
        assert moment <= before < GOOD
        there = {path.name.partition(".")[0] for path in out.glob("case*.nii.gz")}
        assert there >= done
        assert len(there - done) <= (2 if more else 1)
        assert all((out / f"{case}.nii.gz").read_bytes() == oracle[f"{case}.nii.gz"] for case in there)
        if number != signal.SIGKILL:
            summary = re.search(r"stopped by a signal: (\d+) done, (\d+) done before, \d+ failed, 200 in all", said)
            assert summary is not None, said
            assert int(summary[1]) + int(summary[2]) == before
            assert not list(out.glob(".*.part.*"))
    stamps = {case: (out / f"{case}.nii.gz").stat().st_mtime_ns for case in done}
    rest = predict(run, inputs[0], out)
    assert set(rest.skipped) == done
    assert {case: (out / f"{case}.nii.gz").stat().st_mtime_ns for case in done} == stamps
    assert snapshot(out) == oracle


def test_shares_on_several_devices_make_the_same_folder(
    run: Path, inputs: tuple[list[Path], dict[str, str]], whole: Path, tmp_path: Path
):
    parts = [predict(run, inputs[0], tmp_path, shard=Shard(i, 2), engine=Local(["cpu"] * i)) for i in (1, 2)]
    assert sum(len(part.done) for part in parts) == GOOD
    assert sum(len(part.failed) for part in parts) == FAULTY
    results = {name: data for name, data in snapshot(tmp_path).items() if ".nii" in name}
    assert results == {name: data for name, data in snapshot(whole).items() if ".nii" in name}


def entries(out: Path) -> list[dict]:
    """The last whole line of each case of a manifest."""
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    return list({entry["id"]: entry for entry in (json.loads(line) for line in lines if line[-1] == "\n")}.values())
