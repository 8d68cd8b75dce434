"""What `check` finds: problems of cases, and numbers of the set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from densepred.cases.case import Case, Problem
from densepred.cases.labels import LabelCounts


@dataclass
class Facts:
    """What reading one case has shown; the shape is empty where it could not be read."""

    case: Case
    shape: tuple[int, ...] = ()
    """`(C, *spatial)`."""
    spacing: tuple[float, ...] = ()
    digest: str = ""
    """Hash of the voxels of the image."""
    labels: LabelCounts = field(default_factory=LabelCounts)
    rows: list[Problem] = field(default_factory=list)

    def add(self, severity: Literal["error", "note"], file: str | Path, what: str, fix: str = "") -> None:
        """Add a row for this case."""
        self.rows.append(Problem(self.case.id, severity, str(file), what, fix))


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest along each axis, over the cases."""

    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]

    def __str__(self) -> str:
        return f"{row_of(self.low)} to {row_of(self.high)}, median {row_of(self.median)}"


@dataclass(frozen=True)
class Summary:
    """Numbers of a whole set."""

    cases: int
    """Cases that could be read."""
    channels: tuple[str, ...]
    """Names, or numbers where they have none."""
    shapes: Spread | None
    spacings: Spread | None
    shares: dict[str, float]
    """Class name -> its share of the voxels that have a class."""

    def __str__(self) -> str:
        lines = [f"cases     {self.cases}", f"channels  {len(self.channels)}: {', '.join(self.channels)}"]
        if self.shapes is not None and self.spacings is not None:
            lines += [f"shape     {self.shapes}", f"spacing   {self.spacings}"]
        if self.shares:
            lines.append("classes   " + ", ".join(f"{name} {share:.2%}" for name, share in self.shares.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The problems, errors first, and the numbers of the set."""

    rows: list[Problem]
    summary: Summary

    @property
    def ok(self) -> bool:
        """Whether the set can be trained on: there may be notes, but no errors."""
        return all(row.severity != "error" for row in self.rows)


def summarize(facts: Sequence[Facts], names: Mapping[int, str], channels: tuple[str, ...]) -> Summary:
    """The numbers of the cases that could be read; shapes of those with as many axes as the first."""
    counts: dict[str, int] = dict.fromkeys(names.values(), 0)
    for fact in facts:
        for value, count in fact.labels.values.items():
            if value in names:
                counts[names[value]] += count
    total = sum(counts.values()) or 1
    alike = [fact for fact in facts if len(fact.shape) == len(facts[0].shape)]
    return Summary(
        cases=len(facts),
        channels=channels or tuple(f"channel {number}" for number in range(facts[0].shape[0] if facts else 0)),
        shapes=_spread([fact.shape[1:] for fact in alike]),
        spacings=_spread([fact.spacing for fact in alike]),
        shares={name: count / total for name, count in counts.items()},
    )


def _spread(rows: Sequence[Sequence[float]]) -> Spread | None:
    if not rows:
        return None
    axes = list(zip(*rows, strict=True))
    return Spread(tuple(map(min, axes)), tuple(map(statistics.median, axes)), tuple(map(max, axes)))


def row_of(values: Sequence[float]) -> str:
    """Numbers per axis as text: `35 x 51 x 35`."""
    return " x ".join(f"{value:g}" for value in values)
