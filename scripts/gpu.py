"""Everything that needs a GPU in one call: the GPU tests, then the speed of training, of the inferer and of networks
beside those of other libraries (the ones that are installed).

    python scripts/gpu.py

Also runs on a CPU, where the tests skip; the figures are then the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from densepred.config import LossConfig, ModelConfig, OptimizerConfig
from densepred.device import pick_device, pick_precision
from densepred.inference.sliding_window import SlidingWindowInferer
from densepred.losses import SegmentationLoss
from densepred.models.build import build, initialize
from densepred.models.forms import Form
from densepred.training.engine import Engine
from densepred.training.optim import make_optimizer


def wait(device: torch.device) -> float:
    """The time when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bench_training(device: torch.device, steps: int, form: Form) -> None:
    """Steps per second of the hippocampus recipe's network."""
    model = initialize(build(ModelConfig(channels=(32, 64, 128, 256), deep_supervision=1), 1, 3), 0)
    precision = pick_precision("auto", device)
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), device, precision, form)
    criterion = SegmentationLoss(LossConfig())
    image = torch.randn(2, 1, 40, 56, 40, device=device)
    label = torch.randint(0, 3, (2, 40, 56, 40), device=device)
    times = []
    for _ in range(steps):
        start = wait(device)
        engine.gradient(image, lambda outputs: criterion(outputs, label), 12.0)
        engine.update(0.01)
        times.append(wait(device) - start)
    median = statistics.median(times[len(times) // 3 :])
    print(f"step of 2x40x56x40, {precision}, form {form}: {1 / median:.2f} steps/s")


def bench_inference(device: torch.device, size: int, window: int) -> None:
    """The inferer against the bare forward passes of the same number of windows."""
    model = initialize(build(ModelConfig(channels=(32, 64, 128, 256)), 1, 3), 0).eval().to(device)
    precision = pick_precision("auto", device)
    inferer = SlidingWindowInferer((window,) * 3, precision=str(precision).removeprefix("torch."), device=device)
    image = torch.randn(1, size, size, size, device=device)
    count = len(inferer.grid(image.shape[1:]))
    cut = torch.randn(1, 1, window, window, window, device=device)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        model(cut)
        start = wait(device)
        for _ in range(count):
            model(cut)
        bare = wait(device) - start
    start = wait(device)
    for _ in inferer.stream(model, image):
        pass
    total = wait(device) - start
    print(f"{size}^3, {count} windows of {window}^3, {precision}: {total:.2f} s, {total / bare:.3f} of the bare model")


def main() -> None:
    """Run the tests and the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="measure the compiled training step too")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", torch.__version__, flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"])
    for form in ("auto", *(("fast",) if arguments.compile else ())):
        bench_training(device, arguments.steps, form)
    bench_inference(device, arguments.size, arguments.window)
    models = [sys.executable, str(Path(__file__).with_name("bench_models.py")), "--device", str(device)]
    subprocess.run([*models, *(["--compile"] if arguments.compile else [])])
    raise SystemExit(tests.returncode)


if __name__ == "__main__":
    main()
