"""Pictures of probabilities (ROC curves, how often each confidence is right) and of how well maps are predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from densepred.evaluation.values import ValueScores
from densepred.figures import FAINT, INK, color_of, new_figure, save_png
from densepred.files import writable_folder
from densepred.metrics import Calibration, Ranking, Spectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(scores: ValueScores, out: str | Path) -> list[Path]:
    """Draw what probabilities are worth, of all cases pooled.

    Args:
        scores: from `evaluate_values`.
        out: the folder for `probabilities.png`.

    Returns:
        the pictures written: none of maps of numbers, or without a scored case.

    Raises:
        InputError: the folder cannot be written to.
    """
    if not any(isinstance(of, Calibration) for of in scores.pooled.values()):
        return []
    path = writable_folder(out) / "probabilities.png"
    save_png(curves_figure(scores), path)
    return [path]


def curves_figure(scores: ValueScores) -> Figure:
    """ROC curves at the left; at the right accuracy over confidence, and the share of the voxels in each bin."""
    figure = new_figure(9.0, 4.4)
    left, right = figure.subplots(1, 2)
    curves = {name: of for name, of in scores.pooled.items() if isinstance(of, Ranking)}
    for index, (name, of) in enumerate(curves.items()):
        false, true, _ = of.roc
        if not math.isnan(of.auc):
            left.plot(false, true, color=color_of(index), label=f"{name} (AUC {of.auc:.4f})", linewidth=1.8)
    left.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
    _style(left, "false positive rate", "true positive rate")
    _unit(left)
    if len(left.get_lines()) > 1:
        _legend(left, "lower right")
    for whole in scores.pooled.values():
        if isinstance(whole, Calibration):
            _reliability(right, whole)
    return figure


def draw_spectra(spectra: Mapping[str, Spectra], path: str | Path, across: str = "multipole l") -> None:
    """Draw how well maps are predicted at each scale, as PNG.

    Args:
        spectra: name of a method -> the spectra of its predictions.
        path: the file to write, or to replace in one step.
        across: what the wave number is.

    Example:
        >>> draw_spectra({"U-Net": ours, "Wiener": theirs}, "spectra.png")  # doctest: +SKIP
    """
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    for index, (name, of) in enumerate(spectra.items()):
        left.plot(of.frequency, of.ratio, color=color_of(index), label=name, linewidth=1.8)
        right.plot(of.frequency, of.correlation, color=color_of(index), label=name, linewidth=1.8)
    for axes, label in ((left, "power: prediction / truth"), (right, "correlation r")):
        axes.axhline(1, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
        _style(axes, across, label)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), axes.get_ylim()[1])
    _legend(right, "lower left")
    save_png(figure, path)


def _reliability(axes: Axes, of: Calibration) -> None:
    confidence, accuracy = of.reliability
    known = ~np.isnan(confidence)
    edges = np.arange(len(of.counts)) / len(of.counts)
    share = of.counts / max(1, of.counts.sum())
    axes.bar(edges, share, 1 / len(share), align="edge", color="#E6E6E6", label="share of the voxels", zorder=1)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--", zorder=2)
    label = f"accuracy (ECE {of.error:.4f})"
    axes.plot(confidence[known], accuracy[known], color=INK, marker="o", markersize=4, label=label, zorder=3)
    _style(axes, "confidence", "accuracy, share of the voxels")
    _unit(axes)
    _legend(axes, "upper left")


def _style(axes: Axes, across: str, along: str) -> None:
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(along, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _unit(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)


def _legend(axes: Axes, place: Literal["lower right", "lower left", "upper left"]) -> None:
    legend = axes.legend(fontsize=9, loc=place, labelcolor=INK, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
