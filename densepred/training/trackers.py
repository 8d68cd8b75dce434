"""Where the numbers of a training are shown beside its metrics.csv: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from densepred import config as configuration
from densepred.config import Config
from densepred.errors import InputError
from densepred.files import atomic_write

_PROJECT = "densepred"


class Tracker(Protocol):
    """One place."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show named values at a step."""

    def close(self) -> None:
        """Nothing more comes."""


class _TensorBoard:
    def __init__(self, run: Path, step: int, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted training logged beyond this step is hidden
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: Path, step: int, config: Config) -> None:
        wandb = _imported("wandb")
        noted = run / "wandb-id"
        identity = noted.read_text().strip() if noted.is_file() else wandb.util.generate_id()
        atomic_write(noted, identity + "\n")
        recipe = config.model_dump(mode="json")
        self.run = wandb.init(
            project=_PROJECT, name=run.resolve().name, id=identity, resume="allow", dir=str(run), config=recipe
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    def __init__(self, run: Path, step: int, config: Config) -> None:
        self.mlflow = _imported("mlflow")
        noted = run / "mlflow-id"
        self.mlflow.set_experiment(_PROJECT)
        known = noted.read_text().strip() if noted.is_file() else None
        found = self.mlflow.start_run(run_id=known, run_name=None if known else run.resolve().name)
        atomic_write(noted, found.info.run_id + "\n")
        if known is None:
            self.mlflow.log_text(configuration.dump(config), "config.yaml")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics({re.sub(r"[^\w\-. /]", "_", name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, int, Config], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class Trackers:
    """Shows scalars in several places, from `with` on.

    Args:
        names: keys of `TRACKERS`.
        run: the run directory.
        step: steps done already.
        config: the recipe, which is shown too where there is a place for it.

    Raises:
        InputError: what a tracker needs is not installed.
    """

    def __init__(self, names: Sequence[str], run: Path, step: int, config: Config) -> None:
        self._open: list[Tracker] = []
        for name in names:
            self._open.append(TRACKERS[name](run, step, config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._open:
            tracker.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show named values at a step."""
        for tracker in self._open:
            tracker.scalars(step, values)


def names(config: Config) -> tuple[str, ...]:
    """The trackers of a recipe."""
    return (*(("tensorboard",) if config.training.tensorboard else ()), *config.training.trackers)


def require(config: Config) -> None:
    """Are the trackers of a recipe installed?

    Raises:
        InputError: one is not.
    """
    for name in config.training.trackers:
        _imported(name)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = f"training.trackers: {name} is not installed ({error})"
        raise InputError(what, "pip install 'densepred[trackers]', or leave it out") from error
