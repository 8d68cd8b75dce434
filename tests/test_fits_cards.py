"""The header of a FITS output: every card of the source that is still true, and what is new, by astropy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from densepred.errors import InputError
from densepred.volumes import Provenance, Record, Volume, open_volume, open_writer
from densepred.volumes.fits import recorded
from densepred.volumes.fits_header import FitsHeader
from densepred.volumes.fits_writer import Contents, Legend
from tests.fits_files import TAN, image, pixels, save
from tests.test_fits_cut import HEADERS, drift, five
from tests.test_fits_writer import SUFFIXES, only, plane, read, write

STRUCTURE = {
    *("SIMPLE", "XTENSION", "BITPIX", "NAXIS", "PCOUNT", "GCOUNT", "EXTEND", "BSCALE", "BZERO", "BLANK"),
    *("DATAMIN", "DATAMAX", "CHECKSUM", "DATASUM", "BUNIT", "EXTNAME", "EXTVER", "NEXTEND", "GROUPS"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", HEADERS)
def test_the_sky_is_where_it_was(tmp_path: Path, name: str, suffix: str) -> None:
    cards = {card.keyword: card.value for card in HEADERS[name].cards if card.keyword not in STRUCTURE | {"NAXIS1"}}
    cards.pop("NAXIS2")
    cards |= {"OBJECT": "Cen A", "FILTER": "r", "MJD-OBS": 57000.25, "LONPOLE": 180.0, "HIERARCH ESO DET ID": "x" * 90}
    source = open_volume(save(tmp_path / "in.fits", pixels((24, 32)), **cards))
    source.like(np.ones((24, 32), np.uint8)).save(tmp_path / f"out{suffix}")
    header = only(tmp_path / f"out{suffix}")[1]
    before = fits.getheader(tmp_path / "in.fits")
    assert drift(before, header, five((24, 32)), five((24, 32))) < 1e-6
    assert {card: header[card] for card in before if card not in STRUCTURE} == {
        card: before[card] for card in before if card not in STRUCTURE
    }


def test_every_card_of_real_files_survives(real_data: Path, tmp_path: Path) -> None:
    paths = sorted((real_data / "fits").rglob("*.f*"))
    seen = 0
    for path in paths[::2]:
        with fits.open(path) as file, warnings.catch_warnings(action="ignore"):
            found = [n for n, hdu in enumerate(file) if hdu.is_image and len(hdu.shape) == 2][:1]
        for number in found:
            out = tmp_path / f"out{SUFFIXES[seen % 3]}"
            with warnings.catch_warnings(action="ignore"):
                source: Any = open_volume(f"{path}[{number}]")
                source.like(np.ones(source.shape[1:], np.uint8)).save(out)
                header = only(out)[1]
                old, new = source.header.wcs, WCS(header)
                spots = five(source.shape[1:])
                np.testing.assert_array_equal(old.all_pix2world(spots, 0), new.all_pix2world(spots, 0))
            lost = {(c.keyword, str(c.value)) for c in source.header.header.cards} - {
                (c.keyword, str(c.value)) for c in header.cards
            }
            assert {keyword for keyword, _ in lost if not keyword.startswith("FZ")} <= STRUCTURE, path
            if number:
                theirs = fits.getheader(path, 0)
                ours = fits.getheader(out, 0)
                assert {card for card in theirs if card not in ours} <= STRUCTURE | {"INHERIT"}
            seen += 1
    assert seen > 10


def test_data_dependent_cards_go_and_observation_cards_that_look_alike_stay(tmp_path: Path) -> None:
    cards = {"ZD": 31.5, "ZPT": 25.0, "FZERO": 2, "TILE": "a", "BLANKED": 1, "CLASS1": "STAR", "GAIN": 2.0}
    gone = {
        "DATAMIN": 0.0,
        "DATAMAX": 5.0,
        "ZCMPTYPE": "RICE_1",
        "ZTILE1": 3,
        "FZQVALUE": 4,
        "NEXTEND": 3,
        "BTYPE": "x",
    }
    source = open_volume(save(tmp_path / "in.fits", pixels((4, 5)), **cards, **gone))
    header = only(write(tmp_path / "out.fits", source, pixels((1, 4, 5), "f4")))[1]
    assert {card: header[card] for card in cards} == cards
    assert not set(gone) & set(header)


def test_an_image_from_an_extension_keeps_both_headers(tmp_path: Path) -> None:
    primary = fits.PrimaryHDU(header=fits.Header({"TELESCOP": "HST", "NEXTEND": 1, "FILTER": "F814W"}))
    science = image(pixels((6, 7)), "SCI", 2, EXPTIME=30.0, INHERIT=True, BUNIT="ELECTRONS", **TAN)
    fits.HDUList([primary, science]).writeto(tmp_path / "in.fits")
    source = open_volume(tmp_path / "in.fits[SCI,2]")
    more = {"provenance": {"DPMODEL": "unet"}, "contents": Contents(name="SCI", version=2)}
    for suffix in SUFFIXES:
        write(tmp_path / f"out{suffix}", source, pixels((1, 6, 7), "u1"), True, **more)
        with fits.open(tmp_path / f"out{suffix}") as file:
            assert dict(file[0].header) | {"TELESCOP": "HST", "FILTER": "F814W"} == dict(file[0].header)
            assert file[0].data is None
            assert (file["SCI", 2].header["EXPTIME"], file["SCI", 2].header["INHERIT"]) == (30, True)
            assert all(hdu.header["DPMODEL"] == "unet" for hdu in file)
        assert "NEXTEND" not in file[0].header


def test_degenerate_axes_are_restored(tmp_path: Path) -> None:
    cards = TAN | {"CTYPE3": "FREQ", "CRVAL3": 1.4e9, "CTYPE4": "STOKES", "CRVAL4": 1.0}
    source = open_volume(save(tmp_path / "in.fits", pixels((1, 1, 6, 7)), **cards))
    assert source.shape == (1, 6, 7)
    before = fits.getheader(tmp_path / "in.fits")
    for suffix in SUFFIXES:
        got, header = only(write(tmp_path / f"l{suffix}", source, pixels((1, 6, 7), "u1"), True))
        assert got.shape == (1, 1, 6, 7)
        assert {card: header[card] for card in cards} == {card: before[card] for card in cards}
        arrays = read(write(tmp_path / f"p{suffix}", source, pixels((3, 6, 7))))
        assert [array.shape for _, array, _ in arrays] == [(1, 1, 6, 7)] * 3
        cube, header = only(
            write(tmp_path / f"c{suffix}", source, pixels((3, 6, 7)), contents=Contents(probability=True))
        )
        assert cube.shape == (3, 1, 1, 6, 7)
        assert (header["CTYPE5"], header["CTYPE4"], WCS(header).naxis) == ("CLASS", "STOKES", 5)


def test_channels_go_back_to_their_axis_and_a_label_map_has_none(tmp_path: Path) -> None:
    cards = TAN | {"CTYPE3": "WAVE", "CRVAL3": 5e-7, "CDELT3": 1e-9, "CUNIT3": "m", "PC1_2": 0.1, "PV2_1": 0.5}
    cards |= {"WCSAXES": 3, "CTYPE3A": "CHAN"}
    path = tmp_path / "in.fits"
    save(path, pixels((5, 6, 7)), **cards)
    source = open_volume(path, "cyx")
    values = pixels((5, 6, 7))
    got, header = only(write(tmp_path / "copy.fits.fz", source, values))
    np.testing.assert_array_equal(got, values)
    assert {card: header[card] for card in cards} == {card: fits.getheader(path)[card] for card in cards}
    got, header = only(write(tmp_path / "labels.fits", source, pixels((1, 6, 7), "u1"), True))
    assert got.shape == (6, 7)
    assert not [card for card in header if "3" in card]
    assert (header["WCSAXES"], header["PC1_2"]) == (2, 0.1)
    with warnings.catch_warnings(action="ignore"):
        theirs = WCS(fits.getheader(path)).sub([1, 2]).wcs_pix2world(five((6, 7)), 0)
    np.testing.assert_allclose(WCS(header).wcs_pix2world(five((6, 7)), 0), theirs, rtol=0, atol=1e-12)
    five_classes = Contents(probability=True, layout="cube", names=list("abcde"))
    got, header = only(write(tmp_path / "classes.fits", source, values, contents=five_classes))
    assert (header["CTYPE3"], header["CLASS4"], header["CRVAL3"], got.shape) == ("CLASS", "e", 0, (5, 6, 7))
    save(path, values, **(cards | {"PC1_3": 0.2}))
    with pytest.raises(InputError, match=r"coupled with another one: PC1_3 = 0\.2"):
        write(tmp_path / "no.fits", open_volume(path, "cyx"), pixels((1, 6, 7), "u1"), True)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_channels_may_lie_along_any_axis(tmp_path: Path, axis: int, suffix: str) -> None:
    values = pixels((3, 6, 7))
    stored = np.moveaxis(values, 0, axis)
    header = FitsHeader(fits.Header(), 0, "PRIMARY", 1, stored.shape, (), axis)
    got, _ = only(write(tmp_path / f"x{suffix}", Volume(values, (1, 1), header=header), values))
    np.testing.assert_array_equal(got, stored)


def test_a_cube_adds_an_axis_to_a_cd_matrix(tmp_path: Path) -> None:
    save(
        tmp_path / "in.fits",
        pixels((6, 7)),
        **{k: v for k, v in TAN.items() if "CDELT" not in k},
        CD1_1=-1e-4,
        CD2_2=2e-4,
    )
    source = open_volume(tmp_path / "in.fits")
    more = {"contents": Contents(probability=True, layout="cube", names=["sky", "star", "ghost"])}
    values, header = only(write(tmp_path / "out.fits", source, pixels((3, 6, 7)), **more))
    world = WCS(header).all_pix2world([[3, 4, 2]], 0)[0]
    np.testing.assert_allclose(world[:2], WCS(fits.getheader(tmp_path / "in.fits")).all_pix2world([[3, 4]], 0)[0])
    assert (world[2], header["CLASS2"], header["BTYPE"], values.shape) == (2, "ghost", "PROBABILITY", (3, 6, 7))


def test_probabilities_get_an_hdu_each(tmp_path: Path) -> None:
    source = open_volume(save(tmp_path / "in.fits", pixels((6, 7)), BUNIT="Jy", **TAN))
    values = pixels((3, 6, 7))
    names = ["sky", "star", "cosmic ray"]
    contents = Contents(names=names, probability=True, layout="hdus")
    for suffix in SUFFIXES:
        arrays = read(write(tmp_path / f"x{suffix}", source, values, contents=contents))
        assert [name for name, _, _ in arrays] == ["PROB_sky", "PROB_star", "PROB_cosmic ray"]
        for (_, got, header), channel in zip(arrays, values, strict=True):
            np.testing.assert_array_equal(got, channel)
            assert (header["BUNIT"], header["BTYPE"], header["CTYPE1"]) == ("", "PROBABILITY", "RA---TAN")
    names_of = [name for name, _, _ in read(write(tmp_path / "d.fits", source, values))]
    assert names_of == ["PROB_0", "PROB_1", "PROB_2"]
    regression = Contents(names=["kappa"], unit="mJy", name="KAPPA")
    _, header = only(write(tmp_path / "r.fits", source, values[:1], contents=regression))
    assert (header["BUNIT"], header["EXTNAME"], "BTYPE" in header, header["CHAN0"]) == ("mJy", "KAPPA", False, "kappa")
    with pytest.raises(ValueError, match=r"names must name 2 channels, got \['kappa'\]"):
        write(tmp_path / "n.fits", source, values[:2], contents=regression)


def test_the_legend_counts_pixels(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).choice([0, 1, 7, 300], (1, 40, 50), p=[0.7, 0.2, 0.09, 0.01])
    legend = Legend({0: "sky", 1: "stär", 7: "galaxy", 9: "never"}, {7: "#123456"})
    with pytest.raises(ValueError, match=r"ascii|ASCII"):
        write(tmp_path / "bad.fits", plane(40, 50), labels, True, legend=legend)
    legend = Legend(legend.names | {1: "star"}, legend.colours)
    for suffix in SUFFIXES:
        path = write(tmp_path / f"x{suffix}", plane(40, 50), labels, True, legend=legend)
        assert [only(path)[1][f"CLASS{n}"] for n in (0, 1, 7, 9)] == ["sky", "star", "galaxy", "never"]
        with fits.open(path) as file:
            table = file["LABELS"].data
            assert table["id"].tolist() == [0, 1, 7, 9, 300]
            assert table["npix"].tolist() == [(labels == n).sum() for n in (0, 1, 7, 9, 300)]
            assert table["name"].tolist() == ["sky", "star", "galaxy", "never", ""]
            assert table["colour"][0] == "#000000"
            assert table["colour"][2] == "#123456"
            assert len(set(table["colour"])) == 5
    again = open_volume(tmp_path / "x.fits")
    assert again.labels
    _, header = only(write(tmp_path / "y.fits", again, labels, True, legend=Legend({0: "a"})))
    assert [card for card in header if card.startswith("CLASS")] == ["CLASS0"]


def test_provenance_cards_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        hdu = fits.PrimaryHDU(pixels((4, 5)), fits.Header(TAN))
        hdu.add_checksum()
        hdu.writeto(tmp_path / "in.fits")
    source = open_volume(tmp_path / "in.fits")
    cards = {"DPMODEL": "m" * 150, "DPTILE": "512x512", "DPOVERLP": 0.5, "DPDEVICE": None}
    cards["HISTORY"] = "densepred predict " + "x" * 100  # type: ignore[assignment]
    _, header = only(write(tmp_path / "out.fits", source, pixels((1, 4, 5)), provenance=cards))
    assert {card: header[card] for card in ("DPMODEL", "DPTILE", "DPOVERLP")} == {
        card: cards[card] for card in ("DPMODEL", "DPTILE", "DPOVERLP")
    }
    assert header["DPINSUM"] == hdu.header["DATASUM"]
    assert "".join(header["HISTORY"]) == cards["HISTORY"]
    assert "DPDEVICE" not in header
    _, header = only(write(tmp_path / "x.fits", open_volume(tmp_path / "out.fits"), pixels((1, 4, 5))))
    assert "DPMODEL" not in header
    assert "DPVERS" in header


def lookup(path: Path) -> Path:
    """An image with a look-up distortion whose table is an extension."""
    cards = TAN | {"CPDIS1": "LOOKUP", "CPDIS2": "LOOKUP"}
    table = fits.ImageHDU(np.full((3, 4), 0.25, np.float32), name="WCSDVARR", ver=1)
    for axis, size in ((1, 7), (2, 6)):
        table.header[f"CRPIX{axis}"], table.header[f"CRVAL{axis}"], table.header[f"CDELT{axis}"] = 0.0, 0.0, size / 2
    hdu = fits.ImageHDU(pixels((6, 7)), fits.Header(cards), name="SCI")
    for record in ("EXTVER: 1.0", "NAXES: 2.0", "AXIS.1: 1.0", "AXIS.2: 2.0"):
        for name in ("DP1", "DP2"):
            hdu.header.append(fits.Card(name, record), end=True)
    fits.HDUList([fits.PrimaryHDU(), hdu, table, image(pixels((6, 7)), "DQ")]).writeto(path)
    return path


def test_tables_of_distortions_go_with_the_header(tmp_path: Path) -> None:
    path = lookup(tmp_path / "in.fits")
    source = open_volume(f"{path}[SCI]")
    for suffix in SUFFIXES:
        out = write(tmp_path / f"out{suffix}", source, pixels((1, 6, 7), "u1"), True)
        with fits.open(out) as ours, fits.open(path) as theirs:
            assert [hdu.name for hdu in ours][2:] == ["WCSDVARR"]
            spots = five((6, 7))
            expected = WCS(theirs["SCI"].header, theirs).all_pix2world(spots, 0)
            assert np.abs(expected - WCS(fits.Header(TAN)).all_pix2world(spots, 0)).max() > 1e-5
            np.testing.assert_array_equal(WCS(ours[1].header, ours).all_pix2world(spots, 0), expected)
        assert len(read(out)) == 2
    header: Any = source.header
    lost = FitsHeader(header.header, 1, "SCI", 1, (6, 7))
    with pytest.raises(InputError, match=r"need tables \(D2IMARR, WCSDVARR\) that are not in the source"):
        write(tmp_path / "no.fits", Volume(np.zeros((1, 6, 7)), (1, 1), header=lost), pixels((1, 6, 7), "u1"), True)


def test_other_sources_give_a_linear_grid(tmp_path: Path) -> None:
    affine = np.array([[0, -0.5, 0, 3], [0.7, 0, 0, 4], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    like = Volume(np.zeros((1, 4, 5, 6)), (2.0, 0.5, 0.7), affine)
    _, header = only(write(tmp_path / "a.fits", like, pixels((1, 4, 5, 6))))
    np.testing.assert_allclose(WCS(header).wcs_pix2world([[1, 2, 3]], 0)[0], (affine @ [1, 2, 3, 1])[:3])
    _, header = only(write(tmp_path / "s.fits", Volume(np.zeros((1, 4, 5)), (2.0, 0.5)), pixels((1, 4, 5))))
    np.testing.assert_allclose(WCS(header).wcs_pix2world([[3, 2]], 0)[0], (1.5, 4))
    _, header = only(write(tmp_path / "p.fits", plane(4, 5), pixels((1, 4, 5))))
    assert not [card for card in header if card.startswith(("CTYPE", "CRPIX"))]
    odd = FitsHeader(fits.Header(), 0, "", 1, (4, 4))
    with pytest.raises(ValueError, match=r"the spatial shape of its header \(4, 4\), got \(1, 4, 5\)"):
        write(tmp_path / "o.fits", Volume(np.zeros((1, 4, 5)), (1, 1), header=odd), pixels((1, 4, 5)))


def test_names_beyond_ascii_lose_their_accents(tmp_path: Path):
    made = Provenance(model="étoiles", source="größe.fits", command="predict étoiles größe.fits")
    record = Record(names={0: "Hintergrund", 1: "Läsion"}, quantity="label", provenance=made)
    like = Volume.from_array(np.zeros((4, 5), np.float32), (1.0, 1.0))
    with open_writer(tmp_path / "x.fits.fz", like, np.dtype(np.uint8), labels=True, record=record) as writer:
        writer.write(np.ones((1, 4, 5), np.uint8))
    with fits.open(tmp_path / "x.fits.fz") as file:
        assert [name.strip() for name in file["LABELS"].data["name"]] == ["Hintergrund", "Lasion"]
        assert file[1].header["DPMODEL"] == "etoiles"


def test_names_and_units_beyond_ascii_stay_apart() -> None:
    names = {0: "sky", 1: "\u80bf\u7624", 2: "\u809d\u810f", 3: "st\u00e4r", 4: "star"}
    contents, _, _ = recorded(Record(names=names, probability=True, unit="\u00c5"), 5, labels=False)
    assert contents is not None
    assert contents.names == ["sky", "?? 1", "?? 2", "star 3", "star"]
    assert contents.unit == "Angstrom"
    _, legend, _ = recorded(Record(names=names), 1, labels=True)
    assert legend is not None
    assert len(set(legend.names.values())) == 5
    for unit, expected in (("A\u030a", "Angstrom"), ("cm\u207b\u00b9", "cm-1"), ("\u2126", "?")):
        contents, _, _ = recorded(Record(names={}, unit=unit), 1, labels=False)
        assert contents is not None
        assert contents.unit == expected
