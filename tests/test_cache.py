"""The cache of preprocessed cases."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from densepred.cases.cache import MAX_LOCATIONS, prepare
from densepred.cases.case import Case
from densepred.cases.preprocess import preprocess
from densepred.errors import InputError
from tests.case_files import blob, case_of, plan, save


def two_cases(root: Path) -> list[Case]:
    return [case_of(root, *blob(seed=number), name=f"c{number}") for number in range(2)]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in snapshot(folder).items()}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
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
        assert (entry.image.dtype, entry.label.dtype, entry.locations.dtype) == (np.float32, np.int8, np.int32)
        assert isinstance(entry.image, np.memmap)
        for index, (first, stop) in entry.classes.items():
            rows = entry.locations[first:stop]
            assert np.array_equal(rows[:, 1:], np.argwhere(label == index))
            assert set(rows[:, 0]) == {index}


def test_a_second_call_changes_nothing_and_reads_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = two_cases(tmp_path)
    first = prepare(cases, plan(), tmp_path / "cache")
    before = snapshot(tmp_path / "cache")
    monkeypatch.setattr("densepred.cases.cache.sha256", lambda path: pytest.fail(f"{path} was hashed again"))
    monkeypatch.setattr("densepred.cases.cache.preprocess", lambda *_: pytest.fail("preprocessed again"))
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


@pytest.mark.parametrize("harm", ["no meta", "torn meta", "short array"])
def test_unfinished_entries_are_made_anew(tmp_path: Path, harm: str) -> None:
    cases = two_cases(tmp_path)
    entry = prepare(cases, plan(), tmp_path / "cache")[0]
    before = contents(tmp_path / "cache")
    meta = entry.folder / "meta.json"
    if harm == "no meta":
        meta.unlink()
        (entry.folder / "image.npy").unlink()
        (entry.folder / ".999999999.abcdef01.part.image.npy").write_bytes(b"torn")
    elif harm == "torn meta":
        meta.write_text(meta.read_text()[:40])
    else:
        with open(entry.folder / "label.npy", "r+b") as file:
            file.truncate(100)
    prepare(cases, plan(), tmp_path / "cache")
    assert contents(tmp_path / "cache") == before


def test_a_stopped_run_leaves_whole_entries_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, writes, write = two_cases(tmp_path), [0], np.save
    whole = tmp_path / "whole"
    prepare(cases, plan(), whole)

    for stop in range(6):  # three arrays per case: stop in the middle of each

        def fail(path: Path, array: np.ndarray, allow_pickle: bool, stop: int = stop) -> None:
            writes[0] += 1
            if writes[0] == stop + 1:
                Path(path).write_bytes(b"half")
                raise KeyboardInterrupt
            write(path, array, allow_pickle=allow_pickle)

        writes[0] = 0
        with monkeypatch.context() as patched:
            patched.setattr("densepred.cases.cache.np.save", fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(cases, plan(), tmp_path / "cache")
        finished = [path.parent.name for path in (tmp_path / "cache").glob("*/meta.json")]
        assert finished == [path.name for path in sorted(whole.iterdir())][: stop // 3]
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


def test_locations_are_bounded_per_class(tmp_path: Path) -> None:
    label = np.ones((30, 30, 30), np.uint8)
    label[0, 0, :5] = 2
    entry = prepare([case_of(tmp_path, label * 1.0, label)], plan(), tmp_path / "cache")[0]
    assert entry.classes == {1: (0, MAX_LOCATIONS), 2: (MAX_LOCATIONS, MAX_LOCATIONS + 5)}
    positions = entry.locations[:, 1:]
    assert len(np.unique(positions, axis=0)) == len(positions)
    assert abs(positions[:MAX_LOCATIONS].mean(0) - 14.5).max() < 0.5


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    entry = prepare(two_cases(tmp_path)[:1], plan(), tmp_path / "cache")[0]
    (entry.folder / "image.npy").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(InputError, match=r"ERROR c0: .*image.npy: the cache is damaged"):
        _ = entry.image
    assert json.loads((entry.folder / "meta.json").read_text())["id"] == "c0"
