"""The predictor in programs: slabs, hooks, cancelling, threads, notebooks."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import rich.console
import torch
from torch import nn

from densepred import load
from densepred.cases.case import Case
from densepred.errors import ResourceError
from densepred.inference import modes
from densepred.progress import counted, progress
from densepred.volumes import Volume
from tests.untrained_runs import run_of

CLASSES = {0: "sky", 1: "star", 4: "trail"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("api"), ".nii.gz", CLASSES)


def images(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).normal(seed, 1, (70, 60)).astype(np.float32) for seed in range(count)]


class StopError(Exception):
    """What a caller raises to have no more."""


def stop_at(window: int, told: list[int] | None = None) -> Any:
    def hook(done: int, total: int) -> None:
        if told is not None:
            told.append(done)
        if done >= window:
            raise StopError

    return hook


def test_slabs_come_as_they_are_done_and_make_the_whole(run: Path) -> None:
    predictor, image = load(run), images(1)[0]
    whole = predictor.predict(image, outputs=["labels", "entropy"])
    told: list[int] = []
    parts: dict[str, list[np.ndarray]] = {"labels": [], "entropy": []}
    for planes in predictor.stream(Volume.from_array(image, (1.0, 1.0)), lambda done, total: told.append(done)):
        if not parts["labels"]:
            first = told[-1]
        for kind, list_of in parts.items():
            list_of.append(predictor.reduce(planes, kind))
    assert first < told[-1]
    for kind, list_of in parts.items():
        assert np.array_equal(np.concatenate(list_of, 1), whole[kind].numpy())


def test_the_hook_sees_every_window(run: Path) -> None:
    told: list[tuple[int, int]] = []
    load(run).predict(images(1)[0], progress=lambda *now: told.append(now))
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_a_hook_that_raises_ends_the_prediction_and_nothing_else(run: Path) -> None:
    predictor, image, told = load(run), images(1)[0], []
    expected = predictor.predict(image).numpy()
    with pytest.raises(StopError):
        predictor.predict(image, progress=stop_at(5, told))
    assert told == [1, 2, 3, 4, 5]
    assert not torch.is_inference_mode_enabled()
    assert np.array_equal(predictor.predict(image).numpy(), expected)


@pytest.mark.parametrize("suffix", [".nii.gz", ".fits.fz", ".zarr", ".tif", ".h5"])
def test_no_half_file_is_left(run: Path, tmp_path: Path, suffix: str) -> None:
    nibabel.save(nibabel.Nifti1Image(images(1)[0].T, np.eye(4)), tmp_path / "a.nii.gz")
    predictor, case = load(run), Case("a", (tmp_path / "a.nii.gz",))
    paths = {kind: tmp_path / f"{kind}{suffix}" for kind in ("labels", "probabilities", "entropy")}
    with pytest.raises(StopError):
        predictor.predict_file(case, paths, stop_at(20))
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
    predictor.predict_file(case, paths)
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii.gz", *(path.name for path in paths.values())}


def test_a_stream_may_be_left_at_any_slab(run: Path) -> None:
    predictor, image = load(run), images(1)[0]
    slabs = predictor.stream(Volume.from_array(image, (1.0, 1.0)))
    first = next(slabs)
    assert first.start == 0
    slabs.close()  # type: ignore[attr-defined]
    assert next(slabs, None) is None
    again = next(predictor.stream(Volume.from_array(image, (1.0, 1.0))))
    assert torch.equal(first.logits, again.logits)


def test_a_file_is_closed_where_its_prediction_ends(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel.save(nibabel.Nifti1Image(images(1)[0].T, np.eye(4)), tmp_path / "a.nii.gz")
    closed: list[Any] = []
    close = Volume.close
    monkeypatch.setattr(Volume, "close", lambda self: closed.append(self.path) or close(self))
    with pytest.raises(StopError):
        load(run).predict(tmp_path / "a.nii.gz", progress=stop_at(2))
    assert tmp_path / "a.nii.gz" in closed


@pytest.mark.parametrize("overrides", [[], ["inference.mirror=[0]"], ["inference.precision=bfloat16"]])
def test_threads_share_a_predictor(run: Path, overrides: list[str]) -> None:
    predictor = load(run, overrides)
    pictures = images(6)
    expected = [predictor.predict(image, outputs="logits").numpy() for image in pictures]
    together = threading.Barrier(2, timeout=60)

    def work(number: int) -> list[np.ndarray]:
        together.wait()
        mine = pictures if number == 0 else pictures[::-1]
        return [predictor.predict(image, outputs="logits").numpy() for image in mine]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    for found, wanted in ((first, expected), (second, expected[::-1])):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(module.training for module in predictor.model.modules())


def test_the_modes_come_back_after_the_last_of_several_threads() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm2d(2)), nn.Dropout(0.1)).train()
    model[1].eval()
    before = [layer.training for layer in model.modules()]
    assert before == [True, True, False, False, True]
    entered, leave = threading.Event(), threading.Event()

    def other() -> list[bool]:
        with modes.evaluating(model):
            entered.set()
            leave.wait(60)
            return [layer.training for layer in model.modules()]

    with ThreadPoolExecutor(1) as pool:
        with modes.evaluating(model):
            future = pool.submit(other)
            assert entered.wait(60)
        assert not any(layer.training for layer in model.modules())  # the other one is still at work
        with modes.evaluating(model[1]):
            pass
        leave.set()
        assert not any(future.result(60))
    assert [layer.training for layer in model.modules()] == before
    with pytest.raises(StopError), modes.evaluating(model):
        raise StopError
    assert [layer.training for layer in model.modules()] == before
    assert len(modes._USED) == 0
    with modes.evaluating(lambda x: x):
        pass


class Screen:
    """Stands in for Jupyter: IPython and its widgets, which keep what they are shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[Any] = []
        shell, display, widgets = (ModuleType(name) for name in ("IPython", "IPython.display", "ipywidgets"))
        shell.get_ipython = lambda: self  # type: ignore[attr-defined]
        display.display = self.shown.append  # type: ignore[attr-defined]
        widgets.Output = Output  # type: ignore[attr-defined]
        for module in (shell, display, widgets):
            module.__spec__ = ModuleSpec(module.__name__, None)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)


