"""Objects and their shapes against scipy, sep and photutils."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

import densepred.catalogue as module
from densepred.catalogue import catalogue
from densepred.catalogue.columns import ellipse
from densepred.catalogue.objects import NEIGHBOURS
from densepred.errors import InputError
from densepred.volumes import Volume, open_volume, stack
from tests.catalogue_scenes import SIP, plain, scene
from tests.fits_files import TAN


def thin(monkeypatch: pytest.MonkeyPatch, values: int, pending: int = 0) -> None:
    """Slabs of at most `values` values, joined as soon as possible."""
    monkeypatch.setattr(module, "_SLAB_VALUES", values)
    monkeypatch.setattr(module, "_PENDING", pending)


def scipy_rows(labels: np.ndarray, connectivity: int) -> list[tuple]:
    """(first voxel, class, mask) of every component, by scipy's labelling of the whole."""
    structure = ndimage.generate_binary_structure(labels.ndim, NEIGHBOURS[labels.ndim][connectivity])
    rows = []
    for value in np.unique(labels[labels != 0]).tolist():
        numbered, count = ndimage.label(labels == value, structure)
        rows += [(np.flatnonzero(numbered == one)[0], value, numbered == one) for one in range(1, count + 1)]
    return sorted(rows, key=lambda row: row[0])


def assert_same(found: Table, other: Table) -> None:
    assert found.colnames == other.colnames
    for name in found.colnames:
        exact = found[name].dtype.kind in "iubU"
        np.testing.assert_allclose(found[name], other[name], rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from([2, 3]), seed=st.integers(0, 999))
def test_components_are_scipys_for_slabs_of_any_thickness(data: st.DataObject, dims: int, seed: int) -> None:
    labels = data.draw(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=dims, max_dims=dims, max_side=7),
                                     elements=st.integers(0, 2)))  # fmt: skip
    connectivity = data.draw(st.sampled_from(sorted(NEIGHBOURS[dims])))
    thickness = data.draw(st.integers(1, 4))
    generator = np.random.default_rng(seed)
    image = generator.normal(3, 5, labels.shape)
    image[generator.random(labels.shape) < 0.1] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        thin(patch, thickness * 2 * int(np.prod(labels.shape[1:])))
        found = catalogue(plain(labels), plain(image), connectivity=connectivity)
    expected = scipy_rows(labels, connectivity)
    assert found["id"].tolist() == list(range(1, len(expected) + 1))
    for row, (_, value, mask) in zip(found, expected, strict=True):
        assert (row["class"], row["voxels"]) == (value, mask.sum())
        (box,) = ndimage.find_objects(mask.astype(np.uint8))
        letters = "zyx"[-dims:]
        assert [(row[f"min_{one}"], row[f"max_{one}"] + 1) for one in letters] == [(s.start, s.stop) for s in box]
        centre = [row[f"centroid_{one}"] for one in letters]
        np.testing.assert_allclose(centre, ndimage.center_of_mass(mask), rtol=1e-12, atol=1e-12)
        places = np.argwhere(mask)
        covariance = np.cov(places.T, ddof=0)
        for i, j in np.ndindex(dims, dims):
            name = "cov_" + "".join(sorted(letters[i] + letters[j]))
            assert row[name] == pytest.approx(covariance[i, j], abs=1e-10)
        touching = any(s.start == 0 or s.stop == size for s, size in zip(box, labels.shape, strict=True))
        assert row["edge"] == touching
        values = image[mask]
        finite = values[np.isfinite(values)]
        assert row["invalid"] == values.size - finite.size
        if not finite.size:
            assert np.isnan([row["sum"], row["mean"], row["max"], row["weighted_centroid_x"]]).all()
            continue
        np.testing.assert_allclose([row["sum"], row["mean"], row["max"]], [finite.sum(), finite.mean(), finite.max()],
                                   rtol=1e-10, atol=1e-10)  # fmt: skip
        weights = np.where(mask & np.isfinite(image), np.maximum(image, 0), 0)
        if weights.any():
            centre = [row[f"weighted_centroid_{one}"] for one in letters]
            np.testing.assert_allclose(centre, ndimage.center_of_mass(weights), rtol=1e-9, atol=1e-9)
            covariance = np.cov(places.T, aweights=weights[mask], ddof=0)
            assert row["weighted_cov_xx"] == pytest.approx(np.atleast_2d(covariance)[-1, -1], abs=1e-8)


