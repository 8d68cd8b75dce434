"""The folder of a cross-validation: which runs stand for it in a prediction, with which settings, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densepred.errors import InputError
from densepred.files import atomic_write

RECORD, DECISIONS = "crossval.json", "decisions.json"
FORMAT_VERSION = 1
SETTINGS = ("inference.mirror", "inference.keep_largest", "inference.temperature")
"""What a cross-validation decides on."""
DONE = "done"
UNDECIDED = "nothing is decided yet, the settings are those of the recipe: run densepred crossval to its end"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ensemble:
    """What a folder stands for.

    Args:
        name: of the folder.
        runs: the run directories whose mean is predicted.
        settings: `inference.key=value` texts.
        why: a line for each decision.
    """

    name: str
    runs: tuple[Path, ...]
    settings: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


def read_ensemble(folder: Path) -> Ensemble:
    """What a folder stands for: a run directory for itself, a cross-validation for its finished folds.

    Raises:
        InputError: no fold is finished, or its records are damaged.
    """
    if not (folder / RECORD).is_file():
        return Ensemble(folder.resolve().name, (folder,))
    decisions = read_record(folder / DECISIONS) if (folder / DECISIONS).is_file() else {}
    try:
        folds = read_record(folder / RECORD)["folds"]
        done = [fold for fold in folds if fold["state"] == DONE]
        runs = tuple(folder / run for run in decisions.get("runs") or [run for fold in done for run in fold["runs"]])
        chosen = dict(decisions.get("settings", {}))
        why = tuple(str(one["why"]) for one in decisions.get("decisions", ())) if decisions else (UNDECIDED,)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"damaged ({error!r})", "run densepred crossval again", folder / RECORD) from error
    if not runs:
        raise InputError("no fold of this cross-validation is finished", "run densepred crossval again", folder)
    if len(done) < len(folds):
        _LOG.warning("%s: %d of %d folds are finished and used", folder, len(done), len(folds))
    strange = sorted(set(chosen) - set(SETTINGS))
    if strange:
        what = f"decides on {', '.join(strange)}"
        raise InputError(what, f"only {', '.join(SETTINGS)} may stand there", folder / DECISIONS)
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in chosen.items())
    return Ensemble(folder.resolve().name, runs, settings, why)


def decided(found: Sequence[Ensemble]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings that go with what is predicted, and why: those of a cross-validation by itself.

    Decisions were measured with its own models; together with others they are left out, and that is said.
    """
    if len(found) == 1:
        return found[0].settings, tuple(f"{found[0].name}: {line}" for line in found[0].why)
    for one in found:
        if one.settings:
            what = "%s: its settings (%s) were measured without the other models and are not used"
            _LOG.warning(what, one.name, ", ".join(one.settings))
    return (), ()


def read_record(path: Path) -> dict[str, Any]:
    """A record of a cross-validation.

    Raises:
        InputError: it is missing, damaged, or of a newer version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made = content["format_version"]
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", "give the folder of a cross-validation", path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged ({error!r})", "run densepred crossval again", path) from error
    if not isinstance(made, int) or made > FORMAT_VERSION:
        raise InputError(f"is in format {made}; this version reads up to {FORMAT_VERSION}", "upgrade densepred", path)
    return dict(content)


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record, in one step; a value that JSON does not have (nan) becomes null."""
    whole = {"format_version": FORMAT_VERSION, **_plain(content)}
    text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        atomic_write(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
