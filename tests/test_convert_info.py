"""Converting between formats, and describing files; numpy, nibabel and astropy are the witnesses."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from densepred.cli import app
from densepred.convert import convert
from densepred.errors import InputError
from densepred.info import draw, info
from densepred.info_figure import figure_of, middle
from densepred.info_statistics import MOST_LABELS, PERCENTILES, gather
from densepred.volumes import Volume, corner_offset, open_volume
from tests.nifti_files import load_nib, save_nib, scan

OBLIQUE = np.array([[0.7, 0.1, 0, 3], [-0.1, 1.2, 0.2, -7], [0, 0.1, 2.5, 11], [0, 0, 0, 1.0]])


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    from nibabel.nifti1 import Nifti1Header

    header = Nifti1Header()
    header.set_xyzt_units("mm")
    return save_nib(tmp_path / "x.nii.gz", scan((7, 6, 5)), OBLIQUE, header)


@pytest.mark.parametrize("suffix", [".zarr", ".nrrd", ".mha", ".nii"])
def test_geometry_survives_a_round_trip(oblique: Path, tmp_path: Path, suffix: str) -> None:
    with warnings.catch_warnings(action="error"):
        assert convert(oblique, tmp_path / f"y{suffix}") == ()
        assert convert(tmp_path / f"y{suffix}", tmp_path / "z.nii.gz") == ()
    before, after = load_nib(oblique), load_nib(tmp_path / "z.nii.gz")
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    assert after.get_data_dtype() == before.get_data_dtype()


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (".npy", r"its spacing \(2.508 x 1.208 x 0.7071 became 1 x 1 x 1\); its position and orientation \(affine\)"),
        (".tif", r"its position and orientation \(affine\)"),
        (".h5", r"its position and orientation \(affine\)"),
        (".fits", "the unit of its spacing"),
    ],
)
def test_what_is_lost_is_told_once(oblique: Path, tmp_path: Path, suffix: str, words: str) -> None:
    with pytest.warns(UserWarning, match=f"lost in the conversion from .*: {words}") as caught:
        lost = convert(oblique, tmp_path / f"y{suffix}")
    assert len(caught) == 1
    assert all(phrase in str(caught[0].message) for phrase in lost)
    with open_volume(tmp_path / f"y{suffix}", "zyx" if suffix in (".npy", ".fits") else None) as back:
        np.testing.assert_array_equal(back.numpy(), open_volume(oblique).numpy())


def test_world_coordinates_have_no_place_elsewhere(tmp_path: Path) -> None:
    from astropy.io import fits

    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 359.999, "CRVAL2": 2.0, "CRPIX1": 1, "CRPIX2": 1}
    cards |= {"CDELT1": -1e-3, "CDELT2": 1e-3, "CUNIT1": "deg", "CUNIT2": "deg"}
    fits.PrimaryHDU(np.arange(30, dtype="f4").reshape(5, 6), fits.Header(cards)).writeto(tmp_path / "x.fits")
    with pytest.warns(UserWarning, match=r"its world coordinates \(WCS\)"):
        assert convert(tmp_path / "x.fits", tmp_path / "x.nii") == ("its world coordinates (WCS)",)
    assert convert(tmp_path / "x.fits", tmp_path / "y.fits") == ()
    found = info(tmp_path / "x.fits")
    assert found.pixel_scale == ((3.6, "arcsec"), (3.6, "arcsec"))
    assert found.corners[0] == ("RA 359.999 deg", "DEC 2 deg")
    assert found.corners[1][1] == "DEC 2.004 deg"
    assert "first pixel  RA 359.999 deg, DEC 2 deg" in found.table()
    assert "pixel        3.6 arcsec x 3.6 arcsec" in found.table()


def test_units_are_converted_to_those_of_the_target(tmp_path: Path) -> None:
    volume = Volume(np.ones((1, 4, 5, 6), np.uint16), (2.0, 0.5, 0.25), np.diag([0.25, 0.5, 2.0, 1]))
    volume.save(tmp_path / "mm.zarr")
    text = (tmp_path / "mm.zarr/zarr.json").read_text()
    (tmp_path / "mm.zarr/zarr.json").write_text(text.replace("millimeter", "micrometer"))
    assert open_volume(tmp_path / "mm.zarr").header.unit == "um"  # type: ignore[union-attr]
    with warnings.catch_warnings(action="error"):
        for suffix in (".nii", ".nrrd"):
            assert convert(tmp_path / "mm.zarr", tmp_path / f"x{suffix}") == ()
            assert open_volume(tmp_path / f"x{suffix}").spacing == pytest.approx((2e-3, 5e-4, 2.5e-4))
        assert convert(tmp_path / "mm.zarr", tmp_path / "x.zarr") == ()
    assert open_volume(tmp_path / "x.zarr").header.unit == "um"  # type: ignore[union-attr]
    assert load_nib(tmp_path / "x.nii").header.get_xyzt_units()[0] == "mm"
    Volume.from_array(np.ones((4, 5, 6), np.uint8), (3.0, 1.0, 1.0)).save(tmp_path / "none.zarr")
    with pytest.warns(UserWarning, match="voxels of 3 x 1 x 1 have no known unit"):
        convert(tmp_path / "none.zarr", tmp_path / "none.nii")


@pytest.mark.filterwarnings("ignore:.*the unit of its spacing")
def test_labels_and_integers_stay(tmp_path: Path) -> None:
    values = np.arange(-2, 118, dtype="i4").reshape(1, 4, 5, 6) * 250
    Volume(values, (1, 1, 1), labels=True).save(tmp_path / "x.nii.gz")
    for suffix in (".zarr", ".nrrd", ".mha", ".h5", ".fits"):
        convert(tmp_path / "x.nii.gz", tmp_path / f"x{suffix}")
        with open_volume(tmp_path / f"x{suffix}", "zyx" if suffix == ".fits" else None) as back:
            assert back.labels
            assert back.dtype == np.int16
            np.testing.assert_array_equal(back.numpy(), values)


@pytest.mark.filterwarnings("ignore:.*lost in the conversion")
def test_colours_and_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype("u1")
    Image.fromarray(values).save(tmp_path / "x.png")
    for suffix in (".zarr", ".mha", ".nii", ".tif", ".h5", ".npy"):
        convert(tmp_path / "x.png", tmp_path / f"y{suffix}")
        axes = {".nii": "xyc", ".npy": "cyx"}.get(suffix)
        convert(tmp_path / f"y{suffix}", tmp_path / f"z{suffix}.png", axes)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"z{suffix}.png")), values)


def test_labels_are_put_beside_their_image(tmp_path: Path, oblique: Path) -> None:
    convert(oblique, tmp_path / "x.zarr")
    labels = open_volume(oblique).like(np.ones((5, 6, 7), np.uint8))
    labels.save(tmp_path / "labels.nii.gz")
    assert convert(tmp_path / "labels.nii.gz", f"{tmp_path}/x.zarr[labels/cells]") == ()
    back = open_volume(f"{tmp_path}/x.zarr[labels/cells]")
    assert back.labels
    assert corner_offset(open_volume(tmp_path / "x.zarr"), back) < 1e-6


def test_a_conversion_that_cannot_be_is_refused(oblique: Path, tmp_path: Path) -> None:
    before = oblique.read_bytes()
    (tmp_path / "link.nii.gz").symlink_to(oblique)
    for target, words in (
        ("x.nii.gz", "one file"), ("link.nii.gz", "one file"), ("y.xyz", "unknown file type"), ("y.png", "planes"),
        ("no/x.nii", "there is no folder"), ("y.dcm", "only read"), ("y.nrrd[2]", "no part"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            convert(oblique, tmp_path / target, overwrite=True)
    (tmp_path / "old.nrrd").write_bytes(b"old")
    with pytest.raises(InputError, match="there already"):
        convert(oblique, tmp_path / "old.nrrd")
    assert (tmp_path / "old.nrrd").read_bytes() == b"old"
    assert convert(oblique, tmp_path / "old.nrrd", overwrite=True) == ()
    assert oblique.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.nii.gz", "old.nrrd", "x.nii.gz"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "i4", "u4", "i8", "f4", "f8", "bool"]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([1e-3, 1.0, 1e4, 1e30]),
    holes=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_statistics_are_numpys(kind: str, shape: tuple, scale: float, holes: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    dtype = np.dtype(kind)
    values = generator.normal(0, scale, shape)
    if dtype.kind in "biu":
        values = np.clip(
            values, *((0, 1) if kind == "bool" else (np.iinfo(dtype).min, min(np.iinfo(dtype).max, 2**40)))
        )
    values = values.astype(dtype)
    if dtype.kind == "f":
        values[generator.random(shape) < holes] = np.nan
        values.reshape(-1)[0] = np.inf
    for part, found in zip(values, gather(Volume(values, (1, 1, 1))), strict=True):
        finite = np.sort(part[np.isfinite(part)].astype("f8"))
        assert found.count == finite.size
        assert (found.nans, found.infinities) == (np.isnan(part).sum(), np.isinf(part).sum())
        if not finite.size:
            assert np.isnan(found.mean)
            continue
        assert (found.low, found.high) == (finite[0], finite[-1])
        np.testing.assert_allclose(found.mean, finite.mean(), rtol=1e-9, atol=1e-12 * np.abs(finite).max())
        np.testing.assert_allclose(found.std, finite.std(), rtol=1e-7, atol=1e-12 * np.abs(finite).max())
        expected = np.percentile(finite, PERCENTILES, method="inverted_cdf")
        exact = dtype.kind in "biu" and dtype.itemsize <= 2
        np.testing.assert_allclose([*found.percentiles.values()], expected, rtol=0 if exact else 5e-4, atol=1e-37)
        assert sum(found.bars) == finite.size
        if dtype.kind in "biu":
            names, counts = np.unique(part, return_counts=True)
            few = dict(zip(names.tolist(), counts.tolist(), strict=True)) if len(names) <= MOST_LABELS else None
            assert found.labels == few


def test_statistics_do_not_depend_on_the_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(np.random.default_rng(0).normal(1e6, 1, (3, 9, 20, 20)), (1, 1, 1))
    whole = gather(volume)
    monkeypatch.setattr("densepred.info_statistics._SLAB_BYTES", 1)
    for ours, theirs, values in zip(gather(volume), whole, volume.numpy(), strict=True):
        assert ours.percentiles == theirs.percentiles
        assert ours.std == pytest.approx(values.std(), rel=1e-9)  # a naive sum of squares keeps three digits here
    (pooled,) = gather(volume, pooled=True)
    assert pooled.mean == pytest.approx(volume.numpy().mean(), rel=1e-14)


def test_info_of_a_nifti_file(oblique: Path) -> None:
    found = info(oblique)
    assert (found.shape, found.dtype, found.unit, found.orientation) == ((1, 5, 6, 7), "int16", "mm", "RAS")
    assert found.spacing == pytest.approx((2.5080, 1.2083, 0.70711), rel=1e-4)
    values = np.asarray(load_nib(oblique).dataobj)
    text = found.table()
    assert f"range        {values.min()} to {values.max()}" in text
    assert "orientation  RAS (where x, y, z lead)" in text
    assert "spacing      2.508 x 1.208 x 0.7071 mm" in text
    assert "|" in text
    assert found.corners == ()


def test_info_counts_labels_and_holes(tmp_path: Path) -> None:
    Volume(np.repeat(np.arange(4, dtype="u1"), 6).reshape(1, 4, 6), (1, 1), labels=True).save(tmp_path / "x.nii")
    assert "values       0: 6, 1: 6, 2: 6, 3: 6" in info(tmp_path / "x.nii").table()
    values = np.ones((1, 10, 10), np.float32)
    values[0, 0] = np.nan
    Volume(values, (1, 1)).save(tmp_path / "y.nii")
    text = info(tmp_path / "y.nii").table()
    assert "not finite   10 NaN, 0 infinite (10 %)" in text
    assert info(tmp_path / "y.nii").statistics[0].percentiles[50] == 1
    Volume(values * np.nan, (1, 1)).save(tmp_path / "z.nii")
    assert "100 NaN, 0 infinite (100 %)" in info(tmp_path / "z.nii").table()
    draw(tmp_path / "z.nii", tmp_path / "z.png")


def test_info_of_every_kind_of_real_file(real_data: Path, tmp_path: Path) -> None:
    names = ("ct_mr/example_mr_sm.nii.gz", "other_formats/dicom_series", "other_formats/CT_2D_head_fixed.mha",
             "cells/img3d.tif", "fits/images/aia_171_level1.fits")  # fmt: skip
    for number, name in enumerate(names):
        path = real_data / name
        found = info(path)
        with open_volume(path) as volume:
            values = volume.numpy()[0]
        finite = values[np.isfinite(values)].astype("f8")
        assert found.statistics[0].mean == pytest.approx(finite.mean(), rel=1e-9)
        assert found.statistics[0].std == pytest.approx(finite.std(), rel=1e-7)
        assert name.split("/")[1] in found.table()
        draw(path, tmp_path / f"{number}.png")
        assert np.asarray(Image.open(tmp_path / f"{number}.png")).std() > 10


def test_colours_are_shown_as_they_are() -> None:
    colours = Volume.from_array(np.arange(150, dtype="u1").reshape(3, 5, 10), (1.0, 1.0))
    (axes,) = figure_of(colours).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), np.moveaxis(colours.numpy(), 0, -1))


def test_a_very_large_picture_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000 * 70).reshape(1, 1000, 70)
    monkeypatch.setattr("densepred.info_figure._MOST_PIXELS", 300)
    monkeypatch.setattr("densepred.info_figure._ROWS", 16)
    np.testing.assert_array_equal(middle(Volume(values, (1, 1))), values[:, ::4, ::4])


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_writing_on_a_grid_in_micrometres_gives_millimetres(tmp_path: Path, suffix: str) -> None:
    """As a prediction does, whose image is in another format."""
    path = tmp_path / "cells.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
        tiff.write(np.zeros((3, 4, 5), np.uint8), metadata={"axes": "ZYX", **sizes}, photometric="minisblack")
    with open_volume(path) as volume:
        assert volume.spacing == (2.0, 0.5, 0.5)
        volume.like(np.ones((3, 4, 5), np.uint8)).save(tmp_path / f"labels{suffix}")
    with open_volume(tmp_path / f"labels{suffix}") as labels:
        np.testing.assert_allclose(labels.spacing, (2e-3, 5e-4, 5e-4), rtol=1e-6)


def test_a_picture_replaces_no_image_and_makes_its_folder(tmp_path: Path) -> None:
    image = tmp_path / "c.png"
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(image)
    before = image.read_bytes()
    for words in (
        ["info", str(image), "--picture", str(image)],
        ["info", str(image), "--picture", str(image), "--labels", "x"],
    ):
        assert isinstance(CliRunner().invoke(app, words).exception, InputError)
    with pytest.raises(InputError, match="replace what it shows"):
        draw(image, tmp_path / "new" / ".." / "c.png")
    assert image.read_bytes() == before
    draw(image, tmp_path / "new" / "m.png")
    assert (tmp_path / "new" / "m.png").stat().st_size
