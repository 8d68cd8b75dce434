"""Peak memory of predicting shallow and deep volumes from .nii.gz to .nii.gz, each in a fresh process.

    python scripts/bench_memory.py

The two peaks should be the same: the inferer reads, predicts and writes slab by slab.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from densepred.cases.plan import Plan
from densepred.config import Config, DataConfig, InferenceConfig, ModelConfig, PatchConfig
from densepred.config.normalize import ZScore
from densepred.models.build import build, initialize
from densepred.training.run import Run

MOST = 5.0
"""Per cent by which the deepest volume may take more or less than the shallowest; more is told by the exit status."""
WATCHED = """
import atexit
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
from densepred.cli import main
main()
"""


def make_run(folder: Path, window: tuple[int, ...], channels: tuple[int, ...], classes: int = 3) -> Path:
    """A run directory with an untrained network, of as many dimensions as the window."""
    dims = len(window)
    config = Config(
        data=DataConfig(images="*.nii.gz", labels="{id}.nii.gz"),
        model=ModelConfig(channels=channels, dims=dims),
        patch=PatchConfig(size=window),
        inference=InferenceConfig(window=window),
    )
    plan = Plan(
        dims=dims,
        channels=("image",),
        classes=("background", *(f"class {value}" for value in range(1, classes))),
        values=tuple(range(classes)),
        label_map={value: value for value in range(classes)},
        normalize=(ZScore(),),
    )
    folder.mkdir()
    run = Run(folder, config, plan)
    run.save_recipe()
    run.save_weights(initialize(build(config.model, 1, classes), 0).state_dict())
    return folder


def make_volume(path: Path, depth: int, side: int) -> None:
    """A volume of noise, (side, side, depth) in NIfTI's order."""
    noise = np.random.default_rng(depth).integers(0, 1000, (depth, side, side), dtype=np.int16)
    nib.save(nib.Nifti1Image(noise.T, np.eye(4)), path)


def peak_of(*command: object) -> float:
    """Peak resident memory of a densepred command in a process of its own, in MB."""
    arguments = [sys.executable, "-c", WATCHED, *map(str, command)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-2]) / 1024


def main() -> None:
    """Parse the command line, predict and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--window", type=int, nargs=3, default=[64, 64, 64])
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder / "run", tuple(arguments.window), tuple(arguments.channels))
        peaks: dict[int, list[float]] = {depth: [] for depth in arguments.depths}
        for depth in arguments.depths:
            make_volume(folder / f"depth{depth}.nii.gz", depth, arguments.side)
        for repeat in range(arguments.repeats):
            for depth, found in peaks.items():
                image, out = folder / f"depth{depth}.nii.gz", folder / f"out{depth}_{repeat}"
                found.append(peak_of("predict", run, image, "--out", out, "inference.device=cpu"))
                print(f"{depth}x{arguments.side}x{arguments.side}: peak {found[-1]:.1f} MB", flush=True)
        medians = [statistics.median(found) for found in peaks.values()]
        change = 100 * (medians[-1] / medians[0] - 1)
        print(f"medians {', '.join(f'{m:.1f}' for m in medians)} MB: deepest against shallowest {change:+.2f} %")
    raise SystemExit(abs(change) > MOST)


if __name__ == "__main__":
    main()
