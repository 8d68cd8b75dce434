"""Cross-validation folds, by group and seed or from a file. What belongs together never spans two folds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densepred.cases.case import Case
from densepred.config import DataConfig
from densepred.errors import InputError

Fold = tuple[list[str], list[str]]
"""Ids to train on, ids to validate on."""
_FORM = 'the file is a list of {"train": [ids], "val": [ids]}'
_NAMED = 5


def split(cases: Sequence[Case], data: DataConfig) -> tuple[list[Case], list[Case]]:
    """The cases to train on and to validate on, by `data.fold`.

    Raises:
        InputError: there is no such fold, or the folds are not valid.
    """
    if data.fold == "all":
        return list(cases), []
    every = folds(cases, data)
    if data.fold >= len(every):
        raise InputError(f"fold {data.fold} of {len(every)}: the folds count from 0", "choose another data.fold")
    by_id = {case.id: case for case in cases}
    train, val = every[data.fold]
    return [by_id[case] for case in train], [by_id[case] for case in val]


def folds(cases: Sequence[Case], data: DataConfig) -> list[Fold]:
    """All folds, ids sorted within each.

    Args:
        cases: all cases.
        data: number of folds, their seed, grouping, and the file with given folds, if any. The folds do not depend on
            the order of the cases, nor on any library.

    Raises:
        InputError: fewer groups than folds, or a file whose folds name absent ids or share an id or a group.
    """
    groups = groups_of(cases, data)
    if data.splits is not None:
        return _given(Path(data.root) / data.splits, groups)
    members: dict[str, list[str]] = {}
    for case, group in groups.items():
        members.setdefault(group, []).append(case)
    if len(members) < data.folds:
        what = f"{len(members)} groups of cases cannot make {data.folds} folds"
        raise InputError(what, "lower data.folds, add cases, or set data.fold=all")
    drawn = sorted(members, key=lambda group: hashlib.sha256(f"{data.seed}:{group}".encode()).digest())
    parts: list[list[str]] = [[] for _ in range(data.folds)]
    for group in sorted(drawn, key=lambda group: -len(members[group])):  # large groups first, each to the smallest fold
        min(parts, key=len).extend(members[group])
    return [(sorted(set(groups) - set(part)), sorted(part)) for part in parts]


def groups_of(cases: Sequence[Case], data: DataConfig) -> dict[str, str]:
    """Case id -> group: by `data.group` on the id, else by the list's column, else each case by itself.

    Raises:
        InputError: ids that `data.group` does not match.
    """
    if data.group is None:
        return {case.id: case.group if case.group is not None else case.id for case in cases}
    expression = re.compile(data.group)
    found = {case.id: expression.search(case.id) for case in cases}
    unmatched = [case for case, match in found.items() if match is None or match[1] is None]
    if unmatched:
        what = f"data.group '{data.group}' matches nothing in {len(unmatched)} ids: {_some(unmatched)}"
        raise InputError(what, "correct the expression so that its group names the subject")
    return {case: match[1] for case, match in found.items() if match is not None}


def _given(path: Path, groups: dict[str, str]) -> list[Fold]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "correct data.splits", path) from error
    except ValueError as error:
        raise InputError(f"no valid JSON: {error}", _FORM, path) from error
    if not isinstance(content, list) or not content or not all(_is_fold(fold) for fold in content):
        raise InputError("not in the form of folds", _FORM, path)
    faults: list[str] = []
    for number, fold in enumerate(content):
        train, val = fold["train"], fold["val"]
        absent = [case for case in [*train, *val] if case not in groups]
        twice = sorted({case for case in [*train, *val] if [*train, *val].count(case) > 1})
        present = [{groups[case] for case in side if case in groups} for side in (train, val)]
        torn = sorted(present[0] & present[1])
        if absent:
            faults.append(f"fold {number} lists {len(absent)} ids that are not in the data: {_some(absent)}")
        if twice:
            faults.append(f"fold {number} lists {len(twice)} ids more than once: {_some(twice)}")
        if torn and not twice:
            faults.append(f"fold {number} has {len(torn)} groups on both sides: {_some(torn)}")
        if not train or not val:
            faults.append(f"fold {number} has {len(train)} ids to train on and {len(val)} to validate on")
    if faults:
        raise InputError("\n  ".join(faults), "correct the folds, or leave out data.splits to have them made", path)
    return [(sorted(fold["train"]), sorted(fold["val"])) for fold in content]


def _is_fold(fold: Any) -> bool:
    sides = [fold.get(side) for side in ("train", "val")] if isinstance(fold, dict) else []
    return len(sides) == 2 and all(isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in sides)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
