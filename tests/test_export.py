"""Networks leave as programs: torch.export's and ONNX's, of free batch and spatial sizes, with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from densepred.errors import InputError
from densepred.export import export, to_program
from densepred.models import catalog
from densepred.models.build import create_model
from densepred.models.dense import Model
from densepred.models.heads import Regression, Scalar, Segmentation

TRACED = {2: (65, 70), 3: (65, 70, 66)}
OTHERS = {2: [(1, (64, 96)), (3, (77, 66))], 3: [(1, (64, 64, 64)), (3, (67, 80, 71))]}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"channels": (4, 6, 8)},
    "residual": {"channels": (4, 6, 8), "convs_per_stage": 1},
    "vgg11_bn": {"width": 4},
    "resnet18": {"width": 4},
    "timm.resnet18": {"depth": 3},
    "torchvision.squeezenet1_1": {"depth": 2},
    "smp.resnet18": {},
    "resnext50_32x4d": {"width": 16, "depth": 2},  # ResNet-50's blocks, in groups
    "se_resnet18": {"width": 4, "depth": 3},
    "convnext_tiny": {"width": 4, "depth": 1},
    "convnextv2_tiny": {"width": 4, "depth": 2},
    "lenet5": {},
}
"""One encoder of each body; fewer maps where more would only repeat the same blocks."""
PAIRS = [(encoder, "unet") for encoder in BODIES if encoder != "resnet18" and "." not in encoder]
PAIRS += [("resnet18", decoder) for decoder in catalog.DECODERS if decoder not in ("unet", "fcn8s")]
PAIRS += [("vgg11_bn", "deconvnet"), ("vgg11_bn", "fcn8s")]


LIBRARIES = [
    *((encoder, "unet") for encoder in ("timm.resnet18", "torchvision.squeezenet1_1")),
    *(("smp.resnet18", decoder) for decoder in ("smp.Unet", "smp.FPN")),
]
NETWORKS: dict[str, dict[str, Any]] = {
    "nnunet_residual": {"channels": (4, 6, 8)},
    "monai.SegResNet": {"options": {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}},
}


def model_of(encoder: str, decoder: str, dims: int) -> Model:
    """With weights and running statistics such that outputs are neither tiny nor huge."""
    options = BODIES[encoder]
    if encoder in ("vgg11_bn", "resnet18", "smp.resnet18") and not decoder.startswith(("fcn", "smp.FPN")):
        options = {"depth": 3 if dims == 2 else 2} | options  # the others need the maps of all strides
    return stirred(create_model(encoder, decoder, dims, 2, 3, seed=0, **options))


def stirred(model: Model) -> Model:
    dims = model.dims
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(2, 2, *TRACED[dims], generator=generator))
        for name, parameter in model.named_parameters():
            if "score" in name:  # zero to begin with
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model.eval()


def agrees(found: np.ndarray, expected: torch.Tensor) -> None:
    scale = max(float(expected.abs().max()), 1.0)
    np.testing.assert_allclose(found / scale, expected.numpy() / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_onnx_runtime_agrees_at_other_sizes(encoder: str, decoder: str, tmp_path: Path) -> None:
    check_onnx(model_of(encoder, decoder, 2), 2, tmp_path)


@pytest.mark.parametrize(("encoder", "decoder"), [("plain", "unet"), ("vgg11_bn", "deconvnet")])
def test_onnx_runtime_agrees_in_3d(encoder: str, decoder: str, tmp_path: Path) -> None:
    check_onnx(model_of(encoder, decoder, 3), 3, tmp_path)


@pytest.mark.parametrize(("encoder", "decoder"), LIBRARIES)
def test_onnx_runtime_agrees_for_networks_of_libraries(encoder: str, decoder: str, tmp_path: Path) -> None:
    """They are fed whole multiples of their stride: the sizes in between are cut out again."""
    check_onnx(model_of(encoder, decoder, 2), 2, tmp_path)


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_runtime_agrees_for_whole_networks(network: str, tmp_path: Path) -> None:
    model = create_model(network=network, dims=2, in_channels=2, seed=0, **NETWORKS[network])
    check_onnx(stirred(model), 2, tmp_path)


def test_onnx_outputs_bear_the_heads_names(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    heads = {"mask": Segmentation(3), "age": Scalar(covariates=2), "depth": Regression(positive=True)}
    model = create_model("plain", "unet", 2, 2, heads=heads, seed=0, channels=(4, 6, 8), deep_supervision=1).eval()
    path = export(model, tmp_path / "model.onnx", TRACED[2])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["mask", "depth", "mask@2", "depth@2", "age"]
    x, covariates = torch.randn(3, 2, 77, 66), torch.randn(3, 2)
    found = session.run(None, {"x": x.numpy(), "covariates": covariates.numpy()})
    with torch.no_grad():
        expected = model(x, covariates)
    for name, output in zip(names, found, strict=True):
        agrees(output, expected[name])


def check_onnx(model: Model, dims: int, folder: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    path = export(model, folder / "model.onnx", TRACED[dims])
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)  # unpooling follows the places of maxima: near ties go either way
    for batch, size in OTHERS[dims]:
        x = torch.randn(batch, 2, *size, generator=generator)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x)
        assert isinstance(expected, torch.Tensor)
        agrees(found, expected)


@pytest.mark.parametrize("encoder", ["residual", "vgg11_bn", "se_resnet18", "convnext_tiny"])
def test_programs_agree_in_3d(encoder: str, tmp_path: Path) -> None:
    model = model_of(encoder, "unet", 3)
    program = torch.export.load(export(model, tmp_path / "model.pt2", TRACED[3])).module()
    batch, size = OTHERS[3][1]
    x = torch.randn(batch, 2, *size)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)


def test_other_requests_are_refused(tmp_path: Path) -> None:
    model: Any = create_model(dims=2, channels=(4, 8))
    with pytest.raises(InputError, match=r"cannot export to \.h5"):
        export(model, tmp_path / "model.h5", (32, 32))
    with pytest.raises(ValueError, match=r"size must be 2 numbers, got \(32, 32, 32\)"):
        to_program(model, (32, 32, 32))
    assert model.training
    assert not list(tmp_path.iterdir())
