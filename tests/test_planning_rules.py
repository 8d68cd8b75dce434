"""densepred's own rules, what a training is foretold to cost, and the recipes of both rules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from densepred import config as configuration
from densepred.config import ChannelConfig, Config, DataConfig, PatchConfig, TrainingConfig
from densepred.errors import InputError, ResourceError
from densepred.models.build import build
from densepred.planning import own, planner, trial
from densepred.planning.assemble import nnunet_configurations, nnunet_settings
from densepred.planning.cost import foretold, lighter, shapes, with_length
from densepred.planning.fingerprint import Fingerprint
from densepred.planning.measure import CaseFacts, ClassFacts
from densepred.planning.nnunet import Sizes
from densepred.planning.own import Limits, configurations, numbers, recommended
from densepred.planning.planner import Wish, plan
from densepred.planning.recipe import config_of, normalizations, one_sided, text_of
from densepred.planning.sketch import sketch
from densepred.planning.topology import topology
from densepred.planning.trial import Trial
from tests.case_files import save_json

ISOTROPIC = Sizes(((200, 300, 300),) * 50, ((1.0, 1.0, 1.0),) * 50, 1, 3)


def set_of(shape: tuple[int, ...], spacing: tuple[float, ...], cases: int = 10, **changes: object) -> Fingerprint:
    """Equal cases of one channel and two classes."""
    values = sketch(np.random.default_rng(0).normal(100, 10, 1000))
    classes = {"background": ClassFacts(voxels=900), "liver": ClassFacts(voxels=100, pieces=1, largest=100)}
    each = [
        CaseFacts(id=f"c{number}", channels=1, shape=shape, cropped=shape, spacing=spacing, valid=(values,),
                  foreground=(values,), classes=classes)
        for number in range(cases)
    ]  # fmt: skip
    made = Fingerprint(tuple(each), ("MRI",), {0: "background", 1: "liver"}, (), ())
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_patch_fits_the_memory_and_no_larger_would():
    for memory in (2e9, 5e9, 8e9):
        limits = replace(Limits.of_device("cuda", memory), each=10.0, start=1e9)
        one = configurations(ISOTROPIC, limits)["3d_fullres"]
        assert limits.bytes(numbers(one, 3)) <= memory
        net = topology((1.0,) * 3, [n + by for n, by in zip(one.net.patch, one.net.divisor, strict=True)])
        assert limits.bytes(numbers(replace(one, net=net, channels=own.channels(net, limits)), 3)) > memory
    assert one.batch <= own.MOST_BATCH[3]


def test_only_ratios_of_spacings_count():
    """Axes in degrees or pixels are planned as those in millimetres are."""
    limits = Limits.of_device("cpu", 4e9)
    for spacing in ((5.0, 1.0, 1.0), (1.0, 1.0, 3.0)):
        sizes = Sizes(((40, 200, 180),) * 9, (spacing,) * 9, 1, 2)
        tiny = replace(sizes, spacings=(tuple(n * 2.7e-5 for n in spacing),) * 9)
        here, there = configurations(sizes, limits), configurations(tiny, limits)
        assert set(here) == set(there)
        for name in here:
            assert (here[name].net, here[name].batch) == (there[name].net, there[name].batch)


def test_the_choice_of_dimensions():
    limits = Limits.of_device("cpu", 4e9)
    found = configurations(ISOTROPIC, limits)
    assert found["3d_fullres"].covers < own.SEES_NOTHING
    assert recommended(found, 50.0) == "3d_fullres"
    assert recommended(found, 1e5) == "3d_lowres"
    assert recommended(configurations(ISOTROPIC, Limits.of_device("cuda", 1e10)), 1e5) == "3d_fullres"
    assert recommended(configurations(Sizes(((3, 300, 300),) * 9, ((5.0, 1.0, 1.0),) * 9, 1, 2), limits), 1e5) == "2d"
    flat = configurations(Sizes(((300, 400),) * 9, ((1.0, 1.0),) * 9, 3, 2), limits)
    assert (set(flat), recommended(flat, 1e5), flat["2d"].axis) == ({"2d"}, "2d", None)
    assert "3d_lowres" in configurations(ISOTROPIC, limits)
    assert configurations(ISOTROPIC, limits)["3d_lowres"].covers >= 0.25


def test_a_common_grid_is_kept_and_others_are_brought_to_the_median():
    mixed = Sizes(((50, 60, 70),) * 3, ((1.0, 1.0, 1.0), (1.2, 1.0, 1.0), (1.4, 0.9, 1.0)), 1, 2)
    assert own.common_spacing(mixed) == pytest.approx((1.2, 1.0, 1.0))
    assert not own.are_alike(mixed, own.common_spacing(mixed))
    assert own.are_alike(ISOTROPIC, own.common_spacing(ISOTROPIC))


def test_normalisation_by_name_and_by_the_intensities():
    heavy = np.concatenate([np.random.default_rng(0).normal(0, 1, 100_000), [1e4] * 20])
    base = set_of((30, 40, 50), (1, 1, 1))
    bright = replace(base, cases=tuple(c.model_copy(update={"valid": (sketch(heavy),)}) for c in base.cases))
    assert normalizations(base, "densepred")[0][0] == "zscore"
    assert normalizations(bright, "densepred")[0][0] == "asinh"
    assert normalizations(bright, "nnunet")[0][0] == "zscore"
    for rules in ("densepred", "nnunet"):
        assert normalizations(replace(base, channels=("ct",)), rules)[0][0] == "ct_window"


def test_sides_are_not_mirrored():
    assert one_sided(["Left kidney"])
    assert one_sided(["kidney_right", "spleen"])
    assert not one_sided(["leftover", "bright", "upright"])


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 50, 45), (1.0, 1.0, 1.0)), ((20, 300, 310), (4.0, 0.7, 0.7)), ((500, 400), (1.0, 1.0))],
)
def test_every_recipe_of_nnunet_is_valid_and_has_its_numbers(shape: tuple[int, ...], spacing: tuple[float, ...]):
    fingerprint, data = set_of(shape, spacing), DataConfig(images="a/{id}.nii", labels="b/{id}.nii")
    one = nnunet_configurations(fingerprint, 8e9)["3d_fullres" if len(shape) == 3 else "2d"]
    config = config_of(nnunet_settings(fingerprint, data, one), "recipe")
    assert (config.patch.size, config.patch.batch) == (one.net.patch, one.batch)
    assert (config.model.network, config.model.channels) == ("nnunet", one.channels)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.ema) == ("sgd", 0.99, 0.0)
    assert config.training.epochs * config.training.steps == 250_000
    assert config.model.deep_supervision == one.net.stages - 3  # nnU-Net's coarsest output has weight 0


def test_recipes_for_narrow_stacks_can_be_built():
    """Of whose stages two have the same largest stride."""
    fingerprint = set_of((48, 24, 24), (5.0, 1.0, 1.0))
    one = nnunet_configurations(fingerprint, 8e9)["3d_fullres"]
    settings = nnunet_settings(fingerprint, DataConfig(images="a/{id}.nii", labels="b/{id}.nii"), one)
    config = config_of(settings, "recipe")
    assert 0 < config.model.deep_supervision < one.net.stages - 3
    with torch.device("meta"):
        build(config.model, 1, 2, 0)


def test_the_text_of_a_recipe_is_the_recipe(tmp_path: Path):
    fingerprint = set_of((20, 300, 310), (4.0, 0.7, 0.7), channels=("CT",))
    data = DataConfig(images={"CT": "a/{id}.nii"}, labels="b/{id}.nii", folds=3, classes={0: "none", 1: "liver"})
    settings = nnunet_settings(fingerprint, data, nnunet_configurations(fingerprint, 8e9)["3d_fullres"])
    text = text_of(settings, ["Why: a #1"])
    (tmp_path / "recipe.yaml").write_text(text)
    assert configuration.load(tmp_path / "recipe.yaml") == config_of(settings, "recipe")
    assert text.startswith("# Why: a #1\n")
    assert "classes: {0: none, 1: liver}" in text
    assert max(map(len, text.splitlines())) <= 160


def test_channels_that_want_different_normalisations(tmp_path: Path):
    one, two = sketch(np.arange(50.0)), sketch(np.arange(90.0))
    base = set_of((30, 40, 50), (1, 1, 1))
    both = {"channels": 2, "valid": (one, two), "foreground": (one, two)}
    cases = tuple(case.model_copy(update=both) for case in base.cases)
    fingerprint = replace(base, cases=cases, channels=("CT", "PET"))
    full = nnunet_configurations(fingerprint, 8e9)["3d_fullres"]
    patterns = DataConfig(images={"CT": "a/{id}.nii", "PET": "p/{id}.nii"}, labels="b/{id}.nii")
    found = config_of(nnunet_settings(fingerprint, patterns, full), "recipe").data.images
    assert isinstance(found, dict)
    normalize = {name: channel.normalize for name, channel in found.items() if isinstance(channel, ChannelConfig)}
    assert {name: one.name for name, one in normalize.items() if one} == {"CT": "ct_window", "PET": "zscore"}
    save_json(tmp_path, {"labels": {"background": 0, "liver": 1}})
    with pytest.raises(InputError, match="CT: ct_window, PET: zscore"):
        nnunet_settings(fingerprint, DataConfig(root=str(tmp_path), dataset="dataset.json"), full)


RECIPE = Config(
    data=DataConfig(images="a", labels="{id}", spacing=(2.0, 1.0, 1.0), folds=5),
    patch=PatchConfig(size=(16, 32, 32), batch=2),
    training=TrainingConfig(epochs=10, steps=20),
)


def test_what_is_foretold():
    fingerprint = set_of((40, 64, 64), (1.0, 1.0, 1.0))
    assert shapes(fingerprint, RECIPE) == [(20, 64, 64)] * 10
    tried = Trial(step=0.5, start=10**9, peak=3 * 10**9, prepare=1e-6, stored=5.0, device="cpu")
    cost = foretold(tried, RECIPE, fingerprint, scaled=2.0)
    voxels = 10 * 20 * 64 * 64
    assert (cost.memory, cost.disk, cost.prepare) == (5e9, 5 * voxels, pytest.approx(1e-6 * voxels))
    windows = 2 * 3 * 3  # of 16 x 32 x 32 by half of it over 20 x 64 x 64
    assert cost.validation == pytest.approx(2 * windows * 1.0 / 2 / 3)
    config = with_length(RECIPE, cost, 10, 20)
    assert config.training.validate_every == math.ceil(cost.validation / 2)
    validations = math.ceil(10 / config.training.validate_every)
    assert cost.total(config) == pytest.approx(cost.prepare + 200 + validations * cost.validation)
    assert cost.steps_within(100 + cost.prepare) == 90


def test_a_lighter_step_is_as_much_lighter_as_it_says():
    for by in (1, 1.5, 3, 10, 100):
        light, factor = lighter(RECIPE, by)
        work = [c.patch.batch * math.prod(c.patch.size) for c in (RECIPE, light)]
        assert work[0] / work[1] == factor
        assert factor >= min(by, 2 * 16 * 32 * 32 / 16**3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """A made-up machine: 20 bytes and a nanosecond for each number; the recipes that were tried on it."""
    tried: list[Config] = []

    def run(config: Config, cases: list[str]) -> Trial | None:
        tried.append(config)
        channels, patch = config.model.channels or (), config.patch
        strides = [(s,) * len(patch.size) if isinstance(s, int) else s for s in config.model.strides or ()]
        from densepred.planning.topology import Topology, activations

        count = patch.batch * activations(Topology(patch.size, tuple(strides), ()), channels, 3)
        peak = 5 * 10**8 + 20 * count
        return None if peak > 6e9 else Trial(1e-9 * count * channels[0], 5 * 10**8, peak, 1e-7, 5.0, "cpu")

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(planner, "measure", lambda data, folder: set_of((200, 300, 300), (1.0, 1.0, 1.0), 50))
    return tried


def planned(tmp_path: Path, **wish: object) -> planner.Planned:
    source = tmp_path / "data.yaml"
    source.write_text("data: {images: 'a/{id}.nii', labels: 'b/{id}.nii'}\n")
    return plan(source, tmp_path / "recipe.yaml", Wish(**wish), overwrite=True)  # type: ignore[arg-type]


def test_patches_shrink_until_the_trial_fits(machine: list[Config], tmp_path: Path):
    sizes = []
    for memory in (4e9, 1.5e9, 0.8e9):
        made = planned(tmp_path, memory=memory)
        assert made.cost.memory <= memory * planner.TOLERANCE
        sizes.append(math.prod(made.config.patch.size))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    with pytest.raises(ResourceError, match="no training fits"):
        planned(tmp_path, memory=0.4e9)


def test_a_budget_is_kept_with_enough_steps(machine: list[Config], tmp_path: Path):
    for seconds in (20_000.0, 2000.0, 400.0):
        made = planned(tmp_path, budget=seconds)
        training = made.config.training
        assert made.cost.total(made.config) <= seconds * 1.1
        assert training.epochs * training.steps >= own.LEAST_STEPS
        assert not any("budget" in note for note in made.notes)
    assert made.config.model.channels is not None
    assert made.config.model.channels[0] == own.LEAST_BASE
    made = planned(tmp_path, budget=20.0)
    told = "more than the budget" if made.cost.total(made.config) > 22 else "fewer than 2000 steps"
    assert any(told in note for note in made.notes)


def test_the_configuration_can_be_chosen(machine: list[Config], tmp_path: Path):
    low = planned(tmp_path, configuration="3d_lowres")
    assert low.config.data.spacing == pytest.approx(low.chosen.spacing, rel=1e-5)
    assert min(low.chosen.spacing) > 1
    with pytest.raises(InputError, match="2d, 3d_fullres, 3d_lowres"):
        planned(tmp_path, configuration="3d_cascade")


def test_nnunet_is_tried_with_lighter_steps(machine: list[Config], tmp_path: Path):
    made = planned(tmp_path, rules="nnunet")
    assert made.cost.scaled > 1
    assert math.prod(machine[-1].patch.size) < math.prod(made.config.patch.size)
    whole = planned(tmp_path, rules="nnunet", budget=3600 * 24 * 365.0)
    assert whole.config.training.epochs <= 1000


def test_a_recipe_is_not_overwritten(machine: list[Config], tmp_path: Path):
    planned(tmp_path)
    with pytest.raises(InputError, match="there already"):
        plan(tmp_path / "data.yaml", tmp_path / "recipe.yaml")


def test_what_went_wrong_in_a_trial_is_told(monkeypatch: pytest.MonkeyPatch):
    """The process of the trial is this one, and its end is made up."""
    raised: list[Exception] = []

    def here(command: list[str], **settings: object) -> SimpleNamespace:
        if raised:
            monkeypatch.setattr(trial, "_trial", lambda folder: (_ for _ in ()).throw(raised.pop()))
            trial.main(Path(command[-1]))
            return SimpleNamespace(returncode=0)
        return SimpleNamespace(returncode=-9, stderr="")

    monkeypatch.setattr(trial, "tune_allocator", lambda: None)
    monkeypatch.setattr(trial.subprocess, "run", here)
    assert trial.run(RECIPE, ["a"]) is None  # killed for its memory
    raised.append(ResourceError("the memory is exhausted (of the GPU)"))
    assert trial.run(RECIPE, ["a"]) is None
    raised.append(InputError("label values without a class: 7 (2 voxels)", "name them", "a.nii", "a"))
    with pytest.raises(InputError, match="without a class") as caught:
        trial.run(RECIPE, ["a"])
    assert (caught.value.case, caught.value.file, caught.value.fix) == ("a", "a.nii", "name them")
