"""What a CUDA device would refuse or do otherwise, as far as a machine without one can tell; see `tests.fake_cuda`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.augment.volume import Augmenter
from densepred.cases.regrid import kernels_for
from densepred.config import AugmentConfig, LossConfig, OptimizerConfig
from densepred.config.transforms import TRANSFORMS
from densepred.device import pick_precision
from densepred.inference.predictor import load
from densepred.inference.resample import Resampled
from densepred.losses import SegmentationLoss
from densepred.models import norms
from densepred.models.build import create_model
from densepred.models.forms import in_layout, is_channels_last, set_form
from densepred.models.layers import Size, max_pool, upsample
from densepred.training.engine import Engine
from densepred.training.learner import Learner
from densepred.training.loop import resume, train
from densepred.training.optim import MovingAverage, make_optimizer
from densepred.training.trainer import Trainer
from tests.fake_cuda import CUDA, FakeCuda, pretended
from tests.tasks_set import DEPTH, LABELS, RADIUS, REGIONS, TONE, WITH_TABLE, recipe, write_set
from tests.untrained_runs import noise, run_of

EVERY = dict.fromkeys(("dice", "cross_entropy", "tversky", "lovasz", "boundary", "hausdorff", "cldice"), 1)
JOINT = LABELS | REGIONS | WITH_TABLE | {"targets": DEPTH | TONE | RADIUS}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with pretended(monkeypatch) as mode:
        yield mode


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("tasks") / "set", count=4)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def there(x: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    return x.to(CUDA, non_blocking=True)


def slope(x: Tensor, out: Tensor) -> Tensor:
    """The gradient of a sum with uneven weights."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights.to(out.device)).sum().backward()
    assert x.grad is not None
    return x.grad.cpu()


def test_the_device_is_as_strict_as_a_real_one(cuda: FakeCuda):
    x, y = torch.zeros(2, 3, device="cuda"), torch.zeros(2, 3)
    for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x.index_select(0, torch.tensor([1])), x.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    assert (x[0] + 1).device == CUDA == x.double().device
    assert y.to(x).is_cuda
    assert not x.cpu().is_cuda
    assert not cuda.waits[:-2]
    bool((x > 0).all())
    x[x > 0] = 1
    assert [wait.split(" ", 1)[1] for wait in cuda.waits] == [
        "copy from cpu to cuda",
        "copy from cuda to cpu",
        "__bool__",
        "__setitem__ by a mask",
    ]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"dummy_2d", "albumentations"}))
def test_augmentation_is_that_of_the_cpu_and_waits_for_nothing(cuda: FakeCuda, name: str, dims: int):
    image = drawn(3, 2, *(8, 10, 12)[-dims:])
    label, maps = (image[:, 0] > 0).long(), image[:, :1].clone()
    entry: dict[str, Any] = {name: [0, 1] if name == "flip" else {"probability": 1}}
    augment = Augmenter(AugmentConfig.model_validate([entry]), 2, (2.0, 1.0, 1.0)[-dims:], flags=[1])
    for truth in (label, maps):
        wanted = augment(image, truth, [1, 2, 3])
        cuda.waits.clear()
        found = augment(there(image), there(truth), [1, 2, 3])
        assert not cuda.waits
        for one, other in zip(found, wanted, strict=True):
            assert one.device == CUDA
            torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("encoder", "decoder", "options"),
    [
        ("plain", "unet", {"channels": (4, 8), "upsampling": "interpolate", "attention": True}),
        ("plain", "unet", {"channels": (4, 8), "pool": "max", "norm": "batch", "dropout": 0.1}),
        ("residual", "unetplusplus", {"channels": (4, 8, 8), "deep_supervision": 1}),
        ("resnet18", "deeplabv3plus", {"width": 4, "decoder_channels": 4, "stochastic_depth": 0.2}),
        ("convnextv2_atto", "fpn", {"width": 4, "decoder_channels": 4}),
        ("vgg11_bn", "deconvnet", {"width": 2}),
        ("vgg11", "fcn8s", {"width": 2}),
    ],
)
def test_networks_train_there_without_waiting(cuda: FakeCuda, encoder: str, decoder: str, options: dict, dims: int):
    model = create_model(encoder, decoder, dims=dims, in_channels=2, seed=0, **options)
    set_form(model.to(CUDA), "auto", CUDA)
    cuda.waits.clear()
    last = is_channels_last(model, "auto", CUDA)
    out = model(in_layout(there(drawn(2, 2, *(17, 18, 33)[-dims:])), last))
    outputs = list(out.values()) if isinstance(out, dict) else [out]
    assert all(output.device == CUDA for output in outputs)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all().cpu() for p in model.parameters() if p.requires_grad)
    assert not [wait for wait in cuda.waits if wait.startswith("models")]


