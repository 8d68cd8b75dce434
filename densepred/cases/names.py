"""The names of classes and channels, from the configuration or from the list of cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densepred.cases.lists import IMAGE, csv_rows, image_columns, read_json
from densepred.config import DataConfig
from densepred.errors import InputError

IGNORE_NAME = "ignore"
"""A label of this name in an nnU-Net `dataset.json` marks voxels without a truth."""


def class_names(data: DataConfig) -> dict[int, str]:
    """Label value in the files -> class name, background first; empty where nobody names them.

    Raises:
        InputError: the list defines regions (several values for one name), or names that make no sense.
    """
    if data.classes:
        return dict(data.classes)
    names = {value: name for value, name in _listed(data).items() if value not in ignored_values(data)}
    return dict(sorted(names.items()))


def ignored_values(data: DataConfig) -> tuple[int, ...]:
    """Label values that are left out of loss and scores: in the order given, then the one that the list names so."""
    listed = {value for value, name in _listed(data).items() if name == IGNORE_NAME} - set(data.classes)
    return tuple(dict.fromkeys((*data.ignore, *sorted(listed))))


def channel_names(data: DataConfig) -> tuple[str, ...]:
    """The names of the channels in their order; empty where nobody names them."""
    if isinstance(data.images, dict):
        return tuple(data.images)
    if data.dataset is None:
        return ()
    path = Path(data.root) / data.dataset
    if path.suffix.lower() == ".csv":
        columns = image_columns(csv_rows(path)[0], path)
        return () if columns == [IMAGE] else tuple(name.removeprefix(f"{IMAGE}:") for name in columns)
    content = read_json(path)
    named = content.get("channel_names") or content.get("modality") or {}
    if not isinstance(named, Mapping) or not all(str(key).isdigit() for key in named):
        raise InputError("the channels are not numbered", 'write, say, "channel_names": {"0": "T1"}', path)
    return tuple(str(named[key]) for key in sorted(named, key=int))


def _listed(data: DataConfig) -> dict[int, str]:
    """The labels of a `dataset.json`: Decathlon's {"1": "liver"} or nnU-Net's {"liver": 1}."""
    if data.dataset is None or data.dataset.lower().endswith(".csv"):
        return {}
    path = Path(data.root) / data.dataset
    labels: Any = read_json(path).get("labels") or {}
    if not isinstance(labels, Mapping):
        raise InputError("labels is no mapping", 'write, say, "labels": {"0": "background", "1": "liver"}', path)
    if any(isinstance(value, list) for value in labels.values()):
        names = [name for name, value in labels.items() if isinstance(value, list)]
        what = f"defines regions ({', '.join(names)}), which are no values of voxels"
        raise InputError(what, "name the separate classes in data.classes, and what they make up in data.regions", path)
    out: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (key, value) if isinstance(value, str) else (value, key)
        if not str(number).removeprefix("-").isdigit():
            raise InputError(f"label {key!r}: {value!r} has no number", 'write {"1": "liver"} or {"liver": 1}', path)
        out[int(number)] = str(name)
    return out
