"""The section `normalize`: by name or as a mapping, kept in JSON, and checked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from densepred.config.normalize import Asinh, CTWindow, Normalize, Percentile, ZScore

ADAPTER: TypeAdapter[Normalize] = TypeAdapter(Normalize)
NAMES = ["zscore", "robust", "background", "asinh", "zscale", "percentile", "ct_window", "anscombe", "none"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_method_with_its_defaults(name: str) -> None:
    made = ADAPTER.validate_python(name)
    assert made == ADAPTER.validate_python({"name": name}) == ADAPTER.validate_json(f'"{name}"')
    assert made.name == name
    assert ADAPTER.validate_json(ADAPTER.dump_json(made)) == made
    assert hash(made) == hash(ADAPTER.validate_python(made))


def test_settings_survive_json() -> None:
    for made in (
        Asinh(softening=3, joint="scale"),
        Percentile(low=1, high=99, clip=False),
        CTWindow(low=-160, std=12.5),
    ):
        assert ADAPTER.validate_json(ADAPTER.dump_json(made)) == made
    assert ADAPTER.validate_python({"name": "zscore", "joint": True}) == ZScore(joint=True)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("z_score", "zscore"),
        ({"name": "zscore", "softening": 1}, "Extra inputs"),
        ({"name": "asinh", "softening": 0}, "greater than 0"),
        ({"name": "percentile", "low": 60, "high": 40}, "low 60 must be below high 40"),
        ({"name": "percentile", "high": 101}, "less than or equal to 100"),
        ({"name": "ct_window", "low": 5, "high": 5}, "low 5 must be below high 5"),
        ({"name": "background", "mesh": 2}, "greater than or equal to 8"),
        ({"name": "zscore", "joint": "offset"}, "scale"),
        ({"softening": 1}, "name"),
    ],
)
def test_what_is_wrong_is_named(given: object, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        ADAPTER.validate_python(given)


def test_the_schema_for_editors_takes_names_too() -> None:
    schema = str(ADAPTER.json_schema())
    assert "'enum': ['zscore'" in schema
    assert "softening" in schema


def test_the_sections_import_nothing_heavy() -> None:
    code = "import sys, densepred.config.normalize; print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
