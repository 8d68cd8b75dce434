"""The fingerprint of a data set: what all cases hold. Measured case by case in threads; what is known is kept.

Each case is a small JSON file, written at once when it is measured, and named for what it was measured from. So a
measurement can be killed at any moment and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from densepred.cases.case import Case, Found, Problem, find
from densepred.cases.names import channel_names, class_names, ignored_values
from densepred.cases.reading import Reading
from densepred.config import DataConfig
from densepred.errors import DensepredError, InputError, NothingDoneError, ResourceError
from densepred.files import atomic_write, stamps, sweep_parts, writable_folder
from densepred.planning.measure import CaseFacts, Measuring
from densepred.planning.sketch import Sketch, merged
from densepred.progress import progress

VERSION = 1
"""Raised whenever a case would be measured otherwise."""
MOST_UNNAMED = 64
"""More label values than this are instances or intensities rather than classes."""


@dataclass(frozen=True)
class Fingerprint:
    """All sound cases of a set, and what is wrong with the others.

    Attributes:
        cases: what was measured, by id.
        channels: their names.
        classes: label value -> name, the background first.
        ignored: label values without a truth.
        faults: an error for each case that is left out; notes on the set.
    """

    cases: tuple[CaseFacts, ...]
    channels: tuple[str, ...]
    classes: dict[int, str]
    ignored: tuple[int, ...]
    faults: tuple[Problem, ...]

    @property
    def dims(self) -> int:
        """Spatial axes of the images."""
        return len(self.cases[0].shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes by name, the background first, each once."""
        return tuple(dict.fromkeys(self.classes.values()))

    @property
    def relative_size(self) -> float:
        """Median share of the voxels that is left after cropping to where the image is not zero."""
        return statistics.median(case.relative_size for case in self.cases)

    def median(self, of: str) -> tuple[float, ...]:
        """The median over the cases of `shape`, `cropped` or `spacing`, along each axis."""
        return tuple(statistics.median(axis) for axis in zip(*(getattr(c, of) for c in self.cases), strict=True))

    def intensities(self, of: str) -> tuple[Sketch, ...]:
        """Of all cases, `valid` or `foreground`, for each channel."""
        return tuple(merged(parts) for parts in zip(*(getattr(case, of) for case in self.cases), strict=True))

    def summary(self) -> dict[str, Any]:
        """What `fingerprint.json` holds; numbers alone, without the cases' quantiles."""
        spread = {name: [s.facts() for s in self.intensities(name)] for name in ("valid", "foreground")}
        return {
            "version": VERSION,
            "cases": len(self.cases),
            "left_out": [f"{problem.case}: {problem.what}" for problem in self.faults if problem.severity == "error"],
            "channels": list(self.channels),
            "classes": {str(value): name for value, name in self.classes.items()},
            "ignored": list(self.ignored),
            "median_shape": self.median("shape"),
            "median_cropped_shape": self.median("cropped"),
            "median_spacing": self.median("spacing"),
            "median_relative_size_after_cropping": self.relative_size,
            "intensities": spread,
            "class_sizes": {name: self.class_facts(name) for name in self.names},
            "each": {
                case.id: case.model_dump(mode="json", include={"shape", "cropped", "spacing", "classes"})
                for case in self.cases
            },
        }

    def class_facts(self, name: str) -> dict[str, float]:
        """Of one class: cases that have it, share of all voxels, components a case, and the median of their sizes."""
        named = any(name in case.classes for case in self.cases)
        keys = [name] if named else [str(value) for value, other in self.classes.items() if other == name]
        found = [case.classes[key] for case in self.cases for key in keys if key in case.classes]
        having = [one for one in found if one.voxels]
        every = sum(facts.voxels for case in self.cases for facts in case.classes.values())
        facts: dict[str, float] = {
            "cases": len(having),
            "share": sum(one.voxels for one in having) / max(every, 1),
            "voxels": statistics.median(one.voxels for one in having) if having else 0,
        }
        if any(one.pieces for one in having):
            facts |= {
                "components": statistics.median(one.pieces for one in having),
                "component_voxels": statistics.median(one.typical for one in having),
            }
        return facts

    def save(self, path: Path) -> None:
        """Write the summary, atomically."""
        atomic_write(path, json.dumps(self.summary(), indent=1) + "\n")


