"""Pictures of what augmentation does: cases in rows, the original and some draws in columns."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from densepred.augment.volume import Augmenter
from densepred.cases.cache import prepare
from densepred.cases.case import collect
from densepred.cases.folds import split
from densepred.cases.patches import PatchSampler
from densepred.cases.plan import Plan, make_plan
from densepred.config import Config
from densepred.figures import INK, color_of, labelled, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _WIDEST = 2.3, 2.0
"""Height of a panel in inches; its width over its height at most."""
_CAPTION = 0.42
"""Inches for two lines below a panel."""


@dataclass
class Row:
    """One case: what its patch is, and what became of it."""

    case: str
    images: list[np.ndarray] = field(default_factory=list)
    """(C, *spatial), the original first."""
    labels: list[np.ndarray] = field(default_factory=list)
    """(*spatial) class indices, -1 without a truth."""
    captions: list[str] = field(default_factory=list)
    """What happened to each."""


def preview(config: Config, cases: int = 4, draws: int = 5) -> Figure:
    """Draw augmented training patches with the outlines of their labels.

    Patches are centred on foreground, one for each of some training cases, spread evenly over the list. Nothing is
    written but the cache, if the recipe has one.

    Args:
        config: the recipe.
        cases: rows.
        draws: columns beside the original.

    Raises:
        InputError: a fault of the data.

    Example:
        >>> preview(load("configs/hippocampus_unet3d.yaml")).savefig("preview.png")  # doctest: +SKIP
    """
    train = split(collect(config.data), config.data)[0]
    plan = make_plan(config, train)
    chosen = [train[round(at)] for at in np.linspace(0, len(train) - 1, min(cases, len(train)))]
    with tempfile.TemporaryDirectory(prefix="densepred-preview-") as folder:
        cached = prepare(chosen, plan, config.data.cache or folder)
        alone = config.patch.model_copy(update={"batch": 1, "foreground": 1.0})
        samplers = [PatchSampler.of(alone, [case], plan, config.training.seed) for case in cached]
        batches = [sampler.batch(0, number) for number, sampler in enumerate(samplers)]
    inputs = [batch.image[:, : len(plan.channels)] for batch in batches]  # maps to predict may stand behind them
    image = torch.from_numpy(np.concatenate(inputs))
    label = torch.from_numpy(np.concatenate([batch.label for batch in batches])).long()
    augment = Augmenter(config.augment, max(len(plan.classes), 1), plan.typical_spacing, plan.flag_channels)
    originals = zip(chosen, image.numpy(), label.numpy(), strict=True)
    rows = [Row(case.id, [own], [truth], ["original"]) for case, own, truth in originals]
    for draw in range(draws):
        seeds = [(config.training.seed * 1009 + draw) * 1009 + number for number in range(len(rows))]
        images, labels = augment(image, label, seeds)
        for number, row in enumerate(rows):
            row.images.append(images[number].numpy())
            row.labels.append(labels[number].numpy())
            row.captions.append(", ".join(augment.happened(seeds[number], image)) or "unchanged")
    return figure_of(rows, plan)


def figure_of(rows: Sequence[Row], plan: Plan) -> Figure:
    """The grid of pictures. Of volumes it shows the plane across the first axis with most foreground."""
    height, width = rows[0].labels[0].shape[-2:]
    spacing = plan.typical_spacing or (1.0,) * plan.dims
    aspect = spacing[-2] / spacing[-1]
    shape = min(max(width / (height * aspect), 1 / _WIDEST), _WIDEST)
    columns = len(rows[0].images)
    figure = new_figure(columns * (_PANEL * shape + 0.1) + 0.3, len(rows) * (_PANEL + _CAPTION) + 0.6)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        limits = [_limits(channel) for channel in row.images[0]]
        for column, axes in enumerate(line):
            image, label = _plane(row.images[column], row.labels[column])
            labelled(axes, _shown(image, limits, plan), label, _colors(plan), aspect)
            _caption(axes, row, column, _PANEL * shape)
    legend_below(figure, {name: color_of(index) for index, name in enumerate(plan.classes[1:])}, "outside, or no truth")
    return figure


def _colors(plan: Plan) -> dict[int, str]:
    return {index + 1: color_of(index) for index in range(len(plan.classes) - 1)}


def _caption(axes: Axes, row: Row, column: int, width: float) -> None:
    text = "\n".join(textwrap.wrap(row.captions[column], int(width * 15))[:2])
    axes.set_xlabel(text, fontsize=7, color=INK, labelpad=3, parse_math=False)
    if column == 0:
        axes.set_ylabel(textwrap.shorten(row.case, 30, placeholder="..."), fontsize=9, color=INK, parse_math=False)


def _plane(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, Y, X) and (Y, X): of a volume the plane with most foreground, the middle one if there is none."""
    if label.ndim == 2:
        return image, label
    most = (label > 0).sum((1, 2))
    at = int(most.argmax()) if most.any() else len(label) // 2
    return image[:, at], label[at]


def _limits(channel: np.ndarray) -> tuple[float, float]:
    """What is black and white in all pictures of a row, so that brightness can be compared."""
    low, high = np.percentile(channel, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _shown(image: np.ndarray, limits: Sequence[tuple[float, float]], plan: Plan) -> np.ndarray:
    """Colours (Y, X, 3) of images with three channels of intensities, else the first channel (Y, X); 0 to 1."""
    channels = [c for c in range(len(image)) if c not in plan.flag_channels]
    scaled = [np.clip((image[c] - limits[c][0]) / (limits[c][1] - limits[c][0]), 0, 1) for c in channels]
    return np.stack(scaled, -1) if len(scaled) == 3 else scaled[0]
