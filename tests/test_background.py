"""Background and noise from boxes, against photutils, SExtractor's own code (sep) and a known sky."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.stats import SigmaClip
from scipy.interpolate import CubicSpline

from densepred.cases.background import BoxEstimate, MeshMap, box_edges, clipped_level
from densepred.cases.fitted import Fitted
from densepred.cases.normalize import fit
from densepred.config.normalize import Background
from densepred.errors import InputError
from densepred.volumes import Volume, open_volume

RNG = np.random.default_rng(0)


def sky(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth level and noise that are known."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    return 1000 + 8 * x - 5 * y + 2 * np.sin(4 * x + 2 * y), 5 + x + y / 2


def scene(shape: tuple[int, int], stars: int = 60) -> np.ndarray:
    """The sky with noise and stars."""
    level, noise = sky(shape)
    image = RNG.normal(level, noise)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for cy, cx, flux in zip(
        RNG.uniform(0, shape[0], stars), RNG.uniform(0, shape[1], stars), RNG.pareto(1, stars), strict=True
    ):
        image += 100 * flux * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4.5)
    return image


def fitted(image: np.ndarray, mesh: int = 32, thickness: int | None = None) -> Fitted:
    volume = Volume.from_array(image, (1.0,) * image.ndim)
    return fit(volume, [Background(mesh=mesh)], thickness=thickness)


def maps(image: np.ndarray, mesh: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Level and noise: what is normalised to 0, and its distance to what is normalised to 1."""
    found, where = fitted(image, mesh), (slice(None),) * image.ndim
    level = found.inverse(np.zeros((1, *image.shape)), where)[0]
    return level, found.inverse(np.ones((1, *image.shape)), where)[0] - level


def boxes(image: np.ndarray, mesh: int) -> tuple[np.ndarray, np.ndarray]:
    """Level and noise of the boxes, after the median filter."""
    estimate = BoxEstimate(image.shape, mesh, 3.0)
    estimate.add([image], [image])
    level = estimate.level()
    return np.asarray(level.offset)[0], np.asarray(level.scale)[0]


def peer_boxes(image: np.ndarray, mesh: int) -> tuple[np.ndarray, np.ndarray]:
    """photutils' with the settings that ours has fixed: clipped to the end, boxes that keep half of their pixels.

    Its median filter takes what there is at the edge, where SExtractor's keeps the window symmetric; so the edge is
    filtered here, along itself.
    """
    background = pytest.importorskip("photutils.background")
    clip = SigmaClip(3.0, maxiters=None)
    out = []
    for name in ("background_mesh", "background_rms_mesh"):
        plain, filtered = (
            getattr(
                background.Background2D(image, mesh, exclude_percentile=50, filter_size=size, sigma_clip=clip), name
            )
            for size in (1, 3)
        )
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            line = plain[edge]
            filtered[edge] = [np.median(line[max(0, i - 1) : i + 2]) for i in range(len(line))]
        filtered[np.ix_([0, -1], [0, -1])] = plain[np.ix_([0, -1], [0, -1])]
        out.append(filtered)
    return out[0], out[1]


