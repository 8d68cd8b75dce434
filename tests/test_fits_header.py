"""World coordinates of FITS images: as astropy has them, and compared between channels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable

from densepred.errors import InputError
from densepred.volumes import open_volume, stack
from densepred.volumes.fits_header import FitsHeader, wcs_offset
from tests.fits_files import RNG, TAN, astropy_values, image, pixels, save, save_many
from tests.test_fits_cut import HEADERS, five


def header_of(shape: tuple[int, ...] = (24, 40), **cards: object) -> FitsHeader:
    return FitsHeader(fits.Header(TAN | cards), 0, "", 1, shape)


@pytest.mark.parametrize("moved", [0.0, 0.05, 0.3, 7.0])
def test_the_offset_of_two_images_is_in_pixels(moved: float) -> None:
    other = header_of(CRPIX1=TAN["CRPIX1"] + 0.6 * moved, CRPIX2=TAN["CRPIX2"] + 0.8 * moved)
    assert wcs_offset(header_of(), other) == pytest.approx(moved, abs=1e-6)
    turned = header_of(CRVAL1=TAN["CRVAL1"] - 360)
    assert wcs_offset(header_of(), turned) == pytest.approx(0, abs=1e-6)
    cube = FitsHeader(fits.Header(TAN), 0, "", 1, (1, 1, 24, 40), (0, 1))
    assert wcs_offset(cube, other) == pytest.approx(moved, abs=1e-6)


def test_the_offset_between_systems_is_astropys(real_data: Path) -> None:
    from astropy.coordinates import SkyCoord
    from astropy.wcs.utils import skycoord_to_pixel

    place = SkyCoord(TAN["CRVAL1"], TAN["CRVAL2"], unit="deg").galactic
    galactic = header_of(CTYPE1="GLON-TAN", CTYPE2="GLAT-TAN", CRVAL1=place.l.deg, CRVAL2=place.b.deg)
    distances = []
    for spot in ((0, 0), (39, 0), (0, 23), (39, 23), (19.5, 11.5)):
        there = skycoord_to_pixel(galactic.wcs.pixel_to_world(*spot), header_of().wcs)
        distances.append(np.hypot(there[0] - spot[0], there[1] - spot[1]))
    assert wcs_offset(header_of(), galactic) == pytest.approx(max(distances), rel=1e-6)
    assert wcs_offset(header_of(), header_of(CTYPE1="XLIN", CTYPE2="YLIN", CUNIT1="m", CUNIT2="m")) == np.inf
    bare = FitsHeader(fits.Header(), 0, "", 1, (24, 40))
    assert wcs_offset(header_of(), bare) == 0
    with pytest.raises(ValueError, match="spatial shapes must agree"):
        wcs_offset(header_of(), header_of((24, 41)))


def test_real_planes_of_one_exposure_agree_and_others_do_not(real_data: Path) -> None:
    folder = real_data / "fits" / "labelled" / "mzlsbass2"
    planes = [open_volume(folder / f"ksb_170430_055945_{kind}_r_ls9.CCD4.fits") for kind in ("ooi", "oow", "ood")]
    both = stack(planes)
    assert both.shape == (3, 119, 118)
    np.testing.assert_array_equal(both.numpy()[2], planes[2].numpy()[0])
    other = open_volume(folder / "ksb_180313_081856_ooi_g_ls9.CCD4.fits")
    with pytest.raises(InputError, match=r"ls9.CCD4.fits\[1\] and .*\[1\] lie \d+(\.\d+)? pixels apart") as caught:
        stack([planes[0], other])
    assert caught.value.exit_code == 2


def test_the_header_keeps_what_the_hdu_has(tmp_path: Path) -> None:
    path = save_many(tmp_path / "x.fits", image(pixels((24, 40)), "SCI", 3, **TAN, OBJECT="M 13"))
    header = open_volume(path).header
    assert isinstance(header, FitsHeader)
    assert header.header["OBJECT"] == "M 13"
    assert header.path == path
    assert header.pixel_scale == ((0.2, "arcsec"), (0.2, "arcsec"))
    np.testing.assert_allclose(
        header.wcs.all_pix2world([[19.5, 11.5]], 0), [[TAN["CRVAL1"], TAN["CRVAL2"]]], rtol=1e-12
    )
    assert header.spatial_axes == (0, 1)


@pytest.mark.parametrize("name", ["SIP", "TPV", "TAN with CD"])
def test_a_third_axis_does_not_hide_a_distortion(name: str) -> None:
    flat = HEADERS[name]
    cube = flat.copy()
    cube["NAXIS"], cube["NAXIS3"] = 3, 1
    spots = five((240, 320))
    header = FitsHeader(cube, 0, "", 1, (1, 240, 320), (0,))
    with warnings.catch_warnings(action="ignore"):
        expected = WCS(flat).all_pix2world(spots, 0)
    np.testing.assert_allclose(header.spatial_wcs.all_pix2world(spots, 0), expected, rtol=0, atol=1e-12)
    assert wcs_offset(header, FitsHeader(flat, 0, "", 1, (240, 320))) < 1e-9
    assert len(header.pixel_scale) == 2


def test_tables_of_distortions_are_read_from_the_file(tmp_path: Path) -> None:
    wcs = WCS(fits.Header(TAN))
    table = RNG.normal(0, 2, (6, 10)).astype("f4")
    wcs.cpdis1, wcs.cpdis2 = (DistortionLookupTable(t, (1.0, 1.0), (1.0, 1.0), (4.0, 4.0)) for t in (table, -table))
    hdus = wcs.to_fits(relax=True)
    hdus[0].data = pixels((24, 40))
    hdus.writeto(tmp_path / "x.fits.gz")
    header = open_volume(f"{tmp_path / 'x.fits.gz'}[0]").header
    spots = [[5.0, 7.0], [30.0, 20.0]]
    np.testing.assert_array_equal(header.wcs.all_pix2world(spots, 0), wcs.all_pix2world(spots, 0))
    assert np.abs(header.wcs.all_pix2world(spots, 0) - WCS(fits.Header(TAN)).all_pix2world(spots, 0)).max() > 1e-6


@pytest.mark.parametrize(
    ("cards", "words"),
    [
        ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "XYZ"),
        ({"CDELT1": 0.0}, "singular"),
        ({"CUNIT1": "mile"}, "mile"),
    ],
)
def test_world_coordinates_that_make_no_sense_have_a_message(tmp_path: Path, cards: dict, words: str) -> None:
    path = save(tmp_path / "x.fits", pixels((24, 40)), **TAN | cards)
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.numpy()[0], astropy_values(path))
    with pytest.raises(InputError, match=f"HDU 0: the world coordinates make no sense: .*(?i:{words})") as caught:
        wcs_offset(volume.header, header_of())
    assert caught.value.file == path
