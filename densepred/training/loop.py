"""`train` and `resume`: from a recipe to a run directory."""

from __future__ import annotations

import logging
from pathlib import Path

from densepred import config as configuration
from densepred.cases.cache import CachedCase, prepare
from densepred.cases.case import Case, collect
from densepred.cases.folds import split
from densepred.cases.plan import Plan, make_plan
from densepred.config import Config
from densepred.device import pick_device
from densepred.errors import InputError
from densepred.files import sweep_parts, writable_folder
from densepred.models.weights.sources import is_file
from densepred.progress import progress
from densepred.training import checkpoint, ranks
from densepred.training.finetune import rehearse
from densepred.training.run import CONFIG, PLAN, Run
from densepred.training.trackers import require
from densepred.training.trainer import Trainer

MAY_CHANGE = (
    "data.root",
    "data.cache",
    "training.epochs",
    "training.budget",
    "training.workers",
    "training.device",
    "training.tensorboard",
    "training.trackers",
)
"""What a resumed training may be given anew; anything else would make it another training."""
_LOG = logging.getLogger(__name__)


def train(config: Config | str | Path, run: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Run:
    """Train a network.

    Args:
        config: the recipe, or the path of its YAML.
        run: a new folder for everything that training writes.
        overrides: `key.sub=value` texts (with a path only).

    Raises:
        InputError: a fault of the recipe or of the data; all of them are named.
        ResourceError: the loss is not finite, or the disk is full.
        StoppedError: a signal; the state is saved and `resume` goes on.
    """
    if not isinstance(config, Config):
        config = configuration.load(config, overrides)
    config = anchored(config)
    rehearse(config)
    require(config)
    ranks.join(pick_device(config.training.device))
    folder = writable_folder(run)
    with ranks.holding(folder):
        cases = collect(config.data)
        if ranks.first():
            if any((folder / "checkpoints").glob("step-*")):
                raise InputError(
                    "holds a training already",
                    f"go on with it (densepred train --resume {folder}) or choose another folder",
                    folder,
                )
            Run(folder, config, make_plan(config, split(cases, config.data)[0])).save_recipe()
        ranks.wait()
        return _fit(Run(folder, config, Plan.load(folder / PLAN)), cases)


def resume(run: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Run:
    """Go on with a training that was stopped or killed; the end is that of an uninterrupted one, bit for bit.

    Args:
        run: its folder.
        overrides: new values for `MAY_CHANGE` keys.
    """
    folder = Path(run)
    if not (folder / CONFIG).is_file() or not (folder / PLAN).is_file():
        raise InputError(
            f"no run to resume: {CONFIG} or {PLAN} is missing",
            "start it with densepred train CONFIG --run FOLDER",
            folder,
        )
    refused = [text for text in overrides if text.partition("=")[0] not in MAY_CHANGE]
    if refused:
        raise InputError(
            f"a resumed training cannot change {', '.join(refused)}", f"only {', '.join(MAY_CHANGE)} may change", folder
        )
    config = anchored(configuration.load(folder / CONFIG, overrides))
    require(config)
    ranks.join(pick_device(config.training.device))
    with ranks.holding(writable_folder(folder)):
        found = Run(folder, config, Plan.load(folder / PLAN))
        return _fit(found, collect(found.config.data))


def anchored(config: Config) -> Config:
    """The recipe with absolute folders, so that it can be resumed from anywhere."""
    data, model = config.data, config.model
    if model.pretrained and is_file(model.pretrained):
        model = model.model_copy(update={"pretrained": str(Path(model.pretrained).resolve())})
    paths = {"root": str(Path(data.root).resolve()), "cache": data.cache and str(Path(data.cache).resolve())}
    return config.model_copy(update={"data": data.model_copy(update=paths), "model": model})


def _fit(run: Run, cases: list[Case]) -> Run:
    checkpoint.refuse_link(run.checkpoints)
    if ranks.first():
        sweep_parts(run.path)
        sweep_parts(run.checkpoints)
    Trainer(run, *prepared(run, cases)).fit()
    return run


def prepared(run: Run, cases: list[Case]) -> tuple[list[CachedCase], list[CachedCase]]:
    """The cases to learn from and those to validate on, preprocessed; of several processes by the first.

    Raises:
        InputError: no training case has any class but the background, or a case is at fault.
    """
    train_cases, val_cases = split(cases, run.config.data)
    if not ranks.first():
        ranks.wait()  # and find them all there
    cached = {case.id: case for case in _prepare(run, [*train_cases, *val_cases])}
    if ranks.first():
        ranks.wait()
    seen = {index for case in train_cases for index in cached[case.id].classes}
    if not seen and run.plan.classes:
        raise InputError(
            "no training case has a voxel of any class but the background", "check data.classes and labels"
        )
    for index in set(range(1, len(run.plan.classes))) - seen:
        _LOG.warning("no training case holds the class %s", run.plan.classes[index])
    return [cached[c.id] for c in train_cases], [cached[c.id] for c in val_cases]


def _prepare(run: Run, cases: list[Case]) -> list[CachedCase]:
    folder = Path(run.config.data.cache) if run.config.data.cache else run.path / "cache"
    unique = list({case.id: case for case in cases}.values())
    with progress(len(unique), "preparing cases") as advance:
        return prepare(unique, run.plan, folder, lambda: advance(1))
