"""Memory of predictions: what is foretold, allowed and taken, from file to file, each in a process of its own.

    python scripts/bench_budget.py
    python scripts/bench_budget.py --only 512 many-classes --overlap 0.5

Volumes of noise, windows of 96x96x96 and a small network, whose own memory counts too. Without a budget the limit is
80 % of what is free; the last rows are held to a stated one. Taken is VmHWM, the peak of the whole process with Python
and its libraries. The exit status is 1 where a prediction fails or takes more than was foretold.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from astropy.io import fits
from bench_memory import WATCHED, make_run

WINDOW = (96, 96, 96)
FORETOLD = re.compile(r"(\d+) windows(?: in (\d+) bands)? on .* at most ([\d.]+) of")


@dataclass(frozen=True)
class Row:
    """A volume (Z, Y, X), the suffix of its file, classes, and the budget; None: by default."""

    group: str
    shape: tuple[int, int, int]
    suffix: str = ".nii.gz"
    classes: int = 3
    memory: str | None = None


ROWS = [
    Row("512", (512, 512, 512)),
    Row("512", (512, 512, 512), ".fits"),
    Row("512", (512, 512, 512), memory="1GB"),
    Row("many-classes", (600, 512, 512), classes=118, memory="4GB"),
    Row("1024", (1024, 1024, 1024)),
    Row("1024", (1024, 1024, 1024), ".fits"),
    Row("1024", (1024, 1024, 1024), memory="1500MB"),
]


def make_volume(path: Path, shape: tuple[int, int, int]) -> Path:
    """Noise, int16, a quarter of it over and over."""
    planes = np.random.default_rng(0).integers(0, 1000, (shape[0] // 4, *shape[1:]), dtype=np.int16)
    if path.suffix == ".gz":
        image = nib.Nifti1Image(np.tile(planes, (4, 1, 1)).T, np.eye(4))
        nib.save(image, path)
    else:
        fits.PrimaryHDU(np.tile(planes, (4, 1, 1))).writeto(path)
    return path


def measure(row: Row, folder: Path, overlap: float, channels: tuple[int, ...]) -> tuple[str, bool]:
    """A row of the table, and whether what was foretold was kept."""
    run = folder / f"run{row.classes}"
    if not run.exists():
        make_run(run, WINDOW, channels, row.classes)
    image = folder / f"{'x'.join(map(str, row.shape))}{row.suffix}"
    if not image.exists():
        make_volume(image, row.shape)
    out = folder / "out"
    command = [sys.executable, "-c", WATCHED, "predict", str(run), str(image), "--out", str(out)]
    command += [
        "inference.device=cpu",
        f"inference.overlap={overlap}",
        *([f"inference.memory={row.memory}"] if row.memory else []),
    ]
    command += ["data.axes=zyx"] if row.suffix == ".fits" else []  # a cube's meaning must be said
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - start
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return f"| {image.name} | {row.classes} | failed: {done.stderr.strip().splitlines()[-1]} |", False
    told = FORETOLD.search(done.stderr)
    assert told is not None
    taken = int(done.stdout.split()[-2]) / 1e6 * 1.024
    cells = (image.name, row.classes, row.memory or "by default", told[2] or 1, told[1])
    text = f"| {' | '.join(map(str, cells))} | {told[3]} GB | {taken:.2f} GB | {seconds:.0f} s |"
    return text, round(taken, 2) <= float(told[3])


def main() -> None:
    """Parse the command line, predict and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({row.group for row in ROWS}), help="some of the rows")
    parser.add_argument("--overlap", type=float, default=0.125)
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--folder", type=Path, help="for the files, some GB; by default a temporary one")
    arguments = parser.parse_args()
    print("| volume | classes | memory | bands | windows | foretold | taken | time |\n|" + "---|" * 8, flush=True)
    kept = True
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for row in ROWS:
            if arguments.only is None or row.group in arguments.only:
                text, holds = measure(row, Path(name), arguments.overlap, tuple(arguments.channels))
                kept &= holds
                print(text, flush=True)
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