@pytest.mark.filterwarnings("ignore:Input data contains non-finite")
@pytest.mark.parametrize(("shape", "mesh"), [((256, 320), 32), ((128, 192), 64), ((40, 50), 128)])
def test_boxes_equal_those_of_photutils(shape: tuple[int, int], mesh: int) -> None:
    """Also of an image smaller than a box; some pixels are invalid."""
    image = scene(shape)
    image[5:20, 10:30] = np.nan
    for ours, theirs in zip(boxes(image, mesh), peer_boxes(image, mesh), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:Input data contains non-finite")
def test_boxes_without_enough_pixels_are_filled_like_photutils() -> None:
    image = scene((256, 256))
    image[:70, 100:], image[200:, :40], image[150, 150] = np.nan, np.inf, -np.inf
    for ours, theirs in zip(boxes(image, 32), peer_boxes(image, 32), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:Input data contains non-finite")
def test_boxes_of_real_fields_equal_photutils(real_data: Path) -> None:
    files = sorted((real_data / "fits" / "labelled").rglob("*ooi*.fits*"))[:3]
    assert files
    for file in files:
        with open_volume(file) as volume:
            y, x = (25 * (size // 25) for size in volume.shape[1:])
            image = volume.numpy()[0, :y, :x].astype(np.float64)
        for ours, theirs in zip(boxes(image, 25), peer_boxes(image, 25), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.nanstd(image))


@pytest.mark.parametrize("shape", [(512, 512), (540, 479)])
def test_a_known_sky_is_found_under_stars(shape: tuple[int, int]) -> None:
    """Whether or not boxes of 64 pixels fill the image."""
    level, noise = sky(shape)
    image = scene(shape, 60)
    found_level, found_noise = maps(image, 64)
    error = (found_level - level) / noise
    assert abs(error.mean()) < 0.02
    assert np.sqrt(np.mean(error**2)) < 0.05  # the mode of 4,096 pixels has an error of about 0.04 sigma itself
    assert np.abs(error).max() < 0.3
    assert abs(np.median(found_noise / noise) - 0.986) < 0.01  # sigma of a normal distribution cut at 3 sigma


def test_maps_equal_those_of_sextractor_up_to_its_edges() -> None:
    sep = pytest.importorskip("sep")
    image = scene((512, 448), 20)
    level, noise = maps(image, 64)
    theirs = sep.Background(image, bw=64, bh=64, fw=3, fh=3)
    assert np.sqrt(np.mean(np.square((level - theirs.back()) / noise))) < 0.01
    assert np.abs((level - theirs.back()) / noise).max() < 0.1
    inner = np.s_[32:-32, 32:-32]  # beyond, ours stays within the range of the boxes
    assert np.abs(noise / theirs.rms() - 1)[inner].max() < 0.03


@pytest.mark.parametrize("thickness", [1, 7, 32, 50, 1000])
def test_slabs_of_any_thickness_give_the_same_bits(thickness: int) -> None:
    image = scene((150, 90), 10).astype(np.float32)
    where = np.s_[:, :]
    whole = fitted(image, thickness=150).forward(image[None], where)
    assert np.array_equal(fitted(image, thickness=thickness).forward(image[None], where), whole)


def test_each_plane_of_a_volume_has_its_own_maps() -> None:
    stack = np.stack([scene((64, 80), 5) * factor for factor in (1, 2, 5)])
    out = fitted(stack, thickness=2).forward(stack[None], np.s_[:, :, :])[0]
    for plane, image in zip(out, stack, strict=True):
        assert np.array_equal(plane, fitted(image).forward(image[None], np.s_[:, :])[0])


def test_a_plane_without_noise_takes_its_neighbours_map() -> None:
    stack = np.stack([np.zeros((64, 64)), scene((64, 64), 0), scene((64, 64), 0)])
    level, noise = maps(stack)
    assert np.array_equal(level[0], level[1])
    assert np.array_equal(noise[0], noise[1])


def test_padding_with_zeros_is_no_sky() -> None:
    image = scene((192, 192), 0)
    image[:, 128:] = 0
    level, noise = maps(image)
    assert level.min() > 950
    assert noise.min() > 4


def test_clipping_leaves_the_sky() -> None:
    values = np.concatenate([RNG.normal(10, 1, 5000), RNG.normal(60, 1, 300)])
    level, noise = clipped_level(values, 3.0, 100)
    assert level == pytest.approx(10, abs=0.1)
    assert noise == pytest.approx(1, abs=0.05)
    crowded = RNG.exponential(1, 4000)
    kept = SigmaClip(3.0, maxiters=None)(crowded, masked=False)
    assert clipped_level(crowded, 3.0, 0) == pytest.approx((2.5 * np.median(kept) - 1.5 * kept.mean(), kept.std()))
    for nothing in (np.ones(50), np.arange(10.0), np.empty(0)):
        assert np.isnan(clipped_level(nothing, 3.0, 10)).all()


def test_boxes_fill_an_axis_evenly() -> None:
    assert box_edges(512, 128).tolist() == [0, 128, 256, 384, 512]
    assert box_edges(5, 128).tolist() == [0, 5]
    for size in (130, 191, 193, 1000, 20_000):
        widths = np.diff(box_edges(size, 128))
        assert widths.sum() == size
        assert np.ptp(widths) <= 1


def test_a_map_keeps_a_gradient_up_to_the_edges() -> None:
    grid = np.add.outer(np.arange(12.0), 3 * np.arange(9.0))[None]
    y, x = np.arange(1200), np.arange(400, 900)
    expected = np.add.outer((y + 0.5) / 100 - 0.5, 3 * ((x + 0.5) / 100 - 0.5))
    np.testing.assert_allclose(MeshMap(grid, (100, 100)).at(0, y, x), expected, atol=1e-12)


@pytest.mark.parametrize("boxes", [1, 2, 3, 9])
def test_a_map_is_scipys_natural_spline(boxes: int) -> None:
    grid, middles = RNG.normal(size=(1, 6, boxes)), np.arange(boxes) * 11 + 5
    at = np.arange(5, 11 * boxes - 5)
    found = MeshMap(grid, (11, 11)).at(0, np.arange(5, 66, 11), at)
    if boxes == 1:
        expected = np.repeat(grid[0], len(at), axis=1)
    else:
        expected = CubicSpline(middles, grid[0], axis=1, bc_type="natural")(at)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_bounded_map_does_not_swing_over() -> None:
    jump = np.repeat([0.0, 1.0], 3)[None, :, None] * np.ones((1, 6, 6))
    pixels = np.arange(60)
    assert MeshMap(jump, (10, 10)).at(0, pixels, pixels).min() < 0
    bounded = MeshMap(jump, (10, 10), bounded=True).at(0, pixels, pixels)
    assert bounded.min() == 0
    assert bounded.max() == 1


def test_an_image_without_noise_is_refused() -> None:
    image = np.zeros((64, 64))
    image[10, 10] = 5
    with pytest.raises(InputError, match="background finds no scale in channel 0: values span 0 to 5"):
        fitted(image)
