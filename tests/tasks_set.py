"""A small data set with labels, a map of numbers and a table, and recipes for all kinds of heads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from densepred import config as configuration
from densepred.config import Config

COUNT, SIZE = 8, 24


def write_set(root: Path, count: int = COUNT, size: int = SIZE) -> Path:
    """FITS files with IMAGE, LABEL (0, 1 a disc, 2 its core) and DEPTH (NaN in a corner), and table.csv.

    The disc is bright or dark (`tone`), its radius is `radius`; DEPTH is 100 + 40 times the image without noise.
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        rng = np.random.default_rng(number)
        radius, bright = 4 + number % 4, number % 2 == 0
        y, x = np.indices((size, size)) - rng.uniform(9, 15, 2)[:, None, None]
        distance = np.hypot(y, x)
        label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
        clean = np.where(label > 0, 2.0 if bright else -2.0, 0.0)
        depth = 100 + 40 * clean
        depth[:5, :5] = np.nan
        image = clean + rng.normal(0, 0.2, clean.shape)
        planes = {"IMAGE": image.astype(np.float32), "LABEL": label, "DEPTH": depth.astype(np.float32)}
        units = [fits.ImageHDU(plane, name=name) for name, plane in planes.items()]
        fits.HDUList([fits.PrimaryHDU(), *units]).writeto(root / f"c{number}.fits")
        rows.append([f"c{number}", "bright" if bright else "dark", radius, 10 * radius + number, number % 3])
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "tone", "radius", "age", "site"], *rows])
    return root


LABELS = {"labels": "{id}.fits[LABEL]", "classes": {0: "sky", 1: "rim", 2: "core"}}
REGIONS = {"regions": {"disc": ["rim", "core"], "core": ["core"]}}
DEPTH = {"depth": {"file": "{id}.fits[DEPTH]", "unit": "m"}}
TONE = {"tone": {"column": "tone", "classes": ["dark", "bright"]}}
RADIUS = {"radius": {"column": "radius", "unit": "pix"}}
WITH_TABLE = {"table": "table.csv", "covariates": ["age", "site"]}


def recipe(root: Path, data: dict[str, Any], heads: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A recipe that trains in seconds."""
    raw = {
        "data": {"root": str(root), "images": "{id}.fits[IMAGE]", "normalize": "none", "folds": 4} | data,
        "model": {"dims": 2, "channels": [8, 16], "norm": "none"},
        "patch": {"size": [SIZE, SIZE], "batch": 4},
        "augment": [{"flip": [0, 1]}],
        "heads": heads or {},
        "optimizer": {"name": "adamw", "lr": 0.01, "ema": 0.0},
        "training": {"epochs": 1, "steps": 2, "tensorboard": False, "device": "cpu", "precision": "float32"},
        "inference": {"device": "cpu", "precision": "float32"},
    }
    for section, values in sections.items():
        raw[section] |= values
    return configuration.check(raw, {}, "test")
