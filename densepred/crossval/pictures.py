"""Pictures of a cross-validation: the score of every held-out case, and how far probabilities are to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.crossval.calibration import DOUBT, Sample, reliability
from densepred.crossval.held_out import HeldOut, Setup
from densepred.crossval.tables import MEAN
from densepred.figures import COLORS, FAINT, INK, color_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 3
_SPREAD = 0.28  # of the points of a fold


def scores_figure(found: HeldOut, setup: Setup, summary: dict[str, Any]) -> Figure:
    """A panel for each class, map or column: a point for each case, by fold, with the means and their intervals."""
    judged, names = found.judged, list(summary["names"])
    metric, values = judged.metric, judged.values
    rows = -(-len(names) // _ACROSS)
    across = min(len(names), _ACROSS)
    folds = sorted(int(fold) for fold in summary["folds"])
    figure = new_figure(max(across * (1.6 + 0.62 * (len(folds) + 1)), 6.4), 3.9 * rows)
    which = np.array([setup.fold_of[case] for case in judged.cases])
    panels = figure.subplots(rows, across, squeeze=False, sharey=True).ravel()
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        color = color_of(index)
        for at, fold in enumerate(folds):
            mine = np.sort(values[which == fold, index])
            mine = mine[~np.isnan(mine)]
            shift = _SPREAD * (2 * (np.arange(len(mine)) * 0.618034 % 1) - 1)  # spread out, the same each time
            axes.scatter(at + shift, mine, s=13, color=color, alpha=0.75, linewidths=0)
            _mean(axes, at, summary["folds"][fold][name])
        axes.axvline(len(folds) - 0.5, color=FAINT, linewidth=0.8)
        _mean(axes, len(folds), summary["all"][name])
        whole = summary["all"][name]
        axes.set_title(f"{name}: {whole['value']:{metric.form}}", fontsize=11, color=INK, parse_math=False)
        axes.set_xticks(range(len(folds) + 1), [*map(str, folds), "all"])
        axes.set_xlim(-0.6, len(folds) + 0.6)
        _plain(axes)
        axes.set_xlabel("fold", color=INK)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::across]:
        axes.set_ylabel(f"{metric.name} of a held-out case", color=INK)
    title = f"{summary['cases']} held-out cases; bars: means and 95 % intervals; mean of all "
    title += f"{summary['all'][MEAN]['value']:{metric.form}}"
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _mean(axes: Axes, at: float, one: dict[str, float]) -> None:
    below, above = one["value"] - one["low"], one["high"] - one["value"]
    axes.errorbar(
        at, one["value"], [[max(below, 0)], [max(above, 0)]], color=INK, marker="_", markersize=14, capsize=4, zorder=3
    )


def reliability_figure(samples: Sequence[Sample], temperature: float, used: bool) -> Figure:
    """Accuracy over confidence before and after the temperature: where foreground is possible, and everywhere."""
    figure = new_figure(9.2, 4.6)
    panels = figure.subplots(1, 2)
    titles = (f"foreground has a probability above {DOUBT:g}", "all voxels")
    for axes, contested, title in zip(panels, (True, False), titles, strict=True):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="exact")
        for heat, color, name in ((1.0, COLORS[6], "T = 1"), (temperature, COLORS[5], f"T = {temperature:g}")):
            one = reliability(samples, heat, contested)
            there = one.share > 1e-4
            label = f"{name}: error {one.error:.4f}"
            axes.plot(one.confidence[there], one.accuracy[there], color=color, marker="o", markersize=4, label=label)
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("confidence: probability of the predicted class", color=INK)
        axes.set_aspect("equal")
        axes.set_xlim(0.2, 1.02)
        axes.set_ylim(0, 1.02)
        _plain(axes)
        axes.legend(fontsize=9, labelcolor=INK, loc="lower right", frameon=False)
    panels[0].set_ylabel("share that is right", color=INK)
    verdict = "used" if used else "not used"
    figure.suptitle(f"{len(samples)} held-out cases; temperature {temperature:g} is {verdict}", fontsize=11, color=INK)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
