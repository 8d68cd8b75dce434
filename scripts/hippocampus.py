"""Train a recipe on one fold of the hippocampus set, predict its validation cases as whole volumes, and score them.

    python scripts/hippocampus.py --data ../shared/data/hippocampus --out runs/hippocampus_fold0

Prints the Dice of both classes as `densepred evaluate` gives them, the time of the training and its steps per second.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> None:
    """Run one densepred command, its output going where ours goes."""
    subprocess.run([sys.executable, "-m", "densepred", *map(str, arguments)], check=True, cwd=ROOT)


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json and splits.json")
    parser.add_argument("--out", type=Path, required=True, help="new folder for run, predictions and scores")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "hippocampus_unet3d.yaml")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    start = time.monotonic()
    settings = [f"data.root={data}", f"data.fold={arguments.fold}", *arguments.overrides]
    run("train", arguments.config, *settings, "--run", out / "run")
    trained = time.monotonic() - start
    validation = json.loads((data / "splits.json").read_text())[arguments.fold]["val"]
    images = [data / "imagesTr" / f"{case}.nii.gz" for case in validation]
    run("predict", out / "run", *images, "--out", out / "predictions")
    pictures = ["--images", data / "imagesTr"]
    run("evaluate", out / "predictions", data / "labelsTr", "--out", out / "scores", *pictures)
    scores = json.loads((out / "scores" / "scores.json").read_text())
    with open(out / "run" / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    print(f"fold {arguments.fold}: {scores['scored']} cases, mean Dice {scores['mean_dice']:.4f}")
    for name, metrics in scores["summary"].items():
        print(f"  {name}: {metrics['dice']['mean']:.4f}")
    steps, seconds = int(last["step"]), float(last["seconds"])
    print(f"training {trained:.0f} s in all; {steps} steps, {steps / seconds:.2f} steps per second without validation")


if __name__ == "__main__":
    main()
