"""What tables of scores have in common: statistics over cases, and how they are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from densepred.files import atomic_write
from densepred.metrics.bootstrap import interval


@dataclass(frozen=True)
class Failure:
    """A case that could not be scored, and why."""

    case: str
    file: str
    what: str
    fix: str


def save_failures(failures: Sequence[Failure], folder: Path) -> None:
    """Write failures.tsv, a row for each."""
    rows = [{key: " ".join(text.split()) for key, text in vars(failure).items()} for failure in failures]
    atomic_write(folder / "failures.tsv", delimited(["case", "file", "what", "fix"], rows, "\t"))


def statistics_of(values: np.ndarray, drawn: np.ndarray | None) -> dict[str, float]:
    """Of the values (n,) that are not nan; `drawn` are the draws (D, n) of cases."""
    known = values[~np.isnan(values)]
    if not known.size:
        empty = dict.fromkeys(("mean", "low", "high", "std", "median", "lowest", "highest"), math.nan)
        return {**empty, "n": 0, "n_nan": len(values)}
    bounds = interval(values[:, None], (), drawn)
    return {
        "mean": float(known.mean()),
        "low": bounds.low,
        "high": bounds.high,
        "std": float(known.std(ddof=1)) if known.size > 1 else math.nan,
        "median": float(np.median(known)),
        "lowest": float(known.min()),
        "highest": float(known.max()),
        "n": known.size,
        "n_nan": len(values) - known.size,
    }


def mean_of(values: Sequence[float]) -> float:
    """The mean of the values that are not nan; nan if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def without_nan(value: Any) -> Any:
    """The same with None for nan, ready for JSON."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def delimited(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], delimiter: str) -> str:
    """Rows as a table in a text file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def version_of() -> str:
    """That of densepred."""
    try:
        return version("densepred")
    except PackageNotFoundError:
        return "not installed"
