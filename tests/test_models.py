"""Networks: counts from the papers, any size in and the same size out, and layers that equal their definitions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import densepred.models
from densepred.models.blocks import Style
from densepred.models.build import DensePredictor, create_model
from densepred.models.decoders.unet import UNetDecoder
from densepred.models.encoders.base import Encoder
from densepred.models.encoders.plain import PlainEncoder
from densepred.models.encoders.resnet import ResNetEncoder
from densepred.models.layers import conv, fit, max_pool, to_tuple
from densepred.models.norms import NORMS, BatchNorm, InstanceNorm
from densepred.registry import lookup

SIZES = [(65, 70), (7, 7), (1, 1), (2, 3), (33, 30, 37), (7, 7, 7), (1, 1, 1), (2, 3, 1)]
SMALL = (4, 6, 8)
FORMATS = [torch.contiguous_format, torch.channels_last_3d]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(encoder: str, dims: int, in_channels: int, deep_supervision: int = 0) -> DensePredictor:
    """The named encoder at small width with the U-Net decoder."""
    style = Style("batch", "relu")
    body: Encoder = (
        PlainEncoder(dims, in_channels, SMALL)
        if encoder == "plain"
        else ResNetEncoder(dims, in_channels, encoder, 4, style=style)
    )
    decoder = UNetDecoder(dims, body.channels, body.strides, convs_per_stage=1, style=body.style)
    return DensePredictor(body, decoder, dims, in_channels, 3, deep_supervision)


def test_resnet_parameter_names_are_torchvisions() -> None:
    with torch.device("meta"):
        names = set(ResNetEncoder(2, 3, "resnet50").state_dict())
    expected = {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"}
    assert expected | {"layer3.5.conv3.weight", "layer4.2.bn3.num_batches_tracked"} <= names
    assert not {name for name in names if re.fullmatch(r"(conv|.*\.conv)\d\.bias", name)}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("encoder", ["plain", "resnet18", "resnet50"])
def test_any_size_comes_back_at_its_own_size(encoder: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = (1, 2, 3, 4, 12)[SIZES.index(size) % 5]
    model = small(encoder, len(size), channels)
    x = torch.randn(1, channels, *size, requires_grad=True)
    out = model(x)
    assert out.shape == (1, 3, *size)
    out.square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("planes", [5, 7])
def test_the_gradient_of_a_wide_kernel_on_few_planes_is_exact(planes: int) -> None:
    torch.manual_seed(0)
    layer = conv(3, 3, 8, 7, 2)
    x = torch.randn(1, 3, planes, 9, 9).contiguous(memory_format=torch.channels_last_3d)
    weight = layer.weight.detach().double().requires_grad_()
    exact = nn.functional.conv3d(x.double(), weight, layer.bias.detach().double(), 2, 3)
    exact.square().sum().backward()
    found = layer(x)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    for _ in range(20):  # what is not written would be what was there before
        layer.weight.grad = None
        for count in (100, 500, 2000, 4116, 8232, 65536) * 9:
            torch.full((count,), torch.nan)
        layer(x).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad.double(), weight.grad, atol=1e-3, rtol=1e-4)


def test_strides_and_kernels_per_axis() -> None:
    options = {"strides": (1, (1, 2, 2), 2), "kernels": ((1, 3, 3), (1, 3, 3), 3)}
    model = create_model(channels=SMALL, **options)
    assert model.encoder.strides == ((1, 1, 1), (1, 2, 2), (2, 4, 4))
    shapes = [tuple(w.shape[2:]) for name, w in model.named_parameters() if name.endswith("conv.weight")]
    assert shapes == [(1, 3, 3)] * 4 + [(3, 3, 3)] * 2 + [(1, 3, 3)] * 4 + [(1, 1, 1)]
    assert model(torch.zeros(1, 1, 5, 9, 11)).shape == (1, 3, 5, 9, 11)


def test_one_stage_needs_no_way_up() -> None:
    encoder = PlainEncoder(2, 1, (4,))
    decoder = UNetDecoder(2, encoder.channels, encoder.strides)
    assert DensePredictor(encoder, decoder, 2, 1, 2)(torch.zeros(1, 1, 5, 6)).shape == (1, 2, 5, 6)


def test_deep_supervision_gives_named_outputs_in_training_and_evaluation() -> None:
    model = create_model(channels=(4, 6, 8, 10), deep_supervision=2)
    for training in (True, False):
        outputs = model.train(training)(torch.zeros(2, 1, 9, 10, 11))
        shapes = {name: tuple(out.shape) for name, out in outputs.items()}
        assert shapes == {
            "segmentation": (2, 3, 9, 10, 11),
            "segmentation@2": (2, 3, 5, 5, 6),
            "segmentation@4": (2, 3, 3, 3, 3),
        }


def test_deep_supervision_needs_maps_to_supervise() -> None:
    with pytest.raises(ValueError, match="deep_supervision: at most 1 coarser decoder stages exist"):
        create_model(channels=SMALL, deep_supervision=2)
    with pytest.raises(ValueError, match="different largest strides"):
        create_model(channels=(4, 6, 8, 8), strides=(1, (2, 1, 1), (1, 2, 2), 2), deep_supervision=2)


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = create_model(channels=SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    second, third = create_model(channels=SMALL, seed=5).state_dict(), create_model(channels=SMALL, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.stages.0.0.conv.weight"], third["encoder.stages.0.0.conv.weight"])
    torch.manual_seed(1)
    fourth = create_model(channels=SMALL).state_dict()
    torch.manual_seed(1)
    assert all(torch.equal(fourth[name], w) for name, w in create_model(channels=SMALL).state_dict().items())


def test_weights_have_the_spread_of_he_et_al() -> None:
    model = create_model(channels=(32, 64), seed=0)
    weight = model.encoder.stages[1][1].conv.weight  # 64 channels x 27 voxels feed each output
    assert float(weight.detach().std()) == pytest.approx((2 / (1 + 0.01**2) / (64 * 27)) ** 0.5, rel=0.01)
    assert not model.heads["segmentation"].conv.bias.any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_instance_norm_equals_torchs_with_its_gradients(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    ours, theirs = InstanceNorm(5), nn.InstanceNorm3d(5, affine=True)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.uniform_(0.5, 1.5))
        theirs.bias.copy_(ours.bias.normal_())
    image = torch.randn(2, 5, 6, 7, 8) * 3 + 1
    target = torch.randn_like(image)
    results = []
    for layer in (ours, theirs):
        x = image.clone(memory_format=memory_format).requires_grad_()
        out = layer(x)
        (out * target).sum().backward()
        results.append((out, x.grad, layer.weight.grad, layer.bias.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours(image.clone(memory_format=memory_format)), results[1][0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_instance_norm_of_bfloat16_is_exact_to_rounding(memory_format: torch.memory_format, grad: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 40, 40, 40) * 3 + 3).bfloat16().to(memory_format=memory_format).requires_grad_(grad)
    exact = nn.functional.instance_norm(x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        out = InstanceNorm(8)(x)
    assert out.dtype == torch.bfloat16
    rounding = (exact.bfloat16().double() - exact).abs()
    statistics = 1e-4 * float(exact.abs().max())  # the bound the docstring states
    assert float((out.detach().double() - exact).abs().max()) <= float(rounding.max()) + statistics
    assert float((out.detach().double() - exact).abs().mean()) <= 1.01 * float(rounding.mean())


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_instance_norm_of_float32_bears_a_large_offset(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 40, 40, 40) + 30
    out = InstanceNorm(4)(x.to(memory_format=memory_format))
    exact = nn.functional.instance_norm(x.double())
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["instance", "group"])
def test_a_single_voxel_is_normalised_to_the_bias(name: str) -> None:
    layer = NORMS[name](8)
    layer.bias.data.normal_()
    x = torch.randn(1, 8, 1, 1, 1)
    torch.testing.assert_close(layer(x), layer.bias.reshape(1, 8, 1, 1, 1), atol=1e-4, rtol=1e-4)


def test_batch_norm_equals_torchs_and_takes_a_single_voxel() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(4), nn.BatchNorm3d(4)
    x = torch.randn(2, 4, 3, 4, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    before = ours.running_mean.clone()
    voxel = torch.randn(1, 4, 1, 1, 1)
    assert torch.equal(ours(voxel), theirs.eval()(voxel))
    assert torch.equal(ours.running_mean, before)


@pytest.mark.parametrize("encoder", ["plain", "resnet18"])
@pytest.mark.parametrize("dims", [2, 3])
def test_memory_format_does_not_change_the_result(encoder: str, dims: int) -> None:
    torch.manual_seed(0)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    model = small(encoder, dims, 2).eval()
    x = torch.randn(2, 2, *(13, 14, 15)[:dims])
    expected = model(x)
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    out = model.to(memory_format=last)(x.to(memory_format=last))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    out.square().mean().backward()
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-4, rtol=1e-3)


def test_dropout_acts_in_training_only() -> None:
    model = create_model(channels=SMALL, dropout=0.5)
    x = torch.randn(1, 1, 8, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_models_export_with_free_batch_and_spatial_sizes(dims: int) -> None:
    model = create_model(dims=dims, channels=SMALL).eval()
    free = dict.fromkeys(range(2, dims + 2), torch.export.Dim.DYNAMIC) | {0: torch.export.Dim.AUTO}
    x = torch.randn(2, 1, *(33, 30, 37)[:dims])
    program = torch.export.export(model, (x,), dynamic_shapes={"x": free}).module()
    for size in ((12, 13, 14), (40, 40, 40), (9, 31, 5)):
        x = torch.randn(1, 1, *size[:dims])
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_the_decoder_makes_up_for_encoders_that_round_down() -> None:
    features = [torch.randn(1, 4, 7, 5), torch.randn(1, 8, 3, 2)]  # twice 3 and 2 fall short of 7 and 5
    assert UNetDecoder(2, (4, 8), ((1, 1), (2, 2)))(features, (7, 5))[0].shape == (1, 4, 7, 5)
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert fit(row, (2, 5)).tolist() == [[[[1, 2, 3, 3, 3], [1, 2, 3, 3, 3]]]]
    assert fit(row, (1, 2)).tolist() == [[[[1, 2]]]]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (7, 2), (1, 2), (5, 3)])
def test_layers_round_sizes_up(dims: int, kernel: int, stride: int) -> None:
    for n in range(1, 9):
        x = torch.zeros(1, 1, *(n,) * dims)
        layers: list[nn.Module] = [conv(dims, 1, 1, kernel, stride), max_pool(dims, stride, stride)]
        layers += [max_pool(dims, kernel, stride)] if kernel > stride else []
        for layer in layers:
            out: Tensor = layer(x)
            assert out.shape[2:] == (-(-n // stride),) * dims


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 8, 8), r"model expects 4 channels, input \(1, 3, 8, 8, 8\) has 3"),
        ((4, 8, 8, 8), r"model expects 5 axes \(batch, channels, z, y, x\), input \(4, 8, 8, 8\) has 4"),
    ],
)
def test_wrong_inputs_are_answered_with_the_arithmetic(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(in_channels=4, channels=SMALL)(torch.zeros(shape))


def test_wrong_options_name_what_is_allowed_and_what_came() -> None:
    with pytest.raises(
        ValueError, match=r"encoder: there is no 'resnet43' \(did you mean 'resnet34'\?\); known: plain"
    ):
        create_model("resnet43")
    with pytest.raises(
        ValueError, match=r"decoder: there is no 'net' \(did you mean 'unet'\?\); known: unet, unetplusplus"
    ):
        create_model(decoder="net")
    with pytest.raises(ValueError, match=r"activation: there is no 'leakyrelu' \(did you mean 'leaky_relu'\?\)"):
        create_model(activation="leakyrelu")
    with pytest.raises(ValueError, match=r"strides: 2 stages, but model\.channels has 3"):
        create_model(channels=SMALL, strides=(1, 2))
    with pytest.raises(ValueError, match=r"kernels: kernels are odd, so that the grid stays where it is, got \[4\]"):
        create_model(channels=SMALL, kernels=(3, 4, 3))
    with pytest.raises(
        ValueError, match="strides: no option of resnet18 with unet; it belongs to plain, residual, nnunet"
    ):
        create_model("resnet18", strides=(1, 2, 2))
    with pytest.raises(ValueError, match="kernel must be a positive int or 2 of them, got"):
        to_tuple((3, 3, 3), 2, "kernel")
    with pytest.raises(ValueError, match="dims must be 2 or 3, got 4"):
        to_tuple(1, 4, "stride")
    with pytest.raises(ValueError, match=r"variant must be one of resnet18, .*, got 'resnet20'"):
        ResNetEncoder(2, 3, "resnet20")
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1"):
        Style(dropout=1)
    with pytest.raises(ValueError, match="strides must be multiples of the finer map's"):
        UNetDecoder(2, (4, 8), ((2, 2), (3, 4)))
    with pytest.raises(ValueError, match="classes must be an int of at least 1, got 0"):
        create_model(classes=0, channels=SMALL)
    with pytest.raises(ValueError, match=r"pool must be 'stride' or 'max', got 'mean'"):
        PlainEncoder(2, 1, SMALL, pool="mean")  # type: ignore[arg-type]


def test_lookup_guesses_only_what_is_near() -> None:
    assert lookup({"one": 1}, "one", "number") == 1
    with pytest.raises(ValueError, match=r"^number must be one of one, got 'zzz'$"):
        lookup({"one": 1}, "zzz", "number")


def test_one_module_alone_names_the_layers_of_a_dimension() -> None:
    folder = Path(densepred.models.__file__).parent
    pattern = re.compile(r"nn\.\w*(Conv|Pool|Norm|Dropout)\w*[23]d")
    examples = re.compile(r"^ *>>> .*$", re.MULTILINE)
    named = {f.name for f in folder.rglob("*.py") if pattern.search(examples.sub("", f.read_text()))}
    assert named == {"layers.py"}
