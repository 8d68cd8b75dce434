"""`cross_validate`: from a recipe to folds, held-out predictions and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from densepred import config as configuration
from densepred.cases.cache import prepare
from densepred.cases.plan import Plan, make_plan
from densepred.config import Config
from densepred.crossval.held_out import Setup
from densepred.crossval.judging import Verdict, judge
from densepred.crossval.recipe import Shared, chosen, shared
from densepred.crossval.snapshots import decide_snapshots
from densepred.crossval.tables import scores_tables
from densepred.crossval.training import FoldState, Record, train_folds
from densepred.errors import DONE, SOME_FAILED, NothingDoneError
from densepred.files import locked, writable_folder
from densepred.inference.engines import devices_of
from densepred.inference.engines.local import Local
from densepred.inference.folds import DONE as FINISHED
from densepred.progress import progress

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Result:
    """What a command of cross-validation found.

    Args:
        out: its folder.
        verdict: scores and decisions.
        failed: a line for each fold that is not done.
    """

    out: Path
    verdict: Verdict
    failed: list[str]

    @property
    def exit_code(self) -> int:
        """0, or 3 if a fold or a case failed."""
        return SOME_FAILED if self.failed or self.verdict.failed else DONE

    @property
    def tables(self) -> list[Table]:
        """The scores, for the terminal."""
        return scores_tables(self.verdict.held_out, self.verdict.summary)

    @property
    def lines(self) -> list[str]:
        """What was decided, and why; and which labels seem to be moved."""
        return [*(one.why for one in self.verdict.decisions), *map(str, self.verdict.misplaced)]


def cross_validate(
    config: Config | str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    folds: Sequence[int] | None = None,
    devices: str | None = None,
) -> Result:
    """Train the folds of a recipe, predict each case by the model that did not see it, and decide how to predict.

    What is done stays: the same call goes on where an earlier one ended, however it did.

    Args:
        config: the recipe, or the path of its YAML.
        out: a folder for everything; `densepred predict` takes it as a run.
        overrides: `key.sub=value` texts (with a path only).
        folds: their numbers; by default all.
        devices: a training at a time on each: "0,1" (GPUs) or "cpu*2"; by default one, where the recipe says.

    Raises:
        InputError: a fault of the recipe or of the data, or another recipe was cross-validated there.
        NothingDoneError: no fold could be trained, or no case scored.
        LockedError: another cross-validation holds the folder.
        StoppedError: a signal; the same call goes on.

    Example:
        >>> found = cross_validate("configs/hippocampus_unet3d.yaml", "runs/cv")  # doctest: +SKIP
        >>> mean = found.verdict.summary["all"]["mean"]["value"]  # doctest: +SKIP
    """
    if not isinstance(config, Config):
        config = configuration.load(config, overrides)
    asked_devices = () if devices is None else devices_of(devices)
    folder = writable_folder(out)
    with locked(folder):
        common = shared(config, folder)
        asked = chosen(common.folds, folds)
        states = [
            FoldState(fold, [f"fold-{fold}"], common.folds[fold][1], data=common.told_of(common.folds[fold][0]))
            for fold in asked
        ]
        record = Record(folder, states)
        if any(one.state != FINISHED for one in record.folds if one.fold in asked):
            _prepare(common)
            train_folds(record, asked, asked_devices, config.training)
        failed = [f"fold {one.fold}: {one.state}: {one.why}" for one in record.folds if one.state != FINISHED]
        if not record.done:
            raise NothingDoneError("\n  ".join(["no fold could be trained", *failed]), f"see the logs in {folder}/logs")
        plan = Plan.load(folder / record.done[0].runs[0] / "plan.json")
        setup, first, runs = decide_snapshots(Setup(folder, common, plan, record.done, Local(asked_devices)))
        return Result(folder, judge(setup, first, runs), failed)


def _prepare(common: Shared) -> None:
    """Preprocess all cases once, before several folds would each begin with that; a fault of one ends it here."""
    cases, cache = list(common.cases.values()), common.config.data.cache
    assert cache is not None  # the recipe that folds share names one
    with progress(len(cases), "preparing cases") as advance:
        prepare(cases, make_plan(common.config, cases), cache, lambda: advance(1))
