"""Data-quality planes and weights: which pixels count, judged by astropy's bit masks and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import bitfield_to_boolean_mask, interpret_bit_flags
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from densepred.errors import InputError
from densepred.volumes import Flags, Volume, flag_plane, masked, open_volume
from tests.fits_files import TAN


def volume(array: np.ndarray, dims: int = 2) -> Volume:
    return Volume.from_array(array, (1.0,) * dims)


@given(
    arrays(
        st.sampled_from([np.uint8, np.int16, np.int32, np.int64]),
        array_shapes(min_dims=2, max_dims=2),
        elements=st.integers(0, 100),
    ),
    st.sets(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1),
)
def test_bits_are_astropys(plane: np.ndarray, bits: set[int]):
    chosen = sum(bits)
    ignored = interpret_bit_flags(~chosen & 127) if chosen != 127 else 0
    expected = bitfield_to_boolean_mask(plane, ignore_flags=ignored, good_mask_value=False)
    assert np.array_equal(Flags(bits=chosen).meant(plane), expected)


def test_without_bits_or_values_everything_but_zero_is_meant():
    assert Flags().meant(np.array([0, 1, -1, 7])).tolist() == [False, True, True, True]


def test_codes_are_compared_whole():
    plane = np.array([0, 1, 2, 3, 5])
    assert Flags(values=(1, 5)).meant(plane).tolist() == [False, True, False, False, True]
    assert Flags(bits=2, values=(1,)).meant(plane).tolist() == [False, True, True, True, False]


def test_a_plane_of_floats_may_hold_whole_numbers_and_blanks_only():
    assert Flags(bits=4).meant(np.array([0.0, 4.0, np.nan])).tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"fractions, such as 0\.5"):
        Flags().meant(np.array([0.0, 0.5]))


@pytest.mark.parametrize(("dtype", "expected"), [("u1", "f4"), ("i2", "f4"), ("u2", "f4"), ("i4", "f8"), ("f4", "f4")])
def test_masked_pixels_are_nan_and_the_others_exact(dtype: str, expected: str):
    values = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    quality = np.zeros((3, 4), np.int32)
    quality[1, 2] = 8
    weight = np.ones((3, 4), np.float32)
    weight[0, 0], weight[2, 1], weight[2, 3], weight[0, 3] = 0, -1, np.nan, np.inf
    image = masked(volume(values), volume(quality), Flags(bits=8), volume(weight))
    bad = np.zeros((3, 4), bool)
    bad[1, 2] = bad[0, 0] = bad[2, 1] = bad[2, 3] = bad[0, 3] = True
    got = image[...]
    assert got.dtype == expected == image.dtype
    assert np.array_equal(np.isnan(got), np.broadcast_to(bad, got.shape))
    assert np.array_equal(got[:, ~bad], values[:, ~bad])
    assert values.max() == 23  # the source is untouched


@given(st.data())
def test_any_part_of_a_masked_image_is_that_part_of_the_whole(data: st.DataObject):
    values = np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    quality = (np.arange(60).reshape(3, 4, 5) % 7 == 0).astype(np.uint8)
    image = masked(volume(values, 3), volume(quality, 3))
    key = tuple(
        data.draw(st.one_of(st.integers(0, size - 1), st.slices(size).filter(lambda s: s.step is None or s.step > 0)))
        for size in image.shape
    )
    assert np.array_equal(image[key], image[...][key], equal_nan=True)


def test_flags_become_a_channel_of_ones_and_zeros():
    plane = flag_plane(volume(np.array([[0, 4], [6, 2]], np.int16)), Flags(bits=4))
    assert (plane[...].tolist(), plane.dtype) == ([[[0.0, 1.0], [1.0, 0.0]]], np.dtype(np.float32))


def test_planes_must_lie_on_the_images_grid(tmp_path: Path):
    values, quality = np.ones((4, 5), np.float32), np.zeros((4, 5), np.int16)
    fits.PrimaryHDU(values, fits.Header(TAN)).writeto(tmp_path / "a.fits")
    moved = fits.Header(TAN)
    moved["CRPIX1"] += 0.5
    fits.PrimaryHDU(quality, moved).writeto(tmp_path / "dq.fits")
    image, plane = open_volume(tmp_path / "a.fits"), open_volume(tmp_path / "dq.fits")
    with pytest.raises(
        InputError, match=r"image and mask differ in world coordinates: .*dq\.fits\[0\] lie 0\.5 pixels"
    ):
        masked(image, plane)
    with pytest.raises(InputError, match="image and weight differ in shape"):
        masked(image, weight=volume(np.ones((4, 6))))
    with pytest.raises(InputError, match="a mask of 2 channels"):
        masked(image, volume(np.ones((2, 4, 5), np.uint8)))


def test_a_mask_with_fractions_is_named(tmp_path: Path):
    fits.PrimaryHDU(np.full((4, 5), 0.5, np.float32)).writeto(tmp_path / "dq.fits")
    image = masked(volume(np.ones((4, 5))), open_volume(tmp_path / "dq.fits"))
    with pytest.raises(InputError, match="no data-quality plane: holds fractions") as caught:
        image[...]
    assert caught.value.file == tmp_path / "dq.fits"


def test_every_file_of_a_masked_image_is_verified_and_closed(tmp_path: Path):
    fits.PrimaryHDU(np.ones((40, 50), np.float32)).writeto(tmp_path / "a.fits")
    fits.PrimaryHDU(np.zeros((40, 50), np.int16)).writeto(tmp_path / "dq.fits", checksum=True)
    broken = bytearray((tmp_path / "dq.fits").read_bytes())
    broken[3000] ^= 1
    (tmp_path / "dq.fits").write_bytes(broken)
    image = masked(open_volume(tmp_path / "a.fits"), open_volume(tmp_path / "dq.fits"))
    with image, pytest.raises(InputError, match="DATASUM"):
        image.numpy()
