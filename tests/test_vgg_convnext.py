"""VGG, ConvNeXt and the ImageNet classifiers: published counts, and torchvision's and timm's numbers."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.blocks import Style
from densepred.models.classifier import CLASSIFIERS, Classifier, adaptive_mean, create_classifier
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.convnext import ConvNeXtEncoder, GlobalResponseNorm
from densepred.models.encoders.lenet import LeNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.layers import DropPath
from densepred.models.upsampling import unpool

SIZES = [(65, 70), (33, 30, 37), (7, 7), (1, 1), (2, 3, 1)]
SMALL = [
    *(("vgg", "vgg11", {"width": 4, "taps": taps}) for taps in ("convs", "pools")),
    ("vgg", "vgg16_bn", {"width": 4, "style": Style("instance", "leaky_relu", 0.1)}),
    ("convnext", "convnext_tiny", {"width": 4}),
    ("convnext", "convnextv2_atto", {"width": 4, "style": Style("batch", "relu", 0.1), "stochastic_depth": 0.2}),
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(family: str, dims: int, channels: int, variant: str, options: dict) -> Encoder:
    kind = {"vgg": VGGEncoder, "convnext": ConvNeXtEncoder}[family]
    return kind(dims, channels, variant, **options)


def stir(model: nn.Module) -> None:
    """Give what starts at a constant (norms, biases, scales, running statistics) numbers that make a difference."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "layer_scale")) or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.0)
        elif tensor.ndim == 1:
            tensor.uniform_(-0.1, 0.1)


def assert_true(encoder: Encoder, maps: list[Tensor], size: tuple[int, ...]) -> None:
    grids = [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in encoder.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *g) for c, g in zip(encoder.channels, grids, strict=True)]


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16", "convnext_tiny", "resnet50"])
def test_logits_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    imports.torchvision()
    from torchvision import models

    with torch.device("meta"):
        theirs, ours = getattr(models, name)(num_classes=10), create_classifier(name, 10)
    theirs, ours = theirs.to_empty(device="cpu").eval(), ours.to_empty(device="cpu").eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter)
    stir(theirs)
    ours.load_torchvision(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if "resne" not in name and "v2" not in name])
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    imports.torchvision()
    from torchvision import models

    with torch.device("meta"):
        theirs, ours = getattr(models, name)(), create_classifier(name)
    ours.load_torchvision(theirs.state_dict())  # strict: raises if any name or shape differs
    assert len(ours.state_dict()) == len(theirs.state_dict())


def test_loading_is_strict() -> None:
    with torch.device("meta"):
        model = create_classifier("resnet18")
        state = {name.partition(".")[2]: tensor for name, tensor in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
            model.load_torchvision({k: v for k, v in state.items() if k != "fc.bias"})


RENAMES = (  # ours -> timm's
    (r"^encoder\.features\.0\.", "stem."),
    (r"^encoder\.features\.([246])\.(\d)", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}"),
    (r"^encoder\.features\.([1357])\.(\d+)\.block", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}"),
    (r"blocks\.(\d+)\.0\.", r"blocks.\1.conv_dw."),
    (r"blocks\.(\d+)\.2\.", r"blocks.\1.norm."),
    (r"blocks\.(\d+)\.3\.", r"blocks.\1.mlp.fc1."),
    (r"blocks\.(\d+)\.4\.1\.", r"blocks.\1.mlp.grn."),
    (r"blocks\.(\d+)\.5\.", r"blocks.\1.mlp.fc2."),
    (r"^head\.classifier\.0", "head.norm"),
    (r"^head\.classifier\.2", "head.fc"),
)


def timm_name(name: str) -> str:
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"])
def test_version_2_has_timms_parameters(size: str) -> None:
    name = f"convnextv2_{size}"
    with torch.device("meta"):
        theirs, ours = imports.timm().create_model(name), create_classifier(name)
    assert {timm_name(k) for k in ours.state_dict()} == set(theirs.state_dict())
    assert count(ours) == count(theirs)


def test_version_2_computes_what_timms_does() -> None:
    torch.manual_seed(0)
    theirs = imports.timm().create_model("convnextv2_atto", num_classes=10).eval()
    stir(theirs)
    ours = create_classifier("convnextv2_atto", 10).eval()
    state = theirs.state_dict()
    ours.load_state_dict({k: state[timm_name(k)].view_as(v) for k, v in ours.state_dict().items()})
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_global_response_norm_is_the_papers() -> None:
    x = torch.rand(2, 3, 4, 5, 6, dtype=torch.float64)
    layer = GlobalResponseNorm(3).double()
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 0.5)
    norm = x.square().sum((2, 3, 4)).sqrt()  # algorithm 1 of Woo et al. 2023
    relative = norm / (norm.sum(1, keepdim=True) / 3 + 1e-6)
    torch.testing.assert_close(layer(x), 2 * (x * relative[:, :, None, None, None]) + 0.5 + x)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("family", "variant", "options"), SMALL)
