"""Speed of our U-Nets against the same ones of other libraries: forward passes and training steps, in turn.

    python scripts/bench_models.py            # all, on the GPU if there is one
    python scripts/bench_models.py --only 3d --repeats 5
    python scripts/bench_models.py --run runs/hippo --images data/hippocampus/imagesTr

2D: a ResNet-34 U-Net at 512x512, decoder widths 256-128-64-32-16 as in segmentation_models_pytorch.
3D: nnU-Net's plain shape, 32-64-128-256-320 at 96x96x96, as in MONAI's DynUNet and nnU-Net's own
dynamic_network_architectures. The peers run in float32, their default. Ours runs in float32 too, and in the form and
precision that it picks for the device. The models take turns within each repeat, so that a slow machine is slow for
all; medians are given, and ratios to ours in float32. Needs the extra `dev`.

With a trained run instead: how often its labels in bfloat16 equal those in float32, and the speed of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from densepred.allocator import tune_allocator
from densepred.device import pick_device, pick_precision
from densepred.errors import InputError
from densepred.inference.backends import prepare
from densepred.inference.predictor import load
from densepred.models.build import create_model
from densepred.models.forms import Form, in_layout, is_channels_last, set_form

WIDTHS = (32, 64, 128, 256, 320)


def smp_unet() -> nn.Module:
    from densepred.models.adapters import imports

    model: nn.Module = imports.smp().Unet("resnet34", encoder_weights=None, in_channels=3, classes=3)
    return model


def dynunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    strides = [1, 2, 2, 2, 2]
    norm = ("instance", {"affine": True})
    return DynUNet(3, 1, 3, [3] * 5, strides, strides[1:], WIDTHS, norm_name=norm)


def plain_conv_unet() -> nn.Module:
    from densepred.models.adapters import imports

    imports.torchvision()
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    act = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    strides = [1, 2, 2, 2, 2]
    return PlainConvUNet(1, 5, WIDTHS, nn.Conv3d, 3, strides, 2, 3, 2, conv_bias=True, **norm, **act)


def ours_2d() -> nn.Module:
    return create_model("resnet34", "unet", 2, 3, 3, decoder_channels=(16, 32, 64, 128, 256))


def ours_3d() -> nn.Module:
    return create_model("plain", "unet", 3, 1, 3, channels=WIDTHS)


Maker = Callable[[], nn.Module]
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Maker]]] = {
    "2d": ((4, 3, 512, 512), (2, 3, 512, 512), {"densepred": ours_2d, "smp.Unet": smp_unet}),
    "3d": (
        (1, 1, 96, 96, 96),
        (2, 1, 64, 64, 64),
        {"densepred": ours_3d, "monai.DynUNet": dynunet, "PlainConvUNet": plain_conv_unet},
    ),
}


def installed(name: str, make: Maker) -> bool:
    """Can it be built here? A line says so where it cannot."""
    try:
        with torch.device("meta"):
            make()
    except (ImportError, InputError) as error:
        print(f"without {name}: {error}")
        return False
    return True


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def forward(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass in float32."""
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = model(x)
        return out

    return run


def predicting(model: nn.Module, x: Tensor, precision: torch.dtype) -> Callable[[], Tensor]:
    """A forward pass as predictions make it."""
    prepared = prepare(model.eval(), x.shape, x.device, precision, "torch")
    return lambda: prepared(x)


def training(model: nn.Module, x: Tensor, precision: torch.dtype, form: Form) -> Callable[[], Tensor]:
    """A step: forward, cross-entropy, backward, SGD."""
    model.train()
    last = is_channels_last(model, form, x.device)
    set_form(model, form, x.device)
    labels = torch.randint(0, 3, (x.shape[0], *x.shape[2:]), device=x.device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def run() -> Tensor:
        with autocast(x.device, precision):
            logits: Tensor = model(in_layout(x, last))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def take_turns(runs: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = wait(device)
            run()
            seconds[name].append(wait(device) - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def wait(device: torch.device) -> float:
    """The time when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show(title: str, medians: dict[str, float]) -> None:
    base = medians["densepred float32"]
    print(title)
    for name, seconds in medians.items():
        print(f"  {name:<28}{seconds * 1000:10.1f} ms   {seconds / base:5.2f} x ours in float32", flush=True)


def compare(case: str, device: torch.device, repeats: int, compiled: bool) -> None:
    image, batch, makers = CASES[case]
    makers = {name: make for name, make in makers.items() if installed(name, make)}
    best = pick_precision("auto", device)
    x = torch.randn(image, device=device)
    runs = {name if name != "densepred" else "densepred float32": make() for name, make in makers.items()}
    runs = {name: forward(model.to(device), x) for name, model in runs.items()}
    ours = makers["densepred"]().to(device)
    if best != torch.float32:
        runs[f"densepred {str(best)[6:]}"] = predicting(ours, x, best)
        exact = forward(ours, x)().argmax(1)
        agree = (runs[f"densepred {str(best)[6:]}"]().argmax(1) == exact).double().mean()
        print(f"{case}: labels of {str(best)[6:]} equal float32's in {agree:.4%} (untrained network, noise)")
    show(f"{case}: forward pass of {'x'.join(map(str, image))}", take_turns(runs, repeats, device))
    x = torch.randn(batch, device=device)
    steps = {name if name != "densepred" else "densepred float32": make() for name, make in makers.items()}
    runs = {name: training(model.to(device), x, torch.float32, "plain") for name, model in steps.items()}
    forms: tuple[Form, ...] = ("auto", "fast") if compiled else ("auto",)
    for form in forms:
        runs[f"densepred {str(best)[6:]} {form}"] = training(makers["densepred"]().to(device), x, best, form)
    show(f"{case}: training step of {'x'.join(map(str, batch))}", take_turns(runs, repeats, device))


def agreement(run: Path, images: Path, count: int = 20) -> None:
    """Predict images in both precisions, turn by turn."""
    paths = sorted(path for path in images.iterdir() if path.name.endswith((".nii", ".nii.gz")))[:count]
    predictors = {p: load(run, [f"inference.precision={p}"]) for p in ("float32", "bfloat16")}
    seconds = dict.fromkeys(predictors, 0.0)
    same = voxels = 0
    for predictor in predictors.values():
        predictor.predict(paths[0])  # to warm up
    for path in paths:
        labels = {}
        for precision, predictor in predictors.items():
            start = time.perf_counter()
            labels[precision] = predictor.predict(path)[:]
            seconds[precision] += time.perf_counter() - start
        same, voxels = same + int((labels["float32"] == labels["bfloat16"]).sum()), voxels + labels["float32"].size
    ratio = seconds["float32"] / seconds["bfloat16"]
    print(
        f"{len(paths)} images: labels equal in {same / voxels:.4%} of {voxels:,} voxels, bfloat16 {ratio:.2f} x as fast"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="measure the compiled training step too")
    parser.add_argument("--run", type=Path, help="a trained run, whose precisions are compared instead")
    parser.add_argument("--images", type=Path, help="folder of images for it")
    arguments = parser.parse_args()
    tune_allocator()
    torch.manual_seed(0)
    device = pick_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}", flush=True)
    if arguments.run is not None:
        agreement(arguments.run, arguments.images)
        return
    for case in CASES:
        if arguments.only in (None, case):
            compare(case, device, arguments.repeats, arguments.compile)


if __name__ == "__main__":
    main()
