"""Normalisation against closed forms, numpy, astropy and nnU-Net's formula; forward and back; tiles and slabs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from astropy.visualization import AsinhStretch, SqrtStretch, ZScaleInterval
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from densepred.cases.normalize import fit
from densepred.config.normalize import (
    Anscombe,
    Asinh,
    Background,
    CTWindow,
    NoNormalization,
    Normalize,
    Percentile,
    Robust,
    ZScale,
    ZScore,
)
from densepred.errors import InputError
from densepred.volumes import Volume, open_volume
from tests.normalize_images import FIXED, INVERTIBLE, PER_CASE, RNG, fitted, forward, name_of, picture, valid, whole

# against others


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i2", "u1", "u2", "i4", "u8", ">f4"])
def test_zscore_is_the_closed_form_bit_for_bit(dtype: str) -> None:
    array = picture(dtype=dtype)
    values = valid(array)
    expected = ((array.astype(np.float64) - values.mean()) * (1 / values.std())).astype(np.float32)
    out = forward(array, ZScore())
    assert out.dtype == np.float32
    assert np.array_equal(out, np.where(np.isfinite(array), expected, np.nan), equal_nan=True)


def test_zscore_is_sound_far_from_zero() -> None:
    """The textbook sum of squares would lose every digit here."""
    array = np.tile([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16], (1, 30, 1))
    found = fitted(array, ZScore(), thickness=1).describe()[0]
    assert found["offset"] == 1e9 + 10
    assert found["scale"] == pytest.approx(np.sqrt(22.5), rel=1e-9)


def test_robust_is_median_and_quartiles() -> None:
    array = picture()
    low, median, high = np.quantile(valid(array), (0.25, 0.5, 0.75))
    expected = (array.astype(np.float64) - median) / ((high - low) / 1.349)
    np.testing.assert_allclose(forward(array, Robust())[np.isfinite(array)], expected[np.isfinite(array)], rtol=1e-6)
    normal = RNG.normal(3, 7, (1, 300, 300))
    assert fitted(normal, Robust()).describe()[0]["scale"] == pytest.approx(7, rel=0.02)  # five deviations


@pytest.mark.parametrize("softening", [0.1, 1.0, 10.0])
def test_asinh_is_astropys_stretch_in_units_of_the_noise(softening: float) -> None:
    array = picture()
    low, median, high = np.quantile(valid(array), (0.25, 0.5, 0.75))
    units = (valid(array) - median) / ((high - low) / 1.349)
    expected = AsinhStretch(softening)(np.abs(units), clip=False) * np.sign(units)
    out = forward(array, Asinh(softening=softening))
    np.testing.assert_allclose(out[np.isfinite(array)], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 20, 30), (1, 33, 31), (1, 70, 60), (1, 9, 40, 31)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "u2"])
def test_zscale_limits_are_astropys_own(shape: tuple[int, ...], dtype: str) -> None:
    """Fewer voxels than samples, a stride of one and more; with invalid voxels; whatever the slabs."""
    array = picture(shape, dtype)
    low, high = ZScaleInterval().get_limits(array[0])
    for thickness in (1, 4, 1000):
        found = fitted(array, ZScale(), thickness=thickness)
        assert found.describe()[0]["offset"] == low
        assert found.describe()[0]["scale"] == high - low
    expected = ZScaleInterval()(array[0].astype(np.float64), clip=False)
    kept = np.isfinite(array[0])
    np.testing.assert_allclose(found.forward(array, whole(array))[0][kept], expected[kept], rtol=1e-6, atol=1e-6)


def test_zscale_settings_and_joint_sampling_are_astropys() -> None:
    array = picture((3, 50, 41))
    interval = ZScaleInterval(n_samples=300, contrast=0.1)
    found = fitted(array, *[ZScale(samples=300, contrast=0.1, joint=True)] * 3, thickness=7)
    low, high = interval.get_limits(array)
    assert [(each["offset"], each["scale"]) for each in found.describe()] == [(low, high - low)] * 3


def test_zscale_of_real_images_is_astropys(real_data: Path) -> None:
    files = sorted((real_data / "fits" / "labelled").rglob("*ooi*.fits*"))
    assert files
    for file in files:
        with open_volume(file) as volume:
            low, high = ZScaleInterval().get_limits(volume.numpy()[0])
            found = fit(volume, [ZScale()]).describe()[0]
        assert (found["offset"], found["offset"] + found["scale"]) == pytest.approx((low, high), rel=1e-12)


def test_percentiles_are_numpys_and_clipped() -> None:
    array = picture()
    low, high = np.percentile(valid(array), (2, 97))
    expected = np.clip((valid(array) - low) / (high - low), 0, 1)
    out = forward(array, Percentile(low=2, high=97))[np.isfinite(array)]
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert (out.min(), out.max()) == (0, 1)
    assert forward(array, Percentile(low=2, high=97, clip=False))[np.isfinite(array)].max() > 1


def test_ct_window_is_nnunets_formula() -> None:
    hounsfield = RNG.integers(-1024, 3000, (1, 9, 20, 21)).astype(np.int16)
    expected = hounsfield.astype(np.float32)
    np.clip(expected, -958, 1827, out=expected)
    expected -= np.float32(70.9)
    expected /= np.float32(178.3)
    out = forward(hounsfield, CTWindow(low=-958, high=1827, mean=70.9, std=178.3))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_anscombe_is_the_square_root_that_makes_poisson_noise_one() -> None:
    counts = RNG.poisson(30, (1, 200, 200))
    image = counts / 2.5 + 100
    out = forward(image, Anscombe(gain=2.5, offset=100))
    np.testing.assert_allclose(out, 2 * SqrtStretch()(counts + 0.375, clip=False), rtol=1e-6)
    assert out.std() == pytest.approx(1, abs=0.02)
    assert forward(np.full((1, 2, 2), -7.0), Anscombe()).tolist() == [[[0, 0], [0, 0]]]


def test_none_keeps_the_values() -> None:
    array = picture(dtype="f8")
    assert np.array_equal(
        forward(array, NoNormalization()), np.where(np.isfinite(array), array, np.nan).astype("f4"), True
    )


# forward and back


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["f4", "f8"]),
        st.tuples(st.just(1), st.integers(2, 12), st.integers(2, 12)),
        elements=st.floats(-(2**20), 2**20, width=32) | st.just(np.nan) | st.just(np.inf),
    ),
    st.sampled_from(INVERTIBLE),
)
def test_the_inverse_gives_the_values_back(array: np.ndarray, method: Normalize) -> None:
    try:
        found = fitted(array, method)
    except InputError:  # nothing valid, or no scale
        return
    out = found.forward(array, whole(array))
    back = found.inverse(out.astype(np.float64), whole(array))
    kept = np.isfinite(array)
    if method.name == "anscombe":
        kept &= np.nan_to_num(array) > -40
    assert np.array_equal(np.isnan(out), ~np.isfinite(array))
    assert back.dtype == np.float64
    # float32 in between costs half a unit in its last place, which the slope of asinh makes up to 30 times more
    origin = found.inverse(np.zeros(array.shape), whole(array))
    units = 64 if method.name == "asinh" else 4
    with np.errstate(invalid="ignore"):
        allowed = units * 2.0**-24 * np.abs(array - origin) + 1e-12 * (np.abs(array) + np.abs(origin)) + 1e-30
        assert (np.abs(back - array) <= allowed)[kept].all()


@pytest.mark.parametrize("method", [*INVERTIBLE, FIXED[0]], ids=name_of)
def test_the_inverse_is_exact_in_float64(method: Normalize) -> None:
    """Against values that were never rounded to float32; a window gives its ends back."""
    array = picture((1, 64, 48), "f8")
    found, where = fitted(array, method), whole(array)
    level = found.inverse(np.zeros(array.shape), where)
    once = found.inverse(np.full(array.shape, 0.25), where)
    np.testing.assert_allclose(found.forward(level, where), 0, atol=1e-6)
    np.testing.assert_allclose(found.forward(once, where), 0.25, rtol=1e-6)
    expected = np.clip(array, -50, 160) if isinstance(method, CTWindow) else array
    back = found.inverse(found.forward(array, where), where)
    kept = np.isfinite(array)
    np.testing.assert_allclose(back[kept], expected[kept], rtol=1e-5)


@pytest.mark.parametrize("method", PER_CASE, ids=name_of)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, -5e8])
def test_constant_channels_give_zeros(method: Normalize, value: float) -> None:
    array = np.full((1, 40, 50), value)
    array[0, 3, 4] = np.nan
    found = fitted(array, method)
    out = found.forward(array, whole(array))
    assert np.isnan(out[0, 3, 4])
    assert not found.fill(out, "zero", whole(array)).any()
    assert (found.inverse(out, whole(array)) == value).all()
    assert not forward(np.full((1, 5, 6), 7, np.uint8), method).any()


# tiles, slabs, channels


@pytest.mark.parametrize("method", [*PER_CASE, *FIXED], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 70, 60), (2, 7, 33, 40)])
def test_slabs_and_tiles_equal_the_whole(method: Normalize, shape: tuple[int, ...]) -> None:
    array = picture(shape)
    found = fitted(array, method, method, thickness=1000)
    expected = found.forward(array, whole(array))
    for thickness in (1, 3, 32):
        out = fitted(array, method, method, thickness=thickness).forward(array, whole(array))
        np.testing.assert_allclose(out, expected, rtol=1e-6 if method.name == "zscore" else 0, atol=1e-7)
    for tile in (np.s_[2:5, 7:30], np.s_[4:, ::3], np.s_[:1, -9:]):
        where = (*tile[:1], slice(None), tile[1]) if len(shape) == 4 else tile
        key = (slice(None), *where)
        assert np.array_equal(found.forward(array[key], where), expected[key], equal_nan=True)
        back = found.inverse(expected, whole(array))
        assert np.array_equal(found.inverse(expected[key], where), back[key], equal_nan=True)


def test_each_channel_has_its_own_method_and_can_be_picked() -> None:
    array = picture((9, 40, 33))
    chosen = [*PER_CASE, *FIXED]
    found = fitted(array, *chosen, thickness=5)
    out = found.forward(array, whole(array))
    for channel, method in enumerate(chosen):
        alone = forward(array[channel : channel + 1], method)
        np.testing.assert_allclose(out[channel], alone[0], rtol=1e-6, atol=1e-7)
    assert found.valid == (40 * 33 - 6,) * 9
    some = found.pick([7, 2])
    assert np.array_equal(some.forward(array[[7, 2]], whole(array)), out[[7, 2]], equal_nan=True)
    assert [each["name"] for each in some.describe()] == ["anscombe", "background"]


def test_joint_channels_share_one_set_of_parameters() -> None:
    array = picture((3, 64, 64)) * np.array([1, 3, 10], "f4")[:, None, None]
    values = valid(array)
    mean, *_ = fitted(array, *[ZScore(joint=True)] * 3).describe()
    assert (mean["offset"], mean["scale"]) == pytest.approx((values.mean(), values.std()))
    middle = fitted(array, Robust(joint=True), NoNormalization(), Robust(joint=True)).describe()
    assert middle[0]["offset"] == middle[2]["offset"] == np.median(valid(array[[0, 2]]))
    limits = fitted(array, *[Percentile(joint=True)] * 3).describe()[1]
    assert limits["offset"] == np.quantile(values, 0.005)
    boxes = fitted(array, *[Background(mesh=32, joint=True)] * 3).describe()
    assert boxes[0] == boxes[1] == boxes[2]


def test_a_joint_scale_keeps_colours_and_takes_the_offsets_away() -> None:
    array = picture((3, 64, 64), "f8") * np.array([1, 3, 10])[:, None, None] + np.array([0, 50, -20])[:, None, None]
    for method in (m.model_copy(update={"joint": "scale"}) for m in PER_CASE[:3]):
        found, own = fitted(array, *[method] * 3), fitted(array, *[method.model_copy(update={"joint": False})] * 3)
        out = found.inverse(np.ones(array.shape), whole(array)) - found.inverse(np.zeros(array.shape), whole(array))
        each = own.inverse(np.ones(array.shape), whole(array)) - own.inverse(np.zeros(array.shape), whole(array))
        zero = [f.inverse(np.zeros(array.shape), whole(array)) for f in (found, own)]
        np.testing.assert_allclose(zero[0], zero[1], atol=1e-9)
        np.testing.assert_allclose(out[0], out[2], rtol=1e-9)
        if method.name != "background":
            np.testing.assert_allclose(out, np.broadcast_to(np.sqrt(np.mean(each**2, axis=0)), out.shape), rtol=1e-9)


def test_a_constant_channel_beside_others_with_a_joint_scale() -> None:
    array = picture((2, 64, 64), "f8")
    array[1] = 9
    for method in (m.model_copy(update={"joint": "scale"}) for m in PER_CASE):
        out = forward(array, method, method)
        assert not out[1].any()
        assert np.nanstd(out[0]) > 0.1


def test_memory_stays_with_the_slab() -> None:
    class Lazy:
        """32 MB that are made as they are read."""

        shape, dtype = (1, 512, 128, 128), np.dtype(np.float32)

        def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
            planes = np.arange(*key[1].indices(512), dtype=np.float32)
            return (planes[:, None, None] + np.arange(128 * 128, dtype=np.float32).reshape(128, 128) % 97)[None]

    volume = Volume(Lazy(), (1.0, 1.0, 1.0))
    for method in (*PER_CASE[:2], Background(mesh=64), *PER_CASE[3:]):
        tracemalloc.start()
        fit(volume, [method], thickness=8)
        assert tracemalloc.get_traced_memory()[1] < 8e6, method.name
        tracemalloc.stop()


# invalid voxels


def test_fill() -> None:
    rows = np.array([[np.nan, 1, np.nan, np.nan, 4, np.nan], [np.nan] * 6, [0, 1, np.inf, 3, 9, 9]])[None]
    found, where = fitted(rows, Asinh(), median=True), whole(rows)
    out = found.forward(rows, where)
    good = np.isfinite(rows)
    zero = found.fill(out.copy(), "zero", where)
    assert np.array_equal(zero, np.where(good, out, 0))
    median = found.fill(out.copy(), "median", where)
    assert np.array_equal(median, np.where(good, out, found.forward(np.full(rows.shape, 3.0), where)))
    nearest = found.fill(out.copy(), "nearest", where)
    one, four = out[0, 0, 1], out[0, 0, 4]
    assert nearest[0, 0].tolist() == [one, one, one, four, four, four]
    assert not nearest[0, 1].any()
    assert nearest[0, 2].tolist() == [*out[0, 2, :2], out[0, 2, 1], *out[0, 2, 3:]]


def test_the_median_of_a_background_is_taken_where_it_stands() -> None:
    array = picture((1, 64, 64), "f8")
    found = fitted(array, Background(mesh=16), median=True)
    out = found.fill(found.forward(array, whole(array)), "median", whole(array))
    same = found.forward(np.where(np.isfinite(array), array, np.median(valid(array))), whole(array))
    assert np.array_equal(out, same)