def test_channels_and_strides_are_true(family: str, variant: str, options: dict, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = build(family, len(size), 2, variant, options)
    x = torch.randn(1, 2, *size, requires_grad=True)
    maps = encoder(x)
    assert_true(encoder, maps, size)
    sum(m.square().mean() for m in maps).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize(("family", "variant", "options"), SMALL)
def test_a_dilated_encoder_holds_the_maps_of_the_strided_one(
    family: str, variant: str, options: dict, stride: int
) -> None:
    torch.manual_seed(0)
    options = {k: v for k, v in options.items() if k != "style"}  # statistics over another grid would differ
    strided = build(family, 2, 1, variant, options).eval()
    stir(strided)
    if "v2" in variant:  # as would the response norm
        for name, parameter in strided.named_parameters():
            if ".block.4.1." in name:
                nn.init.zeros_(parameter)
    dilated = build(family, 2, 1, variant, {**options, "output_stride": stride}).eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 1, 64, 96)
    maps = dilated(x)
    assert_true(dilated, maps, (64, 96))
    assert max(max(s) for s in dilated.strides) == stride
    for fine, coarse, s, wide in zip(maps, strided(x), dilated.strides, strided.strides, strict=True):
        step = wide[0] // s[0]
        torch.testing.assert_close(fine[:, :, ::step, ::step], coarse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant", "options"), SMALL)
def test_depth_builds_no_more_than_it_gives(family: str, variant: str, options: dict) -> None:
    whole = build(family, 2, 1, variant, options).eval()
    x = torch.randn(1, 1, 65, 70)
    for depth in range(1, len(whole.channels) + 1):
        short = build(family, 2, 1, variant, {**options, "depth": depth}).eval()
        state = {k: v for k, v in whole.state_dict().items() if k in short.state_dict()}
        short.load_state_dict(state)
        assert short.channels == whole.channels[:depth]
        assert short.strides == whole.strides[:depth]
        for ours, theirs in zip(short(x), whole(x), strict=False):
            torch.testing.assert_close(ours, theirs)
        short(x)[-1].sum().backward()
        assert all(p.grad is not None for p in short.parameters())


@pytest.mark.parametrize("size", [(33, 38), (9, 10, 13)], ids=str)
@pytest.mark.parametrize("taps", ["convs", "pools"])
@pytest.mark.parametrize("output_stride", [None, 8])
def test_switches_put_the_maxima_back(size: tuple[int, ...], taps: str, output_stride: int | None) -> None:
    torch.manual_seed(0)
    options = {"width": 4, "taps": taps, "output_stride": output_stride, "style": Style("batch", "relu")}
    encoder = build("vgg", len(size), 1, "vgg11_bn", options).eval()
    x = torch.randn(2, 1, *size)
    maps, switches = encoder.forward_with_switches(x)
    for ours, plain in zip(maps, encoder(x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert [None if s is None else s.shape[1] for s in switches] == list(encoder.switch_channels)
    assert len([s for s in switches if s is not None]) == (5 if output_stride is None else 3)
    for i, switch in enumerate(switches):
        if switch is None:
            continue
        fine = encoder.strides[i - 1] if i else (1,) * len(size)
        assert [s // f for s, f in zip(encoder.strides[i], fine, strict=True)] == [2] * len(size)
        grid = [-(-n // s) for n, s in zip(size, fine, strict=True)]
        assert switch.shape[2:] == maps[i].shape[2:]
        if taps == "convs" and i < 5:  # the map that was pooled is the one before
            pooled = F.max_pool3d if len(size) == 3 else F.max_pool2d
            maxima = pooled(maps[i - 1], 2, ceil_mode=True)
            back = unpool(maxima, switch, 2, grid)
            assert ((back == maps[i - 1]) | (back == 0)).all()
            torch.testing.assert_close(pooled(back, 2, ceil_mode=True), maxima)


def test_vgg_refuses_a_norm_that_its_name_denies() -> None:
    with pytest.raises(ValueError, match="try 'vgg16_bn'"):
        VGGEncoder(2, 3, "vgg16", style=Style("batch"))
    with pytest.raises(ValueError, match="try 'vgg16'"):
        VGGEncoder(2, 3, "vgg16_bn", style=Style("none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 7}, "1 to 6"),
        ({"depth": 6, "taps": "pools"}, "1 to 5"),
        ({"taps": "all"}, "'convs' or 'pools'"),
        ({"width": 0}, "positive"),
        ({"output_stride": 5}, "4, 8, 16 or 32"),
        ({"variant": "vgg17"}, "vgg16"),
    ],
)
def test_vgg_says_what_it_takes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VGGEncoder(2, 3, **options)


def test_a_fresh_vgg_neither_fades_nor_explodes() -> None:
    torch.manual_seed(0)
    maps = VGGEncoder(2, 1, "vgg16", width=16)(torch.randn(4, 1, 64, 64))
    assert all(0.2 < m.square().mean().sqrt() < 5 for m in maps)  # He et al. 2015 keep the variance


def test_stochastic_depth_grows_to_the_last_block() -> None:
    encoder = ConvNeXtEncoder(2, 1, "convnext_tiny", width=4, stochastic_depth=0.36)
    drops = [m.probability for m in encoder.modules() if isinstance(m, DropPath)]
    assert drops == pytest.approx([0.02 * (i + 1) for i in range(18)])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 7), (10, 33), (2, 9, 20)])
def test_adaptive_mean_is_torchs(size: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)](x, (7,) * len(size))
    torch.testing.assert_close(adaptive_mean(x, 7), expected)


@pytest.mark.parametrize("name", ["vgg11", "convnextv2_atto", "resnet18"])
def test_classifiers_in_3d(name: str) -> None:
    with torch.device("meta"):
        model = create_classifier(name, 5, in_channels=1, dims=3)
        assert model(torch.zeros(2, 1, 33, 30, 37)).shape == (2, 5)


def test_unknown_classifiers() -> None:
    with pytest.raises(ValueError, match="did you mean 'convnext_tiny'"):
        create_classifier("convnext_tny")
    with pytest.raises(ValueError, match="classes must be positive"):
        create_classifier("resnet18", classes=0)


@pytest.mark.parametrize("family", ["vgg", "convnext", "lenet"])
def test_export_with_open_sizes(family: str) -> None:
    encoder: nn.Module = {
        "vgg": VGGEncoder(2, 1, "vgg11", width=2, output_stride=8),
        "convnext": ConvNeXtEncoder(2, 1, "convnextv2_atto", width=2, depth=2, output_stride=4),
        "lenet": LeNetEncoder(2, 1),
    }[family].eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(encoder, (torch.randn(2, 1, 64, 96),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(3, 1, 65, 70)
    for ours, theirs in zip(program(x), encoder(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_classifier_takes_any_encoder() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(120, 4))
    assert Classifier(LeNetEncoder(2, 1), head)(torch.zeros(2, 1, 9, 7)).shape == (2, 4)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("variant", ["convnext_tiny", "convnextv2_atto"])
def test_an_exactly_dark_background_blows_up_no_gradient(variant: str, dims: int) -> None:
    """With a stem whose biases are 0 the norm behind it divides by the root of its eps there."""
    torch.manual_seed(0)
    encoder = ConvNeXtEncoder(dims, 2, variant, width=8, depth=2)
    image = torch.zeros(2, 2, *(24, 32, 16)[:dims])
    image[..., :8] = torch.randn(*image.shape[:-1], 8)
    wanted = [torch.randn(one.shape) for one in encoder(image)]

    def norm() -> float:
        encoder.zero_grad()
        sum((one * weight).mean() for one, weight in zip(encoder(image), wanted, strict=True)).backward()
        return float(torch.stack([p.grad.norm() for p in encoder.parameters()]).norm())

    usual = norm()
    with torch.no_grad():
        encoder.features[0][0].bias.zero_()
    assert norm() > 30 * usual
