"""Damaged, false and hostile NIfTI files: none passes as data."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from densepred.errors import DensepredError, InputError
from densepred.volumes import (
    Volume,
    open_volume,
)
from tests.nifti_files import RNG, patched, save_nib, scan

NOISE = RNG.normal(0, 99, (50, 50, 50)).astype("i2")  # too long, compressed, for opening to see its end


def test_no_flipped_bit_passes_as_data(tmp_path: Path) -> None:
    values = NOISE[:30]
    path = save_nib(tmp_path / "x.nii.gz", values)
    sound = path.read_bytes()
    size = 8 * len(sound)
    chosen = [*range(8 * 14), *RNG.integers(8 * 14, size, 200), *range(size - 64, size)]  # all of header and trailer
    refused = 0
    for bit in chosen:
        torn = bytearray(sound)
        torn[bit // 8] ^= 1 << bit % 8
        path.write_bytes(torn)
        for take in (Volume.numpy, lambda v: np.concatenate([slab for _, _, slab in v.slabs(3)], axis=1)):
            try:
                with warnings.catch_warnings(action="ignore"):
                    volume = open_volume(path)
                    got = take(volume)
            except DensepredError as error:
                refused += error.file == path
            else:
                np.testing.assert_array_equal(got[0], values.T)
                np.testing.assert_array_equal(volume.affine, np.diag([1.0, 2, 3, 1]))
    assert refused > 2 * 250


def test_a_wrong_checksum_is_named(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "x.nii.gz", NOISE)
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="the checksum does not match: the file is corrupt"):
        open_volume(path).numpy()
    volume = open_volume(path)
    volume[:, :3]
    with pytest.raises(InputError, match="checksum"):
        volume.verify()
    raw[-6] ^= 1
    for torn in (bytes(raw) + b"left", bytes(raw[:-3])):
        path.write_bytes(torn)
        with pytest.raises(InputError, match="holds its 250352 bytes, but its gzip stream does not end"):
            open_volume(path).numpy()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_files_say_how_much_they_hold(tmp_path: Path, suffix: str) -> None:
    values = scan((20, 20, 20))
    path = save_nib(tmp_path / f"x{suffix}", values)
    sound, needed = path.read_bytes(), 352 + values.nbytes
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(sound[: int(len(sound) * share)])
        with pytest.raises(InputError) as caught:
            open_volume(path).numpy()
        if share >= 0.1:
            held = int(len(sound) * share) if suffix == ".nii" else len(forgiving(path))
            cut = "gzip stream does not end" if held == needed else f"holds {held} of {needed} bytes"
            assert cut in str(caught.value)
    path.write_bytes(gzip.compress(gzip.decompress(sound)[:9000]) if suffix == ".nii.gz" else sound[:9000])
    with pytest.raises(InputError, match=f"holds 9000 of {needed} bytes"):
        next(open_volume(path).slabs(20))


def forgiving(path: Path) -> bytes:
    """What a cut gzip file still gives, byte by byte."""
    out = b""
    with gzip.open(path) as file:
        try:
            while byte := file.read(1):
                out += byte
        except EOFError:
            return out
    return out


def test_members_and_zero_padding_are_read_and_rubbish_is_not(tmp_path: Path) -> None:
    values = scan((8, 8, 8))
    raw = save_nib(tmp_path / "x.nii", values).read_bytes()
    path = tmp_path / "x.nii.gz"
    members = b"".join(gzip.compress(raw[a:b]) for a, b in ((0, 100), (100, 500), (500, len(raw))))
    for tail in (b"", bytes(512)):
        path.write_bytes(members + tail)
        np.testing.assert_array_equal(open_volume(path).numpy()[0], values.T)
    path.write_bytes(members + b"rubbish")
    with pytest.raises(InputError):
        open_volume(path).numpy()


def html(path: Path) -> None:
    path.write_text("\n<html><head>Please log in</head></html>" * 20)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("empty.nii.gz", lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
        ("page.nii.gz", html, "starts with '<html"),
        ("brief.nii.gz", lambda path: path.write_text("<html>no</html>"), "starts with '<html>no</html>'"),
        ("packed.nii.gz", lambda path: path.write_bytes(gzip.compress(b"<html>" * 99)), "starts with '<html"),
        ("noise.nii", lambda path: path.write_bytes(bytes(range(128, 256)) * 9), "starts with the bytes 80 81 82 83"),
        ("short.nii", lambda path: path.write_bytes((348).to_bytes(4, "little") + bytes(90)), "holds 94 of 348"),
        ("folder.nii", lambda path: path.mkdir(), "cannot be read: Is a directory"),
        ("missing.nii.gz", lambda path: None, "no such file"),
        ("scan.ni.gz", html, "unknown file type '.ni.gz'"),
        ("scan", html, "has no suffix"),
    ],
)
def test_what_is_no_nifti_is_called_by_its_name(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=words) as caught:
        open_volume(tmp_path / name)
    assert Path(str(caught.value.file)) == tmp_path / name
    assert caught.value.fix


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [3, -64, 64, 64, 1, 1, 1, 1]}, r"impossible sizes: dim = \[3, -64, 64, 64"),
        ({"dim": [3, 64, 0, 64, 1, 1, 1, 1]}, r"dim = \[3, 64, 0, 64"),
        ({"dim": [0, 4, 4, 4, 1, 1, 1, 1]}, r"dim = \[0, 4"),
        ({"dim": [8, 4, 4, 4, 1, 1, 1, 1]}, r"dim = \[8, 4"),
        ({"dim": [1, 64, 1, 1, 1, 1, 1, 1]}, r"one axis only, so no image: dim = \[1, 64"),
        ({"dim": [4, 2, 4, 4, 2, 1, 1, 1]}, r"4 axes \(2, 4, 4, 2\)"),
        ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, r"impossible spacing: pixdim\[1:4\] = \[0.0, 1.0, 1.0\]"),
        ({"pixdim": [1, 1, -2, 1, 0, 0, 0, 0]}, "-2.0"),
        ({"pixdim": [1, 1, 1, np.nan, 0, 0, 0, 0]}, "nan"),
        ({"srow_x": [0, 0, 0, 5]}, "affine is singular"),
        ({"srow_x": [1, 1, 0, 5], "srow_y": [1, 1, 0, 5]}, "affine is singular"),
        ({"srow_z": [0, 0, np.nan, 5]}, "affine is singular or not finite"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "affine is singular or not finite"),
        ({"datatype": 32}, "complex64"),
        ({"datatype": 128}, "RGB"),
        ({"datatype": 3}, "unknown datatype code 3"),
        ({"vox_offset": 100}, "vox_offset = 100"),
        ({"vox_offset": np.nan}, "vox_offset = nan"),
        ({"vox_offset": 1e30}, "holds 480 of"),
        ({"magic": b"ni1"}, "two-file NIfTI"),
        ({"magic": b""}, "its magic is b''"),
        ({"dim": [3, 4, 4, 5, 1, 1, 1, 1]}, "holds 480 of 512 bytes"),
    ],
)
def test_headers_that_make_no_sense_are_refused_with_their_values(tmp_path: Path, fields: dict, words: str) -> None:
    path = patched(save_nib(tmp_path / "x.nii", scan((4, 4, 4)), np.eye(4)), **fields)
    with pytest.raises(InputError, match=words) as caught:
        open_volume(path)
    assert caught.value.file == path


def test_content_against_the_name_is_read_with_a_warning(tmp_path: Path) -> None:
    values = scan((4, 5, 6))
    raw = save_nib(tmp_path / "x.nii", values).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(raw)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw))
    for name, state in (("plain.nii.gz", "not gzipped"), ("packed.nii", "gzipped")):
        with pytest.warns(UserWarning, match=f"the file is {state}, against its name"):
            np.testing.assert_array_equal(open_volume(tmp_path / name).numpy()[0], values.T)


def test_a_source_found_corrupt_while_copied_leaves_no_output(tmp_path: Path) -> None:
    path = save_nib(tmp_path / "x.nii.gz", NOISE)
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError):
        open_volume(path).save(tmp_path / "y.nii.gz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.nii.gz"]
