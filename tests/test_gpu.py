"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig, LossConfig, ModelConfig, OptimizerConfig
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.losses import SegmentationLoss
from densepred.models.build import build, create_model, initialize
from densepred.models.forms import Form, set_form
from densepred.training.engine import Engine
from densepred.training.loop import resume, train
from densepred.training.optim import MovingAverage, make_optimizer
from tests.tasks_set import LABELS, recipe, write_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SMALL = ModelConfig(channels=(8, 16, 32), deep_supervision=1)


def network() -> torch.nn.Module:
    return initialize(build(SMALL, 1, 3), 0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 numbers in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("exact")
def test_sliding_window_equals_the_cpus():
    image = torch.randn(1, 50, 40, 33, generator=torch.Generator().manual_seed(0))
    model = network()
    inferer = SlidingWindowInferer((24, 24, 24), batch=3)
    on_cpu = inferer(model, image)
    on_gpu = inferer(model.cuda(), image)
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)
    half = SlidingWindowInferer((24, 24, 24), batch=3, precision="auto")(model, image)
    assert (half.argmax(0) == on_cpu.argmax(0)).float().mean() > 0.98


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("recipe", ["light", "nnunet", "microscopy"])
def test_augmentation_does_the_same_on_both(recipe: str, dims: int):
    """All but noise, whose numbers come from the device's own generator."""
    image = torch.randn(8, 2, *(20, 24, 16)[-dims:], generator=torch.Generator().manual_seed(0))
    label = (image[:, 0] > 0.5).long()
    quiet = {"recipe": recipe, "noise": None, "poisson_noise": None, "elastic": {"probability": 0.5}}
    augment = Augmenter(AugmentConfig.model_validate(quiet), 2, (2.0, 1.0, 1.0)[-dims:], flags=[1])
    on_cpu, on_gpu = augment(image, label, range(8)), augment(image.cuda(), label.cuda(), range(8))
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0], atol=1e-3, rtol=1e-3)
    assert (on_gpu[1].cpu() == on_cpu[1]).float().mean() > 0.999
    assert not torch.equal(on_cpu[1], label)


