"""Parts and coarser grids of images, by astropy (Cutout2D, block_reduce, WCS), nibabel (slicer) and ITK (BinShrink)."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import Cutout2D, block_reduce
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.errors import InputError
from densepred.volumes import Volume, open_volume
from densepred.volumes.grid import binned, binned_like, cutout
from tests.drawn_arrays import COMMON
from tests.fits_files import RNG, TAN, pixels, save
from tests.nifti_files import load_nib, save_nib, scan
from tests.test_fits_cut import HEADERS, drift, five
from tests.test_fits_writer import SUFFIXES, only

OBLIQUE = np.array([[0.9, 0.5, -0.2, 11], [-0.4, 1.7, 0.3, -7], [0.3, -0.1, 2.8, 5], [0, 0, 0, 1.0]])
SHEARED = np.array([[1.0, 0.4, 0.1, -30], [0, 2.0, 0.3, 12], [0, 0, 3.0, 4], [0, 0, 0, 1.0]])


def sky_file(path: Path, name: str, shape: tuple[int, int] = (48, 64), dtype: str = "f4") -> Path:
    """An image with one of the headers; its values are not constant over blocks."""
    cards = {card.keyword: card.value for card in HEADERS[name].cards if card.keyword[:5] not in ("SIMPL", "BITPI")}
    return save(path, pixels(shape, dtype), **{key: cards[key] for key in cards if not key.startswith("NAXIS")})


def worlds(header: fits.Header) -> WCS:
    with warnings.catch_warnings(action="ignore"):
        return WCS(header)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", HEADERS)
def test_a_cutout_of_fits_is_astropys(tmp_path: Path, name: str, suffix: str) -> None:
    path = sky_file(tmp_path / "in.fits", name)
    values, header = fits.getdata(path), fits.getheader(path)
    part = cutout(open_volume(path), [(7, 30), (11, 50)])
    part.save(tmp_path / f"out{suffix}")
    got, written = only(tmp_path / f"out{suffix}")
    theirs = Cutout2D(values, (30.0, 18.0), (23, 39), worlds(header))
    assert theirs.bbox_original == ((7, 29), (11, 49))
    np.testing.assert_array_equal(got, theirs.data)
    np.testing.assert_array_equal(part.numpy()[0], theirs.data)
    points = five(got.shape)
    assert theirs.wcs is not None
    back = theirs.wcs.all_world2pix(worlds(written).all_pix2world(points, 0), 0, tolerance=1e-9)
    np.testing.assert_allclose(back, points, rtol=0, atol=1e-6)
    assert drift(header, written, points + np.array([11, 7]), points) < 1e-6  # the alternate WCS too


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", [name for name in HEADERS if name != "TPV"])
def test_binned_fits_is_astropys(tmp_path: Path, name: str, factor: int) -> None:
    path = sky_file(tmp_path / "in.fits", name, (49, 65), "i2")
    values, header = fits.getdata(path), fits.getheader(path)
    part = binned(open_volume(path), factor)
    part.save(tmp_path / "out.fits")
    got, written = only(tmp_path / "out.fits")
    np.testing.assert_allclose(got, block_reduce(values, factor, np.mean), rtol=1e-6)
    assert got.dtype.newbyteorder("=") == part.dtype == np.float32
    points = five(got.shape)
    assert drift(header, written, (points + 0.5) * factor - 0.5, points) < 1e-6
    if name != "SIP" and "CD1_1" not in header:  # astropy's own slicing leaves coefficients and CD as they are
        sliced = worlds(header)[::factor, ::factor]
        back = sliced.all_world2pix(worlds(written).all_pix2world(points, 0), 0)
        np.testing.assert_allclose(back, points, rtol=0, atol=1e-6)
    empty = binned_like(open_volume(path), factor)
    assert (empty.shape, empty.spacing, empty.dtype) == (part.shape, (factor, factor), np.int16)
    empty.like(np.ones(empty.shape, np.uint8)).save(tmp_path / "labels.fits.fz")
    labels = only(tmp_path / "labels.fits.fz")[1]
    np.testing.assert_array_equal(worlds(labels).all_pix2world(points, 0), worlds(written).all_pix2world(points, 0))


def test_what_cannot_be_binned_is_refused(tmp_path: Path) -> None:
    tpv = open_volume(sky_file(tmp_path / "in.fits", "TPV"))
    for make in (binned, binned_like):
        with pytest.raises(InputError, match="a TPV distortion cannot be binned") as caught:
            make(tpv, 2)
        assert caught.value.file == tmp_path / "in.fits"
        with pytest.raises(InputError, match="blocks of 49 voxels are larger than axis 0 of 48"):
            make(tpv, 49)
        for factor in (0, (2,), (2, 2, 2)):
            with pytest.raises(ValueError, match="factor must be one integer or 2"):
                make(tpv, factor)
    with pytest.raises(InputError, match="a label map cannot be binned"):
        binned(tpv.like(np.ones((48, 64), np.uint8)), 2)
    assert binned(tpv, 1) is tpv
    for box in ([(0, 49), (0, 5)], [(-1, 5), (0, 5)], [(0, 5), (5, 5)]):
        with pytest.raises(InputError, match="is not within axis"):
            cutout(tpv, box)
    with pytest.raises(ValueError, match="box must have 2 pairs"):
        cutout(tpv, [(0, 5)])


@settings(**COMMON)
@given(data=st.data())
def test_indexing_a_part_or_means_is_indexing_the_array(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=4).map(tuple))
    values = RNG.normal(0, 1, shape)
    values[RNG.random(shape) < 0.3] = np.nan
    ends = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape[1:]]
    box = [(start, stop + (start == stop)) for start, stop in ends]
    factors = [data.draw(st.integers(1, n)) for n in shape[1:]]
    volume = Volume(values, (1.0,) * (len(shape) - 1))
    with warnings.catch_warnings(action="ignore"):  # blocks without a valid voxel
        blocks = block_reduce(values, (1, *factors), np.nanmean) if max(factors) > 1 else values
    views = {"part": cutout(volume, box), "means": binned(volume, factors)}
    expected = {"part": values[:, *(slice(*pair) for pair in box)], "means": blocks}
    for name, view in views.items():
        assert view.shape == expected[name].shape
        key = [data.draw(st.slices(n) if data.draw(st.booleans()) else st.integers(-n, n - 1)) for n in view.shape]
        np.testing.assert_allclose(view[tuple(key)], expected[name][tuple(key)], rtol=1e-12)
        np.testing.assert_allclose(np.concatenate([slab for *_, slab in view.slabs(2)], 1), expected[name], rtol=1e-12)


def test_means_are_of_valid_voxels_and_exact_in_their_type() -> None:
    values = np.array([[1, np.nan, np.nan, np.nan], [5, np.inf, np.nan, -np.inf]], np.float32)
    np.testing.assert_array_equal(binned(Volume(values[None], (1, 1)), 2).numpy(), [[[3, np.nan]]])
    for dtype, result in (("u1", "f4"), ("u2", "f4"), (">i2", "f4"), ("i4", "f8"), ("f4", "f4"), (">f8", "f8")):
        large = np.full((1, 4, 4), np.iinfo(dtype).max if dtype[-2] != "f" else 1e30).astype(dtype)
        means = binned(Volume(large, (1, 1)), 4)
        assert means.dtype == np.dtype(result)
        assert means.numpy()[0, 0, 0] == large[0, 0, 0]


@pytest.mark.parametrize("affine", [OBLIQUE, SHEARED])
@pytest.mark.parametrize("forms", ["sform", "qform", "both", "neither"])
def test_a_cutout_of_nifti_is_nibabels(tmp_path: Path, affine: np.ndarray, forms: str) -> None:
    straight = np.linalg.qr(affine[:3, :3])[0] * [1, 2, 3]
    affine = nib.affines.from_matvec(straight, affine[:3, 3]) if forms == "qform" else affine
    source = nib.Nifti1Image(scan((9, 10, 11)), affine)
    source.set_sform(affine, 4 if forms in ("sform", "both") else 0)
    source.set_qform(nib.affines.from_matvec(straight, affine[:3, 3]), 2 if forms in ("qform", "both") else 0)
    source.to_filename(tmp_path / "in.nii")
    theirs = load_nib(tmp_path / "in.nii").slicer[2:7, 1:10, 4:8]
    theirs.to_filename(tmp_path / "theirs.nii")
    with warnings.catch_warnings(action="ignore"):  # sform and qform disagree
        part = cutout(open_volume(tmp_path / "in.nii"), [(4, 8), (1, 10), (2, 7)])
        part.save(tmp_path / "out.nii.gz")
    ours, theirs = load_nib(tmp_path / "out.nii.gz"), load_nib(tmp_path / "theirs.nii")
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    if forms == "qform":  # nibabel recomputes the quaternion
        np.testing.assert_allclose(ours.affine, theirs.affine, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert part.affine is not None
    np.testing.assert_allclose(part.affine, ours.affine, rtol=1e-6, atol=1e-5)
    before = load_nib(tmp_path / "in.nii").header
    if forms != "neither":
        for code in ("sform_code", "qform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d"):
            assert ours.header[code] == before[code]
    if forms == "both":  # each form moves by itself
        corner = nib.affines.apply_affine(before.get_qform(), (2, 1, 4))
        np.testing.assert_allclose(ours.header.get_qform()[:3, 3], corner, rtol=1e-6)


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 3, 2), (5, 1, 1)])
def test_binned_nifti_is_itks(tmp_path: Path, factors: tuple[int, int, int]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    affine = nib.affines.from_matvec(np.linalg.qr(OBLIQUE[:3, :3])[0] * [0.7, 1.1, 2.5], OBLIQUE[:3, 3])
    header = nib.Nifti1Header()
    header.set_qform(affine, 1)
    path = save_nib(tmp_path / "in.nii", scan((13, 12, 11), "f4"), affine, header)
    binned(open_volume(path), factors).save(tmp_path / "out.nii")
    theirs = sitk.BinShrink(sitk.ReadImage(str(path)), factors[::-1])
    sitk.WriteImage(theirs, str(tmp_path / "theirs.nii"))
    ours, theirs = load_nib(tmp_path / "out.nii"), load_nib(tmp_path / "theirs.nii")
    np.testing.assert_allclose(np.asarray(ours.dataobj), np.asarray(theirs.dataobj), rtol=1e-6)
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.header.get_zooms(), theirs.header.get_zooms(), rtol=1e-6)
    np.testing.assert_allclose(ours.header.get_qform(), ours.affine, atol=1e-5)


@pytest.mark.parametrize("affine", [OBLIQUE, SHEARED])
def test_blocks_lie_where_their_voxels_lie(tmp_path: Path, affine: np.ndarray) -> None:
    path = save_nib(tmp_path / "in.nii", scan((12, 9, 8)), affine)
    binned(open_volume(path), (2, 3, 4)).save(tmp_path / "out.nii")
    middle = nib.affines.apply_affine(load_nib(path).affine, (4 + 1.5, 3 + 1, 4 + 0.5))
    np.testing.assert_allclose(
        nib.affines.apply_affine(load_nib(tmp_path / "out.nii").affine, (1, 1, 2)), middle, rtol=1e-6
    )


@pytest.mark.parametrize("suffix", [".zarr", ".h5", ".npy", ".nrrd", ".ome.tif", ".nii.gz", ".fits.fz"])
def test_parts_of_every_format(tmp_path: Path, suffix: str) -> None:
    values = pixels((1, 6, 20, 24), "u2")
    Volume(values, (2.0, 0.5, 0.25), np.diag([0.25, 0.5, 2, 1])).save(tmp_path / f"x{suffix}")
    with open_volume(tmp_path / f"x{suffix}", "zyx" if suffix.startswith(".f") else None) as volume:
        part = cutout(volume, [(1, 6), (3, 19), (2, 22)])
        assert part.spacing == volume.spacing
        part.save(tmp_path / f"y{suffix}")
    with open_volume(tmp_path / f"y{suffix}", "zyx" if suffix.startswith(".f") else None) as back:
        np.testing.assert_array_equal(back.numpy(), values[:, 1:6, 3:19, 2:22])
        assert back.spacing == volume.spacing
        if back.affine is not None:
            np.testing.assert_allclose(back.affine[:3, 3], [0.5, 1.5, 2] if volume.affine is not None else 0)
        coarse = binned(back, 2)
        assert coarse.spacing == (back.spacing[0], 2 * back.spacing[1], 2 * back.spacing[2])
        np.testing.assert_allclose(coarse.numpy()[0], block_reduce(back.numpy()[0], (1, 2, 2), np.mean), rtol=1e-6)


def test_cubes_are_cut_and_binned_along_their_own_axes(tmp_path: Path) -> None:
    cards = TAN | {"CTYPE3": "FREQ", "CRVAL3": 1.4e9, "CDELT3": 1e6, "CRPIX3": 2.0, "CUNIT3": "Hz", "CTYPE4": "STOKES"}
    path = save(tmp_path / "in.fits", pixels((1, 6, 12, 20)), **cards, CRVAL4=1.0)
    part = binned(cutout(open_volume(path, "zyx"), [(2, 6), (0, 12), (4, 18)]), (2, 3, 1))
    part.save(tmp_path / "out.fits")
    got, header = only(tmp_path / "out.fits")
    assert (got.shape, part.shape) == ((1, 2, 4, 14), (1, 2, 4, 14))
    world = WCS(header).wcs_pix2world([[5, 2, 1, 0]], 0)
    np.testing.assert_allclose(WCS(fits.getheader(path)).wcs_world2pix(world, 0), [[9, 7, 4.5, 0]], atol=1e-6)
    colours = save(tmp_path / "c.fits", pixels((3, 12, 20)), **TAN)
    part = cutout(open_volume(colours, "cyx"), [(2, 9), (1, 20)])
    part.save(tmp_path / "d.fits")
    got, header = only(tmp_path / "d.fits")
    np.testing.assert_array_equal(got, fits.getdata(colours)[:, 2:9, 1:20])
    assert (header["CRPIX1"], header["CRPIX2"], "CRPIX3" in header) == (19.5, 10.5, False)


class Watched:
    """A large array of nothing that notes what is read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.calls = shape, np.dtype(np.float32), []

    def __getitem__(self, key: Any) -> np.ndarray:
        self.calls.append([(item.start, item.stop) for item in key])
        return np.zeros([item.stop - item.start for item in key], np.float32)

    def verify(self) -> None:
        self.calls.append("verify")

    def close(self) -> None:
        self.calls.append("close")


def test_only_the_window_is_read_and_memory_stays() -> None:
    array = Watched((1, 40_000, 50_000))
    with cutout(Volume(array, (1, 1)), [(100, 200), (1000, 1300)]) as part:
        assert [slab.shape for *_, slab in part.slabs(60)] == [(1, 60, 300), (1, 40, 300)]
    assert array.calls[:2] == [[(0, 1), (100, 160), (1000, 1300)], [(0, 1), (160, 200), (1000, 1300)]]
    assert array.calls[2:] == ["verify", "close"]
    array.calls.clear()
    tracemalloc.start()
    with binned(Volume(array, (1, 1)), 10) as means:
        assert means[:, 7:107].shape == (1, 100, 5000)
        means.verify()
    assert tracemalloc.get_traced_memory()[1] < 150e6  # 200 MB are read
    tracemalloc.stop()
    assert array.calls[0][1][0] == 70
    assert array.calls[-3][1][1] == 1070
    assert array.calls[-2:] == ["verify", "close"]
    assert binned_like(Volume(array, (1, 1)), 2).array.base.nbytes < 100
