"""Pictures of the worst and the median case: a slice across each axis, with the outlines of truth and prediction."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from densepred.evaluation.pairing import Files, find_files
from densepred.evaluation.planes import Plane, fullest, read_planes
from densepred.evaluation.scores import CaseResult, Scores
from densepred.figures import INK, color_of, new_figure, outline_legend, overlay, save_png
from densepred.files import writable_folder
from densepred.metrics import dice
from densepred.volumes import split_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_HEIGHT, _FRAME_HEIGHT = 3.6, 1.1  # inches
_WIDEST = 2.0  # of a panel over its height
_LONGEST = 24  # letters of a case's name in the title


def draw_cases(scores: Scores, out: str | Path, images: Files | None = None) -> list[Path]:
    """Draw the case with the lowest mean Dice and the one in the middle.

    Args:
        scores: from `evaluate`; its files must still be there.
        out: the folder for `worst_<id>.png` and `median_<id>.png`.
        images: a folder, files, or ids with their files; a case without its image is drawn on black.

    Returns:
        the pictures written: none without a scored case, one if there is a single case.

    Raises:
        InputError: the folder cannot be written to, or the images' folder is missing.
    """
    ranked = scores.ranked()
    found = find_files(images, "images") if images is not None else {}
    chosen = {"worst": ranked[0]} if ranked else {}
    if len(ranked) > 1:
        chosen["median"] = ranked[len(ranked) // 2]
    return [draw_case(scores, result, kind, out, found.get(result.case)) for kind, result in chosen.items()]


def draw_case(scores: Scores, result: CaseResult, kind: str, out: str | Path, image: Path | None) -> Path:
    """Draw one case as `<kind>_<id>.png`, which is returned; arguments as of `case_figure` and `draw_cases`."""
    path = writable_folder(out) / f"{kind}_{result.case.replace('/', '_')}.png"
    save_png(case_figure(scores, result, kind, image), path)
    return path


def case_figure(scores: Scores, result: CaseResult, kind: str, image: Path | None = None) -> Figure:
    """One case: slices through the largest areas of the truth, and a legend with the Dice of each class.

    Of several images of a file the one with most of the truth is shown, and named; the Dice is that of all.
    """
    foreground = [value for value in scores.classes if value != 0]
    colors = {value: color_of(index) for index, value in enumerate(foreground)}
    looked_for = None if scores.instances else foreground
    shown = fullest(result.truth, result.prediction, image, looked_for, scores.axes, scores.checksum)
    planes = read_planes(*shown, looked_for, scores.axes, scores.checksum)
    if scores.instances:
        planes = [replace(one, truth=_objects(one.truth), prediction=_objects(one.prediction)) for one in planes]
    shapes = [min(width / height, _WIDEST) for height, width in (plane.size for plane in planes)]
    figure = new_figure(max(6.0, _PANEL_HEIGHT * sum(shapes) + 0.5), _PANEL_HEIGHT + _FRAME_HEIGHT)
    for axes, plane in zip(figure.subplots(1, len(planes), squeeze=False, width_ratios=shapes)[0], planes, strict=True):
        _draw_plane(axes, plane, colors)
    overlaps = dict(zip(scores.classes, dice(result.confusion).tolist(), strict=True))
    named = {
        f"{scores.classes[value]} (Dice {overlaps[value]:.3f})": color
        for value, color in colors.items()
        if not math.isnan(overlaps[value])
    }
    outline_legend(figure, named)
    part = split_part(shown[0])[1] if shown[0] != str(result.truth) else None
    name = result.case if part is None else f"{result.case} [{part}]"
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 2 :]}"
    title = f"{kind} case: {name}, mean Dice {scores.case_dice[result.case]:.3f}"
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return figure


def _objects(numbers: np.ndarray) -> np.ndarray:
    """1 in every object, 0 outside and on one side of where two touch, so that the outline parts them."""
    inside = numbers != 0
    for axis in (0, 1):
        here, before = (np.moveaxis(array, axis, 0) for array in (inside, numbers))
        here[1:] &= (before[1:] == before[:-1]) | (before[:-1] == 0)
    return inside.astype(np.uint8)


def _draw_plane(axes: Axes, plane: Plane, colors: dict[int, str]) -> None:
    overlay(axes, plane.image, plane.truth, plane.prediction, colors, plane.pixel[0] / plane.pixel[1])
    axes.set_title(plane.title, fontsize=10, color=INK)
    places = ((0.5, 0.98, "center", "top"), (0.02, 0.5, "left", "center"))
    box = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1.5}
    for letter, (x, y, across, along) in zip(plane.letters, places, strict=False):
        axes.text(x, y, letter, ha=across, va=along, color="white", fontsize=9, transform=axes.transAxes, bbox=box)
