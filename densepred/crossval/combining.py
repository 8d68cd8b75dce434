"""`combine`: are two cross-validations together better than either?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from densepred import config as configuration
from densepred.cases.plan import Plan
from densepred.crossval.decisions import MIRROR, Decision, Paired, decide, more_than_noise
from densepred.crossval.held_out import HeldOut, Setup, predict_held_out
from densepred.crossval.judging import judge
from densepred.crossval.recipe import GIVEN, RECIPE, Shared, read_given, shared
from densepred.crossval.snapshots import WITH_SNAPSHOTS
from densepred.crossval.training import FoldState, read_states
from densepred.crossval.whole import Result
from densepred.errors import InputError
from densepred.files import atomic_write, locked, writable_folder
from densepred.inference.engines import devices_of
from densepred.inference.engines.local import Local
from densepred.inference.folds import DECISIONS, DONE, RECORD, read_record, write_record
from densepred.inference.loading import check_agreement
from densepred.metrics.bootstrap import interval


@dataclass(frozen=True)
class _Candidate:
    """One cross-validation, or two together."""

    name: str
    setup: Setup
    found: HeldOut


def combine(folders: Sequence[str | Path], out: str | Path, devices: str | None = None) -> Result:
    """Score the means of pairs of cross-validations on the held-out cases, and say which single or pair is best.

    Of a pair the mean of the logits is taken, as prediction does. It is preferred to the best single if it is better by
    more than noise; `out` can be given to `densepred predict` then, and stands for what is best.

    Args:
        folders: of two or more cross-validations with the same folds.
        out: a new folder.
        devices: where to predict, as of `cross_validate`.

    Raises:
        InputError: their folds or cases differ, or their models do not see or predict the same.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < 2:
        raise InputError("--combine needs two cross-validations", "name their folders")
    engine, folder = Local(() if devices is None else devices_of(devices)), writable_folder(out)
    with locked(folder):
        common, states = _common(paths)
        mirror = _mirror(paths)
        plan, *others = (Plan.load(p / f[0].runs[0] / "plan.json") for p, f in zip(paths, states, strict=True))
        for path, other in zip(paths[1:], others, strict=True):
            check_agreement(plan, other, paths[0].name, path)
        singles, pairs = [], []
        for name, path, folds in zip(names(paths), paths, states, strict=True):
            with locked(path):
                own = replace(common, config=configuration.load(path / RECIPE))
                decided = _decided(path, folds)
                setup = Setup(path, own, plan, decided, engine, "" if decided == folds else WITH_SNAPSHOTS)
                singles.append(_Candidate(name, setup, _predicted(setup, "", mirror)))
        for a, b in combinations(singles, 2):
            both = zip(a.setup.done, b.setup.done, strict=True)
            runs = [[*a.setup.runs(one), *b.setup.runs(other)] for one, other in both]
            joint = [
                replace(one, runs=[os.path.relpath(run, folder) for run in each])
                for one, each in zip(a.setup.done, runs, strict=True)
            ]
            name, setup = f"{a.name}+{b.name}", Setup(folder, common, plan, joint, engine)
            pairs.append(_Candidate(name, setup, _predicted(setup, name if len(paths) > 2 else "", mirror)))
        best, decision = _best(singles, pairs)
        return _written(folder, common, best, decision, mirror)


def names(paths: Sequence[Path]) -> list[str]:
    """The last name of each folder, all with their numbers where two have the same.

    Example:
        >>> names([Path("a/cv"), Path("wide")]), names([Path("a/cv"), Path("b/cv"), Path("cv-1")])
        (['cv', 'wide'], ['cv-1', 'cv-2', 'cv-1-3'])
    """
    last = [path.name for path in paths]
    alike = len(set(last)) < len(last)
    return [f"{name}-{number}" if alike else name for number, name in enumerate(last, 1)]


