"""Write `kinds.csv` for the nuclei of BBBC038: `python data/nuclei_kinds.py data/nuclei`.

The table has a row for each of `images/*.png` with its id and kind: `fluorescence` where the image is grey and dark,
else `stained` (coloured, or dark on bright).
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

from densepred.files import atomic_write

COLOURED, BRIGHT = 8.0, 110.0
"""Mean difference between the largest and smallest of red, green and blue, and median grey, of 255."""


def kind_of(image: Image.Image) -> str:
    """`fluorescence` or `stained`."""
    rgb = np.asarray(image.convert("RGB"), np.float32)
    coloured = float((rgb.max(2) - rgb.min(2)).mean()) > COLOURED
    return "stained" if coloured or float(np.median(rgb)) > BRIGHT else "fluorescence"


def write_table(folder: Path) -> dict[str, int]:
    """Write the table; how many there are of each kind."""
    table, counts = io.StringIO(), {"fluorescence": 0, "stained": 0}
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "kind"])
    for path in sorted((folder / "images").glob("*.png")):
        with Image.open(path) as image:
            kind = kind_of(image)
        counts[kind] += 1
        writer.writerow([path.stem, kind])
    atomic_write(folder / "kinds.csv", table.getvalue())
    return counts


def main() -> None:
    """Parse the command line and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the folder images")
    counts = write_table(parser.parse_args().folder)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))


if __name__ == "__main__":
    main()
