"""TIFF read and written; tifffile is the witness."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.errors import InputError, ResourceError
from densepred.volumes import Volume, open_volume, open_writer
from tests.drawn_arrays import COMMON, RNG, SHAPES, last, scan


def test_real_tiffs_read_as_tifffile_reads_them(real_data: Path, tmp_path: Path) -> None:
    files = [*(real_data / "cells").glob("*.tif"), *(real_data / "other_formats").glob("*.tif")]
    assert len(files) == 5
    for path in files:
        theirs = tifffile.imread(path)
        volume = open_volume(path)
        assert volume.dims == theirs.ndim
        np.testing.assert_array_equal(volume.numpy()[0], theirs)
        np.testing.assert_array_equal(np.concatenate([slab for *_, slab in volume.slabs(7)], 1)[0], theirs)
        labels = volume.like(theirs, labels="mask" in path.name)
        labels.save(tmp_path / "copy.tif")
        assert open_volume(tmp_path / "copy.tif").labels == ("mask" in path.name)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "copy.tif"), theirs)


@settings(**COMMON)
@given(
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]),
    shape=SHAPES,
    channels=st.integers(1, 4),
    labels=st.booleans(),
)
def test_tifffile_reads_what_we_write(tmp_path: Path, kind: str, shape: tuple, channels: int, labels: bool) -> None:
    values = scan((channels, *shape), kind)
    labels = labels and kind[0] in "iu"
    spacing = (0.3, 0.2, 0.1)[-len(shape) :]
    Volume(values, spacing, affine=np.eye(4), labels=labels).save(tmp_path / "x.tif")  # an affine: in mm
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        theirs = tif.asarray()
        assert tif.is_ome
        assert f'PhysicalSizeX="{0.1 * 1e3}" PhysicalSizeXUnit="µm"' in str(tif.ome_metadata)
        assert not tif.is_bigtiff
    expected = values.swapaxes(0, 1) if len(shape) == 3 else values
    np.testing.assert_array_equal(theirs, expected.squeeze(tuple(np.flatnonzero(np.equal(expected.shape[:-2], 1)))))
    axes = "zyx"[-len(shape) :] if channels == 1 else ("zcyx" if len(shape) == 3 else "cyx")
    with open_volume(tmp_path / "x.tif", axes) as volume:
        np.testing.assert_array_equal(volume.numpy(), values)
        assert volume.labels == labels
        np.testing.assert_allclose(volume.spacing, np.array(spacing) * 1e3, rtol=1e-15)
        assert volume.header.unit == "um"


@settings(**COMMON)
@given(
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "f2", "f4", "f8"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    options=st.sampled_from(
        [{}, {"tile": (16, 32)}, {"tile": (32, 16), "compression": "zlib"}, {"rowsperstrip": 7}]
        + [{"compression": name} for name in ("lzw", "zlib", "packbits", "zstd")]
    ),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    form=st.sampled_from(["stack", "samples", "planar"]),
)
def test_we_read_what_tifffile_writes(
    tmp_path: Path, kind: str, shape: tuple, options: dict, order: str, big: bool, form: str
) -> None:
    values = scan(shape, kind)
    more: dict[str, Any] = {"photometric": "minisblack"}
    if form != "stack" and shape[0] > 1:
        more["planarconfig"] = "contig" if form == "samples" else "separate"
    data = last(values) if more.get("planarconfig") == "contig" else values
    kwargs = {**options, **more, "byteorder": order, "bigtiff": big, "metadata": None}
    tifffile.imwrite(tmp_path / "x.tif", data, **kwargs)
    volume = open_volume(tmp_path / "x.tif")
    expected = values if "planarconfig" in more or shape[0] == 1 else values[None]
    np.testing.assert_array_equal(volume.numpy(), expected)
    assert volume.dtype == kind
    key = (slice(None), *(slice(size // 3, size // 2 + 1) for size in volume.shape[1:]))
    np.testing.assert_array_equal(volume[key], expected[key])


def test_metadata_say_what_pages_are_and_axes_overrule_them(tmp_path: Path) -> None:
    values = scan((2, 3, 20, 30), "u2")
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values, ome=True, metadata={"axes": "CZYX"})
    np.testing.assert_array_equal(open_volume(path).numpy(), values)
    tifffile.imwrite(path, values, imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(open_volume(path).numpy(), values.swapaxes(0, 1))
    np.testing.assert_array_equal(open_volume(path, "czyx").numpy(), values)
    tifffile.imwrite(path, values[0], ome=True, metadata={"axes": "TYX"})
    with pytest.raises(InputError, match=r"holds 3 times \(axes T of 3, Y of 20, X of 30\)") as caught:
        open_volume(path)
    assert "file of its own" in caught.value.fix
    assert open_volume(path, "zyx").shape == (1, 3, 20, 30)
    with pytest.raises(InputError, match="axes 'tyx' name a time axis"):
        open_volume(path, "tyx")
    tifffile.imwrite(path, values[0], photometric="minisblack")
    assert open_volume(path).shape == (1, 3, 20, 30)
    assert open_volume(path, "cyx").shape == (3, 20, 30)
    with pytest.raises(InputError, match="axes 'czyx' were declared and the file has 3"):
        open_volume(path, "czyx")
    tifffile.imwrite(path, values, photometric="minisblack")
    with pytest.raises(InputError, match=r"not plain \(axes Q of 2, Q of 3"):
        open_volume(path)
    assert open_volume(path, "zcyx").shape == (3, 2, 20, 30)


def test_colours_stay_colours_on_the_way_through(tmp_path: Path) -> None:
    for extra, size in (({}, 3), ({"extrasamples": ["assocalpha"]}, 4)):
        for shape in ((20, 30, size), (4, 20, 30, size)):
            values = scan(shape)
            tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", **extra)
            volume = open_volume(tmp_path / "x.tif")
            np.testing.assert_array_equal(volume.numpy(), np.moveaxis(values, -1, 0))
            volume.save(tmp_path / "y.tif")
            with tifffile.TiffFile(tmp_path / "y.tif") as tif:
                np.testing.assert_array_equal(tif.asarray(), values)
                assert tif.pages.first.photometric == tifffile.PHOTOMETRIC.RGB
                assert tif.pages.first.extrasamples == ((1,) if extra else ())
            np.testing.assert_array_equal(open_volume(tmp_path / "y.tif").numpy(), volume.numpy())
    volume.like(np.ones((3, *volume.shape[1:]), np.uint8), labels=False).save(tmp_path / "y.tif")
    with tifffile.TiffFile(tmp_path / "y.tif") as tif:  # three channels of something else
        assert tif.pages.first.photometric == tifffile.PHOTOMETRIC.MINISBLACK


def test_odd_pixels(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    values = scan((20, 30))
    tifffile.imwrite(path, values > 50, photometric="miniswhite")
    with pytest.warns(UserWarning, match="0 is white in this file"):
        np.testing.assert_array_equal(open_volume(path).numpy()[0], tifffile.imread(path))
    table = RNG.integers(0, 65536, (3, 256)).astype("u2")
    tifffile.imwrite(path, values, photometric="palette", colormap=table)
    for name, labels in ((path, False), (f"{path}[index]", True)):
        volume = open_volume(name)
        np.testing.assert_array_equal(volume.numpy()[0], values)
        assert volume.labels == labels
    tifffile.imwrite(path, values.astype("c8"))
    with pytest.raises(InputError, match="voxels of type complex64"):
        open_volume(path)
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype("u1")
    tifffile.imwrite(path, np.stack([smooth] * 3, -1), photometric="rgb", compression="jpeg", tile=(32, 32))
    np.testing.assert_array_equal(last(open_volume(path).numpy()), tifffile.imread(path))


SIZES = [
    ({"ome": True, "metadata": {"PhysicalSizeX": 200, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.3}}, (0.3, 0.2)),
    ({"imagej": True, "resolution": (5, 4), "metadata": {"unit": "um"}}, (0.25, 0.2)),
    ({"imagej": True, "resolution": (5, 4), "metadata": {"unit": "mm"}}, (250, 200)),
    ({"imagej": True, "resolution": (5, 4), "resolutionunit": "CENTIMETER"}, (2500, 2000)),
    ({"resolution": (5000, 4000), "resolutionunit": "CENTIMETER"}, (2.5, 2)),
    ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
]


@pytest.mark.parametrize(("options", "sizes"), SIZES)
def test_voxel_sizes_are_in_micrometres_and_survive(tmp_path: Path, options: dict, sizes: tuple | None) -> None:
    tifffile.imwrite(tmp_path / "x.tif", scan((20, 30)), **options)
    volume = open_volume(tmp_path / "x.tif")
    assert volume.spacing == pytest.approx(sizes or (1, 1), rel=1e-12)
    assert volume.header.unit == ("um" if sizes else None)
    volume.save(tmp_path / "y.tif")
    again = open_volume(tmp_path / "y.tif")
    assert (again.spacing, again.header.unit) == (volume.spacing, volume.header.unit)


def test_planes_apart_in_stacks(tmp_path: Path) -> None:
    values = scan((4, 20, 30))
    path = tmp_path / "x.tif"
    options = {"imagej": True, "resolution": (5, 5)}
    tifffile.imwrite(path, values, **options, metadata={"axes": "ZYX", "unit": "micron", "spacing": 1.5})
    assert open_volume(path).spacing == pytest.approx((1.5, 0.2, 0.2))
    tifffile.imwrite(path, values, **options, metadata={"axes": "ZYX", "spacing": 3.0})
    assert open_volume(path).header.unit is None  # pixels per what?
    assert open_volume(path).spacing == pytest.approx((3, 0.2, 0.2))
    tifffile.imwrite(path, values, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    with pytest.warns(UserWarning, match="no voxel size is stated along Z; 0.5, that along X, is taken"):
        assert open_volume(path).spacing == (0.5, 0.5, 0.5)
    tifffile.imwrite(path, values, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 0.0, "PhysicalSizeY": 0.5})
    with pytest.raises(InputError, match="impossible voxel size along X: 0"):
        open_volume(path)


def test_millimetres_of_a_scan_become_micrometres(tmp_path: Path) -> None:
    nib.Nifti1Image(scan((3, 4, 5)), np.diag([1.0, 2, 3, 1])).to_filename(tmp_path / "x.nii")
    open_volume(tmp_path / "x.nii").save(tmp_path / "x.tif")
    assert open_volume(tmp_path / "x.tif").spacing == (3000, 2000, 1000)


def test_several_images_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(scan((20, 30)))
        tif.write(second := scan((5, 6, 7), "u2"))
    with pytest.raises(InputError, match=r"holds 2 images: \[0\] YX \(20, 30\) uint8; \[1\] QYX \(5, 6, 7\)") as caught:
        open_volume(path)
    assert "x.tif[0]" in caught.value.fix
    np.testing.assert_array_equal(open_volume(f"{path}[1]").numpy()[0], second)
    for part in ("2", "raw"):
        with pytest.raises(InputError, match=rf"has no image \[{part}\]"):
            open_volume(f"{path}[{part}]")


def test_a_slab_reads_its_pages_and_a_window_its_tiles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tif"
    values = scan((30, 64, 96))
    tifffile.imwrite(path, values, tile=(16, 16), compression="zlib", photometric="minisblack")
    read: list[int] = []
    original = tifffile.FileHandle.read
    volume = open_volume(path)
    monkeypatch.setattr(tifffile.FileHandle, "read", lambda self, size=-1: read.append(size) or original(self, size))
    np.testing.assert_array_equal(volume[:, 4:6], values[None, 4:6])
    assert len(read) == 2 * 24
    read.clear()
    np.testing.assert_array_equal(volume[0, 7, 10:20, 40], values[7, 10:20, 40])
    assert len(read) == 2


def test_a_large_page_is_tiled_and_memory_stays_small(tmp_path: Path) -> None:
    shape = (2, 3000, 2500)
    like = Volume(np.broadcast_to(np.uint8(1), shape), (1, 1))
    path = tmp_path / "x.tif"
    tracemalloc.start()
    with open_writer(path, like, np.uint8, 2) as writer:
        for start in range(0, 3000, 100):
            writer.write(np.broadcast_to((np.arange(start, start + 100) % 251).astype("u1")[:, None], (2, 100, 2500)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * np.prod(shape) + 16e6
    with tifffile.TiffFile(path) as tif:
        assert tif.pages.first.tile == (256, 256)
        np.testing.assert_array_equal(tif.pages[1].asarray()[:, 7], np.arange(3000) % 251)


def test_a_file_over_four_gigabytes_is_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepred.volumes.tiff_writer._CLASSIC", 100)
    Volume.from_array(scan((20, 30)), (1, 1)).save(tmp_path / "x.tif")
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert tif.is_bigtiff
    assert open_volume(tmp_path / "x.tif").shape == (1, 20, 30)


def test_the_same_values_make_the_same_bytes(tmp_path: Path) -> None:
    values = scan((2, 9, 20, 30))
    written = set()
    for thickness in (1, 4, 9):
        with open_writer(tmp_path / "x.tif", Volume(values, (1, 1, 1)), np.uint8, 2) as writer:
            for start in range(0, 9, thickness):
                writer.write(values[:, start : start + thickness])
        written.add((tmp_path / "x.tif").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}, {"ome": True}])
def test_truncated_tiffs_are_refused(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, RNG.integers(0, 60000, (9, 40, 50)).astype("u2"), photometric="minisblack", **options)
    sound = path.read_bytes()
    for size in (0, 3, 8, 30, 400, *range(1000, len(sound), 3500), len(sound) - 40):
        path.write_bytes(sound[:size])
        with pytest.raises(InputError) as caught:
            open_volume(path).numpy()
        assert caught.value.file == path
    path.write_text("<html>log in</html>")
    with pytest.raises(InputError, match="no TIFF file: starts with '<html>log in"):
        open_volume(path)


def test_flipped_bits_give_an_error_of_ours_or_pixels_of_the_right_shape(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (3, 20, 20)).astype("u1")
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values, compression="zlib", photometric="minisblack")
    sound = path.read_bytes()
    with tifffile.TiffFile(path) as tif:
        spans = [(page.dataoffsets[0], page.databytecounts[0]) for page in tif.pages]
    refused = same = 0
    for bit in range(0, 8 * len(sound), 13):
        torn = bytearray(sound)
        torn[bit // 8] ^= 1 << bit % 8
        path.write_bytes(torn)
        in_data = any(start <= bit // 8 < start + size for start, size in spans)
        try:
            with warnings.catch_warnings(action="ignore"):
                got = open_volume(path).numpy()
        except (InputError, ResourceError):
            refused += 1
            continue
        if in_data:
            np.testing.assert_array_equal(got[0], values)
            same += 1
    assert min(refused, same) > 0


def test_missing_tiles_and_circles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, scan((40, 50)), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        counts = tif.pages.first.tags["TileByteCounts"]
        width, at = counts.valuebytecount // counts.count, counts.valueoffset
        first = tif.pages.first.offset
    raw = bytearray(path.read_bytes())
    raw[at : at + width] = bytes(width)
    path.write_bytes(raw)
    with pytest.raises(InputError, match="page 1 misses 1 of 12 strips or tiles"):
        open_volume(path)
    entries = int.from_bytes(raw[first : first + 2], "little")
    end = first + 2 + 12 * entries
    raw[end : end + 4] = first.to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(InputError, match="run in a circle at byte"):
        open_volume(path)
