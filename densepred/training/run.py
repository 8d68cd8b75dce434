"""A run directory: what training leaves, and what prediction needs."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from densepred import config as configuration
from densepred.cases.plan import Plan
from densepred.config import Config
from densepred.figures import training_curves
from densepred.files import atomic_write
from densepred.training.checkpoint import packed

CONFIG, PLAN, WEIGHTS, BEST, METRICS, CURVES, PRETRAINING, SNAPSHOTS = (
    "config.yaml",
    "plan.json",
    "model.safetensors",
    "best.safetensors",
    "metrics.csv",
    "curves.png",
    "pretraining.json",
    "snapshots",
)


@dataclass
class Run:
    """The folder of one training, with its recipe, its plan and its rows of metrics (one an epoch)."""

    path: Path
    config: Config
    plan: Plan
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def save_recipe(self) -> None:
        """Write the resolved configuration and the plan."""
        atomic_write(self.path / CONFIG, configuration.dump(self.config))
        self.plan.save(self.path / PLAN)

    def save_metrics(self) -> None:
        """Write `metrics.csv`."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.path / METRICS, text.getvalue())

    def draw_curves(self) -> None:
        """Draw the metrics."""
        training_curves(self.rows, self.path / CURVES)

    def save_weights(self, weights: dict[str, Tensor], name: str = WEIGHTS) -> None:
        """Write weights for prediction."""
        atomic_write(self.path / name, packed(weights))
