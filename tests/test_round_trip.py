"""Reader and writer undo each other: nibabel's and astropy's files through ours, and opened by them again.

Over types, shapes, byte orders, scalings, compressions and geometries: affines bit for bit, and places on the sky to
1e-6 pixel. The many cases of one format alone are in its own tests.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.nddata import block_reduce
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from torch import Tensor, nn

from densepred.cases.case import Case
from densepred.config import Config
from densepred.inference.predictor import Predictor
from densepred.volumes import open_volume
from densepred.volumes.grid import binned, cutout
from tests.case_files import plan
from tests.drawn_arrays import COMMON
from tests.fits_files import astropy_values, patched, save_many
from tests.nifti_files import GEOMETRY_FIELDS, load_nib
from tests.test_fits_cut import HEADERS, SIP

KINDS = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def drawn(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits, NaN and infinity among them; of 64-bit integers those that 32 bits hold, which we write."""
    generator = np.random.default_rng(seed)
    dtype = np.dtype(kind)
    if dtype.itemsize == 8 and dtype.kind in "iu":
        return generator.integers(0, 2**31, shape).astype(dtype)
    values = np.frombuffer(generator.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    with np.errstate(invalid="ignore"):
        return values + dtype.type(0) if dtype.kind == "f" else values  # quiet NaN: others change when they are copied


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal values; the bits of numbers, and NaN where NaN is."""
    assert ours.shape == theirs.shape
    if ours.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        ours, theirs = (np.where(np.isnan(array), 0, array).astype(ours.dtype) for array in (ours, theirs))
    assert ours.astype(ours.dtype.newbyteorder("<")).tobytes() == theirs.astype(ours.dtype.newbyteorder("<")).tobytes()


def affine_of(geometry: str, seed: int) -> np.ndarray:
    """One of the 48 orientations, or one of them turned, or sheared."""
    generator = np.random.default_rng(seed)
    order, signs = ORIENTATIONS[seed % 48]
    matrix = np.diag(generator.uniform(0.3, 5, 3) * signs)[:, order]
    if geometry != "straight":
        turned = np.linalg.qr(generator.normal(size=(3, 3)))[0]
        matrix = turned @ matrix
    if geometry == "sheared":
        matrix = matrix @ (np.eye(3) + np.triu(generator.uniform(-0.4, 0.4, (3, 3)), 1))
    return nib.affines.from_matvec(matrix, generator.normal(0, 100, 3))


def nibabel_file(path: Path, values: np.ndarray, affine: np.ndarray, forms: str, header: Any, scaling: Any) -> Any:
    """Written by nibabel; the stored numbers are `values` whatever the scaling is. Gives its image."""
    header.set_xyzt_units("micron" if forms == "qform" else "mm", "sec")
    kind = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    made = kind(values, None, header, dtype=values.dtype)
    straight = nib.affines.from_matvec(np.linalg.qr(affine[:3, :3])[0] * [1.1, 2.2, 3.3], affine[:3, 3])
    made.set_qform(affine if forms == "both" else straight, 2 if forms in ("qform", "both", "apart") else 0)
    made.set_sform(affine, 4 if forms in ("sform", "both", "apart") else 0)
    made.header.set_slope_inter(*scaling)
    made.to_filename(path)
    return load_nib(path)


@settings(**COMMON | {"max_examples": 100})
@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple),
    big=st.booleans(),
    scaling=st.sampled_from([(1, 0), (1, 0), (0.1, -1024), (-3.5, 7), (1, 1), (1e-3, 0)]),
    geometry=st.sampled_from(["straight", "oblique", "sheared"]),
    forms=st.sampled_from(["sform", "qform", "both", "apart", "neither"]),
    suffixes=st.tuples(*[st.sampled_from([".nii", ".nii.gz"])] * 2),
    header=st.sampled_from([Nifti1Header, Nifti2Header]),
    seed=st.integers(0, 999),
)
def test_nifti_through_us_is_nibabels(
    tmp_path: Path,
    kind: str,
    shape: tuple,
    big: bool,
    scaling: tuple,
    geometry: str,
    forms: str,
    suffixes: tuple,
    header: type,
    seed: int,
) -> None:
    stored = drawn(kind, shape, seed)
    source, target = tmp_path / f"in{suffixes[0]}", tmp_path / f"out{suffixes[1]}"
    made = header(endianness=">" if big else "<")
    theirs = nibabel_file(source, stored, affine_of(geometry, seed), forms, made, scaling)
    assert theirs.header.endianness == (">" if big else "<")
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # forms that disagree; overflow
        volume = open_volume(source, "xyzc" if len(shape) == 4 else None)
        values = volume.numpy()
        expected = theirs.get_fdata() if scaling != (1, 0) else np.asarray(theirs.dataobj)
        same_bits(values.reshape(shape[::-1]), expected.T.astype(values.dtype))
        np.testing.assert_array_equal(volume.affine, theirs.affine)
        sizes = nib.affines.voxel_sizes(theirs.affine)[: volume.dims]
        np.testing.assert_allclose(volume.spacing, sizes[::-1], rtol=1e-12)
        volume.save(target)
    ours = load_nib(target)
    assert (type(ours), ours.shape) == (type(theirs), theirs.shape)
    assert ours.get_data_dtype() == values.dtype or np.dtype(kind) in (np.int64, np.uint64)
    same_bits(np.asarray(ours.dataobj).astype(values.dtype), values.reshape(shape[::-1]).T)
    for field in (*GEOMETRY_FIELDS, "pixdim"):
        same_bits(ours.header[field], theirs.header[field])
    np.testing.assert_array_equal(ours.affine, theirs.affine)


def _cards(header: fits.Header) -> dict[str, Any]:
    return {
        card.keyword: card.value for card in header.cards if not card.keyword.startswith(("SIMPLE", "BITPIX", "NAXIS"))
    }


SKIES: dict[str, dict[str, Any]] = {
    **{name: _cards(header) for name, header in HEADERS.items()},
    "all-sky galactic": {
        **{"CTYPE1": "GLON-CAR", "CTYPE2": "GLAT-CAR", "CRVAL1": 12.0, "CRVAL2": 0.0, "CRPIX1": 3.0, "CRPIX2": 4.0},
        **{"CDELT1": -0.1, "CDELT2": 0.1, "CUNIT1": "deg", "CUNIT2": "deg"},
    },
    "swapped": {
        **{"CTYPE1": "DEC--SIN", "CTYPE2": "RA---SIN", "CRVAL1": -30.0, "CRVAL2": 359.9999, "CRPIX1": 4.0},
        **{"CD1_1": 1e-4, "CD1_2": 2e-5, "CD2_1": -3e-5, "CD2_2": 1e-4, "LONPOLE": 170.0, "RADESYS": "FK5"},
    },
    "spectral and Stokes axes": {
        **_cards(HEADERS["TAN with CDELT"]),
        **{"CTYPE3": "FREQ", "CRVAL3": 1.4e9, "CDELT3": 1e6, "CRPIX3": 2.0, "CUNIT3": "Hz", "RESTFRQ": 1.42e9},
        **{"CTYPE4": "STOKES", "CRVAL4": 1.0, "CDELT4": 1.0, "CRPIX4": 1.0, "SPECSYS": "BARYCENT"},
    },
    "none": {"OBJECT": "lamp"},
}
"""Cards of world coordinates of every kind."""
PACKINGS = ("none", ".gz", ".bz2", "GZIP_1", "GZIP_2", "RICE_1", "HCOMPRESS_1", "PLIO_1")
SCALINGS: dict[str, dict[str, Any]] = {
    **{"none": {}, "scaled": {"BSCALE": 0.25, "BZERO": -3.0}, "offset": {"BSCALE": 1.0, "BZERO": 1e5}},
    **{"blank": {"BLANK": 7}, "scaled with blank": {"BSCALE": -2.5, "BZERO": 0.0, "BLANK": 7}},
}


def apart(before: fits.Header, after: fits.Header, start: tuple[int, int] = (0, 0), factor: int = 1) -> float:
    """Pixels by which corners and centre moved, in the primary and every alternate WCS, by astropy.

    Args:
        before: of the source.
        after: of what was written: of the blocks of `factor` pixels from `start` (x, y).
    """
    distances = []
    for key in "A" * ("CTYPE1A" in before) + " ":
        old, new = (_wcs(header, key) for header in (before, after))
        assert old.naxis == new.naxis
        sizes = [after[f"NAXIS{axis}"] for axis in (1, 2)]
        spots = [*itertools.product(*((0, size - 1) for size in sizes)), tuple((size - 1) / 2 for size in sizes)]
        points = np.zeros((5, old.naxis))
        points[:, :2] = spots
        world = new.all_pix2world(points, 0)
        back = old.all_world2pix(world, 0, tolerance=1e-9) if old.naxis == 2 else old.wcs_world2pix(world, 0)
        points[:, :2] = (points[:, :2] + 0.5) * factor - 0.5 + start
        distances.append(np.abs(back - points).max())
    return float(max(distances))


def _wcs(header: fits.Header, key: str) -> WCS:
    header = header.copy()
    if key == "A":  # SIP is the primary's alone; astropy would use it here too
        for card in SIP:
            header.remove(card, ignore_missing=True)
    flat = 2 if "A_ORDER" in header else None  # SIP is of two axes to astropy
    with warnings.catch_warnings(action="ignore"):
        return WCS(header, key=key, naxis=flat)


def astropy_file(path: Path, stored: np.ndarray, cards: dict, packing: str, scaling: dict) -> Path:
    """Written by astropy, in an extension; its stored numbers are `stored`."""
    if packing in ("none", ".gz", ".bz2"):
        save_many(path, fits.ImageHDU(stored, fits.Header(cards), name="SCI"))
    else:
        tile = (*[1] * (stored.ndim - 2), *stored.shape[-2:])
        options: dict[str, Any] = {"compression_type": packing, "quantize_level": 0, "tile_shape": tile}
        save_many(path, fits.CompImageHDU(stored, fits.Header(cards), name="SCI", **options))
    if scaling:
        patched(path, 1, **scaling)
    if packing in (".gz", ".bz2"):
        pack = {".gz": "gzip", ".bz2": "bz2"}[packing]
        packed = path.with_name(path.name + packing)
        packed.write_bytes(__import__(pack).compress(path.read_bytes()))
        return packed
    return path


@settings(**COMMON | {"max_examples": 100})
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    leading=st.sampled_from([(), (), (1,), (3,), (1, 1), (1, 3), (2, 3)]),
    swapped=st.booleans(),
    scaling=st.sampled_from(list(SCALINGS)),
    sky=st.sampled_from(list(SKIES)),
    packing=st.sampled_from(PACKINGS),
    suffix=st.sampled_from([".fits", ".fits.gz", ".fits.fz"]),
    axes=st.sampled_from(["zyx", "cyx"]),
    seed=st.integers(0, 999),
)
def test_fits_through_us_is_astropys(
    tmp_path: Path,
    kind: str,
    shape: tuple,
    leading: tuple,
    swapped: bool,
    scaling: str,
    sky: str,
    packing: str,
    suffix: str,
    axes: str,
    seed: int,
) -> None:
    if packing in ("RICE_1", "HCOMPRESS_1", "PLIO_1") and kind not in ("u1", "i2", "i4"):
        kind = "i4"
    if kind not in ("u1", "i2", "i4"):
        scaling = "none"  # unsigned and signed bytes are BZERO's doing
    if packing == "HCOMPRESS_1":  # takes tiles of 4 x 4 and larger
        shape = (shape[0] + 3, shape[1] + 3)
    stored = drawn(kind, (*leading, *shape), seed)
    if packing in ("HCOMPRESS_1", "PLIO_1"):  # sums four; astropy's encoder takes small numbers only
        stored = np.abs(stored.astype(np.int64)) % (1 << 23 if kind == "i4" and packing[0] == "H" else 1 << 7)
    stored = stored.astype(np.dtype(kind).newbyteorder("S" if swapped else "="))
    path = astropy_file(tmp_path / "in.fits", stored, SKIES[sky], packing, SCALINGS[scaling])
    before, squeezed = header_of(path), tuple(size for size in leading if size > 1)
    with open_volume(path, {(): None, (3,): axes, (2, 3): "czyx"}[squeezed]) as volume:
        values = volume.numpy()
        theirs = astropy_values(path, 1)
        if scaling == "none":
            assert values.dtype == np.dtype(kind)
        same_bits(values.reshape(theirs.shape), theirs.astype(values.dtype))
        window = (slice(None), *(slice(1, -1) if size > 2 else slice(None) for size in volume.shape[1:]))
        np.testing.assert_array_equal(volume[window], values[window])
        np.testing.assert_array_equal(np.concatenate([slab for *_, slab in volume.slabs(2)], 1), values)
        if values.dtype.itemsize == 8 and suffix == ".fits.fz" and values.dtype.kind != "f":
            suffix = ".fits"
        volume.save(tmp_path / f"out{suffix}")
    after, written = header_of(tmp_path / f"out{suffix}"), astropy_values(tmp_path / f"out{suffix}", 1)
    same_bits(written.astype(values.dtype), values.reshape(theirs.shape))
    assert written.dtype.newbyteorder("=") == values.dtype or kind in ("i1", "i8", "u8")
    assert {card: after[card] for card in SKIES[sky]} == {card: before[card] for card in SKIES[sky]}
    assert sky == "none" or apart(before, after) < 1e-6


def header_of(path: Path) -> fits.Header:
    """Of the image in the first extension."""
    with warnings.catch_warnings(action="ignore"):
        return fits.getheader(path, 1)


class Threshold(nn.Module):
    """A network that marks what is above 0."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, *spatial) to logits (B, 2, *spatial)."""
        return torch.cat([-x, x], 1)


def predictor(dims: int) -> Predictor:
    """One that needs no training, so that it is known where every label belongs."""
    config = Config.model_validate({"patch": {"size": (8,) * dims}, "inference": {"device": "cpu"}})
    classes = {"classes": ("sky", "source"), "values": (0, 7), "label_map": {0: 0, 7: 1}}
    return Predictor(Threshold(), config, plan(dims=dims, normalize=("none",), **classes), "")  # type: ignore[arg-type]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_every_orientation_goes_through_a_prediction(tmp_path: Path, order: tuple, signs: tuple) -> None:
    affine = nib.affines.from_matvec((np.diag([0.7, 1.3, 2.9]) * signs)[:, order], (-33.3, 7.1, 0.013))
    values = np.random.default_rng(0).normal(0, 1, (9, 5, 11)).astype(np.float32)
    source = nibabel_file(tmp_path / "in.nii", values, affine, "both", Nifti1Header(), (1, 0))
    assert nib.aff2axcodes(source.affine) == nib.aff2axcodes(affine)
    volume = open_volume(tmp_path / "in.nii")
    np.testing.assert_allclose(volume.spacing, np.array([0.7, 1.3, 2.9])[list(order)][::-1], rtol=1e-6)
    paths = {"labels": tmp_path / "labels.nii", "probabilities": tmp_path / "probabilities.nii.gz"}
    predictor(3).predict_file(Case("in", (tmp_path / "in.nii",)), paths)
    np.testing.assert_array_equal(np.asarray(load_nib(paths["labels"]).dataobj), 7 * (values > 0))
    assert load_nib(paths["probabilities"]).shape == (9, 5, 11, 2)
    for path in paths.values():
        np.testing.assert_array_equal(load_nib(path).affine, source.affine)
        for field in GEOMETRY_FIELDS:
            same_bits(load_nib(path).header[field], source.header[field])


@pytest.mark.parametrize("sky", [sky for sky in SKIES if sky != "none"])
def test_the_sky_stays_through_prediction_cutout_and_binning(tmp_path: Path, sky: str) -> None:
    values = np.random.default_rng(0).normal(0, 1, (1, 1, 21, 18) if "axes" in sky else (21, 18)).astype(np.float32)
    path = astropy_file(tmp_path / "in.fits", values, SKIES[sky], "none", {})
    before = header_of(path)
    paths = {"labels": tmp_path / "labels.fits.fz", "probabilities": tmp_path / "probabilities.fits"}
    predictor(2).predict_file(Case("in", (path,)), paths)
    np.testing.assert_array_equal(astropy_values(paths["labels"], 1), 7 * (values > 0))
    assert apart(before, header_of(paths["labels"])) < 1e-6
    for number in (1, 2):
        assert apart(before, fits.getheader(paths["probabilities"], number)) < 1e-6
    part = cutout(open_volume(path), [(5, 20), (3, 17)])
    predictor(2).predict(part).save(tmp_path / "part.fits.gz")
    np.testing.assert_array_equal(astropy_values(tmp_path / "part.fits.gz", 1), 7 * (values > 0)[..., 5:20, 3:17])
    assert apart(before, header_of(tmp_path / "part.fits.gz"), (3, 5)) < 1e-6
    if sky == "TPV":  # which is refused
        return
    coarse = binned(part, 2)
    predictor(2).predict(coarse).save(tmp_path / "coarse.fits")
    means = block_reduce(values[..., 5:20, 3:17].squeeze(), 2, np.mean)
    np.testing.assert_array_equal(astropy_values(tmp_path / "coarse.fits", 1).squeeze(), 7 * (means > 0))
    assert apart(before, header_of(tmp_path / "coarse.fits"), (3, 5), 2) < 1e-6
