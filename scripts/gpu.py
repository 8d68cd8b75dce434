"""Everything that needs a GPU in one call: the GPU tests, then the speed of training, of the inferer and of networks
beside those of other libraries (the ones that are installed); last `bench_inference.py`, prediction beside other tools.

    python scripts/gpu.py

Also runs on a CPU, where the tests skip; the figures are then the CPU's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from densepred.augment.volume import Augmenter
from densepred.config import AugmentConfig, LossConfig, ModelConfig, OptimizerConfig
from densepred.device import pick_device, pick_precision
from densepred.losses import SegmentationLoss
from densepred.models.build import build, initialize
from densepred.models.forms import Form
from densepred.training.engine import Engine
from densepred.training.optim import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in ("gpu", "resample_stream", "prediction_faults")]
"""Those that hold tests marked `gpu`."""


def wait(device: torch.device) -> float:
    """The time when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bench_training(device: torch.device, steps: int, form: Form) -> None:
    """Steps per second of nnU-Net's plain shape on 128x128x128, without augmentation and with nnU-Net's, in turns."""
    size, widths = ((128,) * 3, (32, 64, 128, 256, 320)) if device.type == "cuda" else ((32,) * 3, (8, 16, 32))
    model = initialize(build(ModelConfig(channels=widths, deep_supervision=1), 1, 3), 0)
    precision = pick_precision("auto", device)
    engine = Engine(model, make_optimizer(model, OptimizerConfig()), device, precision, form)
    criterion, augment = SegmentationLoss(LossConfig()), Augmenter(AugmentConfig.model_validate("nnunet"), 3)
    image = torch.randn(2, 1, *size, device=device)
    label = torch.randint(0, 3, (2, *size), device=device)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * steps):
        start = wait(device)
        x, y = augment(image, label, [2 * step, 2 * step + 1]) if step % 2 else (image, label)
        engine.gradient(x, lambda outputs, y=y: criterion(outputs, y), 12.0)
        engine.update(0.01)
        times[bool(step % 2)].append(wait(device) - start)
    plain, augmented = (statistics.mean(found[len(found) // 3 :]) for found in times.values())
    shape = "x".join(map(str, size))
    print(
        f"step of 2x{shape}, {precision}, form {form}: {1 / plain:.2f} steps/s, augmented {augmented / plain:.3f} times"
    )


def main() -> None:
    """Run the tests and the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=256, help="of the volume that is predicted")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="measure compiled networks too")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", torch.__version__, flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS], cwd=ROOT)
    for form in ("auto", *(("fast",) if arguments.compile else ())):
        bench_training(device, arguments.steps, form)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the programs that follow need it
    here, compiled = ROOT / "scripts", ["--compile"] if arguments.compile else []
    models = subprocess.run([sys.executable, here / "bench_models.py", "--device", str(device), *compiled])
    size = ["--size", str(arguments.size)]
    asked = ["--device", str(device), *size, "--repeats", "3", *compiled]
    inference = subprocess.run([sys.executable, here / "bench_inference.py", *asked])
    raise SystemExit(next((one.returncode for one in (tests, models, inference) if one.returncode), 0))


if __name__ == "__main__":
    main()
