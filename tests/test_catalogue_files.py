"""World coordinates of catalogues against astropy and nibabel, and their files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from scipy import ndimage
from typer.testing import CliRunner

from densepred.catalogue import catalogue
from densepred.cli import app
from densepred.errors import DiskFullError, InputError, UnsafeError
from densepred.volumes import Volume, open_volume
from densepred.volumes.fits_legend import Legend
from densepred.volumes.fits_writer import open_writer
from tests.catalogue_scenes import SIP, plain, scene
from tests.fits_files import TAN

TPV = {
    "CTYPE1": "RA---TPV",
    "CTYPE2": "DEC--TPV",
    "PV1_0": 0.0,
    "PV1_1": 1.001,
    "PV1_4": 2.0,
    "PV2_1": 0.999,
    "PV2_5": -1.5,
}


@pytest.mark.parametrize(
    "cards", [TAN, TAN | SIP, TAN | TPV, TAN | {"CTYPE1": "GLON-CAR", "CTYPE2": "GLAT-CAR", "CRVAL2": 0.0}]
)
def test_sky_coordinates_are_astropys(tmp_path: Path, cards: dict) -> None:
    _, segments, _ = scene()
    fits.PrimaryHDU(segments, fits.Header(cards)).writeto(tmp_path / "x.fits")
    found = catalogue(tmp_path / "x.fits")
    points = np.stack([found["centroid_x"], found["centroid_y"]], 1)
    with warnings.catch_warnings(action="ignore"):
        wcs = WCS(fits.Header(cards))
        expected = wcs.all_pix2world(points, 0)
    names = ("glon", "glat") if "GLON-CAR" in cards.values() else ("ra", "dec")
    for axis, name in enumerate(names):
        assert found[name].unit == units.deg
        np.testing.assert_allclose(found[name], expected[:, axis], rtol=1e-13)
    assert found["area"].unit == units.arcsec**2
    areas = []
    for x, y in points:  # the solid angle of a pixel by astropy's positions of its corners
        square = np.array([[x - 0.5, y - 0.5], [x + 0.5, y - 0.5], [x + 0.5, y + 0.5], [x - 0.5, y + 0.5]])
        lon, lat = np.radians(wcs.all_pix2world(square, 0)).T
        lon, lat = (lon - lon[0]) * np.cos(lat.mean()), lat - lat[0]
        areas.append(abs(np.dot(lon, np.roll(lat, 1)) - np.dot(lat, np.roll(lon, 1))) / 2)
    expected_area = np.degrees(np.degrees(areas)) * 3600**2
    np.testing.assert_allclose(found["area"] / found["voxels"], expected_area, rtol=1e-5)


def test_degenerate_and_spectral_axes(tmp_path: Path) -> None:
    radio = TAN | {"CTYPE3": "FREQ", "CRVAL3": 1.4e9, "CDELT3": 1e6, "CRPIX3": 1.0, "CUNIT3": "Hz",
                   "CTYPE4": "STOKES", "CRVAL4": 1.0, "CDELT4": 1.0, "CRPIX4": 1.0}  # fmt: skip
    labels = np.zeros((1, 1, 24, 30), np.uint8)
    labels[..., 5:9, 10:12] = 1
    fits.PrimaryHDU(labels, fits.Header(radio)).writeto(tmp_path / "radio.fits")
    (row,) = found = catalogue(tmp_path / "radio.fits")
    sky = WCS(fits.Header(TAN)).all_pix2world([[10.5, 6.5]], 0)[0]
    np.testing.assert_allclose([row["ra"], row["dec"]], sky, rtol=1e-13)
    assert not {"freq", "stokes"} & set(found.colnames)
    cube = np.zeros((6, 24, 30), np.int16)
    cube[2:4, 5:9, 10:12] = 1
    fits.PrimaryHDU(cube, fits.Header({key: value for key, value in radio.items() if "4" not in key})).writeto(
        tmp_path / "cube.fits"
    )
    (row,) = found = catalogue(tmp_path / "cube.fits", axes="zyx")
    np.testing.assert_allclose([row["ra"], row["dec"], row["freq"]], [*sky, 1.4e9 + 2.5e6], rtol=1e-13)
    assert found["freq"].unit == units.Hz
    assert not {"volume", "area"} & set(found.colnames)  # of mixed axes


def test_points_off_the_sky_have_none(tmp_path: Path) -> None:
    cards = {"CTYPE1": "RA---AIT", "CTYPE2": "DEC--AIT", "CRPIX1": 20.5, "CRPIX2": 10.5, "CDELT1": -9.0, "CDELT2": 9.0}
    labels = np.zeros((20, 40), np.uint8)
    labels[0, 0] = labels[10, 20] = 1
    fits.PrimaryHDU(labels, fits.Header(cards)).writeto(tmp_path / "x.fits")
    found = catalogue(tmp_path / "x.fits", out=tmp_path / "x.ecsv")
    assert np.isnan(found["ra"]).tolist() == [True, False]
    assert np.isnan(Table.read(tmp_path / "x.ecsv")["ra"]).tolist() == [True, False]


def test_millimetres_are_nibabels(tmp_path: Path) -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.array([[0.7, 0.1, 0], [0, 1.2, 0.2], [0, 0, 2.5]]), [12, -40, 7]
    labels = np.zeros((8, 9, 10), np.uint8)  # X, Y, Z
    labels[1:4, 2:7, 3], labels[6, 6:, 5:9] = 1, 2
    image = nib.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "x.nii.gz")
    found = catalogue(tmp_path / "x.nii.gz")
    points = np.stack([found["centroid_x"], found["centroid_y"], found["centroid_z"]], 1)
    expected = nib.affines.apply_affine(nib.load(tmp_path / "x.nii.gz").affine, points)
    np.testing.assert_allclose(np.stack([found["x"], found["y"], found["z"]], 1), expected, rtol=1e-12)
    stored = abs(np.linalg.det(nib.load(tmp_path / "x.nii.gz").affine[:3, :3]))
    np.testing.assert_allclose(found["volume"], found["voxels"] * stored, rtol=1e-12)
    assert (found["x"].unit, found["volume"].unit) == (units.mm, units.mm**3)
    assert found.meta["FRAME"] == "RAS"
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "um.nii.gz")
    np.testing.assert_allclose(catalogue(tmp_path / "um.nii.gz")["x"], found["x"] / 1e3, rtol=1e-6)


def test_spacings_alone_give_micrometres(real_data: Path) -> None:
    path = f"{real_data}/cells/1135_mini.h5[label]"
    found = catalogue(path, f"{real_data}/cells/1135_mini.h5[raw]", instances=True)
    with open_volume(path) as volume:
        values, spacing = volume.numpy()[0], volume.spacing
    numbers = np.unique(values[values > 0])
    assert found["id"].tolist() == numbers.tolist()
    centres = np.array(ndimage.center_of_mass(values > 0, values, numbers))
    for axis, name in enumerate("zyx"):
        np.testing.assert_allclose(found[name], centres[:, axis] * spacing[axis], rtol=1e-10)
        assert found[name].unit == units.um
    assert found["volume"].unit == units.um**3
    np.testing.assert_allclose(found["volume"].sum(), (values > 0).sum() * np.prod(spacing))


def test_no_world_without_a_unit() -> None:
    found = catalogue(plain(np.ones((3, 4), np.uint8)), plain(np.ones((3, 4))))
    assert not {"x", "y", "ra", "area", "weighted_x"} & set(found.colnames)


@pytest.fixture
def sky(tmp_path: Path) -> tuple[Path, Path]:
    """A label map with a legend, and its image."""
    image, segments, _ = scene()
    header = fits.Header(TAN | {"BUNIT": "electron/s"})
    fits.PrimaryHDU(image.astype(np.float32), header).writeto(tmp_path / "image.fits")
    with open_volume(tmp_path / "image.fits") as like:
        legend = Legend({0: "sky", 1: "star", 2: "galaxy", 3: "trail"})
        with open_writer(tmp_path / "labels.fits", like, np.dtype("u1"), labels=True, legend=legend) as writer:
            writer.write((segments[None] % 3 + (segments[None] > 0)).astype(np.uint8))
    return tmp_path / "labels.fits", tmp_path / "image.fits"


@pytest.mark.parametrize("suffix", [".ecsv", ".fits", ".csv"])
def test_catalogues_read_back_as_they_were(sky: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    labels, image = sky
    out = tmp_path / f"objects{suffix}"
    found = catalogue(labels, image, out)
    assert found["name"].tolist() == ["trail", "galaxy", "trail", "galaxy", "star"]
    assert found["sum"].unit == units.electron / units.s
    with warnings.catch_warnings(action="ignore"):  # FITS has no electron: astropy says so
        back = Table.read(out)
    if suffix == ".csv":
        for name in back.colnames:
            if split := re.fullmatch(r"(\S+) \[(.+)\]", name):
                back.rename_column(name, split[1])
                back[split[1]].unit = split[2]
    assert back.colnames == found.colnames
    for name in found.colnames:
        if suffix == ".fits" and found[name].unit == units.electron / units.s:
            assert back[name].unit.to_string() == "electron / s"
        else:
            assert back[name].unit == found[name].unit, name
        if suffix == ".csv" and name == "edge":
            assert back[name].tolist() == [str(value) for value in found[name].tolist()]
        else:
            assert back[name].tolist() == found[name].tolist(), name
        assert suffix != ".ecsv" or back[name].description == found[name].description
    if suffix != ".csv":
        assert {key: back.meta[key] for key in found.meta} == dict(found.meta)
        assert found.meta["DPLABELS"] == "labels.fits"
        assert str(tmp_path) not in str(found.meta)
    if suffix == ".fits":
        with fits.open(out, checksum=True) as file:
            assert file["CATALOG"].header["CHECKSUM"]
            header = file["CATALOG"].header
            assert header["TUNIT" + str(1 + found.colnames.index("ra"))] == "deg"
            comments = [header.comments[f"TTYPE{number}"] for number in range(1, 1 + len(found.columns))]
            assert all(
                found[name].description.startswith(text) for name, text in zip(found.colnames, comments, strict=True)
            )
            assert min(map(len, comments)) > 10


def test_names_come_from_labels_json(sky: tuple[Path, Path], tmp_path: Path) -> None:
    _, segments, _ = scene()
    folder = tmp_path / "predictions"
    folder.mkdir()
    plain(segments.astype(np.uint8)).save(folder / "x.nii.gz")
    (folder / "labels.json").write_text(
        json.dumps({"classes": {"1": "cell", "2": "wall"}, "ignore": [3], "invalid": 4})
    )
    found = catalogue(folder / "x.nii.gz")
    assert sorted(zip(found["class"].tolist(), found["name"].tolist(), strict=True)) == [
        (1, "cell"),
        (2, "wall"),
        (5, ""),
    ]
    with open_volume(folder / "x.nii.gz") as volume:
        volume.classes = {1: "nucleus"}
        assert sorted(set(catalogue(volume)["name"].tolist())) == ["", "nucleus"]
    (folder / "labels.json").write_text("[]")
    with pytest.raises(InputError, match=r"labels\.json"):
        catalogue(folder / "x.nii.gz")


@pytest.mark.parametrize(
    ("card", "unit"), [("Jy/beam", "Jy / beam"), ("ELECTRONS/S", "ELECTRONS/S"), ("3.631 uJy", "3.631 uJy"), ("", None)]
)
def test_any_unit_of_the_image_is_kept(tmp_path: Path, card: str, unit: str | None) -> None:
    fits.PrimaryHDU(np.ones((3, 4)), fits.Header({"BUNIT": card})).writeto(tmp_path / "image.fits")
    labels = plain(np.ones((3, 4), np.uint8))
    with warnings.catch_warnings(action="error"):
        found = catalogue(labels, tmp_path / "image.fits", tmp_path / "x.ecsv")
        catalogue(labels, tmp_path / "image.fits", tmp_path / "x.fits")
    with warnings.catch_warnings(action="ignore"):
        back = [Table.read(tmp_path / name)["mean"].unit for name in ("x.ecsv", "x.fits")]
    assert [None if one is None else one.to_string() for one in (found["mean"].unit, *back)] == [unit] * 3


def test_no_objects_make_an_empty_catalogue(tmp_path: Path) -> None:
    empty = plain(np.zeros((5, 6), np.uint8))
    for suffix in (".csv", ".ecsv", ".fits"):
        for classes in ({}, {1: "star"}):
            empty.classes = classes
            found = catalogue(empty, plain(np.ones((5, 6))), tmp_path / f"x{suffix}", overwrite=True)
            back = Table.read(tmp_path / f"x{suffix}")
            assert (len(back), back.colnames) == (0, found.colnames if suffix != ".csv" else back.colnames)


def test_faults_are_named(sky: tuple[Path, Path], tmp_path: Path) -> None:
    labels, image = sky
    with pytest.raises(InputError, match=r"not written as '\.xml'"):
        catalogue(labels, out=tmp_path / "x.xml")
    with pytest.raises(InputError, match="no folder"):
        catalogue(labels, out=tmp_path / "none" / "x.csv")
    before = labels.read_bytes()
    with pytest.raises(InputError, match="replace what it is made of"):
        catalogue(labels, image, out=labels)
    assert labels.read_bytes() == before
    with pytest.raises(InputError, match="replace what it is made of"):
        catalogue(labels, image, out=labels, overwrite=True)
    with pytest.raises(InputError, match=r"not labels: .*\n.*images go second"):
        catalogue(image)
    with pytest.raises(InputError, match="differ in shape"):
        catalogue(labels, plain(np.ones((3, 4))))
    fits.PrimaryHDU(np.ones((240, 250)), fits.Header(TAN | {"CRPIX1": 21.5})).writeto(tmp_path / "off.fits")
    with pytest.raises(InputError, match="1 pixels apart"):
        catalogue(labels, tmp_path / "off.fits")
    with pytest.raises(InputError, match="labels have one channel, this file has 2"):
        catalogue(Volume(np.ones((2, 3, 4), np.uint8), (1, 1)))
    with pytest.raises(InputError, match=r"in 2D a voxel has no 6 neighbours\n.*one of 4, 8"):
        catalogue(labels, connectivity=6)
    with pytest.raises(ValueError, match="min_size"):
        catalogue(labels, min_size=0)
    with pytest.raises(InputError, match=r"over 2\^62"):
        catalogue(plain(np.full((2, 2), 2**63, np.uint64)))
    (tmp_path / "link.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(UnsafeError):
        catalogue(labels, out=tmp_path / "link.csv")


def test_a_full_disk_leaves_the_old_catalogue(
    sky: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.fits"
    out.write_bytes(b"old")

    def full(self: object, name: Path, **_: object) -> None:
        Path(name).write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fits.BinTableHDU, "writeto", full)
    with pytest.raises(DiskFullError):
        catalogue(*sky, out, overwrite=True)
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*part*"))


def test_another_file_is_not_replaced_unless_told_so(sky: tuple[Path, Path], tmp_path: Path) -> None:
    mosaic = tmp_path / "mosaic.fits"
    fits.PrimaryHDU(np.ones((50, 50), np.float32)).writeto(mosaic)
    before = mosaic.read_bytes()
    with pytest.raises(InputError, match="is there already"):
        catalogue(*sky, mosaic)
    words = ["catalogue", *map(str, sky), "--out", str(mosaic)]
    refused = CliRunner().invoke(app, words)
    assert (type(refused.exception), mosaic.read_bytes()) == (InputError, before)
    done = CliRunner().invoke(app, [*words, "--overwrite"])
    assert (done.exit_code, done.stdout) == (0, f"5 objects in {mosaic}\n")
    with fits.open(mosaic) as file:
        assert [hdu.name for hdu in file] == ["PRIMARY", "CATALOG"]


def test_labels_json_counts_from_above_too(tmp_path: Path) -> None:
    """BIDS derivatives keep it at their root; a file of that name by another program says nothing."""
    values = np.zeros((6, 20, 20), np.uint8)
    values[2:4, 5:9, 5:9], values[:, 15:] = 1, 255
    folder = tmp_path / "derivatives" / "sub-01" / "ses-a" / "anat"
    folder.mkdir(parents=True)
    path = folder / "sub-01_ses-a_dseg.nii.gz"
    plain(values).save(path)
    (tmp_path / "derivatives" / "labels.json").write_text('{"classes": {"1": "lesion"}, "ignore": [], "invalid": 255}')
    (folder.parent / "labels.json").write_text('{"classes": ["cat", "dog"], "labels": {}}')
    found = catalogue(path)
    assert (found["class"].tolist(), found["name"].tolist()) == ([1], ["lesion"])
    (tmp_path / "derivatives" / "labels.json").rename(tmp_path / "labels.json")
    assert set(catalogue(path)["class"].tolist()) == {1, 255}  # too far above


def test_the_command_writes_a_catalogue(sky: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    command = [sys.executable, "-m", "densepred", "catalogue", *map(str, sky), "--out", str(out), "--connectivity", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"5 objects in {out}\n"
    assert len(Table.read(out)) == 5


def test_an_image_may_be_called_labels_and_have_damaged_cards(tmp_path: Path) -> None:
    image = fits.ImageHDU(np.eye(4, dtype=np.uint8), name="LABELS")
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(tmp_path / "x.fits")
    assert len(catalogue(f"{tmp_path}/x.fits[LABELS]")) == 1
    hdu = fits.PrimaryHDU(np.eye(4, dtype=np.uint8))
    hdu.header.append(fits.Card.fromstring("DATE-OBS= 2010-01-01T00:00:00".ljust(80)), end=True)
    hdu.writeto(tmp_path / "y.fits", output_verify="ignore")
    assert len(catalogue(tmp_path / "y.fits")) == 1


def test_class_names_beyond_ascii_go_into_fits(tmp_path: Path) -> None:
    labels = plain(np.ones((3, 4), np.uint8))
    labels.classes = {1: "Läsion"}
    catalogue(labels, out=tmp_path / "x.fits")
    catalogue(labels, out=tmp_path / "x.ecsv")
    assert [Table.read(tmp_path / name)["name"].tolist() for name in ("x.fits", "x.ecsv")] == [["Lasion"], ["Läsion"]]
