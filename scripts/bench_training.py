"""Steps per second of our trainer and of nnU-Net's, with the same network, patch and batch on the same cores or GPU.

    pip install nnunetv2
    python scripts/bench_training.py --data data/hippocampus

Both plan the set by nnU-Net's rules, which must come to the same patch, batch and size of kernels, and train on it
with nnU-Net's augmentation, each in the precision that it chooses on the device. They take turns; each turn is a
process of its own. Given are medians over the turns, and the share of the time that the trainer waits for data.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from bench_peers import nnunet_training
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TOOLS = ("nnU-Net", "densepred")


def densepred(*words: object) -> None:
    """Run one of our commands."""
    subprocess.run([sys.executable, "-m", "densepred", *map(str, words)], check=True, cwd=ROOT)


def planned(work: Path) -> Path:
    """Our recipe by nnU-Net's rules.

    Raises:
        SystemExit: its patch or batch is not what nnU-Net planned.
    """
    told = {"root": str(work / "nnUNet_raw" / nnunet_training.NAME), "dataset": "dataset.json", "fold": "all"}
    (work / "data.yaml").write_text(yaml.safe_dump({"data": told}))
    recipe = work / "recipe.yaml"
    densepred("plan", work / "data.yaml", "--rules", "nnunet", "--configuration", "3d_fullres", "--out", recipe)
    ours, theirs = yaml.safe_load(recipe.read_text())["patch"], nnunet_training.plan(work)
    if ours["size"] != theirs["patch_size"] or ours["batch"] != theirs["batch_size"]:
        raise SystemExit(f"planned differently: {ours}, {theirs['patch_size']} x {theirs['batch_size']}")
    print(f"patch {theirs['patch_size']}, batch {theirs['batch_size']}")
    return recipe


def ours(recipe: Path, run: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of the second epoch, the share of waiting, and the size of all kernels."""
    settings = [f"training.device={arguments.device}", "training.epochs=2", f"training.steps={arguments.steps}"]
    densepred("train", recipe, *settings, "training.tensorboard=false", *arguments.overrides, "--run", run)
    with open(run / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    seconds, waiting = float(second["seconds"]) - float(first["seconds"]), float(second["waiting"])
    with safe_open(run / "model.safetensors", "pt") as weights:
        count = nnunet_training.kernels(map(weights.get_tensor, weights.keys()))
    return {"step": seconds / (1 - waiting) / arguments.steps, "waiting": waiting, "kernels": count}


def theirs(work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The same of nnU-Net's trainer; in a process of its own."""
    command = [sys.executable, __file__, "--data", arguments.data, "--steps", arguments.steps, "--child", work]
    command += ["--device", arguments.device, "--cases", arguments.cases]
    subprocess.run(list(map(str, command)), check=True)
    found: dict[str, float] = json.loads((work / "speed.json").read_text())
    return found


def child(work: Path, arguments: argparse.Namespace) -> None:
    """Measure nnU-Net's trainer here."""
    speed, count = nnunet_training.measured(work, arguments.device, chosen(arguments), arguments.steps, arguments.steps)
    found = {"step": speed.seconds / speed.steps, "waiting": speed.waited / speed.seconds, "kernels": count}
    (work / "speed.json").write_text(json.dumps(found))


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The first cases of the set."""
    every = sorted(path.name.split(".")[0] for path in (arguments.data / "imagesTr").glob("[!.]*.nii.gz"))
    return every[: arguments.cases]


def main() -> None:
    """Parse the command line and take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dataset.json, imagesTr and labelsTr")
    parser.add_argument("--cases", type=int, default=40, help="of the set (default 40)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--steps", type=int, default=10, help="measured, and as many before to warm up (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of our recipe")
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    if arguments.child:
        return child(arguments.child, arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        nnunet_training.prepare(arguments.data, work, chosen(arguments))
        recipe = planned(work)
        turns: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
        for turn in range(arguments.repeats):
            turns["nnU-Net"].append(theirs(work, arguments))
            turns["densepred"].append(ours(recipe, work / f"run{turn}", arguments))
    report(turns)
    return None


def report(turns: dict[str, list[dict[str, float]]]) -> None:
    """The table, in Markdown; ratios are of each pair of turns."""
    middle = {
        tool: {key: statistics.median(t[key] for t in found) for key in found[0]} for tool, found in turns.items()
    }
    counts = {int(found["kernels"]) for found in middle.values()}
    print(f"\nnumbers in kernels: {', '.join(f'{count:,}' for count in sorted(counts))}\n")
    print("| trainer | seconds a step | steps a second | waiting for data |\n|---|---|---|---|")
    for tool, found in middle.items():
        print(f"| {tool} | {found['step']:.3f} | {1 / found['step']:.3f} | {100 * found['waiting']:.1f} % |")
    ratios = [a["step"] / b["step"] for a, b in zip(turns["nnU-Net"], turns["densepred"], strict=True)]
    print(f"\n{statistics.median(ratios):.2f} times nnU-Net's steps ({min(ratios):.2f} to {max(ratios):.2f})")
    if len(counts) > 1:
        raise SystemExit("the networks differ")


if __name__ == "__main__":
    main()
