"""How the files of a case become images: which members go together, which planes are read, and what stays open."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image

from densepred.cases.case import Case, collect
from densepred.cases.preprocess import grid_fault
from densepred.cases.reading import Reading
from densepred.config import DataConfig
from densepred.errors import InputError
from densepred.files import sha256
from densepred.volumes import companions, open_volume, paired, stack
from tests.nifti_files import save_nib, scan

SCI, DQ = "[SCI,all]", "[DQ,all]"


def save(path: Path, *named: tuple[str, int], size: int = 4) -> Path:
    """HDUs of one value, ten times the version and 1 for flags."""
    hdus = [fits.ImageHDU(np.full((size, 5), 10 * ver, "i2"), name=name, ver=ver) for name, ver in named]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return path


def part(path: Path, name: str) -> Path:
    return Path(f"{path}{name}")


# members that go together


def open_in(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return sorted(path for path in found if path.startswith(str(folder)))


def test_members_are_joined_by_their_version(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", ("SCI", 1), ("SCI", 2), ("DQ", 2), ("DQ", 1))
    with fits.open(path, "update") as file:
        file["DQ", 1].data[:2] = 0
        file["DQ", 2].data[2:] = 0
    case = Case("x", (part(path, SCI),), mask=part(path, DQ))
    reading = Reading(validity={"mask": "{id}.fits[DQ,all]"})
    for version, volume in enumerate(reading.open_cases(case), start=1):
        with volume, fits.open(path) as file:
            expected = np.where(file["DQ", version].data != 0, np.nan, file["SCI", version].data)
            np.testing.assert_array_equal(volume[0], expected)
    assert version == reading.count(case) == 2
    data = DataConfig(root=str(tmp_path), images="{id}.fits[SCI,all]", validity={"mask": "{id}.fits[DQ,all]"})
    pairs = [(one.images[0], one.mask) for one in collect(data)]
    assert pairs == [(part(path, f"[SCI,{n}]"), part(path, f"[DQ,{n}]")) for n in (1, 2)]


@pytest.mark.parametrize("others", [[("DQ", 1), ("DQ", 3)], [("DQ", 1)], [("DQ", 2), ("DQ", 3), ("DQ", 1)]])
def test_other_versions_are_refused(tmp_path: Path, others: list[tuple[str, int]]) -> None:
    path = save(tmp_path / "x.fits", ("SCI", 1), ("SCI", 2), *others)
    case = Case("x", (part(path, SCI),), mask=part(path, DQ))
    reading = Reading(validity={"mask": "{id}.fits[DQ,all]"})
    with pytest.raises(InputError, match=r"versions 1, 3, those of .* have 1, 2|stands for"):
        reading.count(case)
    with pytest.raises(InputError):
        next(reading.open_cases(case))
    data = DataConfig(root=str(tmp_path), images="{id}.fits[SCI,all]", validity={"mask": "{id}.fits[DQ,all]"})
    with pytest.raises(InputError, match=r"versions|stands for"):
        collect(data)


def test_single_versions_that_differ_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", ("SCI", 2), ("DQ", 1))
    with pytest.raises(InputError, match=r"versions 1, those of .* have 2"):
        paired({"image": part(path, SCI), "mask": part(path, DQ)})


def test_members_of_equal_names_are_joined_by_these(tmp_path: Path) -> None:
    one = save(tmp_path / "a.fits", ("SCI", 1), ("ERR", 1), ("SCI", 2), ("ERR", 2))
    two = save(tmp_path / "b.fits", ("ERR", 2), ("SCI", 2), ("ERR", 1), ("SCI", 1))
    for found in paired({"image": f"{one}[all]", "label": f"{two}[all]"}):
        assert found["image"].removeprefix(str(one)) == found["label"].removeprefix(str(two))
    other = save(tmp_path / "c.fits", ("L", 1), ("M", 1), ("M", 2), ("L", 2))
    joined = paired({"image": f"{one}[all]", "label": f"{other}[all]"})
    assert [found["label"][-5:] for found in joined] == ["[L,1]", "[M,1]", "[M,2]", "[L,2]"]
    mixed = save(tmp_path / "d.fits", ("L", 1), ("L", 2), ("M", 1), ("M", 2))
    with pytest.raises(InputError, match="cannot be told from their versions"):
        paired({"image": f"{one}[all]", "label": f"{mixed}[all]"})


def test_what_has_no_version_goes_by_its_place_and_one_image_with_each(tmp_path: Path) -> None:
    path = save(tmp_path / "x.fits", ("SCI", 1), ("SCI", 2))
    nameless = save(tmp_path / "n.fits", ("", 1), ("", 1))
    one = save(tmp_path / "one.fits", ("WHT", 7))
    found = paired({"image": part(path, SCI), "mask": f"{nameless}[all]", "weight": one})
    assert [(pair["mask"], pair["weight"]) for pair in found] == [(f"{nameless}[{n}]", str(one)) for n in (1, 2)]
    series = save_nib(tmp_path / "t.nii.gz", scan((3, 4, 5, 3)))
    frames = paired({"image": series, "mask": series}, {"image": "xyzt", "mask": "xyzt"})
    assert frames == [dict.fromkeys(("image", "mask"), f"{series}[{n}]") for n in range(3)]


# planes


def test_each_plane_is_optional_by_itself(tmp_path: Path) -> None:
    image = save(tmp_path / "a.fits", ("SCI", 1))
    quality = save(tmp_path / "q.fits", ("DQ", 1))
    case = Case("a", (image,), mask=quality)
    reading = Reading(validity={"mask": "{id}_dq.fits", "weight": "{id}_w.fits"})
    with pytest.raises(InputError, match="no weight"):
        reading.open_case(case)
    with reading.open_case(case, planes_required=False) as volume:
        assert np.isnan(volume.numpy()).all()
    with Reading().open_case(case) as volume:  # the model knows no mask
        assert (volume.numpy() == 10).all()


# what stays open


def test_a_case_that_fails_leaves_no_file_open(tmp_path: Path) -> None:
    image, small = save(tmp_path / "a.fits", ("SCI", 1)), save(tmp_path / "m.fits", ("DQ", 1), size=3)
    chips = save(tmp_path / "c.fits", ("SCI", 1), ("SCI", 2), ("DQ", 1), ("DQ", 2))
    series = save_nib(tmp_path / "t.nii.gz", scan((3, 4, 5, 3)))
    other = save_nib(tmp_path / "u.nii.gz", scan((3, 4, 6, 3)))
    masked = {"validity": {"mask": "x"}}
    failing = [
        (Case("a", (image,), mask=small), Reading(**masked)),
        (Case("a", (image, tmp_path / "gone.fits")), Reading()),
        (Case("a", (part(chips, SCI),), mask=small), Reading(**masked)),
        (Case("a", (series, other)), Reading(axes="xyzt")),
        (Case("a", (series, small)), Reading(axes="xyzt")),
    ]
    kept = []  # errors hold the frames that they went through
    before = open_in(tmp_path)
    for _ in range(10):
        for case, reading in failing:
            for opening in (reading.open_case, lambda case, reading=reading: next(reading.open_cases(case))):
                with pytest.raises(InputError) as caught:
                    opening(case)
                kept.append(caught.value)
    assert len(kept) == 100
    assert open_in(tmp_path) == before


def test_images_that_are_not_asked_for_leave_no_file_open(tmp_path: Path) -> None:
    chips = save(tmp_path / "c.fits", ("SCI", 1), ("SCI", 2))
    series = save_nib(tmp_path / "t.nii.gz", scan((3, 4, 5, 3)))
    before = open_in(tmp_path)
    for case, reading in ((Case("a", (part(chips, SCI),)), Reading()), (Case("a", (series,)), Reading(axes="xyzt"))):
        images = reading.open_cases(case)
        with next(images) as volume:
            volume.numpy()
        images.close()
        assert open_in(tmp_path) == before


# files that belong to others


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_detached_voxels_are_hashed_with_their_header(tmp_path: Path, suffix: str) -> None:
    itk = pytest.importorskip("SimpleITK")
    path = tmp_path / f"v{suffix}"
    itk.WriteImage(itk.GetImageFromArray(np.zeros((3, 4, 5), "f4")), str(path))
    case = Case("v", (path,), label=path)
    assert case.inputs == case.files == (path, tmp_path / "v.raw")
    before = [sha256(file) for file in case.inputs]
    itk.WriteImage(itk.GetImageFromArray(np.ones((3, 4, 5), "f4")), str(path))
    after = [sha256(file) for file in case.inputs]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_what_belongs_to_a_file(tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw", "s_01.raw", "s_02.raw", "x.dcm", "x.nii", "x.mha"):
        (tmp_path / name).touch()
    head = "NRRD0005\ntype: uchar\ndimension: 2\nsizes: 2 2\nencoding: raw\n"
    (tmp_path / "list.nhdr").write_text(f"{head}data file: LIST\na.raw\nb.raw\n")
    (tmp_path / "pattern.nhdr").write_text(f"{head}data file: s_%02d.raw 1 2 1\n")
    (tmp_path / "meta.mhd").write_text("NDims = 2\nDimSize = 2 2\nElementDataFile = LIST\nb.raw\na.raw\n")
    (tmp_path / "run01").mkdir()
    (tmp_path / "run01" / "s.raw").touch()
    (tmp_path / "deep.nhdr").write_text("NRRD0005\n# contrast 10 %\ndata file: run%02d/s.raw 1 1 1\n")
    (tmp_path / "away.mhd").write_text("NDims = 2\nDimSize = 2 2\nElementDataFile = gone.raw\n")
    (tmp_path / "broken.mhd").write_text("NDims = many\nElementDataFile = a.raw\n")
    expected = {
        "list.nhdr": ["a.raw", "b.raw"],
        "pattern.nhdr": ["s_01.raw", "s_02.raw"],
        "deep.nhdr": ["run01/s.raw"],
        "away.mhd": ["gone.raw"],
    }
    expected |= {"meta.mhd": ["a.raw", "b.raw"], "broken.mhd": [], "x.nii": [], "x.mha": [], "none.mhd": []}
    for name, files in expected.items():
        assert companions(tmp_path / name) == [tmp_path / file for file in files]
    assert companions(tmp_path / "x.dcm") == [tmp_path]


def test_a_mask_that_states_no_size_goes_with_a_calibrated_image(tmp_path: Path):
    options = {"imagej": True, "resolution": (1 / 0.65, 1 / 0.65), "metadata": {"unit": "um"}}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 30), np.uint16), **options)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "m.png")
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(tmp_path / "n.png")
    with open_volume(tmp_path / "a.tif") as image, open_volume(tmp_path / "m.png") as mask:
        assert image.spacing == pytest.approx((0.65, 0.65))
        assert grid_fault(image, mask) is None
    with open_volume(tmp_path / "a.tif") as image, open_volume(tmp_path / "n.png") as mask:
        assert grid_fault(image, mask) is not None


def test_channels_lie_on_the_grid_of_the_one_that_states_it(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 6), np.float32))
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    nib.save(nib.Nifti1Image(np.ones((6, 5, 4), np.float32), affine), tmp_path / "b.nii")
    with open_volume(tmp_path / "a.npy") as plain, open_volume(tmp_path / "b.nii") as sized:
        both = stack([plain, sized])
        assert both.spacing == (2.0, 0.5, 0.5)
        np.testing.assert_array_equal(both.affine, sized.affine)
        assert both.header is sized.header
        assert both.path == tmp_path / "a.npy"
        assert both[:, 0, 0, 0].tolist() == [0, 1]


def test_labels_have_the_axes_of_their_image_but_the_channels():
    assert {Reading(axes=axes).plane_axes for axes in ("zyx", "czyx", "zcyx", "zyxc")} == {"zyx"}
