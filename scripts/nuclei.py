"""Nuclei under the microscope: our U-Nets on ResNet-34 and ConvNeXt-tiny beside SMP's, trained equally long.

    python scripts/nuclei.py --data data/nuclei --out runs/nuclei --budget 15min

All four start from nothing and share data, augmentation, optimiser, loss and time; only the network differs (SMP's is
its `Unet` as it comes). Whole images of the validation fold, or of several folds, are segmented and scored: Dice of the
foreground, mean over the images, and panoptic quality of the connected parts, over all images; the differences with
their 95 % intervals over the images. What is done already in `--out` is not done again. Writes `table.md`,
`scores.json`; the exit status is 1 where ours is below SMP's in panoptic quality, or in Dice by more than noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from densepred import config as configuration
from densepred.cases.case import collect
from densepred.cases.folds import split
from densepred.files import atomic_write, writable_folder
from densepred.metrics import Panoptic, components, confusion, dice, panoptic
from densepred.metrics.bootstrap import Interval, bounded, resampled
from densepred.volumes import open_volume

ROOT = Path(__file__).parent.parent
RECIPES = {
    "ResNet-34": ("unet_resnet34_nuclei", "smp.resnet34"),
    "ConvNeXt-tiny": ("unet_convnext_nuclei", "timm.convnext_tiny"),  # which SMP takes from timm too
}
"""By encoder: our recipe, and the encoder of SMP's U-Net."""
HEAD = "| encoder | U-Net | steps | Dice | panoptic quality | ours - SMP's, Dice | panoptic quality |"


@dataclass(frozen=True)
class Found:
    """What one network finds.

    Attributes:
        dice: of the foreground, for each image.
        objects: of each image.
        steps: that its trainings took.
    """

    dice: list[float]
    objects: list[Panoptic]
    steps: list[int]

    def __add__(self, other: Found) -> Found:
        """Those of other folds."""
        return Found(self.dice + other.dice, self.objects + other.objects, self.steps + other.steps)

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """The mean Dice of draws `(draws, images)`."""
        return weights @ np.array(self.dice) / weights.sum(1)

    def quality(self, weights: np.ndarray) -> np.ndarray:
        """The panoptic quality of draws `(draws, images)`: a ratio of sums over their images."""
        counted = [[one.overlap, one.matched + (one.missed + one.invented) / 2] for one in self.objects]
        overlap, weight = np.array(counted).T
        return (weights @ overlap) / (weights @ weight)


def run(*arguments: object) -> None:
    """Run one densepred command, its output going where ours goes."""
    subprocess.run([sys.executable, "-m", "densepred", *map(str, arguments)], check=True, cwd=ROOT)


def found(recipe: Path, out: Path, settings: list[str]) -> Found:
    """Train, segment the validation images and compare them with the truth."""
    folder, asked = out / "run", configuration.load(recipe, settings)
    if not (folder / "config.yaml").exists():
        run("train", recipe, *settings, "--run", folder)
    elif configuration.load(folder / "config.yaml") == asked:
        run("train", "--resume", folder)
    else:
        raise SystemExit(f"{folder} is of another recipe or other settings: choose another --out")
    data = asked.data
    cases = split(collect(data), data)[1]
    run("predict", folder, *(case.images[0] for case in cases), "--out", out / "predictions")
    scores, objects = [], []
    for case in cases:
        truth = numbers(case.label)
        (file,) = (out / "predictions").glob(f"{case.id}.*")
        mask = numbers(file) > 0
        scores.append(float(dice(confusion(truth > 0, mask, 2))[1]))
        objects.append(panoptic(truth, components(mask)))
    with open(folder / "metrics.csv", newline="") as file:
        steps = int(list(csv.DictReader(file))[-1]["step"])
    return Found(scores, objects, [steps])


def numbers(path: Path | None) -> np.ndarray:
    """The values of a label file (Y, X)."""
    assert path is not None
    with open_volume(path) as volume:
        return volume.numpy()[0]


def difference(
    ours: Callable[[np.ndarray], np.ndarray], theirs: Callable[[np.ndarray], np.ndarray], images: int
) -> Interval:
    """Of a score, over the same images in every draw."""
    every, groups = np.ones((1, images)), [str(image) for image in range(images)]
    weights = resampled(groups)
    return bounded((ours(every) - theirs(every))[0], ours(weights) - theirs(weights), every.T, groups)


def main() -> None:
    """Parse the command line and go the whole road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, predictions and results")
    parser.add_argument("--budget", default="15min", help="for each training (default 15min)")
    parser.add_argument("--folds", default="0", help="to score, each with trainings of its own: 0,1 (default 0)")
    parser.add_argument("--encoder", choices=RECIPES, help="this one only")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of all recipes")
    arguments = parser.parse_args()
    out = writable_folder(arguments.out.resolve())
    common = [f"data.root={arguments.data.resolve()}", f"training.budget={arguments.budget}", *arguments.overrides]
    lines, scores, holds = [HEAD, "|---" * 7 + "|"], {}, True
    for name, (recipe, encoder) in RECIPES.items():
        if arguments.encoder not in (None, name):
            continue
        file = ROOT / "configs" / f"{recipe}.yaml"
        networks = {"ours": [], "smp": [f"model={{dims: 2, encoder: {encoder}, decoder: smp.Unet}}"]}
        both = {whose: Found([], [], []) for whose in networks}
        for fold in arguments.folds.split(","):
            for whose, network in networks.items():
                settings = [*common, f"data.fold={fold}", *network]
                both[whose] += found(file, out / name / f"fold-{fold}" / whose, settings)
        ours, theirs = both["ours"], both["smp"]
        apart = [
            difference(ours.mean, theirs.mean, len(ours.dice)),
            difference(ours.quality, theirs.quality, len(ours.dice)),
        ]
        for whose, one in both.items():
            every = np.ones((1, len(one.dice)))
            mean, quality = float(one.mean(every)[0]), float(one.quality(every)[0])
            told = " | ".join(each.signed() if whose == "ours" else "" for each in apart)
            lines.append(f"| {name} | {whose} | {sum(one.steps)} | {mean:.4f} | {quality:.4f} | {told} |")
            images = {"dice": one.dice, "objects": [asdict(image) for image in one.objects]}
            scores[f"{name}, {whose}"] = {"dice": mean, "pq": quality, "steps": one.steps, "each": images}
        holds &= apart[0].high >= 0 and apart[1].value >= 0
    text = "\n".join(lines) + "\n"
    atomic_write(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    atomic_write(out / "table.md", text)
    print(text)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