@pytest.mark.parametrize("shape", [(300, 40), (40, 22, 18)])
@pytest.mark.parametrize("few", [True, False])
def test_objects_that_meet_late_are_one(monkeypatch: pytest.MonkeyPatch, shape: tuple, few: bool) -> None:
    """Noise near percolation: many parts merge in later slabs, over and over."""
    generator = np.random.default_rng(1)
    labels = (generator.random(shape) < (0.4 if len(shape) == 2 else 0.25)).astype(np.uint8)
    labels *= generator.integers(1, 3, shape, np.uint8) if few else 1
    image = generator.normal(1e4, 1, shape).astype(np.float32)
    whole = catalogue(plain(labels), plain(image))
    numbered, count = ndimage.label(labels > 0, np.ones((3,) * len(shape)))
    if not few:
        assert whole["voxels"].tolist() == np.bincount(numbered.ravel())[1:].tolist()
        np.testing.assert_allclose(whole["sum"], ndimage.sum(image.astype(float), numbered, np.arange(1, count + 1)))
        np.testing.assert_allclose(
            np.stack([whole["centroid_y"], whole["centroid_x"]], 1),
            np.array(ndimage.center_of_mass(labels, numbered, np.arange(1, count + 1)))[:, -2:],
        )
    for rows, pending in ((1, 0), (1, 10**9), (3, 50), (7, 0)):
        thin(monkeypatch, rows * 2 * int(np.prod(shape[1:])), pending)
        assert_same(catalogue(plain(labels), plain(image)), whole)


def test_instances_are_values_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((30, 20), np.int64)
    labels[2:5, 3:9], labels[20:22, 1:4], labels[25, 7], labels[6, 6] = 7, 7, 3, 10**12
    whole = catalogue(plain(labels), instances=True)
    assert whole["id"].tolist() == [3, 7, 10**12]
    assert whole["voxels"].tolist() == [1, 24, 1]
    assert (whole["min_y"][1], whole["max_y"][1]) == (2, 21)
    assert "class" not in whole.colnames
    thin(monkeypatch, 1)
    assert_same(catalogue(plain(labels), instances=True), whole)


