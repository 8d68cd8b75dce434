"""Killed, or out of space, at every call that changes the disk: the old file or the new one is there, whole.

All formats that are written are tried, by calls of the system (see `disk_faults`): opening for writing, writing, giving
a length, syncing, renaming, making folders, removing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from densepred import files
from densepred.errors import RESOURCES, InputError
from densepred.volumes import FORMATS, open_volume
from tests.disk_faults import Fault, available
from tests.trial_server import serving
from tests.write_trials import MOST, Outcome, digest, values_for, write

ONLY_READ = {".fits.bz2", ".nhdr", ".mhd", ".dcm"}
SAME = {
    **dict.fromkeys((".fit", ".fts"), ".fits"),
    **dict.fromkeys((".fit.gz", ".fts.gz"), ".fits.gz"),
    **dict.fromkeys((".tiff", ".ome.tif", ".ome.tiff"), ".tif"),
    **{".fit.fz": ".fits.fz", ".jpeg": ".jpg", ".hdf5": ".h5", ".ome.zarr": ".zarr"},
}
"""Suffixes that are other names of a format."""
WRITTEN = sorted(FORMATS.keys() - ONLY_READ - SAME.keys())
FEWEST = {".zarr": 30, ".h5": 9, ".tif": 9, ".fits.gz": 8, ".fits.fz": 8}
"""Calls that a format needs at least; 5 where none is given: open, write, sync, rename, sync the folder."""

Ask: TypeAlias = "Callable[[str, Fault], list[Outcome]]"


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[..., Any]]:
    if why := available():
        pytest.skip(why)
    with serving("tests.write_trials") as ask:
        yield ask


@pytest.fixture
def ask(server: Callable[..., Any], tmp_path: Path) -> Ask:
    """Runs all trials of a suffix on a file of `values_for(suffix, 1)`."""

    def run(suffix: str, fault: Fault) -> list[Outcome]:
        (tmp_path / "work").mkdir()
        write(tmp_path / "work" / f"x{suffix}", values_for(suffix, 1))
        return [Outcome(**outcome) for outcome in server(suffix, str(tmp_path), fault)]

    return run


def state_of(path: Path, suffix: str) -> str:
    """Whether a file holds the old values or the new ones, as every reader of it would find."""
    axes = None if FORMATS[suffix] in ("densepred.volumes.image", "densepred.volumes.itk") else "czyx"
    if FORMATS[suffix] == "densepred.volumes.nifti":
        axes = "xyzc"
    if FORMATS[suffix] == "densepred.volumes.tiff":
        axes = "zcyx"
    if FORMATS[suffix] == "densepred.volumes.fits":
        with open_volume(f"{path}[1]", "zyx") as one, open_volume(f"{path}[2]", "zyx") as two:
            found = np.concatenate([one.numpy(), two.numpy()])
    else:
        with open_volume(path, axes) as volume:
            found = volume.numpy()
    loss = 120 if suffix == ".jpg" else 0  # of noise
    same = [np.abs(values_for(suffix, seed) - found.astype(float)).mean() <= loss / 4 for seed in (1, 2)]
    assert sum(same) == 1
    return "old" if same[0] else "new"


def states(found: list[Outcome], folder: Path, suffix: str) -> list[str]:
    """The state after every trial; nothing but old and new is there, and the end is new."""
    meaning = {outcome.digest: state_of(folder / outcome.digest / f"x{suffix}", suffix) for outcome in found}
    assert len(found) < MOST
    assert (found[-1].struck, found[-1].status, found[-1].said) == (None, 0, "")
    assert len(found) > FEWEST.get(suffix, 5)
    names = [str(outcome.struck).split()[0] for outcome in found[:-1]]
    assert {"open", "fsync"} <= set(names)
    assert {"write", "writev"} & set(names)
    assert not any(name == "hung:" for name in names)
    out = [meaning[outcome.digest] for outcome in found]
    assert out[-1] == "new"
    assert "old" in out
    return out


@pytest.mark.parametrize("suffix", WRITTEN)
def test_killed_at_every_change_of_the_disk(tmp_path: Path, ask: Ask, suffix: str) -> None:
    found = ask(suffix, "kill")
    after = states(found, tmp_path, suffix)
    assert {outcome.status for outcome in found[:-1]} == {-signal.SIGKILL}
    assert after == sorted(after, reverse=True), "once the new one is there, it stays"
    names = [str(outcome.struck).split()[0] for outcome in found]
    assert names[after.index("new") - 1] in ("rename", "renameat2"), "the old one stays until a rename"
    left = found[-1].others  # by the killed; the last write was done beside it
    assert left
    assert all(".part." in name for name in left)
    assert files.sweep_parts(tmp_path / "work") == len(left)
    assert os.listdir(tmp_path / "work") == [f"x{suffix}"]


@pytest.mark.parametrize("fault", ["full", "full once"])
@pytest.mark.parametrize("suffix", WRITTEN)
def test_the_disk_full_at_every_change(tmp_path: Path, ask: Ask, suffix: str, fault: Fault) -> None:
    found = ask(suffix, fault)
    states(found, tmp_path, suffix)
    refused = f"{RESOURCES} {tmp_path / 'work'}/x{suffix}"
    for outcome in found[:-1]:
        assert outcome.status == 0, f"{outcome.struck}: {outcome.said}"
        assert outcome.said in ("", refused), outcome.struck
        if not outcome.said:  # it could do without that call
            assert state_of(tmp_path / outcome.digest / f"x{suffix}", suffix) == "new", outcome.struck
        assert not outcome.others, f"{outcome.struck} leaves {outcome.others}"
    assert sum(outcome.said == refused for outcome in found) >= FEWEST.get(suffix, 5) - 1


def test_every_format_is_written_or_is_only_read(tmp_path: Path) -> None:
    assert {FORMATS[suffix] for suffix in FORMATS} == {FORMATS[s] for s in WRITTEN} | {"densepred.volumes.dicom"}
    for suffix in ONLY_READ:
        with pytest.raises(InputError):
            write(tmp_path / f"x{suffix}", values_for(suffix, 1))
    for alias, suffix in SAME.items():
        for name in (alias, suffix):
            write(tmp_path / f"x{name}", values_for(name, 1))
        assert digest(tmp_path / f"x{alias}") == digest(tmp_path / f"x{suffix}"), f"{alias} is {suffix} by another name"