def _decided(path: Path, folds: list[FoldState]) -> list[FoldState]:
    """The folds with the runs that prediction uses: their snapshots too, where that was decided.

    Raises:
        InputError: a fold was finished after that.
    """
    used = read_record(path / DECISIONS).get("runs")
    if not used:
        return folds
    found = []
    for one in folds:
        runs = [run for run in used if any(run == own or run.startswith(f"{own}/") for own in one.runs)]
        if not runs:
            what = f"fold {one.fold} was finished after its snapshots were decided on"
            raise InputError(what, "run densepred crossval there to its end", path)
        found.append(replace(one, runs=runs))
    return found


def _common(paths: Sequence[Path]) -> tuple[Shared, list[list[FoldState]]]:
    """Cases and folds, which must be the same for all.

    Raises:
        InputError: they are not.
    """
    states = [[one for one in read_states(path) if one.state == DONE] for path in paths]
    for path, folds in zip(paths, states, strict=True):
        if not folds:
            raise InputError("no finished fold", "give the folder of a cross-validation", path)
        if [(one.fold, one.cases) for one in folds] != [(one.fold, one.cases) for one in states[0]]:
            what = f"its finished folds or their cases are not those of {paths[0]}"
            raise InputError(what, "cross-validate with the same data.folds, data.seed and data.splits", path)
    return shared(read_given(paths[0]), paths[0]), states


def _mirror(paths: Sequence[Path]) -> list[int]:
    """The axes that all of them mirror; none where models of planes and of volumes count their axes differently."""
    if len({configuration.load(path / RECIPE).model.dims for path in paths}) > 1:
        return []
    axes = [set(read_record(path / DECISIONS)["settings"].get(MIRROR, [])) for path in paths]
    return sorted(set.intersection(*axes))


def _predicted(setup: Setup, name: str, mirror: Sequence[int]) -> HeldOut:
    """By mirrored views or not; of a single as it was done there, so that nothing is predicted twice."""
    axes = list(setup.shared.config.inference.mirror)
    known = "mirrored" if mirror and list(mirror) == axes else "plain" if not mirror else "common"
    return predict_held_out(setup, f"{known}-{name}" if name else known, [f"{MIRROR}={list(mirror)}"])


def _best(singles: Sequence[_Candidate], pairs: Sequence[_Candidate]) -> tuple[_Candidate, Decision]:
    """The best single, or the best pair where it is better by more than noise."""
    metric = singles[0].found.judged.metric
    rows = {}
    for one in (*singles, *pairs):
        judged = one.found.judged
        rows[one.name] = interval(judged.values, one.setup.groups(judged.cases))

    def better(one: _Candidate) -> float:
        return metric.sign * rows[one.name].value

    single, pair = max(singles, key=better), max(pairs, key=better)
    decision = decide("ensemble", Paired.of(single.found, pair.found), single.setup, more_than_noise)
    best = pair if decision.used else single
    change = decision.why.partition(", ")[2]
    why = f"{best.name}: used; {pair.name} against {single.name}: {change}; "
    why += ", ".join(f"{name} {one.value:{metric.form}}" for name, one in rows.items())
    numbers = {metric.name: {name: one.to_dict() for name, one in rows.items()}}
    return best, Decision("ensemble", True, why, {"best": best.name} | decision.numbers | numbers)


def _written(folder: Path, common: Shared, best: _Candidate, decision: Decision, mirror: Sequence[int]) -> Result:
    """Judge what is best in the new folder."""
    runs = [[os.path.relpath(run, folder) for run in best.setup.runs(one)] for one in best.setup.done]
    done = [replace(one, runs=names) for one, names in zip(best.setup.done, runs, strict=True)]
    config = common.config.model_copy(
        update={"inference": common.config.inference.model_copy(update={"mirror": tuple(mirror)})}
    )
    for name in (GIVEN, RECIPE):
        atomic_write(folder / name, configuration.dump(config))
    write_record(folder / RECORD, {"folds": [vars(one) for one in done]})
    setup = Setup(folder, replace(common, config=config), best.setup.plan, done, best.setup.engine)
    verdict = judge(setup, [decision], [name for names in runs for name in names])
    return Result(folder, verdict, [])
