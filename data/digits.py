"""Write scikit-learn's handwritten digits as images with a table: `python data/digits.py data/digits`.

1,797 digits of 13 people, 8 x 8 pixels with 17 levels of grey each (the test part of the set of E. Alpaydin and
C. Kaynak, UCI machine learning repository, 1998, CC BY 4.0), as PNG files in `train/` and `test/`, and `train.csv` and
`test.csv` with the columns id, image and digit. A fixed third of each digit is held out, of the same writers.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densepred.files import atomic_path, atomic_write, writable_folder

SEED = 0
"""Of the third that is held out."""
STEP = 15
"""Grey per level: 16 levels of ink reach 240."""


def held_out(digits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the digits (n,) are held out: of each of the ten a third, rounded."""
    out, rng = np.zeros(len(digits), bool), np.random.default_rng(SEED)
    for digit in range(10):
        places = np.flatnonzero(digits == digit)
        out[rng.permutation(places)[: round(len(places) / 3)]] = True
    return out


def write_set(out: Path) -> dict[str, int]:
    """Write the images and tables; how many each part has."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    images, digits = found.images.astype(np.uint8) * STEP, found.target.astype(np.int64)
    test, counts = held_out(digits), {}
    for part, chosen in {"train": ~test, "test": test}.items():
        writable_folder(out / part)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["id", "image", "digit"])
        for index in np.flatnonzero(chosen):
            name = f"digit_{index:04d}"
            with atomic_path(out / part / f"{name}.png") as path:
                Image.fromarray(images[index]).save(path, format="png")
            writer.writerow([name, f"{part}/{name}.png", digits[index]])
        atomic_write(out / f"{part}.csv", table.getvalue())
        counts[part] = int(chosen.sum())
    return counts


def main() -> None:
    """Parse the command line and write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write to")
    arguments = parser.parse_args()
    try:
        counts = write_set(arguments.out)
    except ModuleNotFoundError as error:
        raise SystemExit(f"ERROR {error}\n  fix: pip install scikit-learn") from None
    print(f"{counts['train']} digits to train on and {counts['test']} held out in {arguments.out}")


if __name__ == "__main__":
    main()
