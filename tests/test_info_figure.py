"""Where things lie in the pictures of `densepred info`: nibabel, astropy and pydicom are the witnesses."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from astropy.io import fits
from astropy.visualization import ZScaleInterval
from astropy.visualization.wcsaxes import WCSAxes
from astropy.wcs import WCS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from nibabel.affines import apply_affine
from nibabel.nifti1 import Nifti1Header
from PIL import Image
from typer.testing import CliRunner

from densepred.cli import app
from densepred.errors import InputError
from densepred.figures import COLORS
from densepred.info import draw
from densepred.info_axes import frame_of
from densepred.info_figure import HOLE, Overlay, figure_of, stretch
from densepred.info_outline import color_of, edges_of
from densepred.volumes import Volume, open_volume
from tests.nifti_files import save_nib, scan

ROOT = Path(__file__).parent.parent
ROTATED = {
    "CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "CRVAL1": 150.2, "CRVAL2": 41.0, "CRPIX1": 20.0,
    "CRPIX2": 15.0, "CD1_1": 2e-5, "CD1_2": -3e-4, "CD2_1": 3e-4, "CD2_2": 2e-5, "A_ORDER": 2, "A_2_0": 1e-4,
    "B_ORDER": 2, "B_0_2": -2e-4, "RADESYS": "ICRS",
}  # fmt: skip
TURNS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]  # fmt: skip


def turned(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(order)] * (np.array(signs) * [0.7, 1.3, 4.0])
    affine[:3, 3] = [-31.0, 12.5, 40.25]
    return affine


def nifti(tmp_path: Path, affine: np.ndarray, shape: tuple[int, ...] = (7, 6, 5)) -> Path:
    header = Nifti1Header()
    header.set_xyzt_units("mm")
    return save_nib(tmp_path / "x.nii", scan(shape), affine, header)


def sky(tmp_path: Path, cards: dict[str, Any], shape: tuple[int, ...] = (30, 40)) -> Path:
    values = np.random.default_rng(0).normal(100, 5, shape).astype("f4")
    fits.PrimaryHDU(values, fits.Header(cards)).writeto(tmp_path / "x.fits", overwrite=True)
    return tmp_path / "x.fits"


def drawn(volume: Volume, overlay: Overlay | None = None) -> Any:
    """The axes of the picture after it was drawn, so that ticks are in place."""
    figure = figure_of(volume, overlay)
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure.axes[0]


def written(axes: Any, number: int) -> list[str]:
    """The labels of the ticks of a world axis; astropy has no public name for them."""
    return [text for side in axes.coords[number]._ticklabels.text.values() for text in side if text]


@pytest.mark.parametrize(("order", "signs"), TURNS, ids=str)
def test_axes_hold_world_coordinates_in_all_48_orientations(
    tmp_path: Path, order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    affine = turned(order, signs)
    volume = open_volume(nifti(tmp_path, affine))
    index = 2
    frame = frame_of(volume, index)
    points = np.array([(column, row) for column in range(7) for row in range(6)], float)
    world = apply_affine(affine, np.column_stack([points, np.full(len(points), index)]))
    np.testing.assert_allclose(frame.at(points), world[:, [order[0], order[1]]], atol=1e-6)
    assert frame.where == f"{'xyz'[order[2]]} = {world[0, order[2]]:.4g} mm"
    assert [name[:6] for name in frame.names] == [f"{'xyz'[axis]} / mm" for axis in order[:2]]
    codes = nibabel.aff2axcodes(affine)
    assert frame.sides is not None
    left, right, low, high = frame.sides
    assert right == codes[0]
    assert high in "RAS"
    assert (high == codes[1]) == frame.upward
    assert {frozenset((left, right)), frozenset((low, high))} <= {frozenset(pair) for pair in ("LR", "AP", "SI")}


def test_pixels_are_drawn_where_the_affine_puts_them(tmp_path: Path) -> None:
    affine = turned((1, 2, 0), (-1, 1, -1))
    volume = open_volume(nifti(tmp_path, affine))
    axes = drawn(volume)
    (picture,) = axes.images
    np.testing.assert_array_equal(picture.get_array(), volume[0, 2])
    for column, row in ((0, 0), (6, 0), (3, 5)):
        x, y = apply_affine(affine, (column, row, 2))[[1, 2]]
        shown = picture.get_cursor_data(_at(axes, x, y))
        assert shown == volume[0, 2, row, column]
    assert abs(axes.get_xlim()[1] - axes.get_xlim()[0]) == pytest.approx(7 * 0.7)
    assert abs(axes.get_ylim()[1] - axes.get_ylim()[0]) == pytest.approx(6 * 1.3)
    assert axes.get_aspect() == 1  # millimetres along both: pixels of 0.7 x 1.3 mm look so
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # columns lead to posterior, where y is small
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("y / mm (+ anterior)", "z / mm (+ superior)")
    assert sorted(text.get_text() for text in axes.texts) == ["A", "I", "P", "S"]


def _at(axes: Any, x: float, y: float) -> Any:
    from matplotlib.backend_bases import MouseEvent

    return MouseEvent("motion_notify_event", axes.figure.canvas, *axes.transData.transform((x, y)))


def test_oblique_slices_have_distances(tmp_path: Path) -> None:
    oblique = np.array([[0.7, 0.1, 0, 3], [-0.1, 1.2, 0.2, -7], [0, 0.1, 2.5, 11], [0, 0, 0, 1.0]])
    volume = open_volume(nifti(tmp_path, oblique))
    frame = frame_of(volume, 2)
    assert frame.names == ("mm from the first voxel, towards right", "mm from the first voxel, towards anterior")
    last = apply_affine(oblique, [(6, 0, 2), (0, 5, 2)]) - apply_affine(oblique, (0, 0, 2))
    np.testing.assert_allclose(frame.at(np.array([6.0, 5.0])), np.linalg.norm(last, axis=1), rtol=1e-6)
    assert frame.upward
    assert frame.where == ""
    flipped = open_volume(nifti(tmp_path, oblique @ np.diag([1.0, -1, 1, 1])))
    assert frame_of(flipped, 2).names[1].endswith("towards posterior")
    assert not frame_of(flipped, 2).upward  # anterior stays above


def test_a_slant_below_half_a_pixel_is_none(tmp_path: Path) -> None:
    for slant, slanted in ((0.4, False), (0.6, True)):
        affine = np.diag([1.0, 1, 2, 1])
        affine[1, 0] = slant / 6  # over the six steps of seven columns
        frame = frame_of(open_volume(nifti(tmp_path, affine)), 0)
        assert frame.names[0].startswith("mm from") == slanted


def test_without_a_patient_rows_run_down_in_the_unit_of_the_file(tmp_path: Path) -> None:
    Volume(np.zeros((1, 4, 5, 6), np.uint8), (2.0, 0.5, 0.25)).save(tmp_path / "x.npy")
    assert frame_of(open_volume(tmp_path / "x.npy"), 2).names == ("x / pixels", "y / pixels")
    frame = frame_of(Volume(np.zeros((1, 4, 5, 6)), (2.0, 0.5, 0.25)), 2)
    assert frame.names == ("x / unknown unit", "y / unknown unit")
    assert frame.extent(5, 6) == (-0.125, 1.375, 2.25, -0.25)
    assert not frame.upward
    unplaced = Nifti1Header()  # neither sform nor qform: nothing says where the patient's left is
    unplaced.set_data_shape((6, 5, 4))
    volume = Volume(np.zeros((1, 4, 5, 6)), (1.0, 1.0, 1.0), np.eye(4), unplaced)
    assert frame_of(volume, 1).sides is None


def test_micrometres(real_data: Path) -> None:
    with open_volume(real_data / "cells/1135_mini.h5[raw]") as volume:
        frame = frame_of(volume, 50)
    assert frame.names == ("x / µm", "y / µm")
    assert frame.where == f"z = {50 * 0.28371837:.4g} µm"
    np.testing.assert_allclose(frame.at(np.array([99.0, 10.0])), [99 * 0.12678642, 10 * 0.12678642])


def test_dicom_lies_as_its_tags_say(real_data: Path) -> None:
    import pydicom

    volume = open_volume(real_data / "other_formats/dicom_series")
    index = volume.shape[1] // 2
    frame = frame_of(volume, index)
    heads = [pydicom.dcmread(path) for path in sorted((real_data / "other_formats/dicom_series").iterdir())]
    (tags,) = [head for head in heads if np.array_equal(head.pixel_array, volume[0, index])]
    row, column = np.array(tags.ImageOrientationPatient, float).reshape(2, 3)
    down, right = map(float, tags.PixelSpacing)
    for point in ((0, 0), (87, 0), (0, 127)):
        lps = np.array(tags.ImagePositionPatient, float) + row * right * point[0] + column * down * point[1]
        np.testing.assert_allclose(frame.at(np.array(point, float)), [-lps[0], -lps[1]], atol=1e-3)
    assert frame.sides == ("L", "R", "P", "A")


@pytest.mark.parametrize("name", ["rotated", "TPV"])
def test_ticks_stand_where_astropy_puts_the_sky(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    place = "fits/labelled/testcase4/c4d_170316_062107_ooi_z_ls9.N2.fits"
    path = request.getfixturevalue("real_data") / place if name == "TPV" else sky(tmp_path, ROTATED)
    with warnings.catch_warnings(action="ignore"), fits.open(path) as file:
        wcs = WCS(file[-1].header)
        rows, columns = file[-1].data.shape
    volume = open_volume(path)
    axes = drawn(volume)
    assert isinstance(axes, WCSAxes)
    assert axes.get_xlim() == (-0.5, columns - 0.5)
    assert axes.get_ylim() == (-0.5, rows - 0.5)  # the first row is the lowest
    found = 0
    for number in (0, 1):
        ticks = axes.coords[number]._ticks
        for side, world in ticks.world.items():
            pixels = np.array(ticks.pixel[side]) if len(ticks.pixel[side]) else np.empty((0, 2))
            expected = wcs.all_pix2world(pixels, 0)[:, number] if len(pixels) else []
            np.testing.assert_allclose(np.array(world) % 360, np.array(expected) % 360, atol=2e-6)
            found += len(pixels)
        assert len(written(axes, number)) >= 3
    assert found >= 8
    names = [axes.coords[number].get_axislabel() for number in (0, 1)]
    assert names == ["right ascension (ICRS)", "declination (ICRS)"]


def test_pixels_of_fits_are_as_wide_and_high_as_the_header_says(tmp_path: Path) -> None:
    cards = {
        "CTYPE1": "GLON-CAR",
        "CTYPE2": "GLAT-CAR",
        "CDELT1": -1e-3,
        "CDELT2": 2e-3,
        "CUNIT1": "deg",
        "CUNIT2": "deg",
    }
    axes = drawn(open_volume(sky(tmp_path, cards)))
    assert axes.get_aspect() == pytest.approx(2)
    assert axes.coords[0].get_axislabel() == "galactic longitude"


def test_a_cube_shows_the_plane_that_is_in_the_middle(tmp_path: Path) -> None:
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CTYPE3": "VELO", "CUNIT3": "m/s", "CRVAL2": 10.0}
    cards |= {"CDELT1": -1e-3, "CDELT2": 1e-3, "CDELT3": 500.0}
    path = sky(tmp_path, cards, (1, 6, 30, 40))
    volume = open_volume(path, "zyx")
    axes = drawn(volume)
    np.testing.assert_array_equal(axes.images[0].get_array(), fits.getdata(path)[0, 3])
    assert axes.get_title(loc="left") == "x.fits,  slice 4 of 6"
    distorted = open_volume(sky(tmp_path, {**ROTATED, "CTYPE3": "VELO"}, (6, 30, 40)), "zyx")
    assert drawn(distorted).coords[0].get_axislabel() == "right ascension (ICRS)"


def test_a_cube_whose_sky_moves_from_plane_to_plane(tmp_path: Path) -> None:
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CTYPE3": "VELO", "CRVAL2": 10.0, "PC1_3": 20.0}
    path = sky(tmp_path, cards | {"CDELT1": -1e-3, "CDELT2": 1e-3, "CRPIX3": 1.0}, (6, 30, 40))
    axes = drawn(open_volume(path, "zyx"))
    ticks, found = axes.coords[0]._ticks, 0
    for side, world in ticks.world.items():
        for value, (x, y) in zip(world, ticks.pixel[side], strict=True):
            expected = WCS(fits.getheader(path)).all_pix2world([[x, y, 3]], 0)[0, 0]
            assert (value - expected + 180) % 360 - 180 == pytest.approx(0, abs=2e-6)
            found += 1
    assert found >= 4


def test_fits_without_world_coordinates_counts_pixels_upwards(tmp_path: Path) -> None:
    axes = drawn(open_volume(sky(tmp_path, {})))
    assert (axes.get_xlabel(), axes.get_ylim()) == ("x / pixels from 0", (-0.5, 29.5))


def test_a_whole_sun_has_ticks(real_data: Path) -> None:
    """Its outer edges lie beyond the poles."""
    axes = drawn(open_volume(real_data / "fits/images/heliographic_phase_map.fits.gz"))
    assert [len(written(axes, number)) >= 3 for number in (0, 1)] == [True, True]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 360), (0, 180))


def test_grey_values_are_stretched_as_is_said() -> None:
    image = np.random.default_rng(0).lognormal(size=(60, 70))
    image[:5] = np.nan
    finite = image[np.isfinite(image)]
    assert stretch(image) == (*np.percentile(finite, (1, 99)), "1st to 99th percentile")
    assert stretch(image, sky=True) == (*ZScaleInterval().get_limits(finite), "zscale")
    mask = np.zeros((50, 60))
    mask[3, 4] = 7
    assert stretch(mask, sky=True) == (0, 7, "least to greatest")
    assert stretch(mask * 0 + 3)[2] == "constant"
    assert stretch(image * np.nan)[2] == "no value"


def test_pixels_without_a_value_have_a_colour_and_a_name(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 30)).astype("f4")
    values[2:9, 3:14] = np.nan
    figure = figure_of(Volume.from_array(values, (1.0, 1.0)))
    axes = figure.axes[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(axes.images[0].get_array()), np.isnan(values))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    for row, column in ((5, 8), (15, 20)):
        x, y = axes.transData.transform((column, row))
        shown = "#" + "".join(f"{part:02X}" for part in pixels[int(pixels.shape[0] - y), int(x), :3])
        assert (shown == HOLE) == bool(np.isnan(values[row, column]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no value"]
    assert not figure_of(Volume.from_array(np.nan_to_num(values), (1.0, 1.0))).legends


def brute(labels: np.ndarray) -> set[tuple]:
    """Every edge of a pixel with a label whose neighbour has another, by looking at each."""
    out = set()
    for row, column in np.ndindex(labels.shape):
        for side, ends in (((0, 1), ((0.5, -0.5), (0.5, 0.5))), ((0, -1), ((-0.5, -0.5), (-0.5, 0.5))),
                           ((1, 0), ((-0.5, 0.5), (0.5, 0.5))), ((-1, 0), ((-0.5, -0.5), (0.5, -0.5)))):  # fmt: skip
            y, x = row + side[0], column + side[1]
            other = labels[y, x] if 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] else 0
            if labels[row, column] > 0 and other != labels[row, column]:
                out.add((int(labels[row, column]), *((column + dx, row + dy) for dx, dy in ends)))
    return out


def test_outlines_run_along_the_edges_of_pixels() -> None:
    labels = np.random.default_rng(0).integers(-1, 4, (9, 7))
    segments, owners = edges_of(labels)
    found = {(int(owner), *map(tuple, line)) for owner, line in zip(owners.tolist(), segments.tolist(), strict=True)}
    assert found == brute(labels)
    assert len(segments) == len(found)
    assert len(edges_of(np.zeros((3, 4), int))[0]) == 0


def test_outlines_lie_on_their_pixels_in_the_picture(tmp_path: Path) -> None:
    affine = turned((2, 0, 1), (1, -1, 1))
    volume = open_volume(nifti(tmp_path, affine))
    values = np.zeros(volume.shape[1:], np.uint8)
    values[2, 3, 4], values[2, 1, 0], values[1] = 2, 9, 5
    figure = figure_of(volume, Overlay(volume.like(values), {2: "cord $x"}))
    axes = figure.axes[0]
    lines = [one for one in axes.collections if isinstance(one, LineCollection)]
    by_color: dict[str, np.ndarray] = {}
    for one in lines:
        red, green, blue = (round(255 * part) for part in one.get_color()[0][:3])
        by_color[f"#{red:02X}{green:02X}{blue:02X}"] = np.concatenate(one.get_segments())
    assert by_color.keys() == {"#000000", COLORS[1]}  # 2 and 9 share a colour; 5 is in another slice
    corners = [
        (column + dx, row + dy, 2) for row, column in ((3, 4), (1, 0)) for dx in (-0.5, 0.5) for dy in (-0.5, 0.5)
    ]
    world = apply_affine(affine, corners)[:, [2, 0]]
    assert {tuple(np.round(point, 5)) for point in by_color[COLORS[1]]} == {
        tuple(np.round(point, 5)) for point in world
    }
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["cord $x", "9"]
    assert [handle.get_color() for handle in figure.legends[0].get_lines()] == [color_of(2), color_of(9)]
    many = figure_of(volume, Overlay(volume.like(np.arange(210).reshape(5, 6, 7))))
    assert [text.get_text() for text in many.legends[0].get_texts()] == ["42 labels, 7 colours in turn"]


def test_large_images_are_thinned_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densepred.info_figure._MOST_PIXELS", 20)
    values = np.zeros((1, 50, 70))
    labels = np.zeros((50, 70), np.uint8)
    labels[20:32, 40:60] = 1  # 4 pixels become one: rows 20 to 31, columns 40 to 59
    volume = Volume(values, (0.5, 0.5))
    axes = drawn(volume, Overlay(volume.like(labels)))
    points = np.concatenate([one.get_segments() for one in axes.collections if isinstance(one, LineCollection)])
    np.testing.assert_allclose(points.min((0, 1)), [19.75, 9.75])
    np.testing.assert_allclose(points.max((0, 1)), [29.75, 15.75])
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.25, 34.75), (24.75, -0.25))
    assert axes.images[0].get_extent() == [-0.25, 35.75, 25.75, -0.25]


def test_names_of_classes_come_from_the_header(tmp_path: Path) -> None:
    path = sky(tmp_path, ROTATED)
    labels = np.zeros((30, 40), np.uint8)
    labels[4:9, 5:12], labels[20:, 20:] = 1, 2
    cards = {**ROTATED, "BTYPE": "LABEL", "CLASS0": "sky", "CLASS1": "galaxy"}
    fits.PrimaryHDU(labels, fits.Header(cards)).writeto(tmp_path / "labels.fits")
    with open_volume(path) as volume, open_volume(tmp_path / "labels.fits") as marks:
        figure = figure_of(volume, Overlay(marks))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["galaxy", "2"]
        alone = figure_of(marks)
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["galaxy", "2"]
    shown = alone.axes[0].images[0].get_array()
    assert ["#" + "".join(f"{part:02X}" for part in shown[at]) for at in ((0, 0), (5, 6), (25, 30))] == [
        "#000000", COLORS[0], COLORS[1]
    ]  # fmt: skip


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = sky(tmp_path, ROTATED)
    marks = np.zeros((30, 40), np.int16)
    for name, cards, values, words in (
        ("moved", {**ROTATED, "CRPIX1": 21.0}, marks, "lie 1 pixels apart|world coordinates"),
        ("small", ROTATED, marks[:20], "differ in shape"),
        ("broken", ROTATED, marks + 0.25, "labels are integers, and 1200 of 1200 values are not, such as 0.25"),
    ):
        fits.PrimaryHDU(values, fits.Header(cards)).writeto(tmp_path / f"{name}.fits")
        with pytest.raises(InputError, match=words):
            draw(path, tmp_path / "x.png", labels=tmp_path / f"{name}.fits")
    assert not (tmp_path / "x.png").exists()
    volume = Volume(np.zeros((1, 4, 5, 6)), (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="one channel, and this has 2"):
        figure_of(volume, Overlay(Volume(np.zeros((2, 4, 5, 6), int), (1.0, 1.0, 1.0))))


def test_the_command_draws_labels(tmp_path: Path) -> None:
    path = nifti(tmp_path, turned((0, 1, 2), (1, 1, 1)))
    with open_volume(path) as volume:
        volume.like((volume.numpy() > 0).astype(np.uint8)).save(tmp_path / "labels.nii.gz")
    words = ["info", str(path), "--labels", str(tmp_path / "labels.nii.gz")]
    done = CliRunner().invoke(app, [*words, "--picture", str(tmp_path / "x.png")])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "x.png") as picture:
        colours = {tuple(colour[:3]) for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert tuple(int(COLORS[0][at : at + 2], 16) for at in (1, 3, 5)) in colours
    failed = CliRunner().invoke(app, words)
    assert isinstance(failed.exception, InputError)
    assert "add --picture" in failed.exception.fix
