"""Headers of cut-outs and binned images, against astropy.wcs; sums against astropy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from densepred.errors import InputError
from densepred.volumes.fits_sums import add_sums, encoded, sum_of
from densepred.volumes.fits_writer import binned_header, cutout_header

SHAPE = (240, 320)
_ANGLE = np.deg2rad(33)
_SCALE = 0.26 / 3600
CD = {
    **{"CD1_1": -_SCALE * np.cos(_ANGLE), "CD1_2": _SCALE * np.sin(_ANGLE)},
    **{"CD2_1": _SCALE * np.sin(_ANGLE), "CD2_2": 1.02 * _SCALE * np.cos(_ANGLE)},
}
PC = {
    **{"PC1_1": np.cos(_ANGLE), "PC1_2": -np.sin(_ANGLE), "PC2_1": np.sin(_ANGLE), "PC2_2": np.cos(_ANGLE)},
    **{"CDELT1": -_SCALE, "CDELT2": _SCALE},
}
PLAIN = {"CDELT1": -_SCALE, "CDELT2": 1.5 * _SCALE}
SIP = {
    **{"A_ORDER": 3, "B_ORDER": 3, "AP_ORDER": 2, "BP_ORDER": 2, "A_DMAX": 1.5, "B_DMAX": 0.5},
    **{"A_2_0": 2e-5, "A_1_1": -1e-5, "A_0_2": 3e-6, "A_3_0": 4e-8, "B_2_0": -6e-6, "B_0_2": 1e-5, "B_1_2": 3e-8},
    **{"AP_2_0": -2e-5, "AP_1_1": 1e-5, "AP_0_2": -3e-6, "BP_2_0": 6e-6, "BP_0_2": -1e-5, "AP_1_0": 1e-4},
}
TPV = {
    **{"PV1_0": 1e-4, "PV1_1": 1.01, "PV1_4": 0.02, "PV1_7": 0.3, "PV2_0": -2e-4, "PV2_1": 0.99, "PV2_6": -0.04},
}


def header(projection: str = "TAN", **cards: float) -> fits.Header:
    """An image of the sky with an alternate WCS in detector millimetres."""
    out = fits.Header({"SIMPLE": True, "BITPIX": 8, "NAXIS": 2, "NAXIS1": SHAPE[1], "NAXIS2": SHAPE[0]})
    out["CTYPE1"], out["CTYPE2"] = f"RA---{projection}", f"DEC--{projection}"
    out["CRVAL1"], out["CRVAL2"], out["CRPIX1"], out["CRPIX2"] = 201.3, -43.02, 170.25, 99.75
    out["CUNIT1"] = out["CUNIT2"] = "deg"
    for keyword, value in cards.items():
        out[keyword] = value
    out["CTYPE1A"], out["CTYPE2A"], out["CUNIT1A"], out["CUNIT2A"] = "DETX", "DETY", "mm", "mm"
    out["CRPIX1A"], out["CRVAL1A"], out["CDELT1A"], out["CDELT2A"], out["PC1_2A"] = 11.5, -4.0, 0.015, 0.03, 0.1
    return out


HEADERS = {
    "TAN with CDELT": header(**PLAIN),
    "TAN with CD": header(**CD),
    "TAN with PC": header(**PC),
    "TAN with CROTA": header(CDELT1=-_SCALE, CDELT2=_SCALE, CROTA2=33.0),
    "SIP": header("TAN-SIP", **CD, **SIP),
    "TPV": header("TPV", **CD, **TPV),
}


def worlds(head: fits.Header, key: str = " ") -> WCS:
    head = head.copy()
    if key == "A":  # SIP is the primary's alone; astropy would use it here too
        for card in SIP:
            head.remove(card, ignore_missing=True)
    with warnings.catch_warnings(action="ignore"):
        return WCS(head, key=key)


def drift(source: fits.Header, part: fits.Header, points: np.ndarray, moved: np.ndarray) -> float:
    """How far the pixels `moved` of `part` lie from `points` of `source`, in pixels of `source`, in either WCS."""
    distances = []
    for key in (" ", "A"):
        ours, theirs = worlds(part, key), worlds(source, key)
        back = theirs.all_world2pix(ours.all_pix2world(moved, 0), 0, tolerance=1e-9)
        distances.append(np.abs(back - points).max())
    return float(max(distances))


def five(shape: tuple[int, ...]) -> np.ndarray:
    """Corners and centre, (x, y) from 0."""
    high, wide = shape[0] - 1.0, shape[1] - 1.0
    return np.array([(0, 0), (wide, 0), (0, high), (wide, high), (wide / 2, high / 2)])


@pytest.mark.parametrize("name", HEADERS)
def test_a_cutout_stays_on_the_sky(name: str) -> None:
    box = [(31, 201), (57, 158)]
    source = HEADERS[name]
    part = cutout_header(source, box)
    points = five((170, 101))
    assert drift(source, part, points + np.array([57, 31]), points) < 1e-6
    assert (part["NAXIS1"], part["NAXIS2"], part["LTV1"], part["LTV2"]) == (101, 170, -57, -31)
    assert (part["LTM1_1"], part["LTM2_2"]) == (1, 1)
    assert source == HEADERS[name]
    sliced = worlds(source)[31:201, 57:158].to_header(relax=True)
    assert part["CRPIX1"] == sliced["CRPIX1"]
    twice = cutout_header(part, [(10, 20), (3, 30)])
    once = cutout_header(source, [(41, 51), (60, 87)])
    assert all(twice[card] == once[card] for card in ("CRPIX1", "CRPIX2A", "LTV1", "LTV2", "NAXIS1"))


@pytest.mark.parametrize("name", [name for name in HEADERS if name != "TPV"])
@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_a_binned_image_stays_on_the_sky(name: str, factor: int) -> None:
    source = HEADERS[name]
    part = binned_header(source, factor)
    shape = tuple(size // factor for size in SHAPE)
    assert (part["NAXIS2"], part["NAXIS1"]) == shape
    points = five(shape)
    assert drift(source, part, (points + 0.5) * factor - 0.5, points) < 1e-6
    with warnings.catch_warnings(action="ignore"):
        theirs = worlds(source)[::factor, ::factor]
    assert part["CRPIX1"] == pytest.approx(theirs.wcs.crpix[0])
    assert part["LTM1_1"] * 100 + part["LTV1"] == pytest.approx((100 - 0.5) / factor + 0.5)
    inverse = worlds(part)
    if inverse.sip is not None:  # AP and BP are scaled too
        again = inverse.sip_foc2pix(inverse.sip_pix2foc(points, 0), 0)
        ours = worlds(source).sip_foc2pix(worlds(source).sip_pix2foc((points + 0.5) * factor - 0.5, 0), 0)
        np.testing.assert_allclose(again, (ours + 0.5) / factor - 0.5, atol=1e-9)


@pytest.mark.parametrize("name", ["TAN with CDELT", "TAN with CD", "SIP"])
def test_axes_may_be_binned_differently(name: str) -> None:
    source = HEADERS[name].copy()
    del source["PC1_2A"]  # a rotation
    part = binned_header(source, (2, 5))
    points = five((120, 64))
    assert drift(source, part, (points + 0.5) * (5, 2) - 0.5, points) < 1e-6
    with pytest.raises(InputError, match=r"rotated need one factor, got \[5, 2\]"):
        binned_header(HEADERS["TAN with PC"], (2, 5))


def test_a_cube_is_cut_and_binned_along_its_last_axes() -> None:
    source = HEADERS["TAN with CD"].copy()
    source["NAXIS"], source["NAXIS3"], source["CTYPE3"], source["CRPIX3"], source["CD3_3"] = 3, 9, "WAVE", 4.0, 1e-9
    assert cutout_header(source, [(2, 9), (0, 5)])["CRPIX3"] == 4
    cut = cutout_header(source, [(2, 5), (0, 5), (1, 6)])
    assert (cut["CRPIX3"], cut["NAXIS3"], cut["LTV3"]) == (2, 3, -2)
    assert binned_header(source, 2)["CD3_3"] == 1e-9
    thin = binned_header(source, (3, 1, 1))
    assert (thin["CD3_3"], thin["CRPIX3"]) == pytest.approx((3e-9, 3.5 / 3 + 0.5))
    assert (thin["CD1_1"], thin["NAXIS3"]) == (CD["CD1_1"], 3)


def test_what_cannot_be_cut_or_binned_is_refused() -> None:
    with pytest.raises(InputError, match="a TPV distortion cannot be binned"):
        binned_header(HEADERS["TPV"], 2)
    for card in ("CPDIS1", "D2IMDIS2", "AXISCORR"):
        tables = HEADERS["SIP"].copy()
        tables[card] = "LOOKUP"
        for make in (lambda head: cutout_header(head, [(0, 5), (0, 5)]), lambda head: binned_header(head, 2)):
            with pytest.raises(InputError, match=f"look-up table over the whole image \\({card}\\)"):
                make(tables)
    for box in ([(0, 241), (0, 5)], [(-1, 5), (0, 5)], [(5, 5), (0, 5)], [(0, 1), (0, 5), (0, 5)]):
        with pytest.raises(InputError, match="is not within axis"):
            cutout_header(HEADERS["SIP"], box)
    with pytest.raises(InputError, match="blocks of 241 pixels are larger than axis 2 of 240"):
        binned_header(HEADERS["SIP"], 241)
    with pytest.raises(ValueError, match="at least 1"):
        binned_header(HEADERS["SIP"], 0)


def test_an_image_without_world_coordinates_tells_its_place_by_ltv() -> None:
    bare = fits.Header({"NAXIS": 2, "NAXIS1": 10, "NAXIS2": 10})
    part = binned_header(cutout_header(bare, [(2, 8), (4, 8)]), 2)
    assert dict(part) == {
        **{"NAXIS": 2, "NAXIS1": 2, "NAXIS2": 3},
        **{"LTV1": -1.75, "LTM1_1": 0.5, "LTV2": -0.75, "LTM2_2": 0.5},
    }


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=9000), st.data())
def test_sums_are_astropys_in_any_portions(data: bytes, draw: st.DataObject) -> None:
    hdu = fits.ImageHDU(np.frombuffer(data or b"\0", np.uint8))
    hdu.add_checksum()
    assert sum_of(data) == int(hdu.header["DATASUM"])
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=4)))
    total = 0
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        total = add_sums(sum_of(data[start:stop], start), total)
    assert total in (sum_of(data), *((0,) if sum_of(data) == 0xFFFFFFFF else ()))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_checksum_is_letters_and_digits_that_add_up(value: int) -> None:
    text = encoded(value)
    assert text.isalnum()
    turned = (text[1:] + text[0]).encode()
    assert sum_of(turned) % 0xFFFFFFFF == add_sums(value, sum_of(b"0" * 16)) % 0xFFFFFFFF