def measure(data: DataConfig, folder: str | Path, workers: int | None = None) -> Fingerprint:
    """Measure a data set; faulty cases are told in the result, the others are measured.

    Args:
        data: which files, and what their labels mean.
        folder: for the file of each case.
        workers: threads; by default as many as there are processors.

    Raises:
        NothingDoneError: there is no sound case.
        InputError: the set as a whole makes no sense: several numbers of axes or channels, too many label values.
    """
    folder = writable_folder(folder)
    sweep_parts(folder)
    found, names, ignored = find(data), class_names(data), ignored_values(data)
    measuring = Measuring(Reading.of(data), names, ignored, data.instances)
    settings = [VERSION, measuring.reading.model_dump(mode="json"), sorted(names.items()), ignored, data.instances]
    facts: list[CaseFacts] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1, "densepred-fingerprint") as pool:
        waiting = {pool.submit(_known, case, measuring, folder, settings): case for case in found.cases}
        try:
            with progress(len(waiting), "fingerprint") as advance:
                for future in as_completed(waiting):
                    try:
                        facts.append(future.result())
                    except ResourceError:
                        raise
                    except DensepredError as error:
                        found.error(waiting[future].id, error.file or "", error.what, error.fix)
                    advance(1)
        finally:
            for future in waiting:
                future.cancel()
    return _whole(sorted(facts, key=lambda one: one.id), found, data, names, ignored)


def _known(case: Case, measuring: Measuring, folder: Path, settings: list[Any]) -> CaseFacts:
    """From the file of the case if its images are still the same, else measured and written."""
    path = folder / f"{case.id}.json"
    try:
        files = [stamp for file in case.files for stamp in stamps(file)]
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror})", "check the path and its permissions", error.filename
        ) from error
    content = [settings, files, {role: str(where) for role, where in case.roles.items()}]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    try:
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return CaseFacts.model_validate_json(json.dumps(stored["facts"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass
    facts = measuring.case(case)
    atomic_write(path, json.dumps({"key": key, "facts": facts.model_dump(mode="json")}))
    return facts


def _whole(
    facts: Sequence[CaseFacts], found: Found, data: DataConfig, names: dict[int, str], ignored: tuple[int, ...]
) -> Fingerprint:
    if not facts:
        first = next((problem for problem in found.problems if problem.severity == "error"), None)
        what = "no case can be read" + (f"; the first: {first.case}: {first.file}: {first.what}" if first else "")
        raise NothingDoneError(what, first.fix if first else "correct the data section", data.root)
    for what, values in {
        "spatial axes": [len(f.shape) for f in facts],
        "channels": [f.channels for f in facts],
    }.items():
        _demand_one(what, values, facts)
    channels = channel_names(data) or tuple(f"channel {number}" for number in range(facts[0].channels))
    if len(channels) != facts[0].channels:
        what = f"{facts[0].channels} channels, but {len(channels)} are named: {', '.join(channels)}"
        raise InputError(what, "name each channel once, or say data.axes where a file holds them all", data.root)
    return Fingerprint(tuple(facts), channels, names or _named(facts), ignored, tuple(found.problems))


def _demand_one(what: str, values: Sequence[int], facts: Sequence[CaseFacts]) -> None:
    usual = statistics.mode(values)
    odd = [one.id for one, value in zip(facts, values, strict=True) if value != usual]
    if odd:
        which = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise InputError(f"most cases have {usual} {what}, but not {which}", "leave these out, or give all the same")


def _named(facts: Iterable[CaseFacts]) -> dict[int, str]:
    """Names for the values in the labels, where nobody gave any."""
    values = sorted({int(name) for case in facts for name, one in case.classes.items() if one.voxels or name == "0"})
    if len(values) > MOST_UNNAMED:
        what = f"the labels hold {len(values)} values, {values[0]} to {values[-1]}: instances rather than classes?"
        raise InputError(
            what, "make label maps of classes, or name the values in data.classes: equal names are one class"
        )
    if len(values) < 2:
        raise InputError("the labels hold no value but 0: there is nothing to learn", "check the labels")
    values.sort(key=lambda value: (value != 0, value))
    return {value: f"class_{value}".replace("-", "minus_") if value else "background" for value in values}