@pytest.mark.parametrize("dims", [2, 3])
def test_interpolation_has_the_gradient_of_torchs(cuda: FakeCuda, dims: int):
    """There it is our own, as torch's differs from run to run."""
    for size in ((9, 8, 15), (10, 12, 14), (3, 4, 5)):
        x = drawn(2, 3, *(5, 4, 7)[-dims:]).double().requires_grad_()
        other = x.detach().to(CUDA).requires_grad_()
        wanted, found = upsample(x, size[-dims:]), upsample(other, size[-dims:])
        assert type(found.grad_fn).__name__ == "_InterpolationBackward"
        assert torch.equal(found.cpu(), wanted)
        torch.testing.assert_close(slope(other, found), slope(x, wanted))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), ((1, 3, 3), (1, 2, 2)), ((2, 3, 3), 2), ((3, 5, 1), (2, 2, 1))])
def test_pooling_of_volumes_takes_the_same_voxels(cuda: FakeCuda, kernel: Size, stride: Size):
    x = drawn(2, 3, 9, 10, 11).round().requires_grad_()  # with many alike
    other = x.detach().to(CUDA).requires_grad_()
    pool = max_pool(3, kernel, stride)
    wanted, found = pool(x), pool(other)
    assert ["MaxPool3D" in out.grad_fn.name() for out in (wanted, found)] == [True, False]
    assert torch.equal(found.cpu(), wanted)
    torch.testing.assert_close(slope(other, found), slope(x, wanted))


def test_norms_in_half_precision_keep_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    """On GPUs autocast has float32 versions of what they call."""
    plain_norm, plain_sums, called = torch.group_norm, norms.normalized_by_sums, []
    monkeypatch.setattr(torch, "group_norm", lambda x, groups, *rest: plain_norm(x.float(), groups, *rest))

    def by_sums(*arguments: Any) -> Tensor:
        called.append(torch.is_autocast_enabled("cpu"))
        return plain_sums(*arguments)

    monkeypatch.setattr(norms, "normalized_by_sums", by_sums)
    norm, x = norms.InstanceNorm(3).to(CUDA), there(drawn(2, 3, 5, 6).bfloat16())
    with torch.autocast("cuda", torch.bfloat16):
        learning = norm(x)
        with torch.no_grad():
            seen = norm(x)
    assert learning.dtype == seen.dtype == torch.bfloat16
    assert called == [False]
    torch.testing.assert_close(learning, seen, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("regions", [False, True])
def test_every_loss_is_that_of_the_cpu(cuda: FakeCuda, regions: bool):
    weighted = {"class_weights": [1, 2, 3], "weight": 1}
    terms = EVERY | {"cross_entropy": weighted | {"smoothing": 0.1, "top": 0.5}, "focal": weighted}
    loss = SegmentationLoss(LossConfig.model_validate(terms), regions)
    outputs, label = drawn(2, 3, 6, 7, 8), drawn(2, 6, 7, 8).round().clamp(-1, 2).long()
    targets = torch.stack([label, label.clamp(max=1), label.clamp(max=1)], 1) if regions else label
    here = outputs.clone().requires_grad_()
    far = outputs.to(CUDA).requires_grad_()
    wanted, there_too = loss(here, targets), targets.to(CUDA)
    cuda.waits.clear()
    found = loss(far, there_too)
    assert found.device == CUDA
    assert {wait.partition(":")[0] for wait in cuda.waits if "__int__" not in wait} == {"losses/shape.py"}  # by nature
    torch.testing.assert_close(slope(far, found), slope(here, wanted), atol=1e-6, rtol=1e-4)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_its_loss_and_its_gradient_alone(cuda: FakeCuda, precision: torch.dtype):
    model = create_model(channels=(4, 8), seed=0)
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), CUDA, precision, "auto")
    average, criterion = MovingAverage(model, 0.9), SegmentationLoss(LossConfig())
    image = there(drawn(2, 1, 12, 12, 12))
    label = (image[:, 0] > 0).long()
    cuda.waits.clear()
    engine.gradients([(image, lambda outputs: criterion(outputs, label))] * 2, 12.0)
    engine.update(0.1)
    average.update(model, 0)
    assert [wait.split(" ", 1)[1] for wait in cuda.waits] == ["__float__"] * 2
    assert all(value.device == CUDA for value in average.state.values())


