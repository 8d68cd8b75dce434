"""Weights of other libraries in our encoders: their features, and an account of every tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from densepred.errors import InputError
from densepred.models.adapters import imports
from densepred.models.adapters.smp_encoder import smp_encoder
from densepred.models.adapters.source import IMAGENET
from densepred.models.adapters.timm_encoder import timm_encoder
from densepred.models.adapters.torchvision_encoder import torchvision_encoder
from densepred.models.blocks import Style
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.convnext import ConvNeXtEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.weights import (
    Pretraining,
    load_weights,
)
from tests.random_weights import randomized


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def save(module: nn.Module) -> Path:
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return save


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_weights_see_a_grey_image_as_torchvision_does(channels: int, suffix: str, tmp_path: Path) -> None:
    theirs = randomized(imports.torchvision().models.resnet18())
    file = tmp_path / f"resnet18{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), file)
    ours = ResNetEncoder(2, channels).eval()
    report = load_weights(ours, file, "resnet18")
    grey = torch.rand(1, 1, 65, 70)
    with torch.no_grad():
        logits = theirs.fc(ours(grey.expand(-1, channels, -1, -1))[-1].mean((2, 3)))
        torch.testing.assert_close(logits, theirs(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert report.complete
    assert report.classifier == {"fc.weight": 512_000, "fc.bias": 1000}
    assert list(report.adapted) == ["conv1.weight"]
    parameters = sum(n for name, n in report.loaded.items() if "running" not in name and "num_b" not in name)
    assert parameters == 11_689_512 - 513_000 + (channels - 3) * 64 * 49  # 11,689,512 is torchvision's figure


TIMM: dict[str, tuple[Callable[[], Encoder], str]] = {
    "convnext_tiny": (lambda: ConvNeXtEncoder(2, 3, "convnext_tiny"), "head"),
    "convnextv2_atto": (lambda: ConvNeXtEncoder(2, 3, "convnextv2_atto"), "head"),
    "seresnet18": (lambda: ResNetEncoder(2, 3, "se_resnet18"), "fc"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_weights_give_timms_features(name: str, saved: Callable) -> None:
    make, head = TIMM[name]
    theirs, ours = randomized(imports.timm().create_model(name)), make().eval()
    report = load_weights(ours, saved(theirs))
    assert report.complete
    assert {key.partition(".")[0] for key in report.classifier} == {head}
    assert not report.unexpected
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.forward_intermediates(image, intermediates_only=True)[-4:]
        for one, other in zip(ours(image)[-4:], expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_metas_names_of_convnext_v2_are_understood(tmp_path: Path) -> None:
    """facebookresearch/ConvNeXt-V2: downsample_layers, stages.S.B.dwconv, pwconv, and grn.gamma of (1, 1, 1, C)."""
    ours = randomized(ConvNeXtEncoder(2, 3, "convnextv2_atto", width=4))
    names = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.4.1": "grn", "block.5": "pwconv2"}
    state = {}
    for key, value in ours.state_dict().items():
        _, place, rest = key.split(".", 2)
        stage, odd = divmod(int(place), 2)
        if odd:
            block, inner = rest.split(".", 1)
            part, leaf = inner.rsplit(".", 1)
            if part == "block.4.1":
                leaf, value = {"weight": "gamma", "bias": "beta"}[leaf], value.view(1, 1, 1, -1)
            rest = f"{block}.{names[part]}.{leaf}"
        state[f"stages.{stage}.{rest}" if odd else f"downsample_layers.{stage}.{rest}"] = value
    torch.save({"model": state}, tmp_path / "meta.pt")
    loaded = ConvNeXtEncoder(2, 3, "convnextv2_atto", width=4)
    report = load_weights(loaded, tmp_path / "meta.pt")
    assert report.complete
    assert not report.unexpected
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_encoders_of_other_libraries_take_their_librarys_weights(tmp_path: Path) -> None:
    theirs = randomized(imports.torchvision().models.mobilenet_v2())
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = torchvision_encoder("mobilenet_v2", 2, 3).eval()
    assert load_weights(ours, tmp_path / "a.pth").complete
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(image)[-1], theirs.features(image), atol=1e-4, rtol=1e-4)
    network = randomized(imports.timm().create_model("mobilenetv3_small_050"))
    torch.save(network.state_dict(), tmp_path / "b.pth")
    report = load_weights(timm_encoder("mobilenetv3_small_050", 2, 1), tmp_path / "b.pth")
    assert report.complete
    assert len(report.adapted) == 1


def test_a_trained_models_file_fills_an_encoder(tmp_path: Path) -> None:
    """The encoder's part of a run's model, under a prefix."""
    trained = randomized(ResNetEncoder(2, 1, width=4))
    state = {f"module.encoder.{key}": value for key, value in trained.state_dict().items()}
    torch.save(
        {"epoch": 3, "state_dict": state | {"module.heads.conv.weight": torch.zeros(3, 4, 1, 1)}}, tmp_path / "a.pt"
    )
    ours = ResNetEncoder(2, 1, width=4)
    report = load_weights(ours, tmp_path / "a.pt")
    assert report.complete
    assert len(report.loaded) == len(trained.state_dict())
    assert torch.equal(ours.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)


def test_the_report_counts_every_tensor_once(saved: Callable) -> None:
    deep = ResNetEncoder(3, 1, width=4, depth=3)
    full = randomized(ResNetEncoder(2, 3, width=4, style=Style("instance", "relu")))
    file = saved(full)
    report = load_weights(deep, file, strict=False)
    own = {k: v.numel() for k, v in deep.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert report.loaded | report.missing == own
    assert report.missing.keys() == {k for k in own if "running" in k}
    theirs = {k: v.numel() for k, v in full.state_dict().items()}
    assert report.unexpected == {k: n for k, n in theirs.items() if k.startswith(("layer3.", "layer4."))}
    lines = str(report).splitlines()
    assert lines[1].split() == [
        "loaded",
        str(len(report.loaded)),
        "tensors",
        f"{sum(report.loaded.values()):,}",
        "values",
    ]
    assert lines[2].split()[-1] == "conv1.weight"
    assert not report.complete
    assert deep.pretraining.fresh == ()
    assert deep.pretraining.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_another_width_is_refused_with_the_arithmetic(saved: Callable) -> None:
    file = saved(ResNetEncoder(2, 3, width=8))
    with pytest.raises(InputError) as caught:
        load_weights(ResNetEncoder(2, 3, width=4), file, "resnet18")
    assert str(caught.value) == (
        f"ERROR {file}: encoder resnet18 has width 4, its pretrained weights 8: "
        "layer1.0.conv1.weight is (4, 4, 3, 3), the file has (8, 8, 3, 3)\n  fix: use width 8 or leave pretrained out"
    )


def test_another_architecture_is_refused(saved: Callable) -> None:
    file = saved(ResNetEncoder(2, 3, "resnet50", width=4))
    with pytest.raises(InputError, match=r"of \d+ tensors have other shapes: layer1.0.conv1.weight is \(4, 4, 3, 3\)"):
        load_weights(ResNetEncoder(2, 3, width=4), file, "resnet18")
    with pytest.raises(
        InputError, match=r"none of its .* fits encoder vgg11: the file has .*; the encoder has features.0"
    ):
        load_weights(VGGEncoder(2, 3, "vgg11", width=4), file, "vgg11")


RELATED: dict[str, tuple[Callable[[], Encoder], Callable[[], Encoder], str]] = {
    "too few blocks": (
        lambda: ResNetEncoder(2, 3, "resnet18", width=4),
        lambda: ResNetEncoder(2, 3, "resnet34", width=4),
        r"encoder \w+: the file lacks 80 of its 200 tensors \(layer1\.2\.conv1\.weight, ",
    ),
    "too many blocks": (
        lambda: ResNetEncoder(2, 3, "resnet34", width=4),
        lambda: ResNetEncoder(2, 3, "resnet18", width=4),
        r"encoder \w+: it has no place for 70 of the file's \(layer1\.2\.",
    ),
    "another depth": (
        lambda: VGGEncoder(2, 3, "vgg11", width=4),
        lambda: VGGEncoder(2, 3, "vgg16", width=4),
        r"the file lacks 24 of its 26 tensors \(features\.2\.weight",
    ),
    "no place for parts of blocks": (
        lambda: ResNetEncoder(2, 3, "se_resnet18", width=16),
        lambda: ResNetEncoder(2, 3, "resnet18", width=16),
        r"it has no place for 28 of the file's \(layer1\.0\.se",
    ),
    "too many blocks of a later stage": (
        lambda: ConvNeXtEncoder(2, 3, "convnext_small", width=4),
        lambda: ConvNeXtEncoder(2, 3, "convnext_tiny", width=4),
        r"it has no place for 162 of the file's \(features\.5\.\d+\.",
    ),
}


@pytest.mark.parametrize("case", RELATED)
def test_weights_that_fill_a_part_are_refused(case: str, saved: Callable) -> None:
    theirs, ours, message = RELATED[case]
    file = saved(theirs())
    with pytest.raises(InputError, match=message):
        load_weights(ours(), file)
    assert load_weights(ours(), file, strict=False).loaded


@pytest.mark.parametrize("library", ["torchvision", "smp"])
def test_densenets_are_published_under_older_names(library: str, tmp_path: Path) -> None:
    """densenet121-a639ec97.pth has denselayer1.norm.1.weight, which torchvision renames when it loads it."""
    theirs = imports.torchvision().models.densenet121().state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): v for key, v in theirs.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    torch.save(older, tmp_path / "a.pth")
    make = {"torchvision": torchvision_encoder, "smp": smp_encoder}[library]
    assert load_weights(make("densenet121", 2, 3), tmp_path / "a.pth").complete


def test_every_branch_of_a_stem_sees_the_channels(saved: Callable) -> None:
    theirs, ours = randomized(timm_encoder("repvgg_a0", 2, 3)), timm_encoder("repvgg_a0", 2, 4)
    assert len(load_weights(ours, saved(theirs)).adapted) == 2
    grey = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        for one, other in zip(ours.eval()(grey.expand(-1, 4, -1, -1)), theirs(grey.expand(-1, 3, -1, -1)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_voxels_folded_into_channels_are_not_taken_for_colours(saved: Callable) -> None:
    """TResNet's first convolution sees blocks of 4 x 4 voxels of 3 colours as 48 channels."""
    with pytest.raises(InputError, match=r"body_conv1.conv.weight is \(64, 16, 3, 3\), the file has \(64, 48, 3, 3\)"):
        load_weights(timm_encoder("tresnet_m", 2, 1), saved(timm_encoder("tresnet_m", 2, 3)))


