"""Reading YAML that nobody has vouched for: plain data only, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from densepred.errors import InputError, UnsafeError

MAX_BYTES, MAX_DEPTH, MAX_ALIASES, MAX_NODES = 256_000, 50, 100, 50_000

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """The safe loader, which also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3)."""


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads back the same; equal values are written out each time rather than as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a mapping from a file.

    Returns:
        The data, and the line of each key by its path.

    Raises:
        InputError: the file is missing, is no YAML, or no mapping.
        UnsafeError: it holds tags or duplicate keys, or is too large, too deep or too much aliased.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "check the path", path) from error
    if len(raw) > MAX_BYTES:
        raise UnsafeError(f"more than the {MAX_BYTES} bytes a configuration may have", "shorten it", path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", "save it as UTF-8", path) from error
    data, lines = _parse(text, path)
    if data is None:
        return {}, lines
    if not isinstance(data, dict):
        raise InputError("not a mapping of sections", "start with, say, `data:`", path)
    return data, lines


def value_of(text: str, name: str) -> Any:
    """A value written on the command line, in YAML's syntax; `name` stands for it in messages."""
    return _parse(text, f"override {name}")[0]


def _parse(text: str, name: str | Path) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Plain data and the line of each key, or an error that names the place."""
    lines: dict[tuple[str, ...], int] = {}
    try:
        _refuse_unsafe(text, name)
        root = yaml.compose(text, Loader=_Loader)
        return (None if root is None else _construct(root, (), lines, name, [0])), lines
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise InputError(f"not valid YAML{place}: {problem}", "correct the syntax there", name) from error


def set_path(data: dict[Any, Any], keys: Sequence[str | int], value: Any) -> None:
    """Set data[k0][k1]... = value, making the mappings on the way."""
    for key in keys[:-1]:
        if not isinstance(data.get(key), dict):
            data[key] = {}
        data = data[key]
    data[keys[-1]] = value


def _refuse_unsafe(text: str, name: str | Path) -> None:
    """Look through the events, before anything is built."""
    depth = aliases = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=_Loader)):
        where = f"line {getattr(event.start_mark, 'line', 0) + 1}"
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        aliases += isinstance(event, yaml.AliasEvent)
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            raise UnsafeError(f"a tag ({tag}) at {where}: only plain data may stand here", "remove the tag", name)
        if depth > MAX_DEPTH or aliases > MAX_ALIASES or nodes > MAX_NODES:
            limits = f"more than {MAX_DEPTH} levels, {MAX_ALIASES} aliases or {MAX_NODES} nodes"
            raise UnsafeError(f"{limits} at {where}", "simplify the file", name)


def _construct(
    node: yaml.Node, at: tuple[str, ...], lines: dict[tuple[str, ...], int], name: str | Path, count: list[int]
) -> Any:
    """Build plain data, recording lines and refusing duplicate keys; `count` bounds what aliases unfold to."""
    count[0] += 1
    if count[0] > MAX_NODES or len(at) > MAX_DEPTH:
        limits = f"more than {MAX_NODES} values or {MAX_DEPTH} levels"
        raise UnsafeError(f"aliases unfold to {limits}", "simplify the file", name)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, str(i)), lines, name, count) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError(f"a key is not a plain word at line {line}", "use a word", name)
            key = _scalar(key_node, name)
            if key in data:
                raise UnsafeError(f"the key {key!r} stands twice, again at line {line}", "keep one of them", name)
            lines[(*at, str(key))] = line
            data[key] = _construct(value_node, (*at, str(key)), lines, name, count)
        return data
    return _scalar(node, name)


def _scalar(node: yaml.Node, name: str | Path) -> Any:
    """A word, number, truth value or date; what looks like one and is none (2024-13-45, `<<`) is an error."""
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except (ValueError, yaml.YAMLError) as error:
        place = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
        raise InputError(f"{node.value[:40]!r} has no meaning here ({place})", "quote it", name) from error
    finally:
        loader.dispose()
