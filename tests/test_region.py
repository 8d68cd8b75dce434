"""What users write for a part of an image, and where that is, by astropy (Cutout2D, WCS, SkyCoord)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import Cutout2D
from astropy.wcs import WCS

from densepred.errors import InputError
from densepred.volumes import Volume, open_volume
from densepred.volumes.grid import cutout
from densepred.volumes.region import PixelBox, SkyBox, parse_region
from tests.fits_files import TAN, image, pixels, save, save_many
from tests.test_fits_cut import HEADERS, five
from tests.test_fits_writer import only
from tests.test_grid import sky_file, worlds


def at(place: Any, size: str) -> str:
    """The region around astropy's coordinates."""
    return f"{place.icrs.ra.deg:.15g},{place.icrs.dec.deg:.15g},{size}"


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("3:9,0:5", ((3, 9), (0, 5))),
        (" 1:2 , 3:9 , :5", ((1, 2), (3, 9), (None, 5))),
        (":,-4:7", ((None, None), (-4, 7))),
    ],
)
def test_boxes_of_pixels_are_read(text: str, ranges: tuple) -> None:
    assert parse_region(text) == PixelBox(ranges)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("156.125,-1.2,2arcmin", (156.125, -1.2, 2 / 60, 2 / 60)),
        ("10h24m30s,-01d12m,2arcminx180arcsec", (156.125, -1.2, 2 / 60, 3 / 60)),
        ("10:24:30,-01:12:00,0.5deg", (156.125, -1.2, 0.5, 0.5)),
        ("156d7m30s,-1d12m, 30\"x2'", (156.125, -1.2, 30 / 3600, 2 / 60)),
        ("0,+90,1e-3d", (0, 90, 1e-3, 1e-3)),
    ],
)
def test_places_on_the_sky_are_read(text: str, place: tuple) -> None:
    found = parse_region(text)
    assert isinstance(found, SkyBox)
    assert (found.ra, found.dec, found.width, found.height) == pytest.approx(place, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no region: ''"),
        ("10,20", "no region"),
        ("1:2,3:4,5:6,7:8", "no region"),
        ("1:2:3,3:4", "no region"),
        ("a:b,3:4", "no region"),
        ("5:5,3:4", "the range 5:5 of '5:5,3:4' is empty"),
        ("150.1,2.2,0.1", "no size on the sky: '0.1'"),
        ("150.1,2.2,-1deg", "no size on the sky: '-1deg'"),
        ("150.1,2.2,1degx1degx1deg", "a size of 3 angles"),
        ("abc,2.2,1deg", "no right ascension: 'abc'"),
        ("10h99m,2.2,1deg", "no right ascension: '10h99m'"),
        ("150.1,2h,1deg", "no declination: '2h'"),
        ("370,2.2,1deg", "impossible right ascension: 370 is 370 degrees"),
        ("150.1,-91,1deg", "impossible declination: -91"),
    ],
)
def test_what_is_no_region_has_a_message(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse_region(text)
    assert caught.value.fix


def test_a_box_is_cut_to_the_image_with_a_warning() -> None:
    volume = Volume.from_array(np.zeros((40, 50)), (1.0, 1.0))
    with warnings.catch_warnings(action="error"):
        assert parse_region(":,10:").resolve(volume) == ((0, 40), (10, 50))
    with pytest.warns(UserWarning, match=r"75 % of the box -20:20,25:75 is outside the image; cut to 0:20,25:50"):
        assert parse_region("-20:20,25:75").resolve(volume) == ((0, 20), (25, 50))
    for text in ("40:50,0:5", "0:5,-9:0", "60:,:"):
        with pytest.raises(InputError, match="wholly outside the image of 40 x 50"):
            parse_region(text).resolve(volume)
    with pytest.raises(InputError, match=r"the box has 3 ranges and the image has 2 axes \(40, 50\)"):
        parse_region("0:1,0:2,0:3").resolve(volume)
    with pytest.raises(InputError, match="needs a FITS image with world coordinates"):
        parse_region("1,2,3deg").resolve(volume)


@pytest.mark.parametrize("name", HEADERS)
def test_a_place_on_the_sky_is_astropys(tmp_path: Path, name: str) -> None:
    path = sky_file(tmp_path / "in.fits", name, (240, 320))
    wcs = worlds(fits.getheader(path))
    place = wcs.pixel_to_world(160.3, 101.8)
    size = "9arcsecx7.1arcsec"
    box = parse_region(at(place, size)).resolve(open_volume(path))
    theirs = Cutout2D(fits.getdata(path), place, (7.1 * u.arcsec, 9 * u.arcsec), wcs, mode="trim")
    if name in ("TAN with PC", "TAN with CROTA"):  # of other pixels astropy takes the width for the height
        assert tuple((low, high + 1) for low, high in theirs.bbox_original) == box
    (top, bottom), (left, right) = box
    np.testing.assert_allclose(((left + right - 1) / 2, (top + bottom - 1) / 2), wcs.world_to_pixel(place), atol=0.5)
    width = wcs.pixel_to_world(left - 0.5, top).separation(wcs.pixel_to_world(right - 0.5, top)).arcsec
    height = wcs.pixel_to_world(left, top - 0.5).separation(wcs.pixel_to_world(left, bottom - 0.5)).arcsec
    assert (width, height) == pytest.approx((9, 7.1), abs=0.21)  # half a pixel
    outside = place.directional_offset_by(40 * u.deg, 1 * u.deg)
    with pytest.raises(InputError, match=r"is wholly outside|is not on the image"):
        parse_region(at(outside, size)).resolve(open_volume(path))
    corner = wcs.pixel_to_world(0, 0)
    with pytest.warns(UserWarning, match="is outside the image; cut to 0:"):
        box = parse_region(at(corner, size)).resolve(open_volume(path))
    assert box[0][0] == box[1][0] == 0


def test_a_place_in_other_systems_and_orders(tmp_path: Path) -> None:
    place = SkyCoord(150.1, 2.2, unit="deg")
    galactic = {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN", "CRVAL1": place.galactic.l.deg}
    galactic |= {"CRVAL2": place.galactic.b.deg}
    swapped = {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.2, "CRVAL2": 150.1}
    fk5 = {"RADESYS": "FK5", "EQUINOX": 1975.0, "CRVAL1": 149.7757, "CRVAL2": 2.3207}
    for cards in (galactic, swapped, fk5):
        path = save(tmp_path / "in.fits", pixels((60, 80)), **TAN | {"CRPIX1": 30.0, "CRPIX2": 40.0} | cards)
        wcs = WCS(fits.getheader(path))
        (top, bottom), (left, right) = parse_region("150.1,2.2,2arcsecx1arcsec").resolve(open_volume(path))
        middle = wcs.pixel_to_world((left + right - 1) / 2, (top + bottom - 1) / 2)
        assert middle.separation(place).arcsec < 0.15  # half a pixel
        assert (bottom - top, right - left) == (5, 10)
    cube = save(tmp_path / "cube.fits", pixels((1, 5, 24, 40)), **TAN, CTYPE3="FREQ", CRVAL3=1.4e9, CTYPE4="STOKES")
    assert parse_region("150.1,2.2,1arcsec").resolve(open_volume(cube, "zyx")) == ((0, 5), (9, 14), (17, 22))
    solar = save(tmp_path / "sun.fits", pixels((24, 40)), **TAN | {"CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"})
    with pytest.raises(InputError, match="HPLN-TAN and HPLT-TAN cannot be had from right ascension"):
        parse_region("150.1,2.2,1arcsec").resolve(open_volume(solar))
    linear = save(tmp_path / "lab.fits", pixels((24, 40)), CTYPE1="X", CTYPE2="Y", CRVAL1=3.0)
    with pytest.raises(InputError, match=r"no plane of its axes \(X, Y\) is on the sky"):
        parse_region("150.1,2.2,1arcsec").resolve(open_volume(linear))


def test_a_size_is_an_angle_on_the_sky_wherever_it_is(tmp_path: Path) -> None:
    cards = TAN | {"CTYPE1": "RA---CAR", "CTYPE2": "DEC--CAR", "CDELT1": -0.1, "CDELT2": 0.1, "CRVAL2": 0.0}
    path = save(tmp_path / "map.fits", np.zeros((1800, 3600), "u1"), **cards | {"CRPIX1": 1800.5, "CRPIX2": 900.5})
    (top, bottom), (left, right) = parse_region("150.1,60,10deg").resolve(open_volume(path))
    assert (bottom - top, right - left) == (100, 200)  # 1 / cos 60 degrees
    assert top == 1450


def test_survey_images_are_cut_at_a_place(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "fits" / "labelled" / "mzlsbass2"
    path = folder / "ksb_170430_055945_ooi_r_ls9.CCD4.fits"
    with open_volume(path) as volume:
        header: Any = volume.header
        place = header.wcs.pixel_to_world(50.3, 60.2)
        part = cutout(volume, parse_region(at(place, "10arcsec")).resolve(volume))
        theirs = Cutout2D(fits.getdata(path, header.index), place, part.shape[1:], header.wcs)
        np.testing.assert_array_equal(part.numpy()[0], theirs.data)
        part.save(tmp_path / "out.fits.fz")
        points = five(part.shape[1:])
        back = theirs.wcs.all_world2pix(worlds(only(tmp_path / "out.fits.fz")[1]).all_pix2world(points, 0), 0)
        np.testing.assert_allclose(back, points, rtol=0, atol=1e-6)
    with open_volume(save_many(tmp_path / "mef.fits", image(pixels((6, 7)), "SCI", 2, **TAN))) as volume:
        part = cutout(volume, [(0, 6), (3, 7)])
        assert (part.header.name, part.header.version, part.header.shape) == ("SCI", 2, (6, 4))
