"""The pictures: right data in the right place, whole files, no global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from densepred.errors import UnsafeError
from densepred.figures import COLORS, curves_figure, lighter, new_figure, overlay, save_png, training_curves

ROWS = [
    {"epoch": "1", "loss": "1.2", "lr": "0.01", "dice_mean": "", "dice_left": "", "dice_right": "", "grad_norm": "2"},
    {"epoch": 2, "step": 100, "loss": 0.8, "lr": 0.008, "dice_mean": 0.6, "dice_left": 0.7, "dice_right": 0.5},
    {"epoch": 3, "step": 150, "loss": float("nan"), "lr": 0.006},
    {"epoch": 4, "step": 200, "loss": 0.5, "lr": 0.004, "dice_mean": 0.55, "dice_left": 0.8, "dice_right": 0.3},
]


def test_curves_hold_the_numbers() -> None:
    above, below, rate = curves_figure(ROWS).axes
    assert above.get_lines()[0].get_xydata().tolist() == [[1, 1.2], [2, 0.8], [4, 0.5]]
    assert rate.get_lines()[0].get_xydata().tolist() == [[1, 0.01], [2, 0.008], [3, 0.006], [4, 0.004]]
    curves = {line.get_label(): line.get_xydata().tolist() for line in below.get_lines()}
    assert curves["left"] == [[2, 0.7], [4, 0.8]]
    assert curves["right"] == [[2, 0.5], [4, 0.3]]
    assert curves["mean"] == [[2, 0.6], [4, 0.55]]
    assert below.get_title(loc="right") == "best mean 0.600 in epoch 2"


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[:2], ROWS, [{"epoch": 1, "loss": "inf", "lr": "1e-3"}]])
def test_curves_are_drawn_from_any_start(rows: list[dict[str, object]], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    training_curves(rows, path)
    picture = imread(path)
    assert picture.shape[0] > 500
    assert picture.shape[1] > 500
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        training_curves(ROWS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    (tmp_path / "curves.png").symlink_to(target)
    with pytest.raises(UnsafeError):
        training_curves(ROWS, tmp_path / "curves.png")
    assert target.read_text() == "mine"


def test_no_global_state_and_no_display() -> None:
    code = (
        "import sys, densepred.figures as f; assert 'matplotlib' not in sys.modules\n"
        "f.curves_figure([]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent)


def test_overlay_outlines_both_masks_between_pixels() -> None:
    truth, prediction = np.zeros((12, 10), int), np.zeros((12, 10), int)
    truth[0:5, 2:6], prediction[3:9, 4:9] = 1, 1
    axes = new_figure(3, 3).subplots()
    image = np.random.default_rng(0).normal(size=(12, 10))
    overlay(axes, image, truth, prediction, {1: COLORS[0], 2: COLORS[1]}, aspect=1.5)
    solid, halo, dashed = axes.collections
    assert to_rgb(COLORS[0]) == pytest.approx(solid.get_edgecolor()[0][:3])
    assert solid.get_paths()[0].get_extents().extents == pytest.approx([1.5, -0.5, 5.5, 4.5])
    assert dashed.get_paths()[0].get_extents().extents == pytest.approx([3.5, 2.5, 8.5, 8.5])
    assert halo.get_paths()[0].get_extents().extents == pytest.approx([3.5, 2.5, 8.5, 8.5])
    assert solid.get_linestyle() != dashed.get_linestyle()
    assert axes.get_aspect() == 1.5


def test_overlay_shows_the_image_between_percentiles() -> None:
    image = np.tile(np.arange(100.0), (10, 1))
    image[0, 0] = 1e9
    image[1, 1] = np.nan
    axes = new_figure(3, 3).subplots()
    nothing = np.zeros(image.shape, int)
    overlay(axes, image, nothing, nothing, {1: COLORS[0]})
    low, high = axes.images[0].get_clim()
    assert low == pytest.approx(1, abs=1)
    assert high == pytest.approx(98.5, abs=1)
    assert not axes.collections


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_flat_or_blank_image_can_be_drawn(value: float, tmp_path: Path) -> None:
    figure = new_figure(2, 2)
    mask = np.ones((4, 4), int)
    overlay(figure.subplots(), np.full((4, 4), value), mask, mask, {1: COLORS[0]})
    save_png(figure, tmp_path / "flat.png")
    assert (imread(tmp_path / "flat.png")[..., :3].std(axis=(0, 1)) > 0).all()


def test_lighter_moves_towards_white() -> None:
    assert lighter("#000000", 0.5) == "#808080"
    assert lighter("#E69F00", 0) == "#E69F00"
    assert lighter("#E69F00", 1) == "#FFFFFF"