def waiting_steps(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> list[list[str]]:
    """What every step of a training to come waits for, but for its loss and its gradient (and its stages', once)."""
    steps: list[list[str]] = []
    plain = Trainer._step

    def step(self: Trainer, *arguments: Any) -> None:
        cuda.waits.clear()
        plain(self, *arguments)
        steps.append([wait for wait in cuda.waits if "engine.py" not in wait and "watch.py" not in wait])

    monkeypatch.setattr(Trainer, "_step", step)
    return steps


@pytest.mark.parametrize("data", [LABELS, JOINT, WITH_TABLE | {"targets": TONE}], ids=["labels", "joint", "whole"])
def test_trainings_of_all_kinds_run_there(
    cuda: FakeCuda, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict
):
    steps, on = waiting_steps(monkeypatch, cuda), {"device": "cuda", "precision": "float32"}
    training = on | {"epochs": 2, "accumulate": 2, "workers": 0}
    optimizer = {"ema": 0.9, "swa": 0.5}
    config = recipe(root, data, training=training, inference=on, optimizer=optimizer)
    run = train(config, tmp_path / "run")
    assert run.rows[-1]["loss"] > 0
    assert len(steps) == 4
    assert not any(steps)


def test_the_optimisers_state_comes_back_in_the_layout_of_its_parameters(
    cuda: FakeCuda, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of another layout it would be gone through by other kernels than in a training without a pause."""
    kept: list[list[tuple[int, ...]]] = []
    plain = Learner.start

    def started(self: Learner, tensors: Any = None) -> None:
        plain(self, tensors)
        states = [self.optimizer.state[parameter] for parameter in self.model.parameters()]
        kept.append([state["exp_avg"].stride() for state in states if state])
        if kept[-1]:
            assert kept[-1] == [parameter.stride() for parameter in self.model.parameters()]
            assert all(state["exp_avg"].device == CUDA and state["step"].device.type == "cpu" for state in states)

    monkeypatch.setattr(Learner, "start", started)
    on = {"device": "cuda", "precision": "float32", "workers": 0}
    config = recipe(root, LABELS, training=on, inference={"device": "cuda"})
    train(config, tmp_path / "run")
    run = resume(tmp_path / "run", ["training.epochs=2"])
    assert len(run.rows) == 2
    assert [bool(strides) for strides in kept] == [False, True]
    assert any(len(stride) == 4 and stride[1] == 1 for stride in kept[1])  # channels-last


@pytest.mark.parametrize(
    ("overrides", "outputs"),
    [
        ((), ("labels", "probabilities", "logits", "entropy")),
        (("inference.mirror=[0,1]", "inference.batch=3"), ("labels", "variance")),
        (("inference.blend=gaussian_monai",), ("labels",)),
        (("inference.bin=2",), ("labels", "entropy")),
        (("inference.slices=all",), ("labels", "probabilities")),
    ],
)
def test_predictions_are_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], outputs: tuple[str, ...]
):
    run, image = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "star"}), noise(3, 30)
    image[:12, :20] = 0.5  # some windows are empty
    if "inference.slices=all" in overrides:
        image = np.stack([image] * 5)
    else:
        image[-3:] = np.nan
    wanted = load(run, overrides, device="cpu").predict(image, outputs=list(outputs))
    with pretended(monkeypatch):
        found = load(run, overrides, device="cuda").predict(image, outputs=list(outputs))
    for kind, volume in wanted.items():
        np.testing.assert_allclose(found[kind].numpy(), volume.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["linear", "cubic", "nnunet"])
def test_resampling_is_that_of_the_cpu(cuda: FakeCuda, method: str):
    image, shape = drawn(2, 6, 9, 7), (9, 5, 14)
    kernels = kernels_for(method, (3.0, 1.0, 2.0), (2.0, 1.8, 1.0))
    found = Resampled(image, shape, CUDA, kernels)[:, 0:9]
    assert found.device == CUDA
    torch.testing.assert_close(found.cpu(), Resampled(image, shape, "cpu", kernels)[:, 0:9])


def test_the_precision_is_that_of_the_device_asked_for(monkeypatch: pytest.MonkeyPatch):
    """Of several GPUs the current one may be another."""
    current: list[torch.device] = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[-1].index == 1)
    assert pick_precision("auto", torch.device("cuda", 1)) == torch.bfloat16
    assert pick_precision("auto", torch.device("cuda", 0)) == torch.float32


def test_predictions_ask_for_reproducible_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    run = run_of(tmp_path, ".nii.gz", {0: "sky", 1: "star"})
    load(run, device="cpu")
    assert not torch.backends.cudnn.deterministic
    with pretended(monkeypatch):
        load(run, device="cuda")
    assert torch.backends.cudnn.deterministic
