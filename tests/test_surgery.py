"""Changing finished networks: what is frozen stays, what is new learns fast, and dropout can stay on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.adapters.timm_encoder import timm_encoder
from densepred.models.blocks import Style
from densepred.models.decoders.fcn import FCNDecoder
from densepred.models.decoders.unet import UNetDecoder
from densepred.models.dense import DensePredictor
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.convnext import ConvNeXtEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.forms import set_form
from densepred.models.heads import Classification, Regression, Segmentation
from densepred.models.surgery import (
    freeze,
    frozen,
    monte_carlo_dropout,
    parameter_groups,
    replace_head,
    stages_of,
    unfreeze,
)
from densepred.models.weights import Pretraining


def network(dims: int = 2, dropout: float = 0.0, depth: int = 3, width: int = 4, **heads: object) -> DensePredictor:
    torch.manual_seed(0)
    encoder = ResNetEncoder(dims, 1, width=width, depth=depth, style=Style("batch", "relu", dropout))
    decoder = UNetDecoder(dims, encoder.channels, encoder.strides, style=encoder.style)
    return DensePredictor(encoder, decoder, dims, 1, heads or {"segmentation": Segmentation(3)}, deep_supervision=1)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of what has changed."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def learn(model: nn.Module, steps: int = 2, dims: int = 2) -> None:
    """Training steps as a loop takes them; weight decay would move even what has no gradient of its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        model.train()
        torch.manual_seed(step)
        outputs = model(torch.randn(2, 1, *(16,) * dims))
        outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
        sum(out.square().mean() for out in outputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "lean": lambda model: set_form(model, "lean", torch.device("cpu")),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_frozen_moves_in_training(dims: int, kind: str) -> None:
    model = network(dims)
    names = set(model.state_dict())
    freeze(model.encoder)
    model = COPIES[kind](model)
    assert set(model.state_dict()) == names
    before = state(model)
    learn(model, dims=dims)
    changed = moved(before, model)
    assert not {name for name in changed if name.startswith("encoder.")}
    assert changed == {name for name in names if not name.startswith("encoder.")}, "all the rest learns, norms included"


def test_what_is_not_frozen_moves_to_the_last_counter() -> None:
    """The control of the test above."""
    model = network()
    before = state(model)
    learn(model)
    assert moved(before, model) == set(before)


def test_a_frozen_part_computes_in_training_what_it_does_in_evaluation() -> None:
    encoder, image = network().encoder, torch.randn(2, 1, 20, 21)
    freeze(encoder)
    for one, other in zip(encoder.train()(image), encoder.eval()(image), strict=True):
        assert torch.equal(one, other)


def test_unfreezing_undoes_freezing() -> None:
    model = network()
    freeze(model)
    freeze(model)
    unfreeze(model)
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert all(layer.training for layer in model.modules())
    before = state(model)
    learn(model)
    assert moved(before, model) == set(before)


def test_frozen_norms_of_an_evaluated_model_stay_evaluated_when_unfrozen() -> None:
    model = network().eval()
    freeze(model)
    unfreeze(model)
    assert not any(layer.training for layer in model.modules())


def test_freezing_for_a_block_leaves_what_was_frozen() -> None:
    model = network()
    freeze(model.encoder, stages=1)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = state(model)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    learn(model)
    still = {f"encoder.{name}" for name in model.encoder.state_dict() if name.startswith(("conv1", "bn1"))}
    assert moved(before, model) == set(before) - still


STAGES: dict[str, tuple[Callable[[], Encoder], dict[str, int]]] = {
    "resnet": (
        lambda: ResNetEncoder(3, 2, "se_resnet50", width=4),
        {"conv1.": 0, "bn1.": 0, "layer1.": 1, "layer2.": 2, "layer3.": 3, "layer4.": 4},
    ),
    "vgg": (
        lambda: VGGEncoder(2, 1, "vgg11", width=4),
        {"features.0.": 0, "features.3.": 1, "features.6.": 2, "features.8.": 2, "features.11.": 3, "features.13.": 3}
        | {"features.16.": 4, "features.18.": 4},
    ),
    "convnext": (
        lambda: ConvNeXtEncoder(2, 3, "convnext_tiny", width=4),
        {f"features.{i}.": i // 2 for i in range(8)},
    ),
    "timm": (
        lambda: timm_encoder("resnet18", 2, 5),
        {f"network.{part}.": i for i, part in enumerate(("bn1", "layer1", "layer2", "layer3", "layer4"))},
    ),
}


@pytest.mark.parametrize("family", STAGES)
def test_stages_are_found_for_any_encoder(family: str) -> None:
    make, expected = STAGES[family]
    encoder = make()
    before = state(encoder)
    stages = stages_of(encoder)
    assert stages.keys() == dict(encoder.named_parameters()).keys()
    for name, stage in stages.items():
        starts = [value for prefix, value in expected.items() if name.startswith(prefix)]
        assert starts in ([stage], []), name
    assert set(stages.values()) == set(expected.values())
    assert not moved(before, encoder)


def test_the_first_stages_are_frozen_with_their_norms() -> None:
    model = network(depth=5)
    freeze(model.encoder, stages=2)
    before = state(model)
    learn(model)
    kept = set(before) - moved(before, model)
    assert kept == {name for name in before if name.startswith(("encoder.conv1", "encoder.bn1", "encoder.layer1"))}


def test_stages_that_are_not_there() -> None:
    model = network(depth=3)
    with pytest.raises(ValueError, match="stages must be 1 to 3, got 4"):
        freeze(model.encoder, stages=4)
    with pytest.raises(TypeError, match="of an Encoder, got UNetDecoder"):
        freeze(model.decoder, stages=1)


def test_frozen_networks_are_compiled_and_exported_whole() -> None:
    model, image = network(), torch.randn(2, 1, 16, 16)
    freeze(model.encoder)
    before = state(model)
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    sum(out.mean() for out in compiled(image).values()).backward()
    assert not {name for name in moved(before, model) if name.startswith("encoder.")}
    assert moved(before, model)
    program = torch.export.export(model.eval(), (image,)).module()
    torch.testing.assert_close(program(image), model(image))


# ---- rates


def pretrain(model: DensePredictor, fresh: tuple[str, ...] = ()) -> DensePredictor:
    model.encoder.pretraining = Pretraining("x", fresh=fresh)
    return model


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_groups_hold_every_parameter_once(decay: float) -> None:
    model = pretrain(network())
    freeze(model.encoder, stages=1)
    groups = parameter_groups(model, 0.1, layer_decay=decay)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(group["params"] for group in groups)


def rates(model: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """Name of each parameter -> rate and weight decay, as the optimiser has them."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, **options))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_pretrained_layers_learn_mildly_and_new_ones_boldly() -> None:
    model = pretrain(network(), fresh=("layer2.0.conv1.weight",))
    for name, (rate, decay) in rates(model, pretrained_lr_factor=0.01, weight_decay=0.02).items():
        bold = not name.startswith("encoder.") or name == "encoder.layer2.0.conv1.weight"
        assert rate == pytest.approx(0.1 if bold else 0.001), name
        kernel = "conv" in name or "up." in name or ".0.weight" in name
        assert decay == (0.02 if kernel and name.endswith("weight") else 0), name
    assert {rate for rate, _ in rates(network(), pretrained_lr_factor=0.01).values()} == {0.1}, "nothing is pretrained"


def test_rates_fall_towards_the_image() -> None:
    model = pretrain(network(depth=5))
    found = rates(model, pretrained_lr_factor=0.5, layer_decay=0.1)
    assert [
        found[f"encoder.{name}"][0] for name in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight")
    ] == (pytest.approx([0.1 * 0.5 * 1e-4, 0.1 * 0.5 * 1e-3, 0.1 * 0.5]))


def test_layer_scales_are_not_decayed() -> None:
    groups = {group["name"]: group["params"] for group in parameter_groups(ConvNeXtEncoder(3, 1, width=4), 0.1)}
    assert {p.ndim for p in groups["new"]} == {2, 5}  # linear layers and kernels
    assert len(groups["new, not decayed"]) == len([*ConvNeXtEncoder(3, 1, width=4).parameters()]) - len(groups["new"])


def test_rates_out_of_range() -> None:
    for options, message in (
        ({"base_lr": 0.0}, "base_lr must be positive"),
        ({"base_lr": 0.1, "weight_decay": -1.0}, "weight_decay not negative, got 0.1, -1.0"),
        ({"base_lr": 0.1, "pretrained_lr_factor": 2.0}, "pretrained_lr_factor must be above 0 and at most 1, got 2.0"),
        ({"base_lr": 0.1, "layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_groups(network(), **options)


# ---- heads


def test_a_new_head_predicts_new_classes_and_leaves_the_rest() -> None:
    model = network(dims=3, organs=Segmentation(3), depth_map=Regression(), grade=Classification(2)).double().eval()
    before = state(model)
    replace_head(model, "organs", Segmentation(7, regions=True))
    replace_head(model, "grade", Classification(4))
    outputs = model(torch.zeros(1, 1, 9, 10, 11, dtype=torch.float64))
    shapes = {name: tuple(out.shape) for name, out in outputs.items()}
    assert shapes["organs"] == (1, 7, 9, 10, 11)
    assert {shape[:2] for name, shape in shapes.items() if name.startswith("organs@")} == {(1, 7)}
    assert shapes["grade"] == (1, 4)
    assert shapes["depth_map"] == (1, 1, 9, 10, 11)
    assert model.specs["organs"] == Segmentation(7, regions=True)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    kept = {name: value for name, value in before.items() if not name.startswith(("heads.organs", "heads.grade"))}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert not any(layer.training for layer in model.modules())


def test_heads_that_cannot_be_replaced() -> None:
    model = network()
    with pytest.raises(ValueError, match="name must be one of the heads segmentation, got 'organs'"):
        replace_head(model, "organs", Segmentation(2))
    with pytest.raises(ValueError, match="spec must be dense as the head 'segmentation' is"):
        replace_head(model, "segmentation", Classification(2))
    encoder = VGGEncoder(2, 1, "vgg11", width=4, taps="pools")
    decoder = FCNDecoder(2, encoder.channels, encoder.strides, 3, fc_channels=8)
    model = DensePredictor(encoder, decoder, 2, 1, 3)
    with pytest.raises(
        ValueError, match="FCNDecoder computes the 3 outputs of 'segmentation' itself, so 5 need a model"
    ):
        replace_head(model, "segmentation", Segmentation(5))
    replace_head(model, "segmentation", Segmentation(3, regions=True))
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)


# ---- Monte-Carlo dropout


@pytest.mark.parametrize("kind", COPIES)
def test_dropout_stays_on_in_evaluation_and_nothing_else(kind: str) -> None:
    model = network(dropout=0.5, width=16)
    count = sum(isinstance(layer, nn.Dropout2d) for layer in model.modules())
    assert monte_carlo_dropout(model) == count > 0
    model = COPIES[kind](model).train().eval()
    image = torch.randn(2, 1, 32, 32)
    before = state(model)
    passes = torch.stack([model(image)["segmentation"] for _ in range(4)])
    assert len(passes.flatten(1).unique(dim=0)) == 4
    assert not moved(before, model)
    norms = [layer for layer in model.modules() if hasattr(layer, "running_mean")]
    assert norms
    assert not any(layer.training for layer in norms)
    monte_carlo_dropout(model, on=False)
    assert not any(layer.training for layer in model.modules())
    assert torch.equal(model(image)["segmentation"], model(image)["segmentation"])


def test_dropped_channels_are_as_many_as_asked_for() -> None:
    layer = nn.Sequential(nn.Dropout(0.3)).eval()
    monte_carlo_dropout(layer)
    torch.manual_seed(0)
    share = float((layer(torch.ones(100_000)) == 0).float().mean())
    assert share == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 100_000) ** 0.5)


def test_stochastic_depth_is_left_alone() -> None:
    encoder = ResNetEncoder(2, 1, width=4, style=Style("batch", "relu", 0.5), stochastic_depth=0.9).eval()
    monte_carlo_dropout(encoder)
    encoder(torch.zeros(1, 1, 32, 32))
    active = {type(layer).__name__ for layer in encoder.modules() if layer.training}
    assert active == {"Dropout2d"}


def test_dropout_follows_training_again_when_off() -> None:
    model = network(dropout=0.5)
    monte_carlo_dropout(model)
    model.eval()
    model(torch.zeros(1, 1, 32, 32))
    model.train()
    assert monte_carlo_dropout(model, on=False)
    assert all(layer.training for layer in model.modules())


def test_a_model_without_dropout_has_nothing_to_switch() -> None:
    with pytest.raises(ValueError, match="no dropout layer with p > 0"):
        monte_carlo_dropout(network())
    assert monte_carlo_dropout(network(), on=False) == 0


def test_frozen_norms_and_dropout_go_together() -> None:
    model = network(dropout=0.5)
    freeze(model.encoder)
    monte_carlo_dropout(model)
    before, image = state(model.encoder), torch.randn(2, 1, 32, 32)
    first, second = (model.encoder.train()(image)[-1] for _ in range(2))
    assert not torch.equal(first, second)
    assert not moved(before, model.encoder)
    imports.timm()  # a whole network of another library, whose norms are torch's own
    other = timm_encoder("resnet18", 2, 1).train()
    freeze(other)
    before = state(other)
    other(image)
    assert not moved(before, other)


def test_stages_of_an_encoder_that_folds_voxels_into_channels() -> None:
    encoder = timm_encoder("tresnet_m", 2, 1)
    stages = stages_of(encoder)
    assert min(stages.values()) == 0
    assert max(stages.values()) == len(encoder.channels) - 1
