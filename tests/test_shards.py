"""Shares of a batch: several runs on one folder, one after the other and at the same time."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from densepred import files
from densepred.errors import InputError, LockedError, UnsafeError
from densepred.inference import shards
from densepred.inference.batch import BatchResult, predict
from densepred.inference.manifest import Manifest
from densepred.inference.predictor import Predictor
from densepred.inference.shards import Shard, held
from tests.acceptance.helpers import snapshot
from tests.untrained_runs import image, noise, run_of

NAMES = "abcdefg"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Seven images, of which `d` is damaged."""
    paths = [image(tmp_path / "in" / f"{name}.nii.gz", noise(seed)) for seed, name in enumerate(NAMES)]
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    return paths


def all_shards(run: Path, inputs: list[Path], out: Path, count: int) -> list[BatchResult]:
    return [predict(run, inputs, out, shard=Shard(number + 1, count)) for number in range(count)]


def results(folder: Path) -> dict[str, bytes]:
    """What is no record."""
    return {name: data for name, data in snapshot(folder).items() if not name.startswith((".", "manif", "fail"))}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}


def test_three_at_the_same_time_make_what_one_run_makes(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict(run, inputs, whole)
    together, plain, met = threading.Barrier(3), Predictor.predict_file, threading.local()

    def meeting(self: Predictor, *arguments: object) -> None:
        if not hasattr(met, "once"):  # each shard waits in its first case until all are in theirs
            met.once = together.wait(60)
        plain(self, *arguments)

    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(Predictor, "predict_file", meeting)
        parts = list(pool.map(lambda i: predict(run, inputs, out, shard=Shard(i, 3)), (1, 2, 3)))
    assert [part.done for part in parts] == [["a", "g"], ["b", "e"], ["c", "f"]]
    assert list(parts[0].failed) == ["d"]
    assert results(out) == results(whole)
    records = {path.name for path in out.glob("*-of-3.*")}
    assert records == {f"manifest-{i}-of-3.jsonl" for i in (1, 2, 3)} | {"failures-1-of-3.tsv"}
    before = stamps(out)
    again = predict(run, inputs, out)
    assert (again.done, list(again.failed)) == ([], ["d"])
    assert snapshot(out) == snapshot(whole)  # the records of the shards have become those of a whole run
    assert stamps(out) == before


def test_another_number_of_shards_does_nothing_again(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    good = [path for path in inputs if path.name[0] != "d"]
    all_shards(run, good, out, 3)
    before = {name: data for name, data in snapshot(out).items() if name[0] != "."}
    monkeypatch.setattr(Predictor, "predict_file", lambda *_: pytest.fail("predicted again"))
    for count in (2, 3, 9):
        parts = all_shards(run, good, out, count)
        assert sorted(case for part in parts for case in part.skipped) == [*"abcefg"]
        assert not any(part.done or part.failed for part in parts)
    after = {name: data for name, data in snapshot(out).items() if name[0] != "."}
    assert {name: data for name, data in after.items() if data} == before  # the other manifests are empty


def test_what_another_shard_did_anew_holds(run: Path, inputs: list[Path], tmp_path: Path):
    """The last word on a case may be in any of the manifests."""
    out = tmp_path / "out"
    for turn, count in enumerate((3, 2, 3, 4)):
        image(inputs[0], noise(20 + turn))
        assert predict(run, inputs[:3], out, shard=Shard(1, count)).done[0] == "a"
        for other in (1, 2, 3, 5):
            assert "a" in predict(run, inputs[:3], out, shard=Shard(1, other)).skipped
    lines = (out / "manifest-1-of-4.jsonl").read_text().splitlines()
    assert [json.loads(line)["turn"] for line in lines] == [3]  # from 3 to 2, back, and from there to 4
    predict(run, inputs[:3], out)
    predict(run, inputs[:3], tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_corrected_map_is_left_alone_by_all_shards(run: Path, inputs: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    all_shards(run, inputs[:3], out, 3)
    corrected = image(out / "b.nii.gz", noise(9)).read_bytes()
    assert "changed since it was written" in predict(run, inputs[:3], out, shard=Shard(2, 2)).failed["b"].what
    assert (out / "b.nii.gz").read_bytes() == corrected


def test_rows_of_failures_go_when_any_shard_has_done_the_case(run: Path, inputs: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    all_shards(run, inputs, out, 2)
    row = (out / "failures-2-of-2.tsv").read_text().splitlines()[1]
    assert row.startswith("d\t")
    image(inputs[3], noise(3))
    assert predict(run, inputs, out, shard=Shard(1, 3)).done == ["d"]
    assert not list(out.glob("failures*"))


# Killed


def test_a_killed_shard_goes_on(run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, plain = tmp_path / "out", Predictor.predict_file

    def killed(self: Predictor, *arguments: object) -> None:
        plain(self, *arguments)
        if arguments[0].id == "e":  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_file", killed)
        patch.setattr(Manifest, "compact", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            predict(run, inputs, out, shard=Shard(1, 2))
    assert "begun" in (out / "manifest-1-of-2.jsonl").read_text().splitlines()[-1]
    assert predict(run, inputs, out, shard=Shard(2, 2)).done == ["b", "f"]
    assert "begun" in (out / "manifest-1-of-2.jsonl").read_text().splitlines()[-1]
    rest = predict(run, inputs, out, shard=Shard(1, 2))
    assert (rest.done, rest.skipped) == (["e", "g"], ["a", "c"])
    predict(run, inputs, tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


def test_a_shard_sweeps_away_its_own_unfinished_files_only(run: Path, inputs: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    gone = ".4194305.0123abcd.part."  # above the largest number of a process: of another machine, or killed
    left = {name: out / f"{gone}{name}" for name in ("a.nii.gz", "b.nii.gz", "labels.json", "manifest-1-of-2.jsonl")}
    for path in left.values():
        path.touch()
    predict(run, inputs, out, shard=Shard(1, 2))
    assert [name for name, path in left.items() if path.exists()] == ["b.nii.gz", "labels.json"]
    predict(run, inputs, out)
    assert not any(path.exists() for path in left.values())


# Who may run beside whom


def test_runs_that_would_meet_exclude_each_other(tmp_path: Path):
    cases = {None: [Shard(1, 2)], Shard(1, 2): [None, Shard(1, 2), Shard(2, 3)]}
    for holder, others in cases.items():
        with held(tmp_path, holder):
            for other in others:
                with (
                    pytest.raises(LockedError, match=r"another run holds this folder \(process \d+ on "),
                    held(tmp_path, other),
                ):
                    pytest.fail("both run")
            if holder is not None:
                with held(tmp_path, Shard(2, 2)):
                    pass
    with held(tmp_path, Shard(2, 3)), held(tmp_path, Shard(1, 3)):  # nobody holds what lies there of others
        pass
    with held(tmp_path, None):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_shards_that_were_given_different_lists_do_not_spoil_each_others_results(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder that grows: the case `c` belongs to both, and the other has done it since this one began."""
    out, plain = tmp_path / "out", Predictor.predict_file

    def other_first(self: Predictor, *arguments: object) -> None:
        if arguments[0].id == "a":  # type: ignore[attr-defined]
            monkeypatch.setattr(Predictor, "predict_file", plain)
            predict(run, inputs[1:3], out, shard=Shard(2, 2))
        plain(self, *arguments)

    monkeypatch.setattr(Predictor, "predict_file", other_first)
    result = predict(run, inputs[:3], out, shard=Shard(1, 2))
    assert (result.done, result.skipped, result.failed) == (["a"], ["c"], {})


def test_one_folder_has_one_meaning(run: Path, inputs: list[Path], tmp_path: Path):
    other = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "galaxy"}, "other")
    out = tmp_path / "out"
    predict(run, inputs, out, shard=Shard(1, 2))
    with pytest.raises(UnsafeError, match="for 4 cases that stay"):
        predict(other, inputs, out, shard=Shard(2, 2))


def test_a_result_is_held_back_when_the_meaning_was_replaced(
    run: Path, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two shards of different models that began at the same moment."""
    out, plain = tmp_path / "out", Predictor.predict_file

    def replaced(self: Predictor, *arguments: object) -> None:
        (out / "labels.json").write_text('{"classes": {"1": "galaxy"}}')
        plain(self, *arguments)

    monkeypatch.setattr(Predictor, "predict_file", replaced)
    result = predict(run, inputs[:1], out, shard=Shard(1, 2))
    assert "says something else" in result.failed["a"].what
    assert not list(out.glob("*.nii.gz"))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b", "1/3/5", ""])
def test_what_is_no_share_is_refused(text: str):
    with pytest.raises(InputError, match="is no share"):
        Shard.parse(text)


def test_shares_have_everything_once():
    cases = [f"{number:03d}" for number in range(200)]
    for count in (1, 3, 7, 250):
        parts = [Shard(number + 1, count).of(cases) for number in range(count)]
        assert sorted(case for part in parts for case in part) == cases
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_names_of_records(tmp_path: Path):
    for name in ("failures.tsv", "failures-2-of-3.tsv", "failures_old.tsv"):
        (tmp_path / name).touch()
    assert [path.name for path in shards.records_of("failures.tsv", tmp_path)] == [
        "failures.tsv",
        "failures-2-of-3.tsv",
    ]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(InputError, match="cannot be locked"), files.locked(tmp_path):
        pytest.fail("held")


def test_a_manifest_is_settled_while_other_threads_add_to_it(tmp_path: Path):
    manifest = Manifest(tmp_path)
    for case in "ab":
        manifest.begin({"id": case}, [])

    class Cases(set[str]):
        def __contains__(self, case: object) -> bool:  # as another thread would, between two looks
            manifest.entries.setdefault("late", {"id": "late", "outputs": {}})
            return True

    manifest.settle(Cases())
    assert not any("begun" in entry for entry in manifest.entries.values())
