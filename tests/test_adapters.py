"""Other libraries' networks behind our contracts, against those libraries themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.adapters import imports
from densepred.models.adapters import smp_encoder as smp
from densepred.models.adapters import timm_encoder as timm
from densepred.models.adapters import torchvision_encoder as torchvision
from densepred.models.adapters.source import HALF, IMAGENET, Source
from densepred.models.adapters.wrapped import Map, WrappedEncoder, dry_run, probe

BUILDERS = {"timm": timm.timm_encoder, "torchvision": torchvision.torchvision_encoder, "smp": smp.smp_encoder}
REPRESENTATIVES = [
    "timm.convnext_atto",
    "timm.efficientnet_lite0",
    "timm.legacy_xception",
    "timm.mobilenetv3_small_050",
    "timm.mobilevitv2_050",
    "timm.regnetx_002",
    "timm.swin_tiny_patch4_window7_224",
    "timm.vgg11",
    "torchvision.alexnet",
    "torchvision.densenet121",
    "torchvision.efficientnet_b0",
    "torchvision.googlenet",
    "torchvision.inception_v3",
    "torchvision.mobilenet_v2",
    "torchvision.regnet_x_400mf",
    "torchvision.shufflenet_v2_x0_5",
    "torchvision.squeezenet1_0",
    "torchvision.swin_t",
    "smp.efficientnet-b0",
    "smp.inceptionv4",
    "smp.mit_b0",
    "smp.mobileone_s0",
    "smp.vgg11",
    "smp.xception",
]


def encoder(name: str, in_channels: int = 3, **options: object) -> WrappedEncoder:
    source, _, rest = name.partition(".")
    return BUILDERS[source](rest, 2, in_channels, **options)


def has_true_shapes(built: WrappedEncoder, size: tuple[int, int], device: str = "cpu") -> bool:
    with torch.no_grad():
        features = built(torch.zeros(1, built.in_channels, *size, device=device))
    expected = [
        (1, channels, *(math.ceil(n / s) for n, s in zip(size, stride, strict=True)))
        for channels, stride in zip(built.channels, built.strides, strict=True)
    ]
    return [tuple(feature.shape) for feature in features] == expected


@pytest.mark.parametrize(("i", "name"), list(enumerate(REPRESENTATIVES)), ids=REPRESENTATIVES)
def test_channels_and_strides_are_true_for_any_size(i: int, name: str):
    with torch.device("meta"):
        built = encoder(name, in_channels=(1, 3, 12)[i % 3]).eval()
    for size in ((65, 70), (1, 1), (224, 31)):
        assert has_true_shapes(built, size, "meta"), size


@pytest.mark.parametrize("name", ["timm.mobilenetv3_small_050", "torchvision.squeezenet1_0", "smp.mobilenet_v2"])
@pytest.mark.parametrize("in_channels", [1, 2, 4, 12])
def test_any_number_of_channels_trains(name: str, in_channels: int):
    built = encoder(name, in_channels)
    assert built.training
    sum(feature.mean() for feature in built(torch.randn(2, in_channels, 65, 70))).backward()
    assert [parameter.grad is not None for parameter in built.parameters()].count(False) == 0


@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_050", "regnetx_002", "swin_tiny_patch4_window7_224", "pvt_v2_b0"]
)
def test_timm_maps_are_timms_own(name: str):
    built = encoder(f"timm.{name}").eval()
    whole = imports.timm().create_model(name, pretrained=False)
    loaded = built.load_state_dict(built.published(whole.state_dict()), strict=False)
    assert not loaded.missing_keys, "the names of published weights are not ours"
    options = {"strict_img_size": False} if "swin" in name else {}
    theirs = imports.timm().create_model(name, features_only=True, **options).eval()
    theirs.load_state_dict(built.network.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = [f.permute(0, 3, 1, 2) if "swin" in name else f for f in theirs(x)]
        for ours, wanted in zip(built(x), expected, strict=True):
            assert torch.equal(ours, wanted)


TAPS = {
    "densenet121": ["features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3"],
    "googlenet": ["conv1", "conv3", "inception3b", "inception4e", "inception5b"],
    "regnet_x_400mf": ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))],
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "shufflenet_v2_x0_5": ["conv1", "maxpool", "stage2", "stage3", "conv5"],
}


@pytest.mark.parametrize("name", TAPS)
def test_torchvision_maps_are_what_its_classifier_computes(name: str):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    whole = imports.torchvision().models.get_model(name, weights=None, **options).eval()
    seen: dict[str, Tensor] = {}

    def keep(tap: str):
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            if tap not in seen:  # ResNet calls one ReLU again and again
                seen[tap] = output.clone()

        return hook

    for tap in TAPS[name]:
        whole.get_submodule(tap).register_forward_hook(keep(tap))
    built = encoder(f"torchvision.{name}").eval()
    assert not built.load_state_dict(built.published(whole.state_dict()), strict=False).missing_keys
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole(x)
        for ours, tap in zip(built(x), TAPS[name], strict=False):
            assert torch.equal(ours, seen[tap]), tap


@pytest.mark.parametrize("name", ["mobileone_s0", "mit_b0", "efficientnet-b0", "vgg11"])
def test_smp_maps_are_smps_own(name: str):
    built = encoder(f"smp.{name}").eval()
    theirs = imports.smp().encoders.get_encoder(name, weights=None).eval()
    assert not built.load_state_dict(built.published(theirs.state_dict()), strict=False).missing_keys
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = [feature for feature in theirs(x) if feature.shape[1] not in (0, 3)]
        for ours, wanted in zip(built(x), expected, strict=True):
            assert torch.equal(ours, wanted)


def test_an_odd_image_is_one_whose_last_voxels_are_repeated():
    built = encoder("smp.resnet18").eval()
    x = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        theirs = built.network.encoder(F.pad(x, (0, 26, 0, 31), mode="replicate"))[1:]
        for ours, wanted in zip(built(x), theirs, strict=True):
            assert torch.equal(ours, wanted[:, :, : ours.shape[2], : ours.shape[3]])


class Ramped(nn.Module):
    """Means over windows of 5 in steps of 2, then of 3 in steps of 2, without padding."""

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.avg_pool2d(x, 5, 2)
        return [fine, F.avg_pool2d(fine, 3, 2)]


def test_maps_that_lost_their_borders_are_centred():
    """A ramp's value is its place: within half a voxel of the map it is where the regular grid has it."""
    built = WrappedEncoder(1, Ramped(), probe(Ramped(), 1))
    assert built.maps == (Map(1, 2, 2), Map(1, 4, 2))
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    for stride, feature in zip((2, 4), built(ramp), strict=True):
        places = torch.arange(64 // stride) * stride + (stride - 1) / 2
        inner = slice(2, -2)
        assert (feature[0, 0, 0] - places)[inner].abs().max() <= stride / 2


@pytest.mark.parametrize(
    "name", ["timm.efficientnet_lite0", "torchvision.googlenet", "smp.efficientnet-b0", "smp.mit_b0", "smp.vgg11"]
)
def test_depth_keeps_the_first_maps_and_the_layers_they_need(name: str):
    with torch.device("meta"):
        whole = encoder(name)
    part = encoder(name, depth=2)
    assert part.channels == whole.channels[:2]
    assert part.strides == whole.strides[:2]
    assert has_true_shapes(part, (65, 70))
    sum(feature.sum() for feature in part(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters())
    count = len(whole.channels)
    with pytest.raises(ValueError, match=f"depth must be 1 to the {count} maps there are, got {count + 1}"):
        encoder(name, depth=count + 1)


def test_options_reach_the_constructor():
    with torch.device("meta"):
        dilated = encoder("smp.resnet18", options={"output_stride": 16})
        assert [stride[0] for stride in dilated.strides] == [2, 4, 8, 16, 16]
        dilated = encoder("timm.resnet18", options={"output_stride": 8})
        assert [stride[0] for stride in dilated.strides] == [2, 4, 8, 8, 8]
    with pytest.raises(ValueError, match=r"options of smp.resnet18 must be among output_stride, got stride"):
        encoder("smp.resnet18", options={"stride": 16})
    with pytest.raises(ValueError, match=r"timm cannot build resnet18.*colour"):
        encoder("timm.resnet18", options={"colour": 1})
    with pytest.raises(ValueError, match=r"options of torchvision.resnet18.*colour"):
        encoder("torchvision.resnet18", options={"colour": 1})


def test_no_option_loads_weights_or_runs_what_it_names():
    taken = ("pretrained", "checkpoint_path", "weights", "features_only", "cache_dir", "pretrained_filter_fn")
    for source in BUILDERS:
        for option in taken if source != "smp" else ("weights", "pretrained"):
            with pytest.raises(ValueError, match=f"options may not hold what the adapter sets itself, got {option}"):
                encoder(f"{source}.resnet18", options={option: "os.system"})
    for option in ("act_layer", "norm_layer", "block"):
        with pytest.raises(ValueError, match=r"timm cannot build resnet18 as an encoder.*(os\.system|str)"):
            encoder("timm.resnet18", options={option: "os.system"})
    with pytest.raises(ValueError, match="str"):
        encoder("torchvision.resnet18", options={"norm_layer": "os.system"})


def test_names_that_cannot_be():
    with pytest.raises(ValueError, match="nearest: convnext_atto"):
        encoder("timm.convnext_attoo")
    with pytest.raises(ValueError, match="nearest: densenet121"):
        encoder("torchvision.densenet12")
    with pytest.raises(ValueError, match="maps all have one stride"):
        encoder("timm.vit_base_patch16_224")
    with pytest.raises(ValueError, match="images of one size only"):
        encoder("timm.coatnet_0_224")
    for source, build in BUILDERS.items():
        with pytest.raises(ValueError, match=rf"dims must be 2 for {source}.resnet18, got 3"):
            build("resnet18", 3, 1)


def test_names_list_what_can_be_built():
    assert len(timm.names()) > 700
    assert not [name for name in timm.names() if name.startswith(("vit_", "deit", "coatnet"))]
    assert {"alexnet", "googlenet", "inception_v3", "mnasnet1_0"} <= set(torchvision.names())
    assert "resnet18" in smp.names()


def test_fixed_windows_take_multiples_of_the_size_they_were_trained_on():
    with torch.device("meta"):
        built = encoder("timm.maxvit_rmlp_pico_rw_256").eval()
    assert built.multiple == 256
    assert has_true_shapes(built, (65, 300), "meta")


def test_an_encoder_that_pads_exports_for_any_size():
    built = encoder("torchvision.squeezenet1_0", 1).eval()
    free = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC) | {0: torch.export.Dim.AUTO}
    program = torch.export.export(built, (torch.randn(2, 1, 65, 70),), dynamic_shapes=(free,), strict=False)
    other = torch.randn(2, 1, 97, 40)
    for ours, exported in zip(built(other), program.module()(other), strict=True):
        assert torch.equal(ours, exported)


def test_a_dry_run_leaves_the_weights_alone():
    shared = nn.Linear(3, 3)
    network = nn.ModuleDict({"first": shared, "second": shared})
    network.forward = lambda x: network["second"](network["first"](x))
    before = shared.weight.clone()
    assert dry_run(network, lambda: torch.empty(2, 3)).device.type == "meta"
    assert torch.equal(shared.weight, before)


def test_torchvision_sources_are_its_own_metadata():
    for name in ("resnet50", "densenet161", "mnasnet0_5", "googlenet", "inception_v3", "swin_t"):
        for entry in imports.torchvision().models.get_model_weights(name):
            source = torchvision.weights_of(name, entry.name)
            assert source.url == entry.url
            assert source.sha256 is not None
            assert source.sha256 in source.file
            own = tuple(entry.transforms().mean), tuple(entry.transforms().std)
            assert (source.mean, source.std) == (HALF if name in ("googlenet", "inception_v3") else own)
    assert torchvision.weights_of("resnet50").name == "torchvision.resnet50.IMAGENET1K_V2"
    with pytest.raises(
        ValueError, match=r"weights of torchvision.resnet50 must be one of IMAGENET1K_V1, IMAGENET1K_V2"
    ):
        torchvision.weights_of("resnet50", "IMAGENET1K")


def test_torchvisions_inceptions_see_images_from_minus_one_to_one():
    """Their published weights come with a change of normalisation inside the network, which an encoder leaves out."""
    whole = imports.torchvision().models.googlenet(weights=None, aux_logits=False, init_weights=False)
    whole.transform_input = True
    image = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in IMAGENET)
    assert torch.allclose(whole._transform_input((image - mean) / std), (image - 0.5) / 0.5, atol=1e-6)


def test_timm_and_smp_sources():
    source = timm.weights_of("convnext_atto")
    assert source.url == "https://huggingface.co/timm/convnext_atto.d2_in1k/resolve/main/model.safetensors"
    assert (source.mean, source.std) == IMAGENET
    assert timm.weights_of("xception41").mean == HALF[0]
    with pytest.raises(ValueError, match=r"weights of timm.convnext_atto must be one of d2_in1k, got 'x'"):
        timm.weights_of("convnext_atto", "x")
    source = smp.weights_of("resnet18", "ssl")
    assert source.url.startswith("https://huggingface.co/smp-hub/resnet18.ssl/resolve/d600d511")
    assert (source.mean, source.std) == IMAGENET
    assert smp.weights_of("efficientnet-b0", "advprop").mean == HALF[0]
    assert len({smp.weights_of(name).file for name in smp.names()}) == len(smp.names())


def test_a_source_checks_itself():
    with pytest.raises(ValueError, match="sha256"):
        Source("a", "u", "f", "XYZ", *IMAGENET)
    with pytest.raises(ValueError, match="input_range must be 1 or 255, got 2"):
        Source("a", "u", "f", None, *IMAGENET, 2)
