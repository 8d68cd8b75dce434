"""NRRD, MetaImage and DICOM; SimpleITK, pydicom and nibabel are the witnesses."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densepred.errors import InputError
from densepred.volumes import Volume, corner_offset, open_volume, open_writer
from densepred.volumes.volume import spacing_affine
from tests.nifti_files import load_nib

sitk = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")
RNG = np.random.default_rng(0)


def image(shape: tuple[int, ...], kind: str = "i2", vector: bool = False) -> tuple[np.ndarray, Any]:
    values = RNG.integers(0, 100, shape).astype(kind)
    return values, sitk.GetImageFromArray(values, isVector=vector)


def test_real_files_read_as_simpleitk_reads_them(real_data: Path) -> None:
    folder = real_data / "other_formats"
    files = sorted([*folder.glob("*.nrrd"), *folder.glob("*.mha")])
    assert len(files) == 4
    for path in files:
        theirs = sitk.ReadImage(str(path))
        values = sitk.GetArrayFromImage(theirs)
        with open_volume(path) as volume:
            assert volume.dtype == values.dtype
            assert volume.spacing == theirs.GetSpacing()[::-1]
            np.testing.assert_array_equal(volume[:, 5:9, 3:4], values[np.newaxis, 5:9, 3:4])
            np.testing.assert_array_equal(volume.numpy()[0], values)
            slabs = np.concatenate([slab for *_, slab in volume.slabs(7)], axis=1)
            np.testing.assert_array_equal(slabs[0], values)
    nifti = open_volume(folder / "BallBinary30x30x30.nii.gz")
    for name in ("BallBinary30x30x30.nrrd", "BallBinary30x30x30_gz.nrrd"):
        ours = open_volume(folder / name)
        np.testing.assert_array_equal(ours.affine, nifti.affine)
        np.testing.assert_array_equal(ours.numpy(), nifti.numpy())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_orientation_is_where_nibabel_sees_it(tmp_path: Path, order: tuple, signs: tuple) -> None:
    """SimpleITK writes one image as NIfTI and as NRRD; nibabel reads the former."""
    values, theirs = image((4, 5, 6))
    theirs.SetDirection((np.diag(signs)[:, order]).astype(float).reshape(-1).tolist())
    theirs.SetSpacing((0.7, 1.3, 2.9))
    theirs.SetOrigin((-33.3, 7.1, 0.013))
    for name in ("x.nii", "x.nrrd"):
        sitk.WriteImage(theirs, str(tmp_path / name))
    volume = open_volume(tmp_path / "x.nrrd")
    np.testing.assert_allclose(volume.affine, load_nib(tmp_path / "x.nii").affine, atol=2e-6)
    np.testing.assert_array_equal(volume.numpy(), load_nib(tmp_path / "x.nii").get_fdata().T[np.newaxis])
    np.testing.assert_allclose(volume.spacing, (2.9, 1.3, 0.7))
    volume.save(tmp_path / "y.nrrd")
    back = sitk.ReadImage(str(tmp_path / "y.nrrd"))
    np.testing.assert_allclose(back.GetDirection(), theirs.GetDirection(), atol=1e-12)
    np.testing.assert_allclose(back.GetOrigin(), theirs.GetOrigin(), atol=1e-12)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), values)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["u1", "i1", "u2", ">i2", "i4", "u4", "f4", "f8"]),
    channels=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
    numbers=st.lists(st.floats(-3, 3, width=32), min_size=12, max_size=12),
    suffix=st.sampled_from([".nrrd", ".mha"]),
)
def test_what_is_written_reads_back_and_simpleitk_reads_it(
    tmp_path: Path, kind: str, channels: int, spatial: tuple, numbers: list, suffix: str
) -> None:
    dims = len(spatial)
    values = RNG.integers(0, 120, (channels, *spatial)).astype(kind)
    affine = np.eye(4)
    noise = np.reshape(numbers, (3, 4)) * [0.3, 0.3, 0.3, 50]
    affine[:dims, :dims] = np.eye(dims) * 4 + noise[:dims, :dims]
    affine[:dims, 3] = noise[:dims, 3]
    spacing = np.linalg.norm(affine[:3, :dims], axis=0)[::-1].tolist()
    path = tmp_path / f"x{suffix}"
    with open_writer(path, Volume(values, spacing, affine), values.dtype, channels) as writer:
        writer.write(values[:, :1])
        writer.write(values[:, 1:])
    volume = open_volume(path)
    assert volume.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(volume.numpy(), values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-12)
    theirs = sitk.ReadImage(str(path))
    expected = np.moveaxis(values, 0, -1) if channels > 1 else values[0]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs), expected)
    corner = [size - 1 for size in reversed(spatial)]
    world = volume.affine @ np.array([*corner, *[0] * (3 - dims), 1])  # type: ignore[operator]
    np.testing.assert_allclose(
        theirs.TransformContinuousIndexToPhysicalPoint([float(c) for c in corner]), (world[:3] * [-1, -1, 1])[:dims]
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nhdr", ".mhd"])
def test_regions_and_axes(tmp_path: Path, suffix: str, compressed: bool) -> None:
    values, theirs = image((5, 6, 7, 2), vector=True)
    sitk.WriteImage(theirs, str(tmp_path / f"v{suffix}"), useCompression=compressed)
    volume, whole = open_volume(tmp_path / f"v{suffix}"), np.moveaxis(values, -1, 0)
    for key in (
        (1, slice(1, 3)),
        (..., 2),
        (slice(None), slice(None, None, -2), 4),
        (0, -1, 2, 3),
        (slice(None), slice(0, 0)),
    ):
        np.testing.assert_array_equal(volume[key], whole[key])
    volume.close()
    np.testing.assert_array_equal(volume.numpy(), whole)
    if suffix == ".nhdr":
        return  # SimpleITK writes no 4D pair there
    values, theirs = image((3, 4, 5, 6))
    sitk.WriteImage(theirs, str(tmp_path / f"t{suffix}"), useCompression=compressed)
    with pytest.raises(InputError, match=r"4 axes \(6, 5, 4, 3\): what lies along the last is not declared"):
        open_volume(tmp_path / f"t{suffix}")
    np.testing.assert_array_equal(open_volume(tmp_path / f"t{suffix}", "xyzc")[1:, 1:3], values[1:, 1:3])
    with pytest.raises(InputError, match="not known"):
        open_volume(tmp_path / f"t{suffix}", "tzyx")


def test_a_plain_metaimage_is_read_by_the_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, theirs = image((50, 40, 30))
    sitk.WriteImage(theirs, str(tmp_path / "x.mha"))
    volume = open_volume(tmp_path / "x.mha")
    sizes = []
    execute = volume.array._execute  # type: ignore[attr-defined]
    monkeypatch.setattr(
        volume.array, "_execute", lambda corner, extent: sizes.append(extent[2]) or execute(corner, extent)
    )
    np.testing.assert_array_equal(volume[:, 20:24], values[np.newaxis, 20:24])
    assert sizes == [4]


def test_free_entries_and_labels_survive(tmp_path: Path) -> None:
    values, theirs = image((4, 5, 6), "u1")
    theirs.SetMetaData("patient note", "left hand")
    for suffix in (".nrrd", ".mha"):
        sitk.WriteImage(theirs, str(tmp_path / f"x{suffix}"))
        volume = open_volume(tmp_path / f"x{suffix}")
        assert not volume.labels
        with open_writer(tmp_path / f"y{suffix}", volume, np.int32, labels=True) as writer:
            writer.write(values[np.newaxis])
        assert open_volume(tmp_path / f"y{suffix}").labels
        assert sitk.ReadImage(str(tmp_path / f"y{suffix}")).GetMetaData("patient note") == "left hand"
    plain = Volume.from_array(values, (3.0, 2.0, 1.0))
    plain.save(tmp_path / "z.nrrd")
    assert sitk.ReadImage(str(tmp_path / "z.nrrd")).GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert corner_offset(plain, open_volume(tmp_path / "z.nrrd")) == 0


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_no_flipped_bit_in_compressed_voxels_passes(tmp_path: Path, suffix: str) -> None:
    """ITK returns most of these as data."""
    values, theirs = image((20, 20, 20))
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(theirs, str(path), useCompression=True)
    sound, refused = path.read_bytes(), 0
    for bit in RNG.integers(8 * 600, 8 * len(sound), 100):
        torn = bytearray(sound)
        torn[bit // 8] ^= 1 << bit % 8
        path.write_bytes(torn)
        try:
            np.testing.assert_array_equal(open_volume(path).numpy()[0], values)
        except InputError as error:
            refused += "damaged" in error.what
    assert refused > 95
    for share in (0.5, 0.9, 0.999):
        path.write_bytes(sound[: int(len(sound) * share)])
        with pytest.raises(InputError, match=r"damaged after \d+ of 16000 bytes"):
            open_volume(path).numpy()


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_truncated_and_false_files(tmp_path: Path, suffix: str) -> None:
    _, theirs = image((20, 20, 20))
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(theirs, str(path))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1000])
    with pytest.raises(InputError, match="truncated: holds 15000 of 16000 bytes"):
        open_volume(path)
    for content, words in (
        (b"", "empty"),
        (b"<html>\nno", "starts with '<html>'"),
        (b"\x89PNG\r\n\x1a\n", "89 50 4e 47"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_volume(path)
    path.write_bytes(sound.replace(b"20 20 20", b"9999999 9999999 20"))
    with pytest.raises(InputError, match=r"truncated|ITK cannot read"):
        open_volume(path)
    with pytest.raises(InputError, match="one image, not a part"):
        open_volume(f"{path}[0]")


def test_a_pair_without_its_voxels_and_a_pair_to_write(tmp_path: Path) -> None:
    values, theirs = image((4, 5, 6))
    for suffix, rest in ((".mhd", ".raw"), (".nhdr", ".raw")):
        sitk.WriteImage(theirs, str(tmp_path / f"x{suffix}"))
        np.testing.assert_array_equal(open_volume(tmp_path / f"x{suffix}").numpy()[0], values)
        (tmp_path / f"x{rest}").unlink()
        with pytest.raises(InputError, match=rf"its voxels are in x\{rest}, which is not there"):
            open_volume(tmp_path / f"x{suffix}")
        with pytest.raises(InputError, match="only read"):
            Volume.from_array(values, (1, 1, 1)).save(tmp_path / f"y{suffix}")
    oblique = np.eye(4)
    oblique[2, 0] = 0.5
    with pytest.raises(InputError, match="2D image that lies elsewhere"):
        Volume(values[:1], (1.0, np.sqrt(1.25)), oblique).save(tmp_path / "x.mha")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    like = Volume(np.ones((1, 4, 5, 6), np.uint8), (1, 1, 1))
    like.save(tmp_path / "x.nrrd")
    before = (tmp_path / "x.nrrd").read_bytes()
    with pytest.raises(ValueError, match="all 4 planes"), open_writer(tmp_path / "x.nrrd", like, np.uint8):
        pass
    assert (tmp_path / "x.nrrd").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.nrrd"]


# DICOM


def series(folder: Path, count: int = 6, change: Callable[[int, Any], object] | None = None, **tags: Any) -> np.ndarray:
    """Write CT slices with pydicom alone, file names against the order; returns their values after rescaling."""
    folder.mkdir(exist_ok=True)
    uid = tags.pop("SeriesInstanceUID", "1.2.3")
    out = []
    for number in range(count):
        head = pydicom.Dataset()
        head.file_meta = pydicom.dataset.FileMetaDataset()
        head.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = f"{uid}.{number + 1}"
        head.SeriesInstanceUID, head.StudyInstanceUID, head.Modality = uid, "1.2", "CT"
        head.Rows, head.Columns, head.SamplesPerPixel, head.PhotometricInterpretation = 5, 7, 1, "MONOCHROME2"
        head.BitsAllocated = head.BitsStored = 16
        head.HighBit, head.PixelRepresentation = 15, 1
        head.ImageOrientationPatient, head.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.5, 0.25]
        head.ImagePositionPatient = [10, 20, 30 + 2.5 * number]
        head.RescaleSlope, head.RescaleIntercept = 1, -1024
        for name, value in tags.items():
            setattr(head, name, value)
        if change is not None:
            change(number, head)
        values = RNG.integers(0, 2000, (head.Rows, head.Columns)).astype("i2")
        head.PixelData = values.tobytes()
        head.save_as(folder / f"{uid}-{(number * 5) % 7:02}.dcm", enforce_file_format=True)
        out.append(values * float(head.RescaleSlope) + float(head.RescaleIntercept))
    return np.stack(out) if len({values.shape for values in out}) == 1 else out[0]


def test_the_real_series_is_that_of_simpleitk_and_pydicom(real_data: Path) -> None:
    folder = real_data / "other_formats" / "dicom_series"
    volume = open_volume(folder)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    theirs = sitk.ReadImage(names)
    np.testing.assert_array_equal(volume.numpy()[0], sitk.GetArrayFromImage(theirs))
    assert volume.dtype == sitk.GetArrayFromImage(theirs).dtype
    np.testing.assert_allclose(volume.spacing, theirs.GetSpacing()[::-1], atol=1e-6)
    corner = theirs.TransformIndexToPhysicalPoint([87, 127, 16])
    np.testing.assert_allclose(volume.affine @ [87, 127, 16, 1], [-corner[0], -corner[1], corner[2], 1], atol=1e-5)
    heads = sorted(map(pydicom.dcmread, names), key=lambda head: head.ImagePositionPatient[2])
    for number, head in enumerate(heads):
        stored = head.pixel_array * float(head.RescaleSlope) + float(head.RescaleIntercept)
        np.testing.assert_array_equal(volume[0, number], stored)
    np.testing.assert_array_equal(open_volume(folder / "IMG0009.dcm").numpy(), volume.numpy())


@pytest.mark.parametrize(("slope", "kind"), [(1, "i4"), (2, "i4"), (0.5, "f8")])
def test_slices_go_by_position_and_are_rescaled(tmp_path: Path, slope: float, kind: str) -> None:
    values = series(tmp_path / "s", RescaleSlope=slope)
    (tmp_path / "s" / "notes.txt").write_text("not an image")
    volume = open_volume(tmp_path / "s")
    assert (volume.dtype, volume.spacing, volume.header.unit) == (np.dtype(kind), (2.5, 0.5, 0.25), "mm")
    np.testing.assert_array_equal(volume.numpy()[0], values)
    np.testing.assert_array_equal(volume[0, ::-2, 1], values[::-2, 1])
    np.testing.assert_allclose(
        volume.affine, np.array([[-0.25, 0, 0, -10], [0, -0.5, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
    )
    with pytest.raises(InputError, match="only read"):
        volume.save(tmp_path / "s" / "x.dcm")


def test_slopes_of_their_own_per_slice(tmp_path: Path) -> None:
    values = series(tmp_path / "s", change=lambda n, head: setattr(head, "RescaleSlope", [1, 0.25, 3][n % 3]))
    np.testing.assert_array_equal(open_volume(tmp_path / "s").numpy()[0], values)


def test_a_tilted_gantry_gives_a_sheared_affine(tmp_path: Path) -> None:
    def tilt(number: int, head: Any) -> None:
        head.ImagePositionPatient = [10, 20 + 0.6 * number, 30 + 2.5 * number]

    values = series(tmp_path / "s", change=tilt)
    volume = open_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.numpy()[0], values)
    np.testing.assert_allclose(volume.affine[:3, 2], [0, -0.6, 2.5])  # type: ignore[index]


def test_several_series_in_a_folder_must_be_told_apart(tmp_path: Path) -> None:
    first = series(tmp_path / "s", 6)
    second = series(tmp_path / "s", 4, SeriesInstanceUID="1.2.9")
    with pytest.raises(InputError, match=r"2 series: \[1\.2\.3\] 6 images; \[1\.2\.9\] 4 images") as caught:
        open_volume(tmp_path / "s")
    assert caught.value.fix == "add one: s[1.2.3]; or give files, as in s/*.dcm"
    np.testing.assert_array_equal(open_volume(f"{tmp_path}/s[1.2.3]").numpy()[0], first)
    np.testing.assert_array_equal(open_volume(tmp_path / "s" / "1.2.9-00.dcm").numpy()[0], second)
    with pytest.raises(InputError, match=r"no series \[7\]"):
        open_volume(f"{tmp_path}/s[7]")


def moved(number: int, to: float) -> Callable[[int, Any], object]:
    def change(at: int, head: Any) -> None:
        if at == number:
            head.ImagePositionPatient = [10, 20, to]

    return change


def set_one(number: int, **tags: Any) -> Callable[[int, Any], object]:
    return lambda at, head: [setattr(head, name, value) for name, value in tags.items() if at == number]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moved(3, 37), r"slices lie 2 to 3 mm apart, unevenly first between 1\.2\.3-03\.dcm and 1\.2\.3-01\.dcm"),
        (moved(5, 47.5), "2 slices are missing, the first between 1.2.3-06.dcm and 1.2.3-04.dcm"),
        (moved(2, 30), "lie at one position"),
        (set_one(2, ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), "slices differ in ImageOrientationPatient"),
        (set_one(2, PixelSpacing=[0.5, 0.3]), r"slices differ in PixelSpacing: \[0.5, 0.25\]"),
        (set_one(2, Columns=6), "slices differ in Columns: 7"),
        (set_one(0, NumberOfFrames=3), "multi-frame"),
        (set_one(2, ImagePositionPatient=None), "ImagePositionPatient is missing"),
        (set_one(2, ImagePositionPatient=[11, 20, 35]), "do not lie in a row: one is 1 mm aside"),
    ],
)
def test_series_that_are_no_stack_are_refused(tmp_path: Path, change: Callable[[int, Any], object], words: str) -> None:
    series(tmp_path / "s", change=change)
    with pytest.raises(InputError, match=words) as caught:
        open_volume(tmp_path / "s")
    assert caught.value.fix


def test_a_missing_slice_is_noticed(tmp_path: Path) -> None:
    series(tmp_path / "s")
    (tmp_path / "s" / "1.2.3-03.dcm").unlink()
    with pytest.raises(InputError, match=r"1 slice is missing, the first between 1\.2\.3-05\.dcm and 1\.2\.3-01\.dcm"):
        open_volume(tmp_path / "s")


def test_single_images_damaged_slices_and_other_folders(tmp_path: Path) -> None:
    values = series(tmp_path / "one", 1, SliceThickness=4)
    volume = open_volume(tmp_path / "one")
    assert (volume.shape, volume.spacing) == ((1, 1, 5, 7), (4, 0.5, 0.25))

    def flat(_: int, head: Any) -> None:
        del head.ImagePositionPatient

    values = series(tmp_path / "flat", 1, change=flat)
    volume = open_volume(tmp_path / "flat")
    assert (volume.shape, volume.spacing, volume.affine) == ((1, 5, 7), (0.5, 0.25), None)
    np.testing.assert_array_equal(volume.numpy(), values)
    series(tmp_path / "s")
    torn = tmp_path / "s" / "1.2.3-03.dcm"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(InputError, match="ITK cannot read it") as caught:
        open_volume(tmp_path / "s").numpy()
    assert caught.value.file == torn
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no DICOM images"):
        open_volume(tmp_path / "empty")
    (tmp_path / "empty" / "x.dcm").write_text("<html>")
    with pytest.raises(InputError, match="no DICOM image"):
        open_volume(tmp_path / "empty" / "x.dcm")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(InputError, match="no such file"):
        open_volume(tmp_path / "s")


def test_an_affine_without_turns_is_the_spacing() -> None:
    np.testing.assert_array_equal(spacing_affine((3.0, 2.0, 1.0)), np.diag([1.0, 2, 3, 1]))
