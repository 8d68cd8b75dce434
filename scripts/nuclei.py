"""Nuclei under the microscope: our U-Nets on ResNet-34 and ConvNeXt-tiny beside SMP's, trained equally long.

    python scripts/nuclei.py --data data/nuclei --out runs/nuclei --budget 15min

All four start from nothing and share data, augmentation, optimiser, loss and time; only the network differs (SMP's is
its `Unet` as it comes). Whole images of the validation fold are segmented and scored: Dice of the foreground, mean over
the images, and panoptic quality of the connected parts, over all images. What is done already in `--out` is not done
again. Writes `table.md`, `scores.json`; the exit status is 1 where ours is below SMP's in panoptic quality, or in Dice
by more than noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from densepred import config as configuration
from densepred.cases.case import collect
from densepred.cases.folds import split
from densepred.files import atomic_write, writable_folder
from densepred.metrics import Panoptic, components, confusion, dice, panoptic
from densepred.metrics.bootstrap import gain
from densepred.volumes import open_volume

ROOT = Path(__file__).parent.parent
RECIPES = {
    "ResNet-34": ("unet_resnet34_nuclei", "smp.resnet34"),
    "ConvNeXt-tiny": ("unet_convnext_nuclei", "timm.convnext_tiny"),  # which SMP takes from timm too
}
"""By encoder: our recipe, and the encoder of SMP's U-Net."""


@dataclass(frozen=True)
class Found:
    """What one network finds.

    Attributes:
        dice: of the foreground, for each image.
        objects: over all images.
        steps: that its training took.
    """

    dice: list[float]
    objects: Panoptic
    steps: int


def run(*arguments: object) -> None:
    """Run one densepred command, its output going where ours goes."""
    subprocess.run([sys.executable, "-m", "densepred", *map(str, arguments)], check=True, cwd=ROOT)


def found(recipe: Path, out: Path, settings: list[str]) -> Found:
    """Train, segment the validation images and compare them with the truth."""
    folder = out / "run"
    if (folder / "config.yaml").exists():
        run("train", "--resume", folder)
    else:
        run("train", recipe, *settings, "--run", folder)
    data = configuration.load(recipe, settings).data
    cases = split(collect(data), data)[1]
    run("predict", folder, *(case.images[0] for case in cases), "--out", out / "predictions")
    scores, objects = [], Panoptic()
    for case in cases:
        truth = numbers(case.label)
        (file,) = (out / "predictions").glob(f"{case.id}.*")
        mask = numbers(file) > 0
        scores.append(float(dice(confusion(truth > 0, mask, 2))[1]))
        objects += panoptic(truth, components(mask))
    with open(folder / "metrics.csv", newline="") as file:
        steps = int(list(csv.DictReader(file))[-1]["step"])
    return Found(scores, objects, steps)


def numbers(path: Path | None) -> np.ndarray:
    """The values of a label file (Y, X)."""
    assert path is not None
    with open_volume(path) as volume:
        return volume.numpy()[0]


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, predictions and results")
    parser.add_argument("--budget", default="15min", help="for each training (default 15min)")
    parser.add_argument("--encoder", choices=RECIPES, help="this one only")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of all recipes")
    arguments = parser.parse_args()
    out = writable_folder(arguments.out.resolve())
    common = [f"data.root={arguments.data.resolve()}", f"training.budget={arguments.budget}", *arguments.overrides]
    lines = ["| encoder | U-Net | steps | Dice | panoptic quality | ours - SMP's, Dice |", "|---" * 6 + "|"]
    scores, holds = {}, True
    for name, (recipe, encoder) in RECIPES.items():
        if arguments.encoder not in (None, name):
            continue
        file = ROOT / "configs" / f"{recipe}.yaml"
        theirs = f"model={{dims: 2, encoder: {encoder}, decoder: smp.Unet}}"
        both = {
            "ours": found(file, out / name / "ours", common),
            "SMP's": found(file, out / name / "smp", [*common, theirs]),
        }
        before, after = (np.array(both[whose].dice)[:, np.newaxis] for whose in ("SMP's", "ours"))
        apart = gain(before, after, [str(image) for image in range(len(before))])
        for whose, one in both.items():
            difference = apart.signed() if whose == "ours" else ""
            mean, quality = float(np.mean(one.dice)), one.objects.quality
            lines.append(f"| {name} | {whose} | {one.steps} | {mean:.4f} | {quality:.4f} | {difference} |")
            scores[f"{name}, {whose}"] = {"dice": mean, "pq": quality, "steps": one.steps, "each": one.dice}
        holds &= apart.high >= 0 and both["ours"].objects.quality >= both["SMP's"].objects.quality
    text = "\n".join(lines) + "\n"
    atomic_write(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    atomic_write(out / "table.md", text)
    print(text)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
