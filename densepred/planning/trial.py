"""A few real training steps in a process of their own: how long they take, and how much memory.

The process prepares some cases of the set as training would, trains on them, and writes what it found. A process of its
own, because only so its memory is known, and because one that runs out of memory takes nothing else with it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from densepred.allocator import tune_allocator
from densepred.children import environment, python
from densepred.config import Config, dump, load
from densepred.errors import DensepredError, InputError, ResourceError
from densepred.files import atomic_write

STEPS, TIMED = 2, 3
"""Steps before the clock starts and between its readings; the shortest of so many counts, as other programs disturb."""
LEAST = 0.001
"""Seconds of a step that are told from none."""
_RECIPE, _CASES, _RESULT = "config.yaml", "cases.json", "result.json"


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        step: seconds of a step.
        start: bytes of the process before the network was built: Python, torch and the libraries.
        peak: bytes at most.
        prepare: seconds to prepare a voxel, all its channels together.
        stored: bytes that a prepared voxel takes on disk, label and all.
        device: where it ran, such as "cpu".
    """

    step: float
    start: int
    peak: int
    prepare: float
    stored: float
    device: str


def run(config: Config, cases: Sequence[str]) -> Trial | None:
    """Try a recipe on some of its cases.

    Args:
        config: the recipe.
        cases: their ids.

    Returns:
        None where there was not enough memory.

    Raises:
        DensepredError: the recipe cannot be trained: what the training said.
    """
    short = config.training.model_copy(
        update={"epochs": 1 + TIMED, "steps": STEPS, "budget": None, "tensorboard": False, "checkpoint_every": 10**9}
    )
    root = config.data.model_copy(update={"root": str(Path(config.data.root).resolve()), "cache": None, "fold": "all"})
    with tempfile.TemporaryDirectory(prefix="densepred-plan-") as name:
        folder = Path(name)
        atomic_write(folder / _RECIPE, dump(config.model_copy(update={"training": short, "data": root})))
        atomic_write(folder / _CASES, json.dumps(list(cases)))
        command = python("-m", "densepred.planning.trial", name)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment())
        if not (folder / _RESULT).is_file():
            if done.returncode in (-9, 137):  # the system's way to say that memory is full
                return None
            raise ResourceError(f"the trial training failed: {done.stderr.strip()[-2000:]}", "report it as a bug")
        found = json.loads((folder / _RESULT).read_text())
    if "what" not in found:
        return Trial(**found)
    if found["memory"]:
        return None
    raise InputError(found["what"], found["fix"], found["file"], found["case"])


def _trial(folder: Path) -> Trial:
    """In the process of the trial."""
    from densepred.cases.cache import prepare
    from densepred.cases.case import find
    from densepred.cases.plan import make_plan
    from densepred.device import pick_device
    from densepred.inference.memory import peak_of, resident
    from densepred.training.run import Run
    from densepred.training.trainer import Trainer

    config = load(folder / _RECIPE)
    wanted = set(json.loads((folder / _CASES).read_text()))
    cases = [case for case in find(config.data).cases if case.id in wanted]  # faulty ones are told already
    device = pick_device(config.training.device)
    (folder / "run").mkdir()
    made = Run(folder / "run", config, make_plan(config, cases))
    began = time.monotonic()
    cached = prepare(cases, made.plan, folder / "cache")
    voxels = sum(math.prod(case.shape[1:]) for case in cached)
    seconds = (time.monotonic() - began) / voxels
    stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()) / voxels
    start = resident() if device.type == "cpu" else 0
    with peak_of(device) as peak:
        Trainer(made, cached, []).fit()
    clock = [float(row["seconds"]) for row in made.rows]
    computing = min(after - before for before, after in pairwise(clock)) / STEPS
    step = max(computing, LEAST) / (1 - min(float(made.rows[-1]["waiting"]), 0.9))
    return Trial(step, start, start + peak(), seconds, stored, str(device))


def main(folder: Path) -> None:
    """The whole of the process: the result, or what went wrong, into `result.json`."""
    tune_allocator()
    try:
        content: dict[str, object] = asdict(_trial(folder))
    except DensepredError as error:
        memory = isinstance(error, ResourceError) and "memory" in error.what
        file = None if error.file is None else str(error.file)
        content = {"what": error.what, "fix": error.fix, "file": file, "case": error.case, "memory": memory}
    atomic_write(folder / _RESULT, json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