def test_small_objects_far_out_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of these indices need 48 bits; of a sum of them, float64 would keep four digits."""
    labels = np.zeros((12_000_000, 2), np.uint8)
    labels[-9:-4, 0] = 1
    (row,) = catalogue(plain(labels))
    assert row["centroid_y"] == len(labels) - 7
    assert row["cov_yy"] == 2.0
    assert row["cov_xx"] == 0.0


def test_known_ellipses_come_back() -> None:
    image, segments, shapes = scene()
    found = catalogue(plain(segments), plain(image), instances=True)
    for row, (x, y, a, b, theta) in zip(found, shapes, strict=True):
        assert (row["weighted_centroid_x"], row["weighted_centroid_y"]) == pytest.approx((x, y), abs=2e-3)
        assert (row["weighted_a"], row["weighted_b"]) == pytest.approx((a, b), rel=2e-3)  # cut at 5 sigma
        assert row["sum"] == pytest.approx(2 * np.pi * a * b * 100 * row["id"], rel=1e-4)
        if a != b:
            assert row["weighted_theta"] == pytest.approx(theta, abs=0.02)
        assert (row["a"], row["b"]) == pytest.approx((2.5 * a, 2.5 * b), rel=0.03)  # a filled ellipse: half its axes


def test_shapes_are_seps_and_photutils(tmp_path: Path) -> None:
    sep = pytest.importorskip("sep")
    photutils = pytest.importorskip("photutils.segmentation")
    image, segments, _ = scene()
    segments[5, 5:9], image[5, 5:9] = 6, 9.0  # a line one pixel wide: regularised
    segments[230, 240], image[230, 240] = 7, 3.0  # a single pixel
    fits.PrimaryHDU(segments, fits.Header(TAN | SIP)).writeto(tmp_path / "segments.fits")
    found = catalogue(tmp_path / "segments.fits", plain(image), instances=True)
    wcs = WCS(fits.Header(TAN | SIP))
    peer = photutils.SourceCatalog(image, photutils.SegmentationImage(segments), wcs=wcs)
    names = {"sum": "segment_flux", "max": "max_value", "voxels": "area", "weighted_centroid_x": "xcentroid",
             "weighted_centroid_y": "ycentroid", "weighted_a": "semimajor_sigma", "weighted_b": "semiminor_sigma",
             "min_x": "bbox_xmin", "max_x": "bbox_xmax", "min_y": "bbox_ymin", "max_y": "bbox_ymax"}  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        for ours, theirs in names.items():
            expected = getattr(peer, theirs)
            np.testing.assert_allclose(found[ours], getattr(expected, "value", expected), rtol=1e-7, err_msg=ours)
        turned = (found["weighted_theta"] - peer.orientation.to_value("deg") + 90) % 180 - 90
        np.testing.assert_allclose([*turned[:2], *turned[3:6]], 0, atol=1e-6)
        np.testing.assert_allclose(found["weighted_ra"], peer.sky_centroid.ra.deg, rtol=1e-12)
        np.testing.assert_allclose(found["weighted_dec"], peer.sky_centroid.dec.deg, rtol=1e-12)
    objects, numbers = sep.extract(image, 0.0, segmentation_map=True, minarea=1, filter_kernel=None, clean=False,
                                   deblend_cont=1.0)  # fmt: skip
    own = catalogue(plain(numbers), plain(image), instances=True)
    assert len(own) == len(objects) == 7
    for ours, theirs, scale in (("sum", "flux", 1), ("weighted_centroid_x", "x", 1), ("weighted_centroid_y", "y", 1),
                                ("weighted_a", "a", 1), ("weighted_b", "b", 1), ("voxels", "npix", 1)):  # fmt: skip
        np.testing.assert_allclose(own[ours], objects[theirs] * scale, rtol=2e-6, err_msg=ours)
    askew = np.abs(own["weighted_a"] - own["weighted_b"]) > 1e-3
    np.testing.assert_allclose(own["weighted_theta"][askew], np.degrees(objects["theta"][askew]), atol=1e-4)


def test_the_regularisation_is_sextractors() -> None:
    axes, theta = ellipse(np.array([np.zeros((2, 2)), [[0.0, 0.0], [0.0, 2.0]], np.full((2, 2), np.nan)]))
    np.testing.assert_allclose(axes[0], np.sqrt(1 / 12))
    np.testing.assert_allclose(axes[1], np.sqrt([2 + 1 / 12, 1 / 12]))
    assert np.isnan(axes[2]).all()
    assert np.isnan(theta[2])
    np.testing.assert_allclose(ellipse(np.zeros((1, 3, 3)))[0], [[np.sqrt(1 / 12)] * 3])


def test_negative_values_have_no_weight_in_places() -> None:
    labels, image = np.ones((1, 4), np.uint8), np.array([[-5.0, 1.0, 3.0, np.inf]])
    (row,) = catalogue(plain(labels), plain(image))
    assert (row["sum"], row["mean"], row["max"], row["invalid"]) == (-1.0, pytest.approx(-1 / 3), 3.0, 1)
    assert row["weighted_centroid_x"] == 1.75
    (row,) = catalogue(plain(labels), plain(-np.ones((1, 4))))
    assert np.isnan([row["weighted_centroid_x"], row["weighted_a"], row["weighted_theta"]]).all()
    assert row["centroid_x"] == 1.5


def test_real_dendrograms(real_data: Path) -> None:
    for name, axes in (("2d1", None), ("3d1", "zyx")):
        path = real_data / "fits" / "labelled" / f"{name}.fits"
        with pytest.raises(InputError, match=r"negative labels, such as -1\n.*-1 is the background"):
            catalogue(f"{path}[2]", axes=axes)
        found = catalogue(f"{path}[2]", f"{path}[1]", instances=True, background=-1, axes=axes)
        values, data = (fits.getdata(path, index) for index in (2, 1))
        numbers = np.unique(values[values >= 0])
        assert found["id"].tolist() == numbers.tolist()
        finite = np.nan_to_num(data.astype(float))
        np.testing.assert_allclose(found["sum"], ndimage.sum(finite, values, numbers), rtol=1e-9)
        np.testing.assert_array_equal(found["invalid"], ndimage.sum(np.isnan(data), values, numbers))
        boxes = [box for box in ndimage.find_objects(values + 1) if box is not None]
        assert [found["min_x"].tolist(), found["max_y"].tolist()] == [
            [box[-1].start for box in boxes], [box[-2].stop - 1 for box in boxes]]  # fmt: skip


def test_real_filaments_cells_and_vertebrae(real_data: Path) -> None:
    folder = real_data / "fits" / "labelled" / "filfinder"
    found = catalogue(folder / "test1_mask.fits", folder / "filaments_updatedhdr.fits", min_size=5)
    mask = fits.getdata(folder / "test1_mask.fits") > 0
    numbered, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)
    assert found["id"].tolist() == (np.flatnonzero(sizes[1:] >= 5) + 1).tolist()
    assert found["voxels"].tolist() == sizes[found["id"]].tolist()
    with warnings.catch_warnings(action="ignore"):
        wcs = WCS(fits.getheader(folder / "test1_mask.fits"))
    sky = wcs.all_pix2world(np.stack([found["weighted_centroid_x"], found["weighted_centroid_y"]], 1), 0)
    np.testing.assert_allclose(found["weighted_glat"], sky[:, 1], rtol=1e-12)

    found = catalogue(real_data / "cells" / "mask3d.tif", real_data / "cells" / "img3d.tif", instances=True)
    with open_volume(real_data / "cells" / "mask3d.tif") as volume:
        values = volume.numpy()[0]
    assert found["id"].tolist() == np.unique(values)[1:].tolist()
    assert found["voxels"].tolist() == np.bincount(values.ravel())[found["id"]].tolist()

    found = catalogue(
        real_data / "spinal_cord" / "t2_seg-manual_labeled.nii.gz", real_data / "spinal_cord" / "t2.nii.gz"
    )
    file = nib.load(real_data / "spinal_cord" / "t2_seg-manual_labeled.nii.gz")
    values = np.rint(file.get_fdata())
    for value in np.unique(values[values > 0]):
        rows = found[found["class"] == value]
        assert rows["voxels"].sum() == (values == value).sum()
        if len(rows) == 1:
            centre = nib.affines.apply_affine(file.affine, ndimage.center_of_mass(values == value))
            np.testing.assert_allclose([*rows["x"], *rows["y"], *rows["z"]], centre, rtol=1e-9)


def test_several_channels_have_numbers() -> None:
    labels = np.ones((3, 4), np.uint8)
    image = stack([plain(labels.astype(float)), plain(labels * 2.0)])
    (row,) = catalogue(plain(labels), image)
    assert (row["sum_0"], row["sum_1"]) == (12.0, 24.0)


class Stripes:
    """A label map of 100 MB that is never in memory, with two short bars."""

    shape, dtype = (1, 10_000, 10_000), np.dtype(np.uint8)

    def __getitem__(self, key: tuple) -> np.ndarray:
        rows = np.arange(*key[1].indices(self.shape[1]))
        out = np.zeros((1, len(rows), self.shape[2]), np.uint8)
        out[:, (rows % 5_000) == 3, :7] = 1
        return out


def test_memory_holds_a_slab() -> None:
    volume = Volume(Stripes(), (1, 1))
    tracemalloc.start()
    found = catalogue(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["voxels"].tolist() == [7, 7]
    assert peak < 60e6  # of a map of 100 MB, which takes 800 MB as int64


def test_many_objects_are_quick() -> None:
    side = 320
    labels = np.kron(np.arange(1, side * side + 1, dtype=np.int32).reshape(side, side), np.ones((5, 5), np.int32))
    labels[::5], labels[:, ::5] = 0, 0
    image = plain(np.ones(labels.shape, np.float32))
    for values, instances in ((labels, True), ((labels > 0).astype(np.uint8), False)):
        start = time.process_time()
        found = catalogue(plain(values), image, instances=instances)
        assert time.process_time() - start < 6  # half a second
        assert len(found) == side * side
        assert set(found["voxels"]) == {16}


def test_labels_may_be_floats_with_holes() -> None:
    labels = np.array([[1.0, 1.0004, np.nan, 2.0], [0.0, 255.0, np.nan, 2.0]])
    found = catalogue(plain(labels), background=[0, 255])
    assert (found["class"].tolist(), found["voxels"].tolist()) == ([1, 2], [2, 2])
    with pytest.raises(InputError, match=r"1 values of a slab are no integers, such as 0\.5"):
        catalogue(plain(np.array([[1.0, 0.5]])))