NO_WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "integers": (lambda x: x.to(torch.int8), r"conv1.weight holds torch.int8 \(torch.strided\), the encoder"),
    "complex": (lambda x: x.to(torch.complex64), "conv1.weight holds torch.complex64"),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), "conv1.weight holds no values"),
    "diverged": (lambda x: x * torch.nan, "conv1.weight holds numbers that are not finite"),
    "flat": (lambda x: x[:, 0, 0, 0].clone(), r"conv1.weight is \(4, 3, 7, 7\), the file has \(4,\)"),
    "empty": (lambda x: x[:, :0].clone(), r"the file has \(4, 0, 7, 7\)"),
}


@pytest.mark.parametrize("fault", NO_WEIGHTS)
def test_tensors_that_are_no_weights_are_refused(fault: str, tmp_path: Path) -> None:
    spoil, message = NO_WEIGHTS[fault]
    ours = ResNetEncoder(2, 3, width=4)
    state = ours.state_dict()
    torch.save(state | {"conv1.weight": spoil(state["conv1.weight"])}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_weights(ours, tmp_path / "a.pth")


def test_half_precision_is_inflated_in_full(tmp_path: Path) -> None:
    theirs, ours = ResNetEncoder(2, 3, width=4).half(), ResNetEncoder(3, 3, width=4)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    load_weights(ours, tmp_path / "a.pth")
    sums = ours.layer1[0].conv1.weight.sum(2)
    torch.testing.assert_close(sums, theirs.layer1[0].conv1.weight.float(), atol=1e-7, rtol=1e-6)


def test_without_strictness_what_does_not_fit_stays_fresh(saved: Callable) -> None:
    ours = ResNetEncoder(2, 3, width=4)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    report = load_weights(ours, saved(randomized(ResNetEncoder(2, 3, "resnet50", width=4))), strict=False)
    assert report.refused
    assert all(torch.equal(before[key], ours.state_dict()[key]) for key in report.refused)
    assert not torch.equal(before["conv1.weight"], ours.conv1.weight)
    assert set(ours.pretraining.fresh) == {key for key in report.refused if "running" not in key}


def test_weights_go_into_tensors_that_exist(saved: Callable) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(2, 3, width=4)
    with pytest.raises(ValueError, match="it is on the meta device"):
        load_weights(encoder, "imagenet", "resnet18")


def test_images_are_normalised_as_torchvision_does() -> None:
    transforms = imports.torchvision().transforms
    picture = torch.randint(0, 256, (3, 9, 10), dtype=torch.uint8)
    expected = transforms.Normalize(*IMAGENET)(picture / 255)
    known = Pretraining("x", *IMAGENET)
    torch.testing.assert_close(known.normalize(picture, 0, 255), expected)
    torch.testing.assert_close(known.normalize(picture[None] / 255, 0, 1, axis=1), expected[None])
    in_bytes = Pretraining("x", [255 * m for m in IMAGENET[0]], [255 * s for s in IMAGENET[1]], (0, 255))
    torch.testing.assert_close(in_bytes.normalize(picture / 255, 0, 1), expected)


def test_other_channels_than_the_colours_get_the_average() -> None:
    known = Pretraining("x", *IMAGENET)
    assert known.for_channels(3) is known
    assert known.for_channels(2).mean == pytest.approx((0.449, 0.449), abs=1e-6)  # 1.347 / 3
    assert known.for_channels(1).std == pytest.approx((0.226,), abs=1e-6)  # 0.678 / 3
    assert Pretraining(**json.loads(json.dumps(dataclasses.asdict(known)))) == known


def test_a_normalisation_that_cannot_be_applied() -> None:
    image = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match=r"the normalisation of a\.pth is not known"):
        Pretraining("a.pth").normalize(image, 0, 1)
    with pytest.raises(ValueError, match=r"image must have 3 channels on axis 1, got \(3, 4, 4\)"):
        Pretraining("a", *IMAGENET).normalize(image, 0, 1, axis=1)
    with pytest.raises(ValueError, match="high must be above low, got 1 and 0"):
        Pretraining("a", *IMAGENET).normalize(image, 1, 0)
    with pytest.raises(ValueError, match="std must be positive"):
        Pretraining("a", (0.5,), (0.0,))
    with pytest.raises(ValueError, match="a number for each channel"):
        Pretraining("a", (0.5,), (0.5, 0.5))
