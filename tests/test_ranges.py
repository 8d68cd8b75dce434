"""One image by several workers, each with a range of its planes: the files of one worker, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from densepred import load
from densepred.cases.case import Case
from densepred.errors import DiskFullError, InputError, StoppedError
from densepred.inference.batch import predict
from densepred.inference.crew import Crew
from densepred.inference.engines.local import Local
from densepred.inference.outputs import Outputs
from densepred.inference.predictor import Predictor
from densepred.inference.ranges import divided
from densepred.inference.sliding_window import Part, SlidingWindowInferer
from densepred.inference.spool import Spool
from densepred.inference.volume_pass import VolumePass
from tests.acceptance.helpers import COMMAND, ROOT, snapshot
from tests.test_resample_stream import predictor
from tests.untrained_runs import image, noise, run_of

KINDS = ("labels", "probabilities")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("flat"), ".nii.gz", {0: "sky", 1: "star"})


def count_ranges(model: Predictor, used: list[Predictor]) -> None:
    """Note who predicts a range."""
    plain = model.predict_range
    model.predict_range = lambda *given: used.append(model) or plain(*given)  # type: ignore[method-assign, func-returns-value]


def case_of(folder: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Case:
    """An image of which every hundredth pixel does not count."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    array[rng.random(shape) < 0.01] = np.nan
    nibabel.save(nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], *[1] * (4 - len(shape))])), folder / "a.nii.gz")
    return Case("a", (folder / "a.nii.gz",))


def settled(model: Predictor, **changes: object) -> Predictor:
    """The same with other settings of the inference."""
    config = model.config.model_copy(update={"inference": model.config.inference.model_copy(update=changes)})
    return Predictor(model.models, config, model.plan, "")


def outcome(model: Predictor, case: Case, out: Path, others: list[Predictor]) -> tuple[dict[str, bytes], list[tuple]]:
    out.mkdir()
    told: list[tuple[int, int]] = []
    paths = {kind: out / f"{kind}.nii.gz" for kind in KINDS}
    model.predict_file(case, paths, lambda *now: told.append(now), None, others)
    return snapshot(out), told


@pytest.mark.parametrize(
    ("shape", "spacing", "wanted", "settings"),
    [
        ((61, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {}),
        ((61, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), {"cutout": "3:60,1:12,0:9", "batch": 3}),
        ((47, 12, 9), (1.5, 0.7, 0.7), (1.0, 1.0, 1.0), {}),
        ((80, 9, 12), (1.0, 1.0, 1.0), (1.6, 0.7, 1.0), {"lines": 5}),
        ((90, 20), (1.0, 1.0), (1.0, 1.0), {"overlap": 0.7}),
        ((90, 20), (1.0, 1.0), (1.0, 1.0), {"bin": 3}),
        ((61, 47), (1.7, 0.6), (1.0, 1.0), {"blend": "none"}),
        ((50, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0), {"slices": 0, "batch": 4}),
        ((50, 12, 11), (1.0, 1.0, 1.0), (1.0, 1.0), {"slices": "all"}),
    ],
)
def test_the_bytes_are_those_of_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape, spacing, wanted, settings: dict[str, Any]
) -> None:
    case, plain, lines = case_of(tmp_path, shape, spacing), predictor(wanted, 8), settings.pop("lines", None)
    if lines:  # as if the memory had room for no more
        monkeypatch.setattr("densepred.inference.memory.widest", lambda *_: lines)
    models = [settled(plain, **settings) for _ in range(3)]
    alone, told_alone = outcome(models[0], case, tmp_path / "alone", [])
    used: list[Predictor] = []
    for model in models[1:]:
        count_ranges(model, used)
    for others in (models[1:2], models[1:]):
        used.clear()
        found, told = outcome(models[0], case, tmp_path / f"with{len(others)}", others)
        assert found == alone
        assert used == others
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1] >= told_alone[-1][1]
