"""The loss section: weights, settings, faults, and what the recipe's loss then is."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from densepred import config as configuration
from densepred.config import Config, LossConfig
from densepred.config.contradictions import contradictions
from densepred.config.loading import dump
from densepred.config.loss import TERMS
from densepred.errors import InputError
from densepred.losses import LOSSES, HeadLoss, MultiTaskLoss, SegmentationLoss, cross_entropy, dice, focal, tversky
from densepred.models.heads import Regression, Segmentation

RECIPE = "data: {root: x, images: 'i/{id}.nii', labels: 'l/{id}.nii', classes: {0: back, 1: a, 2: b}}\n"


def load(tmp_path: Path, loss: str, *overrides: str) -> Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + (f"loss: {loss}\n" if loss else ""))
    return configuration.load(path, overrides)


def test_settings_are_the_functions_arguments_and_defaults():
    assert TERMS.keys() == LOSSES.keys()
    for name, term in TERMS.items():
        arguments = inspect.signature(LOSSES[name]).parameters
        for setting, value in term().settings.items():
            assert arguments[setting].default == value, (name, setting)


def test_a_number_is_a_weight_and_a_section_has_settings(tmp_path: Path):
    text = "{dice: 2, cross_entropy: {weight: 0.5, class_weights: [1, 2, 3], top: 0.1}, tversky: {beta: 0.9}, focal: 1}"
    loss = load(tmp_path, text).loss
    assert {name: term.weight for name, term in loss.terms.items()} == {
        "dice": 2,
        "cross_entropy": 0.5,
        "tversky": 1,
        "focal": 1,
    }
    assert loss.cross_entropy.class_weights == (1, 2, 3)
    assert (loss.cross_entropy.top, loss.tversky.beta, loss.tversky.alpha) == (0.1, 0.9, 0.3)
    assert load(tmp_path, "").loss.terms.keys() == {"dice", "cross_entropy"}
    assert load(tmp_path, "{dice: 1}", "loss.dice=0.25", "loss.focal={weight: 2, gamma: 3}").loss.focal.gamma == 3


def test_an_override_keeps_the_weight_of_a_term(tmp_path: Path):
    loss = load(
        tmp_path, "{cross_entropy: 0.5, tversky: 0.0}", "loss.cross_entropy.smoothing=0.1", "loss.tversky.alpha=1"
    ).loss
    assert (loss.cross_entropy.weight, loss.cross_entropy.smoothing) == (0.5, 0.1)
    assert "tversky" not in loss.terms
    assert load(tmp_path, "{dice: 0.5}", "loss.dice.weight=2").loss.dice.weight == 2


def test_a_recipe_reads_back_as_it_was_and_plain_weights_stay_numbers(tmp_path: Path):
    config = load(tmp_path, "{dice: 2, cldice: {weight: 0.5, iterations: 5}}")
    text = dump(config)
    assert "dice: 2.0" in text
    assert "lovasz: 0.0" in text
    path = tmp_path / "again.yaml"
    path.write_text(text)
    assert configuration.load(path) == config


def test_the_schema_knows_both_forms():
    schema = Config.model_json_schema()
    forms = schema["$defs"]["LossConfig"]["properties"]["tversky"]["anyOf"]
    assert {"type": "number"} in forms
    assert {"$ref": "#/$defs/TverskyTerm"} in forms
    assert "gamma" in json.dumps(schema["$defs"]["TverskyTerm"])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("{dice: -1}", "loss.dice.weight: input should be greater than or equal to 0, got -1"),
        ("{dice: true}", "loss.dice: input should be a valid dictionary or instance of DiceTerm, got True"),
        ("{tversky: {alfa: 1}}", r"loss.tversky.alfa: unknown key \(did you mean 'alpha'\?\)"),
        ("{cross_entropy: {top: 0}}", "loss.cross_entropy.top: input should be greater than 0"),
        ("{dice: 0, cross_entropy: 0}", "loss: every term has weight 0"),
        ("{cross_entropy: {class_weights: [1, 2]}}", "loss.cross_entropy.class_weights: 2 weights for the 3 of data"),
        ("{dice: 0, cross_entropy: 0, boundary: 1}", "loss: boundary stands beside a term such as dice, not alone"),
        ("{tversky: {alpha: 0, beta: 0}}", "loss.tversky: alpha and beta are both 0"),
        ("{jaccard: 1}", "loss.jaccard: unknown key"),
    ],
)
def test_faults_are_named(tmp_path: Path, loss: str, words: str):
    with pytest.raises(InputError, match=words):
        load(tmp_path, loss)


@pytest.mark.parametrize(("weights", "right"), [((1, 2), True), ((1, 2, 3), False)])
def test_weights_are_of_the_regions_where_these_are_learnt(weights: tuple[int, ...], right: bool):
    data = {"images": "a/*.nii", "labels": "b/{id}.nii", "classes": {0: "sky", 1: "rim", 2: "core"}}
    data |= {"regions": {"disc": ["rim", "core"], "core": ["core"]}}
    config = Config.model_validate({"data": data, "loss": {"cross_entropy": {"class_weights": weights}}})
    told = [message for where, message in contradictions(config) if where[0] == "loss"]
    assert told == ([] if right else ["3 weights for the 2 of data.regions"])


def test_the_recipes_loss_is_the_sum_of_its_terms(tmp_path: Path):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 6, 7), torch.randint(-1, 3, (2, 6, 7))
    text = "{dice: {weight: 0.5, generalised: true}, cross_entropy: {class_weights: [1, 2, 3]}, focal: 2, tversky: 1}"
    config = load(tmp_path, text[:-1] + ", batch_dice: false}").loss
    expected = (
        0.5 * dice(logits, labels, over_batch=False, generalised=True)
        + cross_entropy(logits, labels, class_weights=(1, 2, 3))
        + 2 * focal(logits, labels)
        + tversky(logits, labels, over_batch=False)
    )
    torch.testing.assert_close(SegmentationLoss(config)(logits, labels), expected)


def test_the_recipes_loss_of_regions():
    torch.manual_seed(0)
    logits, regions = torch.randn(2, 3, 6, 7), torch.randint(-1, 2, (2, 3, 6, 7))
    config = LossConfig.model_validate({"dice": 1, "cross_entropy": 2, "lovasz": 1})
    expected = LOSSES["region_dice"](logits, regions) + 2 * LOSSES["region_cross_entropy"](logits, regions)
    loss = SegmentationLoss(config, regions=True)
    torch.testing.assert_close(loss(logits, regions), expected + LOSSES["lovasz"](logits, regions))
    assert loss.at_chance(7) == pytest.approx(1 + 2 * math.log(2) + 1)


def test_an_untrained_network_starts_where_it_is_said_to():
    """Flat predictions of balanced classes; a term without such a value makes the whole nan, which warns of nothing."""
    labels = torch.arange(4).repeat(16).view(1, 8, 8)
    flat = torch.zeros(1, 4, 8, 8)
    for terms in ({"cross_entropy": 2, "dice": 0}, {"cross_entropy": 0, "dice": 0, "focal": 1}):
        loss = SegmentationLoss(LossConfig.model_validate(terms))
        assert loss.at_chance(4) == pytest.approx(loss(flat, labels).item(), rel=1e-5)
    for name in ("dice", "tversky", "lovasz", "cldice"):
        loss = SegmentationLoss(LossConfig.model_validate({"dice": 0, "cross_entropy": 0, name: 1}))
        assert loss(flat, labels).item() <= loss.at_chance(4) == 1
    assert math.isnan(SegmentationLoss(LossConfig.model_validate({"hausdorff": 0.1})).at_chance(4))


def test_every_term_sees_every_scale():
    torch.manual_seed(0)
    labels = torch.randint(-1, 3, (2, 8, 8))
    outputs = {f"s@{n}": torch.randn(2, 3, 8 // n, 8 // n, requires_grad=True) for n in (1, 2, 4)}
    names = list(LossConfig.model_fields)[:-1]
    total = SegmentationLoss(LossConfig.model_validate(dict.fromkeys(names, 1)))(outputs, labels)
    parts = []
    for name in names:
        alone = {**dict.fromkeys(("dice", "cross_entropy"), 0), name: 1}
        parts.append(SegmentationLoss(LossConfig.model_validate(alone))(outputs, labels))
        gradients = torch.autograd.grad(parts[-1], list(outputs.values()), retain_graph=True)
        assert all(one.isfinite().all() and (one != 0).any() for one in gradients), name
    torch.testing.assert_close(total, torch.stack(parts).sum())


def test_heads_take_settings_by_name():
    torch.manual_seed(0)
    means, targets = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5)
    loss = HeadLoss(Regression(2), {"huber": {"weight": 3, "delta": 0.5}, "mean_absolute": 1})
    expected = 3 * F.huber_loss(means, targets, delta=0.5) + F.l1_loss(means, targets)
    torch.testing.assert_close(loss(means, targets), expected)
    heads = {"s": (Segmentation(3), 1.0), "r": (Regression(2), 1.0)}
    both = MultiTaskLoss(heads, {"s": {"focal": {"gamma": 1.0}}, "r": {"huber": {"weight": 3, "delta": 0.5}}})
    outputs = {"s": torch.zeros(2, 3, 5, 5), "r": means}
    parts = both.parts(outputs, {"s": torch.zeros(2, 5, 5), "r": targets})
    assert parts["s"].item() == pytest.approx(math.log(3) * 2 / 3)
    torch.testing.assert_close(parts["r"], 3 * F.huber_loss(means, targets, delta=0.5))
    with pytest.raises(ValueError, match=r"the term huber: dleta: unknown key \(did you mean 'delta'\?\)"):
        HeadLoss(Regression(2), {"huber": {"dleta": 1}})
