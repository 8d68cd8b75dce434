"""Trackers by name: what they are told, that a run is gone on with, and what happens where they are not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from densepred.config import Config
from densepred.errors import InputError
from densepred.training.trackers import Trackers, names, require

BOTH = Config.model_validate({"training": {"tensorboard": False, "trackers": ["wandb", "mlflow"]}})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What modules in the place of wandb and mlflow are told."""
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append(("log", (step, values))), finish=lambda: calls.append(("finish", None))
    )

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return run

    def start_run(run_id: str | None = None, run_name: str | None = None) -> SimpleNamespace:
        calls.append(("start", (run_id, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "made"))

    wandb = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: "drawn"))
    mlflow = SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=start_run,
        log_text=lambda text, name: calls.append(("text", name)),
        log_metrics=lambda values, step: calls.append(("metrics", (step, values))),
        end_run=lambda: calls.append(("end", None)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_trackers_are_told_and_a_resumed_run_is_the_same_one(told: list[tuple[str, Any]], tmp_path: Path):
    run = tmp_path / "hip"
    run.mkdir()
    for step in (0, 5):
        with Trackers(names(BOTH), run, step, BOTH) as trackers:
            trackers.scalars(step, {"dice_µ": 0.5})
    found: dict[str, list[Any]] = {}
    for call, value in told:
        found.setdefault(call, []).append(value)
    assert [(options["id"], options["name"]) for options in found["init"]] == [("drawn", "hip")] * 2
    assert found["init"][0]["config"]["training"]["trackers"] == ["wandb", "mlflow"]
    assert found["log"] == [(0, {"dice_µ": 0.5}), (5, {"dice_µ": 0.5})]
    assert found["start"] == [(None, "hip"), ("made", None)]
    assert found["text"] == ["config.yaml"]
    assert found["metrics"] == [(0, {"dice_µ": 0.5}), (5, {"dice_µ": 0.5})]
    assert len(found["finish"]) == len(found["end"]) == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    config = Config.model_validate({"training": {"trackers": [name]}})
    with pytest.raises(InputError, match=f"{name} is not installed") as caught:
        require(config)
    assert "densepred[trackers]" in caught.value.fix


def test_tensorboard_is_written_by_default(tmp_path: Path):
    with Trackers(names(Config()), tmp_path, 0, Config()) as trackers:
        trackers.scalars(0, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events*"))
