"""Volumes in several files, a plane each, as headers of MetaImage and NRRD name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from densepred.errors import InputError
from densepred.volumes import companions, open_volume
from tests.read_trials import Answer, reader

pytest.importorskip("SimpleITK", reason="needs the extra itk")


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., Answer]]:
    """A process that may end over what it reads."""
    with reader() as read:
        yield read


PATTERNS = ["s_%d.raw 1 2 0", "s_%d.raw 1 2", "s%%.raw 1 1 -1", "%s%s.raw 1 2 1", "%9999d 1 2 1", "LIST -5", "LIST x"]


@pytest.mark.parametrize("files", PATTERNS)
def test_patterns_of_files_that_itk_does_not_survive(tmp_path: Path, ask: Callable[..., Answer], files: str):
    for name in ("s%.raw", "s_1.raw", "s_2.raw"):
        (tmp_path / name).write_bytes(bytes(64))
    path = tmp_path / "x.mhd"
    head = "ObjectType = Image\nNDims = 3\nDimSize = 8 8 2\nElementType = MET_UCHAR\n"
    path.write_text(f"{head}ElementDataFile = {files}\n")
    found = ask(path)
    assert found.status == 0
    assert "impossible files of voxels" in found.reads[0]
    path.write_text(f"{head}ElementDataFile = s_%d.raw 1 2 1\n")
    with open_volume(path) as volume:
        assert volume.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("names", ["a.raw\n", "a.raw\na.raw"], ids=["one missing", "no end"])
def test_a_list_of_planes_that_is_cut_off_is_refused(tmp_path: Path, names: str):
    (tmp_path / "a.raw").write_bytes(bytes(range(64)))
    head = "ObjectType = Image\nNDims = 3\nDimSize = 8 8 2\nElementType = MET_UCHAR\nElementDataFile = LIST\n"
    (tmp_path / "x.mhd").write_text(head + names)
    with pytest.raises(InputError, match="truncated: lists"):
        open_volume(tmp_path / "x.mhd")


@pytest.mark.parametrize("name", ["{}/s_%02d.raw 1 2 1", "**%d.raw 1 2 1"])
def test_patterns_of_any_form_end_no_batch(tmp_path: Path, name: str):
    (tmp_path / "s_01.raw").touch()
    (tmp_path / "x.nhdr").write_text(f"NRRD0005\ndata file: {name.format(tmp_path)}\n")
    assert set(companions(tmp_path / "x.nhdr")) <= {tmp_path / "s_01.raw"}
