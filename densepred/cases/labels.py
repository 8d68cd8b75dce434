"""Label values in files -> class indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.errors import InputError

IGNORE = -1
"""Inside the program: a voxel without a truth."""
NEAR = 1e-3
"""A label stored as a float may lie this far from its integer."""
_UNKNOWN = -2
_MAX_LISTED = 12


@dataclass
class LabelCounts:
    """How many voxels hold each value: integers (after rounding), others (`odd`), NaN (`missing`)."""

    values: Counter[int] = field(default_factory=Counter)
    odd: Counter[float] = field(default_factory=Counter)
    missing: int = 0

    def add(self, array: np.ndarray) -> None:
        """Count a portion, of any shape."""
        if array.dtype.kind == "f":
            nan = np.isnan(array)
            self.missing += int(np.count_nonzero(nan))
            array = array[~nan]
        values, counts = np.unique(array, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if abs(value) < 2**53 and abs(value - round(value)) <= NEAR:
                self.values[round(value)] += count
            else:
                self.odd[value] += count

    def unknown(self, known: Iterable[int]) -> str:
        """Values beyond the known ones with their counts, or nothing: `7 (12 voxels), 0.5 (3 voxels)`."""
        expected = set(known)
        rows: list[tuple[float, int]] = [(v, n) for v, n in sorted(self.values.items()) if v not in expected]
        rows += sorted(self.odd.items())
        listed = ", ".join(f"{value:g} ({count} voxels)" for value, count in rows[:_MAX_LISTED])
        return listed + (f" and {len(rows) - _MAX_LISTED} more" if len(rows) > _MAX_LISTED else "")


def mapping_to_paste(values: Iterable[int], names: Mapping[int, str]) -> str:
    """A `classes` mapping in YAML that covers the values, keeping the names there are.

    Example:
        >>> mapping_to_paste([0, 2], {0: "background"})
        'classes: {0: background, 2: class_2}'
    """
    every = sorted({*values, *names})
    default = {0: "background"} | {value: f"class_{value}".replace("-", "minus_") for value in every if value}
    return "classes: {" + ", ".join(f"{value}: {names.get(value, default[value])}" for value in every) + "}"


def map_labels(array: np.ndarray, plan: Plan, case: Case) -> np.ndarray:
    """Class indices of label values, of the same shape.

    Args:
        array: label values as stored, `(*any)`; floats within 1e-3 of an integer count as that integer.
        plan: says which values are which class, and which are ignored.
        case: for the message.

    Returns:
        int16 with 0..K-1, and -1 where the value is ignored or NaN.

    Raises:
        InputError: values that no class has, with their counts and a mapping to paste.
    """
    if plan.instances:
        array = np.where(array > 0, array.dtype.type(1), array)
    known = {**plan.label_map, **dict.fromkeys(plan.ignore, IGNORE)}
    out = np.empty(array.shape, np.int16)
    for plane in range(array.shape[0]):  # plane by plane, for the memory's sake
        out[plane] = _map(array[plane], known)
    if (out == _UNKNOWN).any():
        raise unknown_of([array], plan, case)
    return out


def unknown_of(slabs: Iterable[np.ndarray], plan: Plan, case: Case) -> InputError:
    """The error for the values in some arrays that no class has."""
    known, counts = {**plan.label_map, **dict.fromkeys(plan.ignore, IGNORE)}, LabelCounts()
    for slab in slabs:
        counts.add(slab[_map(slab, known) == _UNKNOWN])
    return unknown_labels(counts, known, {v: plan.classes[i] for v, i in plan.label_map.items()}, case)


def unknown_labels(counts: LabelCounts, known: Iterable[int], names: Mapping[int, str], case: Case) -> InputError:
    """The error for values that no class has."""
    fix = "make the labels integers, without interpolating them"
    if not counts.odd:
        fix = f"name them in the data section, or ignore them:  {mapping_to_paste(counts.values, names)}"
    what = f"label values without a class: {counts.unknown(known)}"
    return InputError(what, fix, case.label, case.id)


def _map(values: np.ndarray, known: dict[int, int]) -> np.ndarray:
    stored = np.array(sorted(known), np.int64)
    index = np.array([known[value] for value in stored.tolist()], np.int16)
    missing = near = None
    if values.dtype.kind == "f":
        missing, whole = np.isnan(values), np.rint(values)
        with np.errstate(invalid="ignore"):
            near = np.abs(values - whole) <= NEAR
        values = whole
    at = np.minimum(np.searchsorted(stored, values), len(stored) - 1)
    out = np.where(stored[at] == values, index[at], np.int16(_UNKNOWN))
    if near is not None and missing is not None:
        out[~near] = _UNKNOWN
        out[missing] = IGNORE
    return out
