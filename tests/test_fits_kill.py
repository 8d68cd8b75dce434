"""Killed, or out of space, at every call that changes the disk: the old file or the new one is there, whole."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densepred import files
from densepred.errors import DiskFullError
from densepred.volumes import Volume, fits_tiles, fits_writer, open_volume
from densepred.volumes.fits_writer import Legend, open_writer
from tests.fits_files import TAN, pixels, save

SUFFIXES = (".fits", ".fits.gz", ".fits.fz")
VALUES = pixels((2, 12, 40))


class Clock:
    """Calls `at_end` at the `last` change of the disk, counted from 1."""

    def __init__(self, last: int, at_end: Callable[[], None]) -> None:
        self.ticks, self._last, self._at_end = 0, last, at_end

    def tick(self) -> bool:
        """Count; whether this is the last one."""
        self.ticks += 1
        return self.ticks == self._last

    def strike(self) -> None:
        self._at_end()


class Torn:
    """A file whose last write is done by half."""

    def __init__(self, file: Any, clock: Clock) -> None:
        self._file, self._clock = file, clock

    def write(self, data: Any) -> int:
        content = bytes(data)
        if self._clock.tick():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._clock.strike()
        return int(self._file.write(content))

    def truncate(self, size: int) -> int:
        if self._clock.tick():
            self._clock.strike()
        return int(self._file.truncate(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def wire(patch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Let `clock` see every change of the disk."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if clock.tick():
                clock.strike()
            return call(*args)

        return run

    def unnamed(**options: Any) -> Any:
        return Torn(tempfile.TemporaryFile(**options), clock)

    class Temporary:
        TemporaryFile = staticmethod(unnamed)

    patch.setattr(fits_writer, "open", lambda path, mode: Torn(Path(path).open(mode), clock), raising=False)  # noqa: SIM115
    for module in (fits_writer, fits_tiles):
        patch.setattr(module, "tempfile", Temporary)
    patch.setattr(files, "sync", counted(files.sync))
    patch.setattr(files.os, "replace", counted(os.replace))


def write(path: Path, like: Volume, values: np.ndarray) -> None:
    labels = values.dtype.kind == "u"
    legend = Legend({0: "sky", 1: "star"}) if labels else None
    with open_writer(path, like, values.dtype, values.shape[0], labels, legend=legend) as writer:
        for start in range(0, 12, 5):
            writer.write(values[:, start : start + 5])


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process that does `work`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("values", [VALUES, VALUES[:1].astype("u1")], ids=["probabilities", "labels"])
def test_killed_at_every_write(
    tmp_path: Path, suffix: str, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = open_volume(save(tmp_path / "in.fits", pixels((12, 40)), **TAN))
    path, fresh = tmp_path / f"x{suffix}", tmp_path / f"fresh{suffix}"
    write(fresh, like, values)
    write(path, like, values[:1] * 0)
    old, new = path.read_bytes(), fresh.read_bytes()
    assert old != new
    fresh.unlink()
    states = []
    for last in range(1, 99):

        def work(last: int = last) -> None:
            wire(monkeypatch, Clock(last, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            write(path, like, values)

        status = in_child(work)
        assert status in (0, -signal.SIGKILL)
        states.append(path.read_bytes())
        assert states[-1] in (old, new)
        left = [entry.name for entry in tmp_path.iterdir() if entry.name not in ("in.fits", path.name)]
        assert all(".part." in name for name in left)
        assert files.sweep_parts(tmp_path) == len(left) <= 1
        if status == 0:
            break
        path.write_bytes(old)
    assert status == 0
    assert states[-1] == states[-2] == new, "the last kill is after the rename, at the folder's sync"
    assert states.count(old) == len(states) - 2 >= 8


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("values", [VALUES, VALUES[:1].astype("u1")], ids=["probabilities", "labels"])
def test_the_disk_full_at_every_write(
    tmp_path: Path, suffix: str, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = open_volume(save(tmp_path / "in.fits", pixels((12, 40)), **TAN))
    path = tmp_path / f"x{suffix}"
    write(path, like, values[:1] * 0)
    old = path.read_bytes()

    def full() -> None:
        raise OSError(28, "No space left on device")

    refused = 0
    for last in range(1, 99):
        with monkeypatch.context() as patch:
            wire(patch, Clock(last, full))
            fault = attempt(path, like, values)
        if fault is None:
            break
        refused += 1
        assert fault.exit_code == 6
        assert Path(str(fault.file)) == path
        if path.read_bytes() != old:  # renamed; then the folder's sync failed
            assert np.array_equal(np.squeeze(read(path)), np.squeeze(values))
            path.write_bytes(old)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.fits", path.name]
    assert refused >= 9
    assert np.array_equal(np.squeeze(read(path)), np.squeeze(values))


def attempt(path: Path, like: Volume, values: np.ndarray) -> DiskFullError | None:
    try:
        write(path, like, values)
    except DiskFullError as error:
        return error
    return None


def read(path: Path) -> np.ndarray:
    """All images of a file."""
    from astropy.io import fits

    with fits.open(path, memmap=False, checksum=True) as file:
        return np.stack([hdu.data for hdu in file if hdu.is_image and hdu.data is not None])


def test_a_mosaic_that_will_not_fit_is_refused_before_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=14000)
    monkeypatch.setattr(fits_writer.shutil, "disk_usage", lambda path: usage)
    like = Volume(np.zeros((1, 60, 60), np.float32), (1, 1))
    entered = []
    with pytest.raises(DiskFullError, match=r"0 MB free"), open_writer(tmp_path / "x.fits", like, np.dtype("f4")):
        entered.append(True)
    assert not entered
    assert not list(tmp_path.iterdir())