class Output:
    """As ipywidgets': a context to print in, that can be cleared."""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        """Prints nothing."""

    def clear_output(self, wait: bool = False) -> None:
        """Has nothing to clear."""


def test_a_notebook_shows_a_bar(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(monkeypatch)
    load(run).predict(images(1)[0], progress=True)
    assert any(isinstance(item, Output) for item in screen.shown)
    drawn = "".join(str(getattr(item, "text", "")) for item in screen.shown)
    assert "predicting" in drawn
    assert capsys.readouterr().err == ""


def test_without_widgets_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    monkeypatch.delitem(sys.modules, "ipywidgets")
    with counted("windows") as hook:
        hook(1, 2)
    assert screen.shown == []


def test_bars_of_two_threads_live_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    together = threading.Barrier(2, timeout=60)

    def work(label: str) -> None:
        with progress(2, label) as advance:
            together.wait()
            advance(2)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["first", "second"]))
    assert sum(isinstance(item, Output) for item in screen.shown) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_many_images_are_as_one_by_one(run: Path, batch: int) -> None:
    rng = np.random.default_rng(0)
    images = [rng.normal(size=size).astype(np.float32) for size in ((16, 16), (9, 16), (40, 33), (16, 5), (12, 12))]
    images[1][3, 4:7] = np.nan
    predictor = load(run, [f"inference.batch={batch}"])
    for image, found in zip(images, predictor.predict_many(images, ["labels", "logits"]), strict=True):
        alone = predictor.predict(image, outputs=["labels", "logits"])
        np.testing.assert_allclose(found["logits"].numpy(), alone["logits"].numpy(), rtol=1e-5, atol=1e-5)
        assert found["labels"].classes == alone["labels"].classes
        assert (found["labels"].numpy() == alone["labels"].numpy()).mean() > 0.99


def test_small_images_share_calls_of_the_network(run: Path) -> None:
    predictor, calls = load(run, ["inference.batch=4"]), []
    images = [np.full((16, 16), number, np.float32) + np.eye(16, dtype=np.float32) for number in range(9)]
    list(predictor.predict_many(images[:1]))  # the network is prepared
    for ready in predictor._compute._ready.values():
        made = ready.models[0]
        runtime = made.runtime
        object.__setattr__(made, "runtime", lambda x, runtime=runtime: calls.append(len(x)) or runtime(x))
    assert len(list(predictor.predict_many(images))) == 9
    assert calls == [4, 4, 4]


def test_many_images_refuse_what_one_refuses(run: Path) -> None:
    predictor, (image,) = load(run), images(1)
    image = image[:12, :12]
    list(predictor.predict_many([image]))
    with torch.no_grad():
        for weight in predictor.models[0].parameters():
            weight.fill_(torch.nan)
    broken = load(run)
    broken.models[0].load_state_dict(predictor.models[0].state_dict())
    for attempt in (lambda: broken.predict(image), lambda: list(broken.predict_many([image]))):
        with pytest.raises(ResourceError, match="not all finite"):
            attempt()
