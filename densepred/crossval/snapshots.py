"""Are the snapshots of each fold, together with its end, better than the end alone?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from densepred.crossval.decisions import MIRROR, Decision, Paired, decide, more_than_noise
from densepred.crossval.held_out import Setup, predict_held_out

WITH_SNAPSHOTS = "-snapshots"
"""Behind the names of trials that they take part in."""


def decide_snapshots(setup: Setup) -> tuple[Setup, list[Decision], list[str]]:
    """Take the snapshots (`optimizer.cycles`) into the mean of each fold where this gains more than noise.

    Both are predicted with the mirrored views of the recipe.

    Returns:
        what predicts from now on, the decision, and the runs that prediction uses; of a recipe without snapshots the
        setup as it was, and nothing.
    """
    more = [replace(one, runs=[*one.runs, *_snapshots(setup.out, one.runs)]) for one in setup.done]
    if more == list(setup.done):
        return setup, [], []
    both = replace(setup, done=more, suffix=WITH_SNAPSHOTS)
    axes = list(setup.shared.config.inference.mirror) if setup.kind else []
    name, settings = "mirrored" if axes else "plain", [f"{MIRROR}={axes}"]
    pair = Paired.of(predict_held_out(setup, name, settings), predict_held_out(both, name, settings))
    decision = decide("snapshots", pair, setup, more_than_noise)
    decision.numbers["models"] = sum(len(one.runs) for one in more)
    if not decision.used:
        return setup, [decision], []
    return both, [decision], [run for one in more for run in one.runs]


def _snapshots(out: Path, runs: Sequence[str]) -> list[str]:
    found = [path for run in runs for path in sorted((out / run / "snapshots").glob("cycle-*"))]
    return [path.relative_to(out).as_posix() for path in found]
