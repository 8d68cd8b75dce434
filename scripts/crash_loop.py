"""Kill trainings and batch predictions with SIGKILL at random moments and compare what they end with.

    python scripts/crash_loop.py --kills 10

A small training and a batch of predictions run once undisturbed, and once killed and started again until they are done.
The weights must be equal bit for bit, the folders of the predictions byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = """
data: {dataset: dataset.json, folds: 4}
model: {channels: [4, 8, 8], deep_supervision: 1, dropout: 0.1}
patch: {size: [16, 16, 16], batch: 2}
optimizer: {ema: 0.9}
training: {epochs: 40, steps: 20, checkpoint_every: 5, validate_every: 5, tensorboard: false}
inference: {window: [32, 32, 32]}
"""


def command(*arguments: object) -> list[str]:
    """The command line of one densepred command."""
    return [sys.executable, "-m", "densepred", *map(str, arguments)]


def finish(arguments: list[str]) -> float:
    """Run to the end; seconds taken."""
    start = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return time.monotonic() - start


def kill_at(arguments: list[str], seconds: float) -> bool:
    """Start and kill after some seconds; False if it was done before."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: ended with {process.returncode} before it was killed")
    return False


def differing(left: Path, right: Path) -> list[str]:
    """Names of files that differ or are missing on one side."""
    names = {str(p.relative_to(side)) for side in (left, right) for p in side.rglob("*") if p.is_file()}
    same = (name for name in names if (left / name).is_file() and (right / name).is_file())
    equal = {name for name in same if filecmp.cmp(left / name, right / name, shallow=False)}
    return sorted(names - equal)


def crash_training(folder: Path, kills: int, moments: random.Random) -> bool:
    """Train undisturbed and killed; True if the weights are equal."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    whole, killed = folder / "whole", folder / "killed"
    start = ["train", recipe, f"data.root={folder / 'data'}", "--run"]
    longest = finish(command(*start, whole))
    done = 0
    while done < kills:
        begun = any((killed / "checkpoints").glob("step-*"))
        arguments = command("train", "--resume", killed) if begun else command(*start, killed)
        if not kill_at(arguments, moments.uniform(0.08, 0.16) * longest):
            break
        done += 1
    begun = any((killed / "checkpoints").glob("step-*"))
    finish(command("train", "--resume", killed) if begun else command(*start, killed))
    names = ("model.safetensors", "best.safetensors")
    wrong = [name for name in names if (whole / name).read_bytes() != (killed / name).read_bytes()]
    print(f"training: killed {done} times, files that differ: {wrong or 'none'}", flush=True)
    return not wrong and done == kills


def crash_batch(folder: Path, kills: int, moments: random.Random) -> bool:
    """Predict undisturbed and killed; True if the folders are equal."""
    predict = ["predict", folder / "whole", folder / "data" / "imagesTr", "inference.overlap=0.88", "--out"]
    longest = finish(command(*predict, folder / "out_whole"))
    again = command(*predict, folder / "out_killed")
    done = sum(kill_at(again, moments.uniform(0.08, 0.16) * longest) for _ in range(kills))
    finish(again)
    wrong = differing(folder / "out_whole", folder / "out_killed")
    print(f"prediction: killed {done} times, files that differ: {wrong or 'none'}", flush=True)
    return not wrong and done == kills


def main() -> None:
    """Parse the command line, kill and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = ROOT / "data" / "synthetic_volumes.py"
        finish([sys.executable, str(generator), str(folder / "data"), "--cases", "12", "--seed", "2"])
        trained = crash_training(folder, arguments.kills, moments)
        predicted = crash_batch(folder, arguments.kills, moments)
    raise SystemExit(0 if trained and predicted else 1)


if __name__ == "__main__":
    main()
