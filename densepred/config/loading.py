"""Reading a recipe: `load` applies `key.sub=value` overrides and reports every fault at once, with path and line."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from densepred.config.base import Section
from densepred.config.contradictions import contradictions, nearest
from densepred.config.data import DataConfig
from densepred.config.schema import Config
from densepred.config.tasks import named
from densepred.errors import InputError
from densepred.yamlfile import Dumper, read_yaml, set_path, value_of


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` texts, the value in YAML's syntax; they win over the file.

    Raises:
        InputError: every fault of the file and the overrides, one line each with its place.
        UnsafeError: the file holds tags, duplicate keys, too many aliases, or is too large or too deep.
    """
    data, lines = read_yaml(Path(path))
    if isinstance(data.get("augment"), str):
        data["augment"] = _long(data["augment"], ("augment",), path)  # faults are told of its key
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"override {text!r} is not of the form key.sub=value", "write, say, training.epochs=40")
        path_in = tuple(key.split("."))
        section: Any = data
        for at, name in enumerate(path_in[:-1], 1):
            if not isinstance(section, dict) or name not in section:
                break
            section[name] = _long(section[name], path_in[:at], path)
            section = section[name]
        set_path(data, [int(part) if part.isdecimal() else part for part in path_in], value_of(value, text))
        lines[path_in] = 0
    return check(data, lines, str(path))


def _long(value: Any, keys: tuple[str, ...], path: str | Path) -> Any:
    """The mapping that a short form stands for, so that what it says stays where an override changes a part of it."""
    key, above = keys[-1], keys[-2:-1]
    if key == "augment" and isinstance(value, list):
        pairs = [pair for entry in value if isinstance(entry, dict) for pair in entry.items()]
        if len(dict(pairs)) != len(value):
            what = "an override cannot change augment, whose entries are not each one transform, listed once"
            raise InputError(what, "change the list", path)
        return {"recipe": "none", **{name: {} if changes is None else changes for name, changes in pairs}}
    if above == ("augment",) and isinstance(value, list):
        return {"axes": value}
    if key == "covariates" and keys[0] == "data":
        return named(value)
    if above == ("loss",) and isinstance(value, int | float) and not isinstance(value, bool):
        return {"weight": value}
    if keys[:2] == ("data", "images") and len(keys) == 3 and isinstance(value, str):
        return {"file": value}
    short = {"augment": "recipe", "normalize": "name"}
    return {short[key]: value} if key in short and isinstance(value, str) else value


def check(data: dict[str, Any], lines: dict[tuple[str, ...], int], name: str) -> Config:
    """Validate `data`; every fault is reported with the line that `lines` gives for its path."""
    faults: list[tuple[tuple[str, ...], str]] = []
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults = field_faults(error)
        config = _without(data, [path for path, _ in faults])
    wrong = {path for path, _ in faults}
    faults += [(path, text) for path, text in contradictions(config) if path not in wrong]
    if not faults:
        return config
    rows = sorted({(_line(path, lines), ".".join(path), text) for path, text in faults})
    places = [f"  {f'{name}:{line}' if line else 'command line'}: {path}: {text}" for line, path, text in rows]
    count = f"{len(rows)} mistake{'s' if len(rows) > 1 else ''} in the configuration"
    raise InputError("\n".join([count, *places]), "correct these; `densepred schema` lists every key", name)


def dump(config: Config) -> str:
    """The configuration as YAML, every default written out; `load` reads the same configuration back."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _line(path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int:
    """The line of the nearest enclosing key; 0 stands for the command line."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def field_faults(error: ValidationError, whole: type[Section] = Config) -> list[tuple[tuple[str, ...], str]]:
    """The faults that validating `whole` found, as (path, message)."""
    faults: dict[tuple[str, ...], str] = {}
    for item in error.errors(include_url=False):
        section, path = _walk(item["loc"], whole)
        if item["type"] == "extra_forbidden":
            known = list(section.model_fields)
            text = f"unknown key{nearest(path[-1], known)}; known: {', '.join(known)}"
        else:
            text = f"{item['msg'][0].lower()}{item['msg'][1:]}, got {reprlib.repr(item['input'])}"
        faults[path] = f"{faults[path]}; or {text}" if path in faults else text
    return list(faults.items())


def _walk(loc: tuple[int | str, ...], section: type[Section]) -> tuple[type[Section], tuple[str, ...]]:
    """The section that holds the fault, and its path cut at the last key that stands in the YAML."""
    path: list[str] = []
    named: type[Section] | None = None
    for part in loc:
        path.append(str(part))
        inner, named = named or section.inside(part), None
        if inner is None:
            named = section.inside_names(part)
            if named is None:
                break
        else:
            section = inner
    return section, tuple(path)


def _without(data: dict[str, Any], paths: list[tuple[str, ...]]) -> Config:
    """What is left of a faulty configuration, for finding contradictions among the sound keys."""
    kept = {name: dict(section) if isinstance(section, dict) else section for name, section in data.items()}
    for path in paths:
        if len(path) > 1 and isinstance(kept.get(path[0]), dict):
            kept[path[0]].pop(path[1], None)
        else:
            kept.pop(path[0], None)
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return Config(data=DataConfig(images="*", labels="{id}"))
