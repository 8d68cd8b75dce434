"""The cases of a list that is given to predict: a CSV, or the `dataset.json` of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from densepred.cases.case import Case, check_ids, missing_files, raise_all
from densepred.cases.lists import read_inputs
from densepred.cases.names import channel_names
from densepred.config import DataConfig
from densepred.errors import InputError


def is_list(path: Path) -> bool:
    """Whether a file is a list of cases rather than an image, by its name."""
    return path.suffix.lower() in (".csv", ".json")


def listed_cases(path: Path, data: DataConfig, channels: Sequence[str]) -> list[Case]:
    """The cases of a list, with absolute paths and the channels in the order of the model.

    A case of which a file is not there has a `fault`, so that it fails alone.

    Args:
        path: of the list; paths in it are relative to its folder.
        data: of the recipe.
        channels: names of the model's.

    Raises:
        InputError: what cannot be read as a list, ids that cannot be names of files or are there twice, planes that
            the model does not know, or other channels than its.
        UnsafeError: an id that is a path.
    """
    found = read_inputs(path)
    check_ids(found)
    for role in ("mask", "weight"):
        if role not in data.planes() and any(getattr(case, role) is not None for case in found.cases):
            what = f"the list has a {role}, and the model was trained without one (data.validity.{role})"
            found.error("", path, what, f"take the column {role} out: it would not be used")
    raise_all(problem for problem in found.problems if problem.severity == "error")
    names = channel_names(DataConfig(root=str(path.parent), dataset=path.name))
    _check_names(names, channels, path)
    return [_in_order(_checked(case), names, channels) for case in found.cases]


def _checked(case: Case) -> Case:
    """With absolute paths, and a fault if a file is missing."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path))

    images = tuple(Path(os.path.abspath(image)) for image in case.images)
    whole = Case(case.id, images, absolute(case.label), None, absolute(case.mask), absolute(case.weight))
    return replace(whole, fault=next(iter(missing_files(whole, label=False)), None))


def _check_names(names: Sequence[str], channels: Sequence[str], path: Path) -> None:
    """Refuse columns of other names than the model's channels have, unless these are numbered only.

    Other lists than a CSV name the modalities rather than the channels.
    """
    numbered = all(name == f"channel {number}" for number, name in enumerate(channels))
    if path.suffix.lower() == ".csv" and names and not numbered and sorted(names) != sorted(channels):
        what = f"the list has the channels {', '.join(names)}; the model has {', '.join(channels)}"
        raise InputError(what, f"name the columns {', '.join(f'image:{name}' for name in channels)}", path)


def _in_order(case: Case, names: Sequence[str], channels: Sequence[str]) -> Case:
    """With the channels in the order of the model, where list and model have the same ones in another order."""
    if list(names) == list(channels) or sorted(names) != sorted(channels) or case.fault is not None:
        return case
    if len(case.images) == len(names) == len(set(names)):
        return replace(case, images=tuple(case.images[names.index(name)] for name in channels))
    what = f"the list has the channels in the order {', '.join(names)}; the model has {', '.join(channels)}"
    raise InputError(what, "give a file for each channel", case.images[0], case.id)
