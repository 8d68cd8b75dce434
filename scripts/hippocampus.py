"""Train a recipe on one fold of the hippocampus set, predict its validation cases as whole volumes, and score them.

    python scripts/hippocampus.py --data data/hippocampus --out runs/hippocampus_fold0
    python scripts/hippocampus.py --data data/hippocampus --out runs/nnunet_fold0 --nnunet 30min

Prints the Dice of both classes as `densepred evaluate` gives them, the time of the training and its steps per second.
The second trains nnU-Net v2 (`pip install nnunetv2`) on the same fold for so long, by its own plan and trainer.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

from bench_peers import nnunet_training

from densepred.config.training import parse_duration
from densepred.device import pick_device

ROOT = Path(__file__).parent.parent


def run(*arguments: object) -> None:
    """Run one densepred command, its output going where ours goes."""
    subprocess.run([sys.executable, "-m", "densepred", *map(str, arguments)], check=True, cwd=ROOT)


def ours(data: Path, out: Path, fold: dict[str, list[str]], arguments: argparse.Namespace) -> Path:
    """Train the recipe and segment; where the label maps are."""
    settings = [f"data.root={data}", f"data.fold={arguments.fold}", *arguments.overrides]
    run("train", arguments.config, *settings, "--run", out / "run")
    images = [data / "imagesTr" / f"{case}.nii.gz" for case in fold["val"]]
    run("predict", out / "run", *images, "--out", out / "predictions")
    with open(out / "run" / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    steps, seconds = int(last["step"]), float(last["seconds"])
    print(f"{steps} steps, {steps / seconds:.2f} a second without validation")
    return out / "predictions"


def nnunets(data: Path, out: Path, fold: dict[str, list[str]], arguments: argparse.Namespace) -> Path:
    """Let nnU-Net plan, train and segment; where the label maps are."""
    work = out / "nnunet"
    nnunet_training.prepare(data, work, sorted(fold["train"] + fold["val"]))
    device, seconds = str(pick_device("auto")), parse_duration(arguments.nnunet)
    steps = nnunet_training.fitted(work, device, fold["train"], fold["val"], seconds)
    print(f"{steps} steps of nnU-Net")
    return nnunet_training.segmented(work)


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json and splits.json")
    parser.add_argument("--out", type=Path, required=True, help="new folder for run, predictions and scores")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "hippocampus_unet3d.yaml")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--nnunet", metavar="TIME", help="train nnU-Net instead of the recipe, for so long")
    parser.add_argument("--least", type=float, default=0.0, help="the exit status is 1 if the mean Dice is lower")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    start = time.monotonic()
    fold = json.loads((data / "splits.json").read_text())[arguments.fold]
    predictions = (nnunets if arguments.nnunet else ours)(data, out, fold, arguments)
    took = time.monotonic() - start
    run("evaluate", predictions, data / "labelsTr", "--out", out / "scores", "--images", data / "imagesTr")
    scores = json.loads((out / "scores" / "scores.json").read_text())
    print(f"fold {arguments.fold}: {scores['scored']} cases, mean Dice {scores['mean_dice']:.4f}")
    for name, metrics in scores["summary"].items():
        print(f"  {name}: {metrics['dice']['mean']:.4f}")
    print(f"{took:.0f} s from files to segmentations")
    raise SystemExit(scores["mean_dice"] < arguments.least)


if __name__ == "__main__":
    main()
