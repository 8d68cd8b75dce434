"""The cache of preprocessed cases."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.cache import prepare
from densepred.cases.case import Case
from densepred.cases.preprocess import preprocess
from densepred.cases.store import ArrayWriter
from densepred.errors import DiskFullError, InputError, UnsafeError
from densepred.files import locked, sha256
from tests import disk_faults
from tests.case_files import blob, case_of, plan, save


def two_cases(root: Path) -> list[Case]:
    return [case_of(root, *blob(seed=number), name=f"c{number}") for number in range(2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".preparing"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_cached_arrays_are_the_preprocessed_ones(tmp_path: Path) -> None:
    cases, calls = two_cases(tmp_path), []
    cached = prepare(cases, plan(), tmp_path / "cache", lambda: calls.append(1))
    assert len(calls) == 2
    assert [entry.id for entry in cached] == ["c0", "c1"]
    for case, entry in zip(cases, cached, strict=True):
        image, label = preprocess(case, plan())
        assert label is not None
        assert entry.shape == (1, 6, 7, 8)
        assert np.array_equal(entry.image, image)
        assert np.array_equal(entry.label, label)
        assert (entry.image.dtype, entry.label.dtype, entry.counts.dtype) == (np.float32, np.int8, np.int64)
        assert entry.spacing == (1.0, 1.0, 1.0)
        assert entry.classes == {index: int((label == index).sum()) for index in (1, 2)}
        assert entry.labelled == label.size
        assert entry.counts.tolist() == [[(label == index).sum() for index in range(3)]]


def test_a_second_call_changes_nothing_and_reads_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = two_cases(tmp_path)
    first = prepare(cases, plan(), tmp_path / "cache")
    before = snapshot(tmp_path / "cache")

    def of_own_files(path: Path) -> str:
        assert path.is_relative_to(tmp_path / "cache"), f"{path} was hashed again"
        return sha256(path)

    monkeypatch.setattr("densepred.cases.cache.sha256", of_own_files)
    monkeypatch.setattr("densepred.cases.cache.prepared", lambda *_: pytest.fail("preprocessed again"))
    assert prepare(cases, plan(), tmp_path / "cache") == first
    assert snapshot(tmp_path / "cache") == before


def test_the_key_follows_contents_and_settings_only(tmp_path: Path) -> None:
    cases = two_cases(tmp_path)
    key = prepare(cases, plan(), tmp_path / "cache")[0].key
    assert prepare(cases, plan(classes=("other", "names", "here")), tmp_path / "cache")[0].key == key
    assert prepare(cases, plan(normalize=("none",)), tmp_path / "cache")[0].key != key
    assert prepare(cases, plan(spacing=(2.0, 1.0, 1.0)), tmp_path / "cache")[0].shape == (1, 3, 7, 8)
    os.utime(cases[0].images[0], ns=(1, 1))
    assert prepare(cases, plan(), tmp_path / "cache")[0].key == key
    save(cases[0].images[0], blob(seed=9)[0])
    assert prepare(cases, plan(), tmp_path / "cache")[0].key != key


def test_the_cache_is_the_same_wherever_and_whenever_it_is_made(tmp_path: Path) -> None:
    cases = two_cases(tmp_path)
    for name in ("one", "two"):
        prepare(cases[:: 1 if name == "one" else -1], plan(), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("harm", ["no meta", "torn meta", "short array", "counts.npy", "image/zarr.json"])
def test_unfinished_entries_are_made_anew(tmp_path: Path, harm: str) -> None:
    cases = two_cases(tmp_path)
    entry = prepare(cases, plan(), tmp_path / "cache")[0]
    before = contents(tmp_path / "cache")
    meta = entry.folder / "meta.json"
    if harm == "no meta":
        meta.unlink()
        (tmp_path / "cache" / ".999999999.abcdef01.part.c0.0123456789abcdef").mkdir()
    elif harm == "torn meta":
        meta.write_text(meta.read_text()[:40])
    elif harm != "short array":
        content = bytearray((entry.folder / harm).read_bytes())
        content[-4] ^= 1
        (entry.folder / harm).write_bytes(content)
    else:
        with open(entry.folder / "label" / "c" / "0" / "0" / "0", "r+b") as file:
            file.truncate(100)
    prepare(cases, plan(), tmp_path / "cache")
    assert contents(tmp_path / "cache") == before
    assert not list((tmp_path / "cache").glob(".*part*"))


def test_a_stopped_run_leaves_whole_entries_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, add = two_cases(tmp_path), ArrayWriter.add
    whole = tmp_path / "whole"
    prepare(cases, plan(), whole)
    for stop in range(4):  # two arrays per case: stop in the middle of each
        writes = [0]

        def fail(writer: ArrayWriter, planes: np.ndarray, stop: int = stop, writes: list[int] = writes) -> None:
            writes[0] += 1
            if writes[0] == stop + 1:
                raise KeyboardInterrupt
            add(writer, planes)

        with monkeypatch.context() as patched:
            patched.setattr(ArrayWriter, "add", fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(cases, plan(), tmp_path / "cache", workers=1)
        finished = [path.parent.name for path in (tmp_path / "cache").glob("*/meta.json")]
        assert finished == [path.name for path in sorted(whole.glob("c*"))][: stop // 2]
        prepare(cases, plan(), tmp_path / "cache")
        assert contents(tmp_path / "cache") == contents(whole)
        shutil.rmtree(tmp_path / "cache")


def test_bad_cases_are_all_named_and_the_others_made(tmp_path: Path) -> None:
    good = two_cases(tmp_path)
    gone = Case("gone", (tmp_path / "x.nii",), tmp_path / "y.nii")
    bad = [case_of(tmp_path, blob()[0], blob()[1] + 3, name="values"), gone]
    with pytest.raises(InputError) as caught:
        prepare([bad[0], *good, bad[1]], plan(), tmp_path / "cache")
    message = str(caught.value)
    assert "2 of 4 cases cannot be prepared" in message
    assert "values: " in message
    assert "3 (240 voxels)" in message
    assert "x.nii: cannot be read (No such file or directory)" in message
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 2
    with pytest.raises(InputError, match="ERROR values: "):
        prepare(bad[:1], plan(), tmp_path / "cache")


def test_however_many_work_at_a_time_the_cache_is_the_same(tmp_path: Path) -> None:
    cases = [case_of(tmp_path, *blob((40, 37, 70), seed=number), name=f"c{number}") for number in range(5)]
    found = [prepare(cases, plan(), tmp_path / str(workers), workers=workers) for workers in (1, 5)]
    assert [entry.id for entry in found[1]] == [case.id for case in cases]
    assert contents(tmp_path / "1") == contents(tmp_path / "5")


def test_an_error_of_the_caller_ends_the_work(tmp_path: Path) -> None:
    """Nothing is prepared on behind the back of one who has gone."""
    cases = [case_of(tmp_path, *blob(seed=number), name=f"c{number}") for number in range(40)]

    def told() -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        prepare(cases, plan(), tmp_path / "cache", told, workers=1)
    made = len(list((tmp_path / "cache").glob("c*")))
    assert made < len(cases)
    assert not [thread for thread in threading.enumerate() if "densepred-prepare" in thread.name]
    assert not list((tmp_path / "cache").glob(".*.part.*"))


def test_two_runs_prepare_a_case_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases, cache = two_cases(tmp_path), tmp_path / "cache"
    cache.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with locked(cache, ".preparing"):  # another run
            waiting = pool.submit(prepare, cases, plan(), cache)
            until = time.monotonic() + 60
            while "waiting: another run" not in caplog.text and time.monotonic() < until:
                time.sleep(0.01)
            assert not waiting.done()
            assert not list(cache.glob("c*"))
        assert [entry.id for entry in waiting.result()] == ["c0", "c1"]
    assert "waiting: another run prepares cases in this folder" in caplog.text


@pytest.mark.parametrize("where", ["image", "label"])
def test_a_flipped_bit_is_named_and_the_case_made_anew(tmp_path: Path, where: str) -> None:
    generator = np.random.default_rng(0)
    image, label = generator.normal(size=(70, 80, 66)), generator.integers(0, 3, (70, 80, 66)).astype(np.uint8)
    cases = [case_of(tmp_path, image.astype(np.float32), label, name="c0")]
    entry = prepare(cases, plan(), tmp_path / "cache")[0]
    before = contents(tmp_path / "cache")
    file = entry.folder / where / "c" / "0" / "0" / "0" / ("0" if where == "image" else "")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = prepare(cases, plan(), tmp_path / "cache")[0]  # the size is right, so that it is found on reading
    with pytest.raises(
        InputError, match=r"ERROR c0: .*the cache is damaged: chunk \(.*\) does not have its checksum"
    ) as caught:
        np.asarray(getattr(again, where))
    assert "prepared anew" in caught.value.fix
    assert contents(tmp_path / "cache") != before
    again = prepare(cases, plan(), tmp_path / "cache")[0]
    assert contents(tmp_path / "cache") == before
    assert np.array_equal(again.label, label)


@pytest.mark.parametrize("name", ["image/zarr.json", "counts.npy", "label/c/0/0/0"])
def test_a_damaged_cache_is_named(tmp_path: Path, name: str) -> None:
    entry = prepare(two_cases(tmp_path)[:1], plan(), tmp_path / "cache")[0]
    file = entry.folder / name
    file.write_bytes(b"\x80\x04nonsense".ljust(file.stat().st_size, b"-"))
    with pytest.raises(InputError, match=r"ERROR c0: .*: the cache is damaged"):
        _ = np.asarray(entry.image), np.asarray(entry.label), entry.counts
    assert not (entry.folder / "meta.json").exists()


def test_a_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    """With SPACE for each number of changes to the disk, from none to all."""
    if reason := disk_faults.available():
        pytest.skip(reason)
    cases, whole, cache = two_cases(tmp_path), tmp_path / "whole", tmp_path / "cache"
    prepare(cases, plan(), whole)
    seen = set()
    for last in itertools.count(1, 4):
        trial = disk_faults.attempt(lambda: _made(cases, cache), cache, last, "full")
        if trial.struck is None:
            break
        assert trial.status == 0, trial.said
        at_its_end = "ftruncate /.preparing" in trial.struck  # what the lock says goes, and nobody needs that
        assert trial.said.startswith("the disk is full") or (at_its_end and trial.said == "2 cases"), trial
        assert not list(cache.glob(".*part*"))
        for entry in cache.glob("*.*/meta.json"):
            inner = entry.parent.name
            assert contents(entry.parent) == contents(whole / inner)
        seen.add(len(list(cache.glob("*.*/meta.json"))))
        shutil.rmtree(cache, ignore_errors=True)
    assert trial.said == "2 cases"
    assert seen >= {0, 1}


@pytest.mark.parametrize("fault", ["kill", "full once"])
def test_a_killed_preparation_goes_on(tmp_path: Path, fault: disk_faults.Fault) -> None:
    if reason := disk_faults.available():
        pytest.skip(reason)
    cases, whole, cache = two_cases(tmp_path), tmp_path / "whole", tmp_path / "cache"
    prepare(cases, plan(), whole)
    for last in itertools.count(1, 7):
        trial = disk_faults.attempt(lambda: _made(cases, cache), cache, last, fault)
        if trial.struck is None:
            break
        prepare(cases, plan(), cache)
        assert contents(cache) == contents(whole), trial.struck
        shutil.rmtree(cache)
    assert last > 10


def _made(cases: list[Case], cache: Path) -> str:
    try:
        return f"{len(prepare(cases, plan(), cache, workers=1))} cases"
    except DiskFullError as error:
        return error.what


def test_invalid_voxels_have_no_truth_and_labels_out_of_range_are_named(tmp_path: Path) -> None:
    image, label = blob()
    image[2, 3, 4] = np.nan
    entry = prepare([case_of(tmp_path, image, label, name="nan")], plan(), tmp_path / "cache")[0]
    assert np.array_equal(np.argwhere(np.asarray(entry.label) == -1), [[2, 3, 4]])
    assert np.isfinite(np.asarray(entry.image)).all()
    assert entry.labelled == label.size - 1
    label[5, 0, :2] = 7
    with pytest.raises(InputError, match=r"ERROR seven: .*label values without a class: 7 \(2 voxels\)"):
        prepare([case_of(tmp_path, blob()[0], label, name="seven")], plan(), tmp_path / "cache")


def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path) -> None:
    """As releases unpacked with the times of their archive are."""
    cases = two_cases(tmp_path)
    path = cases[0].images[0]
    key, times = prepare(cases, plan(), tmp_path / "cache")[0].key, path.stat()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    with contextlib.suppress(InputError):  # where the bit spoils a compressed file
        assert prepare(cases, plan(), tmp_path / "cache")[0].key != key


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.tex"
    kept.write_text("years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(kept)
    with pytest.raises(UnsafeError, match="symbolic link"), locked(tmp_path / "run"):
        pytest.fail("it was locked")
    assert kept.read_text() == "years"
