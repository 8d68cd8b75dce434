"""Targets beside label maps: maps of numbers, and columns of a table; covariates.

A plan fixes what was found in the training cases: names of classes, means and deviations. In the arrays of a case the
maps follow the channels of the image, each map's numbers and then 1 where they are known, else 0: so they are cut and
moved with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from densepred.cases.case import Case
from densepred.cases.estimates import CONSTANT
from densepred.cases.lists import csv_rows
from densepred.cases.quantiles import slab_thickness
from densepred.config import Config, DataConfig, Section, TargetConfig
from densepred.config.data import TARGET
from densepred.config.tasks import kind_of
from densepred.errors import InputError
from densepred.volumes import Volume

if TYPE_CHECKING:
    from densepred.cases.plan import Plan

_SHOWN = 5
_MAX_CLASSES = 1000


class Standard(Section):
    """What makes numbers standard: (value - mean) / deviation."""

    mean: float = 0.0
    """Of the training cases."""
    deviation: Annotated[float, Field(gt=0)] = 1.0
    """Of the training cases."""


class Target(Standard):
    """A target as it was learnt."""

    kind: Literal["regression", "classification", "scalar"]
    """A map of numbers; a class or a number for the whole image."""
    classes: tuple[str, ...] = ()
    """Names of the classes by index, as they stand in the table."""
    unit: str = ""
    """Of the numbers."""
    column: str = ""
    """Of the table, where the target is one."""


class Covariate(Standard):
    """A column of numbers beside the image."""

    name: str
    """Of the column."""


@dataclass(frozen=True)
class Table:
    """A CSV with a column `id`.

    Attributes:
        path: of the file.
        columns: their names.
        rows: id -> column -> cell.
    """

    path: Path
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, str]]

    def cell(self, case: str, column: str) -> str:
        """A cell, blanks removed.

        Raises:
            InputError: no such row or column.
        """
        if column not in self.columns:
            what = f"no column {column} among {', '.join(self.columns) or 'none'}"
            raise InputError(what, "name the columns as they stand there", self.path)
        if case not in self.rows:
            raise InputError("no row of this id", "add the row, or leave the case out", self.path, case)
        return self.rows[case][column]

    def number(self, case: str, column: str) -> float:
        """A number; NaN where the cell is empty.

        Raises:
            InputError: no such row or column, or no number.
        """
        text = self.cell(case, column)
        try:
            return float(text) if text else math.nan
        except ValueError:
            what = f"{column} is {text!r}, which is no number"
            raise InputError(what, "correct the table", self.path, case) from None


def read_table(data: DataConfig) -> Table | None:
    """The table of a recipe; None if it has none.

    Raises:
        InputError: it cannot be read, has no column id, or an id twice.
    """
    if data.tabular is None:
        return None
    return open_table(Path(data.root) / data.tabular)


def open_table(path: Path) -> Table:
    """A table of one row a case.

    Raises:
        InputError: it cannot be read, has no column id, or an id twice.
    """
    columns, rows = csv_rows(path)
    if "id" not in columns:
        raise InputError("the table has no column id", "add one with the ids of the cases", path)
    by_id: dict[str, Mapping[str, str]] = {}
    for line, row in rows.items():
        if row["id"] in by_id:
            raise InputError(f"line {line} has an id that was there: {row['id']}", "keep one row a case", path)
        by_id[row["id"]] = row
    return Table(path, columns, by_id)


def make_targets(config: Config, plan: Plan, cases: Sequence[Case]) -> dict[str, Target]:
    """What the training cases say of the targets.

    Args:
        config: names them.
        plan: how files are read.
        cases: of the training.

    Raises:
        InputError: the table lacks what is asked of it, a class is unknown, or a map cannot be read.
    """
    data, found = config.data, {}
    table = read_table(data)
    for name, target in data.targets.items():
        kind = kind_of(target)
        if kind == "classification":
            assert table is not None  # the recipe was checked for it
            classes = _classes(name, target, table, cases)
            found[name] = Target(kind=kind, classes=classes, column=str(target.column))
            continue
        mean, deviation = 0.0, 1.0
        if target.mean is not None and target.deviation is not None:
            mean, deviation = target.mean, target.deviation
        elif target.standardize:
            sums = _Moments()
            for case in cases:
                for part in _numbers(name, target, table, case, plan):
                    sums.add(part)
            mean, deviation = sums.standard(name)
            if name in config.heads and config.heads[name].positive:
                mean, deviation = 0.0, math.hypot(mean, deviation)  # zero stays where it is
        column = target.column or ""
        found[name] = Target(kind=kind, unit=target.unit, column=column, mean=mean, deviation=deviation)
    return found


def make_covariates(data: DataConfig, cases: Sequence[Case]) -> tuple[Covariate, ...]:
    """The covariates with their means and deviations: those of the recipe, or else over the training cases.

    Raises:
        InputError: a cell is missing, or no number.
    """
    table, found = read_table(data), []
    for name, given in data.covariates.items():
        if given is not None:
            found.append(Covariate(name=name, mean=given.mean, deviation=given.deviation))
            continue
        assert table is not None
        values = [covariate(table, case.id, name) for case in cases]
        mean, deviation = float(np.mean(values)), float(np.std(values))
        found.append(Covariate(name=name, mean=mean, deviation=_or_one(deviation, mean)))
    return tuple(found)


def covariate(table: Table, case: str, name: str) -> float:
    """The number of a case, which has to be there.

    Raises:
        InputError: it is not.
    """
    value = table.number(case, name)
    if not math.isfinite(value):
        raise InputError(f"no {name}: the network was given it of every case", "fill the cell", table.path, case)
    return value


def covariates_of(plan: Plan, table: Table | None, case: str) -> np.ndarray:
    """The standardised covariates of a case, float32 (F,).

    Raises:
        InputError: there is no table, or a cell is missing.
    """
    if plan.covariates and table is None:
        names = ", ".join(one.name for one in plan.covariates)
        raise InputError(f"the network needs {names} of each image", "give data.table=FILE.csv", case=case)
    values = [(covariate(table, case, one.name) - one.mean) / one.deviation for one in plan.covariates if table]
    return np.array(values, np.float32)


def truth_of(name: str, target: Target, table: Table, case: str) -> float:
    """The truth of a target of whole images: the index of a class, or a standard number; -1 or NaN if not known.

    Raises:
        InputError: no such row, a class that training did not know, or no number.
    """
    column = target.column
    if target.kind == "scalar":
        return (table.number(case, column) - target.mean) / target.deviation
    text = table.cell(case, column)
    if text and text not in target.classes:
        what = f"{column} is {text!r}, which is none of the classes {_some(target.classes)}"
        raise InputError(what, f"correct the table, or name it in data.targets.{name}.classes", table.path, case)
    return float(target.classes.index(text)) if text else -1.0


class Maps:
    """The maps of an opened case, which follow the image's channels: numbers, where they are known, numbers ...

    Args:
        opened: name -> its map, on the grid of the image, in the order of `plan.maps`.
        plan: makes numbers standard.
    """

    def __init__(self, opened: Mapping[str, Volume], plan: Plan) -> None:
        self._opened, self._plan = opened, plan

    def planes(self, start: int, stop: int, valid: np.ndarray | None) -> np.ndarray:
        """float32 `(2 T, n, *rest)`; numbers are 0 where they are not known, or the image `(n, *rest)` is not valid."""
        out = []
        for name, volume in self._opened.items():
            values, target = volume[:, start:stop][0], self._plan.targets[name]
            known = np.isfinite(values) if valid is None else np.isfinite(values) & valid
            out += [np.where(known, (values - target.mean) / target.deviation, 0), known]
        return np.stack(out).astype(np.float32)


def settled(planes: np.ndarray, maps: int) -> np.ndarray:
    """Resampled planes `(C + 2 T, *any)`, in which numbers are known where more than half of what made them was.

    Args:
        planes: changed in place.
        maps: T.

    Example:
        >>> settled(np.array([[5.0, 5.0], [1.5, 0.1], [0.75, 0.25]]), 1).tolist()
        [[5.0, 5.0], [2.0, 0.0], [1.0, 0.0]]
    """
    for at in range(len(planes) - 2 * maps, len(planes), 2):
        numbers, share = planes[at], planes[at + 1]
        known = share > 0.5
        planes[at] = np.divide(numbers, share, out=np.zeros_like(numbers), where=known)
        planes[at + 1] = known
    return planes


@contextmanager
def open_maps(case: Case, plan: Plan, image: Volume) -> Iterator[Maps]:
    """Open the maps of a case.

    Raises:
        InputError: one is missing, or does not lie on the image's grid.
    """
    from densepred.cases.preprocess import grid_fault

    with ExitStack() as stack:
        opened = {}
        for name in plan.maps:
            path = _map_of(case, name)
            opened[name] = stack.enter_context(plan.reading.open_plane(path))
            fault = grid_fault(image, opened[name])
            if fault is not None:
                what, fix = (text.replace("label", "map") for text in fault)
                raise InputError(what, fix, path, case.id)
        yield Maps(opened, plan)


def _map_of(case: Case, name: str) -> Path:
    path = dict(case.maps).get(f"{TARGET}{name}")
    if path is None:
        raise InputError(f"no map of {name}", "add it or leave the case out", case.images[0], case.id)
    return path


def _numbers(name: str, target: TargetConfig, table: Table | None, case: Case, plan: Plan) -> Iterator[np.ndarray]:
    """The numbers of a case, part by part."""
    if target.column is not None:
        assert table is not None
        yield np.array([table.number(case.id, target.column)])
        return
    with plan.reading.open_plane(_map_of(case, name)) as volume:
        for _, _, slab in volume.slabs(slab_thickness(volume.shape)):
            yield slab


class _Moments:
    """Sums over finite numbers, by which means and deviations are found part by part (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)].astype(np.float64)
        if not len(values):
            return
        total, mean = self.count + len(values), float(values.mean())
        apart = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + apart**2 * self.count * len(values) / total
        self.mean += apart * len(values) / total
        self.count = total

    def standard(self, name: str) -> tuple[float, float]:
        if not self.count:
            raise InputError(f"no training case has a known value of {name}", "check data.targets and the files")
        deviation = math.sqrt(self.squares / self.count)
        return self.mean, _or_one(deviation, self.mean)


def _or_one(deviation: float, mean: float) -> float:
    """A deviation to divide by: 1 of numbers that are all the same, to rounding."""
    return deviation if deviation > CONSTANT * abs(mean) else 1.0


def _classes(name: str, target: TargetConfig, table: Table, cases: Sequence[Case]) -> tuple[str, ...]:
    held = {text for case in cases if (text := table.cell(case.id, str(target.column)))}
    classes = target.classes
    if classes == "auto":
        classes = tuple(sorted(held, key=_order))
    assert isinstance(classes, tuple)
    if not 2 <= len(classes) <= _MAX_CLASSES:
        what = f"the column {target.column} holds {len(classes)} classes in the training cases: {_some(classes)}"
        raise InputError(what, f"2 to {_MAX_CLASSES} can be told apart; check data.targets.{name}", table.path)
    strange = sorted(held - set(classes), key=_order)
    if strange:
        what = f"the column {target.column} holds {_some(strange)}, none of the classes {_some(classes)}"
        raise InputError(what, f"correct the table, or name them in data.targets.{name}.classes", table.path)
    return classes


def _order(text: str) -> tuple[float, str]:
    """Numbers by their size, then words by the alphabet."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
