"""Numbers that papers, libraries' metadata and released networks state, each once, and our networks against them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from densepred.models.adapters import imports
from densepred.models.adapters.torchvision_encoder import torchvision_encoder
from densepred.models.adapters.wrapped import built
from densepred.models.classifier import CLASSIFIERS, create_classifier
from densepred.models.decoders.deconvnet import DeconvNetDecoder
from densepred.models.decoders.fcn import FCNDecoder
from densepred.models.encoders.lenet import LeNet5
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.encoders.vgg import VGGEncoder
from densepred.models.layers import CONVOLUTIONS, conv
from densepred.models.presets import unet3d2016, unet2015

OURS = {  # parameters with ImageNet's 1000 classes: "num_params" in torchvision's metadata
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
}
SQUEEZE_AND_EXCITATION = {  # timm's, as above; theirs are called seresnet
    "se_resnet18": 11_779_624,
    "se_resnet34": 21_960_416,
    "se_resnet50": 28_088_024,
    "se_resnet101": 49_326_872,
    "se_resnet152": 66_821_848,
}
TORCHVISIONS = {  # networks that we take from there: the same numbers, and how many of them the classifier holds
    "alexnet": (61_100_840, 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000),
    "googlenet": (6_624_904, 1024 * 1000 + 1000),
    "inception_v3": (23_834_568, 2048 * 1000 + 1000),
    "squeezenet1_0": (1_248_424, 512 * 1000 + 1000),
    "densenet121": (7_978_856, 1024 * 1000 + 1000),
    "densenet161": (28_681_000, 2208 * 1000 + 1000),
    "densenet169": (14_149_480, 1664 * 1000 + 1000),
    "densenet201": (20_013_928, 1920 * 1000 + 1000),
    "mobilenet_v2": (3_504_872, 1280 * 1000 + 1000),
    "mobilenet_v3_large": (5_483_032, 960 * 1280 + 1280 + 1280 * 1000 + 1000),
    "mobilenet_v3_small": (2_542_856, 576 * 1024 + 1024 + 1024 * 1000 + 1000),
    "efficientnet_b0": (5_288_548, 1280 * 1000 + 1000),
    "efficientnet_b1": (7_794_184, 1280 * 1000 + 1000),
    "efficientnet_b2": (9_109_994, 1408 * 1000 + 1000),
    "efficientnet_b3": (12_233_232, 1536 * 1000 + 1000),
    "efficientnet_b4": (19_341_616, 1792 * 1000 + 1000),
    "efficientnet_b5": (30_389_784, 2048 * 1000 + 1000),
    "efficientnet_b6": (43_040_704, 2304 * 1000 + 1000),
    "efficientnet_b7": (66_347_960, 2560 * 1000 + 1000),
    "regnet_x_400mf": (5_495_976, 400 * 1000 + 1000),
    "regnet_y_400mf": (4_344_144, 440 * 1000 + 1000),
    "regnet_y_16gf": (83_590_140, 3024 * 1000 + 1000),
}
WITH_AUXILIARY = {"googlenet": 13_004_888, "inception_v3": 27_161_264}


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def norms_of(*modules: nn.Module) -> list[nn.Module]:
    layers = [layer for module in modules for layer in module.modules()]
    return [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def theirs(name: str, **options: Any) -> nn.Module:
    return built(lambda: imports.torchvision().models.get_model(name, weights=None, **options))


@pytest.mark.parametrize(("name", "total"), [*OURS.items(), *SQUEEZE_AND_EXCITATION.items()])
def test_our_classifiers(name: str, total: int) -> None:
    with torch.device("meta"):
        assert count(create_classifier(name)) == total


def test_all_classifiers_but_convnext_v2_are_in_the_table() -> None:
    assert {name for name in CLASSIFIERS if "v2" not in name} == {*OURS, *SQUEEZE_AND_EXCITATION}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_classifiers_that_are_torchvisions(name: str) -> None:
    total, head = TORCHVISIONS[name]
    plain = {"aux_logits": False, "init_weights": False} if name in WITH_AUXILIARY else {}
    with torch.device("meta"):
        assert count(theirs(name, **plain)) == total
        assert count(torchvision_encoder(name, 2, 3)) == total - head


@pytest.mark.parametrize("name", WITH_AUXILIARY)
def test_classifiers_with_auxiliary_ones(name: str) -> None:
    with torch.device("meta"):
        assert count(theirs(name, aux_logits=True, init_weights=False)) == WITH_AUXILIARY[name]


@pytest.mark.parametrize("name", [*OURS, *TORCHVISIONS])
def test_the_table_is_torchvisions_metadata(name: str) -> None:
    total = OURS[name] if name in OURS else TORCHVISIONS[name][0]
    entry = imports.torchvision().models.get_model_weights(name).DEFAULT
    assert entry.meta["num_params"] == (WITH_AUXILIARY[name] if name == "inception_v3" else total)


def test_lenet5() -> None:
    """LeCun et al. 1998, section II.B: parameters and connections of each layer."""
    with torch.device("meta"):
        model = LeNet5()
        layers = [*(getattr(model.stages, name) for name in ("c1", "s2", "c3", "s4", "c5")), model.f6]
        assert [count(layer) for layer in layers] == [156, 12, 1_516, 32, 48_120, 10_164]
        assert count(model) == 60_000
        c1, c3, c5 = model.stages(torch.zeros(1, 1, 32, 32))
    units = [c1[0, 0].numel(), c3[0, 0].numel(), c5[0, 0].numel()]
    connections = [156 * units[0], 5 * 6 * 14 * 14, 1_516 * units[1], 5 * 16 * 5 * 5, 48_120 * units[2], 10_164]
    assert connections == [122_304, 5_880, 151_600, 2_000, 48_120, 10_164]
    assert sum(connections) + model.codes.numel() == 340_908  # the paper's total; the output layer is its last 840


@pytest.mark.parametrize(
    ("stride", "without", "ups"), [(32, 134_346_581, 1_806_336), (16, 134_357_354, 458_640), (8, 134_362_751, 127_008)]
)
def test_fcn_on_vgg16(stride: int, without: int, ups: int) -> None:
    """Long et al. 2015 with 21 classes; the released filters are k4 s2, k4 s2, k16 s8 / k32 s16 / k64 s32."""
    with torch.device("meta"):
        encoder = VGGEncoder(2, 3, "vgg16", taps="pools")
        decoder = FCNDecoder(2, encoder.channels, encoder.strides, 21, stride, 4096, style=encoder.style)
        frozen = FCNDecoder(2, encoder.channels, encoder.strides, 21, stride, 4096, learn_upsampling=False)
    assert count(decoder.ups) == ups
    assert count(encoder, decoder) == without + ups
    assert count(encoder, frozen) == without
    assert count(encoder) == 14_714_688
    assert [count(decoder.fc[i].conv) for i in (0, 2)] == [102_764_544, 16_781_312]
    kernels = [up.layer.kernel_size[0] for up in decoder.ups[::-1]]
    assert kernels == {32: [64], 16: [4, 32], 8: [4, 4, 16]}[stride]


def test_deconvnet_on_vgg16() -> None:
    """Noh et al. 2015 with 21 classes, by the released prototxt."""
    with torch.device("meta"):
        encoder = VGGEncoder(2, 3, "vgg16_bn", taps="pools")
        arguments = (encoder.channels, encoder.strides, encoder.switch_channels)
        decoder = DeconvNetDecoder(2, *arguments, style=encoder.style, unpooling="switches", fc_channels=4096)
        score = conv(2, decoder.channels[0], 21, 1)
    norms = norms_of(encoder, decoder)
    assert (len(norms), count(*norms)) == (29, 33_408)
    assert count(encoder, decoder, score) - count(*norms) == 251_772_245
    assert count(encoder, decoder, score) == 251_805_653
    assert count(decoder.middle.fc6_deconv.conv) == 7 * 7 * 4096 * 512 + 512 == 102_760_960
    deconvs = [block.conv for stage in decoder.stages[::-1] for block in stage.blocks if hasattr(block, "conv")]
    mirrored = [512] * 5 + [256] * 3 + [128] * 2 + [64] * 3  # deconv5-1 to deconv1-2
    assert [layer.out_channels for layer in deconvs] == mirrored


def test_unet_of_2015() -> None:
    """Ronneberger et al. 2015, one channel to two classes; "in total the network has 23 convolutional layers"."""
    with torch.device("meta"):
        model = unet2015()
        assert count(model) == 31_030_658
        assert sum(isinstance(layer, CONVOLUTIONS) for layer in model.modules()) == 23
        for size, output in ((572, 388), (188, 4), (204, 20)):
            assert model(torch.zeros(1, 1, size, size)).shape == (1, 2, output, output)


def test_3d_unet_of_2016() -> None:
    """Cicek et al. 2016, three channels to three classes; the paper leaves the norms out of its count."""
    with torch.device("meta"):
        model = unet3d2016()
        norms = count(*norms_of(model))
        assert (count(model) - norms, norms) == (19_069_955, 4_672)
        assert model(torch.zeros(1, 3, 116, 132, 132)).shape == (1, 3, 28, 44, 44)  # 132 x 132 x 116 in the paper
        assert model.output_size((116, 132, 132)) == (28, 44, 44)


@pytest.mark.parametrize("name", ["resnet50", "se_resnet50"])
def test_encoders_are_classifiers_less_their_last_layer(name: str) -> None:
    with torch.device("meta"):
        encoder = ResNetEncoder(2, 3, name)
    assert count(encoder) == {**OURS, **SQUEEZE_AND_EXCITATION}[name] - (2048 * 1000 + 1000)