@pytest.mark.parametrize("name", ["noise", "poisson_noise", "rician_noise"])
def test_noise_on_a_device_is_a_function_of_the_seed_alone(name: str):
    image = torch.randn(4, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    augment = Augmenter(AugmentConfig.model_validate([{name: {"probability": 1}}]), 2)
    on_cpu = augment(image, image[:, 0].long(), range(4))[0] - image
    on_gpu = augment(image.cuda(), image[:, 0].long().cuda(), range(4))[0].cpu() - image
    alone = augment(image[2:3].cuda(), image[2:3, 0].long().cuda(), [2])[0].cpu() - image[2:3]
    assert torch.equal(on_gpu[2:3], alone)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.std().item() == pytest.approx(cpu.std().item(), rel=0.05)


def test_augmentation_does_not_wait_for_the_device():
    image = torch.randn(4, 1, 48, 48, 48, device="cuda")
    label = (image[:, 0] > 1).long()
    entries = ("rotation", "elastic", "flip", "noise", "blur", "brightness", "contrast", "low_resolution", "bias_field")
    augment = Augmenter(AugmentConfig.model_validate([{name: {"probability": 1}} for name in entries]), 2)
    augment(image, label, range(4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(image, label, range(4, 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_two_trainings_give_the_same_bits_and_learn(precision: torch.dtype):
    ends, losses, criterion = [], [], SegmentationLoss(LossConfig())
    for _ in range(2):
        model = network()
        engine = Engine(model, make_optimizer(model, OptimizerConfig()), torch.device("cuda"), precision, "auto")
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(2, 1, 24, 24, 24, generator=generator).cuda()
        label = (image[:, 0] > 0.5).long() + (image[:, 0] > 1.5).long()
        course = []
        for _ in range(20):
            loss, _ = engine.gradient(image, lambda outputs, label=label: criterion(outputs, label), 12.0)
            engine.update(0.01)
            course.append(loss)
        losses.append(course)
        ends.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_memory_of_the_inferer_does_not_grow_with_depth(tmp_path: Path):
    model, peaks = network().cuda().eval(), []
    inferer = SlidingWindowInferer((24, 24, 24))
    for _ in inferer.stream(model, np.zeros((1, 72, 48, 48), np.float32)):  # what the libraries take once
        pass
    for depth in (72, 264):  # which are read in equal pieces
        torch.cuda.reset_peak_memory_stats()
        source = np.zeros((1, depth, 48, 48), np.float32)
        for _ in inferer.stream(model, source):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("resnet18", "unet"), ("vgg11_bn", "deconvnet"), ("convnext_tiny", "fpn"), ("se_resnet18", "deeplabv3plus")],
)
def test_networks_give_what_they_give_on_the_cpu(encoder: str, decoder: str, dims: int):
    options = {"decoder_channels": 8} if decoder in ("fpn", "deeplabv3plus") else {}
    model = create_model(encoder, decoder, dims=dims, in_channels=2, width=8, seed=0, **options)
    x = torch.randn(2, 2, *(65, 70, 37)[:dims], generator=torch.Generator().manual_seed(0))
    if decoder == "deconvnet":  # unpooling follows the places of maxima: in float32 those of near ties differ
        model, x = model.double(), x.double()
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        out = model(x.to(device))
        out.square().mean().backward()
        norms = [p.grad.norm().cpu() for p in model.parameters()]
        results.append((out.detach().cpu(), torch.stack(norms)))
    scale = results[0][0].abs().max()
    torch.testing.assert_close(results[1][0] / scale, results[0][0] / scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("form", ["plain", "fast", "lean"])
def test_forms_train_alike(form: Form):
    device, losses = torch.device("cuda"), []
    for chosen in ("plain", form):
        model = create_model(channels=(8, 16, 24), seed=0).to(device)
        engine = Engine(model, make_optimizer(model, OptimizerConfig()), device, torch.float32, chosen)  # type: ignore[arg-type]
        x = torch.randn(2, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1)).to(device)
        for _ in range(3):
            loss, _ = engine.gradient(x, lambda out: out.square().mean(), 12.0)
            engine.update(0.01)
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_checkpointing_needs_less_memory():
    """Of what is kept for the backward pass; at the peak there are cuDNN's workspaces too."""
    held = []
    for form in ("auto", "lean"):
        model = set_form(create_model(seed=0).cuda(), form, torch.device("cuda"))  # type: ignore[arg-type]
        image = torch.randn(1, 1, 96, 96, 96, device="cuda")
        before = torch.cuda.memory_allocated()
        loss = model(image).square().mean()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        del model, loss
    assert held[1] < 0.7 * held[0]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("encoder", "decoder", "options"),
    [
        ("plain", "unet", {"channels": (8, 16), "upsampling": "interpolate", "attention": True}),
        ("resnet18", "deeplabv3plus", {"width": 8, "decoder_channels": 8}),
        ("convnext_tiny", "fpn", {"width": 8, "decoder_channels": 8}),
        ("vgg11_bn", "deconvnet", {"width": 8}),
        ("vgg11", "fcn8s", {"width": 8}),
    ],
)
def test_gradients_have_the_same_bits_in_every_run(encoder: str, decoder: str, options: dict, dims: int):
    device, criterion = torch.device("cuda", 0), SegmentationLoss(LossConfig.model_validate({"dice": 1, "cldice": 1}))
    model = create_model(encoder, decoder, dims=dims, seed=0, **options)
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), device, torch.bfloat16, "auto")
    image = torch.randn(2, 1, *(33, 65, 48)[-dims:], generator=torch.Generator().manual_seed(0)).to(device)
    label, found = (image[:, 0] > 0).long(), []
    for _ in range(5):
        torch.manual_seed(0)
        engine.gradient(image, lambda outputs: criterion(outputs, label), 0.0)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu())
        engine.discard()
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_ends_with_the_same_bits_after_a_pause(tmp_path: Path, optimizer: str):
    root, on = write_set(tmp_path / "set"), {"device": "cuda", "precision": "auto"}
    steady = {"name": optimizer, "schedule": "constant", "ema": 0.9}
    for name, epochs in (("whole", 2), ("part", 1)):
        training = on | {"epochs": epochs, "steps": 5}
        train(recipe(root, LABELS, training=training, inference=on, optimizer=steady), tmp_path / name)
    resume(tmp_path / "part", ["training.epochs=2"])
    whole, part = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part


def test_a_step_waits_for_its_loss_and_its_gradient_alone():
    device, criterion = torch.device("cuda", 0), SegmentationLoss(LossConfig())
    model = network()
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), device, torch.bfloat16, "auto")
    average = MovingAverage(model, 0.9)
    image = torch.randn(2, 1, 24, 24, 24, device=device)
    label = (image[:, 0] > 0.5).long()

    def step(number: int) -> None:
        engine.gradients([(image, lambda outputs: criterion(outputs, label))] * 2, 12.0)
        engine.update(0.01)
        average.update(model, number)

    step(0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 2


def test_the_reader_works_in_the_callers_stream():
    """Its thread would be in the default one, which does not wait for ours."""
    image = torch.randn(1, 64, 32, device="cuda")

    class Slow:
        shape = image.shape

        def __getitem__(self, key: object) -> torch.Tensor:
            torch.cuda._sleep(200_000_000)
            return image[key] * 1.0

    def found(ahead: int) -> torch.Tensor:
        inferer = SlidingWindowInferer((16, 16), device="cuda", ahead=ahead)
        return torch.cat([slab for *_, slab in inferer.stream(lambda cut: cut, Slow())], 1)

    expected = found(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = found(2)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
