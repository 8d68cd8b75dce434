"""As a new user would, command by command: from hippocampus files as they come to scores.

    python scripts/new_user.py --data data/hippocampus --out runs/acceptance/new_user

Once from nnU-Net's layout and once from loose files (`x.nii.gz` beside `x_seg.nii.gz`), with nothing renamed and no
environment variable set: `plan`, `train` two short epochs, `predict`, `evaluate`. It ends with 1 if a command fails or
changes a file of the data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

CASES = 12
SHORT = ("training.epochs=2", "training.steps=20", "training.validate_every=2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the hippocampus set (densepred data hippocampus)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all that is made")
    arguments = parser.parse_args()
    if not chosen(arguments.data):
        parser.error(f"no imagesTr/*.nii.gz in {arguments.data}: densepred data hippocampus brings them")
    arguments.out.mkdir(parents=True)
    failed = False
    for layout in (as_nnunet, as_loose_files):
        images, labels = layout(arguments.data, arguments.out / layout.__name__)
        failed |= not walk(arguments.out / layout.__name__, images, labels)
    return int(failed)


def as_nnunet(data: Path, folder: Path) -> tuple[str, str]:
    """Copies in nnU-Net's layout; where images and labels are."""
    for case in chosen(data):
        copy(data / f"imagesTr/{case}.nii.gz", folder / f"set/imagesTr/{case}_0000.nii.gz")
        copy(data / f"labelsTr/{case}.nii.gz", folder / f"set/labelsTr/{case}.nii.gz")
    labels = {"background": 0, "Anterior": 1, "Posterior": 2}
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": CASES, "file_ending": ".nii.gz"}
    (folder / "set/dataset.json").write_text(json.dumps(content))
    return "set/imagesTr", "set/labelsTr"


def as_loose_files(data: Path, folder: Path) -> tuple[str, str]:
    """Copies of images beside their labels."""
    for case in chosen(data):
        copy(data / f"imagesTr/{case}.nii.gz", folder / f"set/{case}.nii.gz")
        copy(data / f"labelsTr/{case}.nii.gz", folder / f"set/{case}_seg.nii.gz")
    return "set", "set/{id}_seg.nii.gz"


def chosen(data: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in (data / "imagesTr").glob("[!.]*.nii.gz"))[:CASES]


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def walk(folder: Path, images: str, labels: str) -> bool:
    """The four commands, run in the folder; whether all went well."""
    before = {path: path.read_bytes() for path in (folder / "set").rglob("*") if path.is_file()}
    commands = (
        ("plan", "set", "--out", "recipe.yaml", "--budget", "10min"),
        ("train", "recipe.yaml", *SHORT, "training.budget=null", "--run", "run"),
        ("predict", "run", images, "--out", "predictions"),
        ("evaluate", "predictions", labels, "--out", "scores"),
    )
    for command in commands:
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "densepred", *command], cwd=folder, capture_output=True, text=True)
        print(f"{folder.name}: densepred {' '.join(command)}: {time.monotonic() - started:.0f} s")
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
            return False
    print(done.stdout)
    same = before == {path: path.read_bytes() for path in (folder / "set").rglob("*") if path.is_file()}
    if not same:
        print(f"{folder.name}: the data have changed")
    return same


if __name__ == "__main__":
    sys.exit(main())
