"""From names and options to networks: what goes together, what does not, and where weights start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densepred.errors import InputError, NetworkError
from densepred.models import catalog
from densepred.models.build import create_model
from densepred.models.heads import Classification, Regression, Scalar, Segmentation

HEADS = {
    "segmentation": Segmentation(3),
    "speed": Regression(2, unit="km/s", variance=True),
    "stage": Classification(4, covariates=2),
    "mass": Scalar(positive=True),
}


@pytest.mark.parametrize("decoder", ["unet", "fcn16s", "deconvnet", "fpn", "deeplabv3plus"])
def test_several_heads_share_a_trunk(decoder: str) -> None:
    model = create_model("resnet18", decoder, dims=2, heads=HEADS, width=4, seed=0)
    x = torch.randn(2, 1, 40, 33)
    for training in (True, False):
        outputs = model.train(training)(x, covariates=torch.randn(2, 2))
        shapes = {name: tuple(out.shape) for name, out in outputs.items()}
        assert shapes == {
            "segmentation": (2, 3, 40, 33),
            "speed": (2, 4, 40, 33),
            "stage": (2, 4),
            "mass": (2, 1),
        }
    sum(out.square().mean() for out in outputs.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_scores_of_an_fcn_go_to_the_heads_in_order() -> None:
    heads = {"a": Segmentation(2), "b": Regression(1)}
    model = create_model("resnet18", "fcn32s", dims=2, heads=heads, width=4, seed=0).eval()
    x = torch.randn(1, 1, 32, 32)
    maps = model.decoder(model.encoder(x), (32, 32))[0]
    outputs = model(x)
    assert torch.equal(torch.cat([outputs["a"], outputs["b"]], 1), maps)


def test_global_heads_need_no_decoder() -> None:
    model = create_model("resnet18", heads={"stage": Classification(4)}, width=4)
    assert model(torch.zeros(2, 1, 9, 9, 9)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"covariates \(2, 1\) given, but no head takes any"):
        model(torch.zeros(2, 1, 9, 9, 9), torch.zeros(2, 1))


def test_deep_supervision_has_every_dense_head_on_every_map() -> None:
    heads = {"segmentation": Segmentation(3), "speed": Regression()}
    model = create_model(channels=(4, 6, 8, 10), deep_supervision=1, heads=heads, dims=2)
    assert list(model(torch.zeros(1, 1, 9, 9))) == ["segmentation", "speed", "segmentation@2", "speed@2"]


CASES: list[tuple[dict[str, Any], str]] = [
    ({"encoder": "resnet43"}, r"there is no 'resnet43' \(did you mean 'resnet34'\?\)"),
    ({"network": "unet2051"}, r"there is no 'unet2051' \(did you mean 'unet2015'\?\)"),
    ({"network": "unet2015"}, "unet2015 exists in 2D only, model.dims is 3"),
    ({"encoder": "timm.resnet18"}, "timm.resnet18 exists in 2D only, model.dims is 3"),
    ({"encoder": "plain", "width": 8}, "width: no option of plain with unet; it belongs to vgg11"),
    ({"decoder": "fpn", "deep_supervision": 1}, "deep_supervision: no option of plain with fpn; it belongs to unet"),
    (
        {"encoder": "resnet18", "decoder": "deconvnet", "unpooling": "switches"},
        "unpooling='switches' needs 5 poolings to reverse.*the encoder has 0",
    ),
    (
        {"encoder": "resnet18", "decoder_channels": (8, 16)},
        r"decoder_channels must be 5 numbers for unet on resnet18, .*\[32, 64, 64, 128, 256\]\), got \(8, 16\)",
    ),
    ({"encoder": "resnet18", "decoder_channels": 8}, "decoder_channels must be 5 numbers for unet on resnet18"),
    ({"widht": 8}, r"widht: unknown key \(did you mean 'width'\?\)"),
    ({"dims": 4}, "dims: input should be 2 or 3, got 4"),
    ({"strides": (1, 2), "channels": (4, 8), "norm": "bath"}, "norm: .*got 'bath'"),
    ({"encoder": "resnext50_32x4d", "width": 4}, "width must be at least 16"),
    ({"encoder": "vgg11", "norm": "batch"}, "norm must be none for vgg11, got 'batch'; try 'vgg11_bn'"),
    ({"channels": (4, 8), "deep_supervision": 1}, "deep_supervision: at most 0 coarser decoder stages exist"),
    ({"encoder": "resnet18", "decoder": "fpn", "decoder_channels": (8, 8)}, "decoder_channels must be one number"),
]


@pytest.mark.parametrize(("options", "message"), CASES, ids=lambda value: str(value)[:60])
def test_what_does_not_go_together_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        create_model(**options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


def test_pretrained_weights_of_another_width_do_the_arithmetic(tmp_path: Path) -> None:
    path = tmp_path / "wide.pth"
    torch.save(create_model("resnet18", dims=2, in_channels=3).encoder.state_dict(), path)
    with pytest.raises(InputError, match=r"(?s)resnet18 .*\(32, 32, 3, 3\).*\(64, 64, 3, 3\)"):
        create_model("resnet18", dims=2, in_channels=3, width=32, pretrained=str(path))


def test_a_wrong_image_names_the_numbers() -> None:
    model = create_model("vgg11", "fcn8s", dims=2, in_channels=3, width=4)
    with pytest.raises(ValueError, match=r"model expects 3 channels, input \(1, 4, 32, 32\) has 4"):
        model(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"model expects 4 axes \(batch, channels, y, x\), input .* has 5"):
        model(torch.zeros(1, 3, 8, 32, 32))


@pytest.mark.parametrize("encoder", ["plain", "vgg11", "resnet18", "convnext_tiny", "lenet5"])
def test_weights_are_a_function_of_the_seed(encoder: str) -> None:
    options: dict[str, Any] = {"heads": HEADS, "dims": 2}
    first, again, other = (create_model(encoder, seed=seed, **options).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_published_initialisations_stay() -> None:
    convnext = create_model("convnext_tiny", dims=2, width=16).encoder
    weights = [layer.weight.std() for layer in convnext.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert all(0.015 < float(std) < 0.025 for std in weights)  # truncated normal of 0.02 (Liu et al. 2022)
    fcn = create_model("vgg11", "fcn8s", dims=2, in_channels=3, width=4)
    out: Tensor = fcn(torch.randn(1, 3, 65, 70))
    assert out.abs().max() == 0  # score layers start at zero (Long et al. 2015, section 4.3)


def test_a_smooth_start_repeats_voxels() -> None:
    model = create_model(channels=(4, 8), dims=2, smooth_start=True)
    layer = next(m for m in model.modules() if isinstance(m, nn.ConvTranspose2d))
    x = torch.randn(1, 8, 3, 5)
    expected = x[:, [0, 1, 2, 3]].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), expected)


def test_whole_networks_go_by_name() -> None:
    for name, dims in (
        ("unet2015", 2),
        ("unet3d2016", 3),
        ("nnunet", 3),
        ("nnunet_residual", 2),
        ("monai.SegResNet", 3),
    ):
        with torch.device("meta"):
            model = create_model(network=name, dims=dims, in_channels=2, classes=4)
            assert model(torch.empty(1, 2, *(65, 70, 37)[:dims])).shape == (1, 4, *(65, 70, 37)[:dims])


GIVEN: dict[str, Any] = {
    "channels": (8, 16, 24),
    "strides": (1, 1, 2, 2, 2),
    "kernels": (1, 3, 3, 3, 3),
    "convs_per_stage": 3,
    "pool": "max",
    "width": 48,
    "depth": 3,
    "output_stride": 8,
    "stochastic_depth": 0.3,
    "norm": "group",
    "activation": "elu",
    "dropout": 0.25,
    "decoder_convs": 3,
    "upsampling": "interpolate",
    "residual": True,
    "attention": True,
    "fc_channels": 24,
    "deep_supervision": 1,
}
PAIRS = [
    *(
        (encoder, "unet")
        for encoder in ("plain", "residual", "vgg11_bn", "resnet18", "convnextv2_atto", "timm.resnet18")
    ),
    *(("lenet5", decoder) for decoder in catalog.DECODERS),
]
NETWORKS: list[dict[str, Any]] = [
    *({"encoder": encoder, "decoder": decoder} for encoder, decoder in PAIRS),
    *({"network": name} for name in ("nnunet", "nnunet_residual")),
]
FIVE = (32, 64, 128, 256, 320)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(network.values()))
def test_every_option_a_network_takes_changes_it(network: dict[str, Any]) -> None:
    entries = [catalog.find(kind, name) for kind, name in network.items()]
    taken = frozenset[str]().union(*(entry.options for entry in entries if entry is not None))
    stages = {"channels": FIVE} if "network" in network else {}  # as many as the strides and kernels above
    with torch.device("meta"):
        usual = repr(create_model(dims=2, **network, **stages))
        changed = {
            name: repr(create_model(dims=2, **{**network, **stages, name: GIVEN[name]}))
            for name in taken & GIVEN.keys()
        }
    assert changed
    assert [name for name, text in changed.items() if text == usual] == []


def test_a_finest_stage_with_a_stride_has_one_more_map_to_supervise() -> None:
    model = create_model(channels=(4, 8, 8), strides=(2, 2, 2), dims=2, deep_supervision=2)
    assert list(model(torch.zeros(1, 1, 16, 16))) == ["segmentation", "segmentation@2", "segmentation@4"]


@pytest.mark.parametrize("decoder", ["deconvnet", "fcn32s", "deeplabv3plus"])
def test_layers_that_see_a_single_voxel_have_no_instance_norm(decoder: str) -> None:
    """It would be constant there, with gradients of 1e8 and more."""
    model = create_model("vgg11_bn", decoder, dims=2, width=8, norm="instance", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    model(torch.randn(2, 1, 64, 64, generator=generator)).square().mean().backward()
    assert all(float(p.grad.norm()) < 1e4 for p in model.parameters() if p.grad is not None)


def test_options_of_other_libraries_may_be_lists_of_lists() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    options = {"kernel_size": [3, 3, 3], "strides": strides, "upsample_kernel_size": strides[1:], "filters": [4, 6, 8]}
    model = create_model(network="monai.DynUNet", classes=2, options=options)
    assert model(torch.zeros(1, 1, 6, 9, 10)).shape == (1, 2, 6, 9, 10)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("encoder", "fine"), [("convnext_tiny", (4, 6)), ("resnet18", (4,)), ("timm.resnet18", (4,))])
@pytest.mark.parametrize("decoder", ["unet", "unetplusplus"])
def test_fine_stages_see_what_a_stem_passes_over(encoder: str, fine: tuple[int, ...], decoder: str, dims: int) -> None:
    if dims == 3 and "." in encoder:
        pytest.skip("timm's are in 2D")
    options: dict[str, Any] = {} if "." in encoder else {"width": 8, "depth": 2}
    model = create_model(encoder, decoder, dims=dims, classes=2, fine_channels=fine, seed=0, **options).eval()
    assert model.fine is not None
    assert [max(stride) for stride in model.fine.strides] == [1, 2][: len(fine)]
    assert model.decoder.channels[: len(fine)] == fine
    image = torch.randn(1, 1, *(37, 33, 40)[:dims], generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = model(image)
    assert out.shape[2:] == image.shape[2:]
    middle = tuple(size // 2 for size in image.shape[2:])
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.zero_()
    model(image)[(0, 1, *middle)].backward()
    assert image.grad.count_nonzero() > 0  # by the fine stages alone


def test_fine_stages_go_with_kernels_of_the_encoder() -> None:
    given = {"channels": (4, 8), "strides": (2, 2), "kernels": (5, 5), "fine_channels": (3,)}
    model = create_model("plain", "unet", dims=2, seed=0, **given)
    kernels = [step.blocks[0].conv.kernel_size for step in model.decoder.steps]
    assert kernels == [(5, 5), (3, 3)]
    assert model(torch.zeros(1, 1, 9, 10)).shape[2:] == (9, 10)


def test_fine_stages_are_no_part_of_the_encoder() -> None:
    plain, fine = (create_model("resnet18", dims=2, width=8, fine_channels=given, seed=0) for given in (None, (4,)))
    assert plain.encoder.state_dict().keys() == fine.encoder.state_dict().keys()
    assert {name.split(".")[0] for name in fine.state_dict()} == {"encoder", "fine", "decoder", "heads"}
    for options, message in (
        ({"encoder": "resnet18", "fine_channels": (4, 8)}, "fine_channels must be 1 numbers, one for each grid finer"),
        ({"encoder": "plain", "fine_channels": (4,)}, "fine_channels must be left out on plain"),
        ({"encoder": "resnet18", "decoder": "fpn", "fine_channels": (4,)}, "fine_channels"),
    ):
        with pytest.raises(NetworkError, match=message):
            create_model(dims=2, **options)
