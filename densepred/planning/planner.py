"""`densepred plan`: measure the set, choose, try it, and write the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from densepred import __version__
from densepred.config import Config, DataConfig, check, load
from densepred.errors import InputError, ResourceError
from densepred.files import atomic_write, writable_folder
from densepred.planning import assemble, own, trial
from densepred.planning.cost import Cost, foretold, lighter, typical_cases, with_length
from densepred.planning.fingerprint import Fingerprint, measure
from densepred.planning.layouts import of_folder
from densepred.planning.nnunet import REFERENCE_BYTES, Configuration
from densepred.planning.own import LEAST_STEPS, Limits, numbers
from densepred.planning.recipe import Setting, config_of, sizes_of, text_of
from densepred.progress import clock
from densepred.yamlfile import read_yaml

Rules = Literal["nnunet", "densepred"]
SUMMARY = "fingerprint.json"
LENGTH = {"cpu": (100, 100), "cuda": (100, 250)}
"""Epochs and steps of each where there is no budget, by kind of device."""
MOST_MEMORY = {"cpu": 4e9, "cuda": 10e9}
"""Bytes taken where nothing is said, if half of what is free is no less."""
TOLERANCE = 1.02
LIGHT = 5e7
"""Numbers that the convolutions of a trial's step give at most, on a processor and by nnU-Net's rules."""
TRIALS = 5


@dataclass(frozen=True)
class Planned:
    """What was planned.

    Attributes:
        path: the recipe.
        fingerprint: of the set.
        configurations: all that the rules give.
        chosen: the one that the recipe has.
        config: the recipe.
        cost: of the training.
        notes: what the user should know.
    """

    path: Path
    fingerprint: Fingerprint
    configurations: dict[str, Configuration]
    chosen: Configuration
    config: Config
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What the user asked for: rules, bytes, seconds, and a configuration by name."""

    rules: Rules = "densepred"
    memory: float | None = None
    budget: float | None = None
    configuration: str | None = None


def plan(source: str | Path, out: str | Path, wish: Wish | None = None, overwrite: bool = False) -> Planned:
    """Plan a training.

    Args:
        source: a YAML with a section `data`, or a folder of images and labels.
        out: the recipe to write; `fingerprint.json` and the folder `fingerprint` are put beside it.
        wish: what is asked for.
        overwrite: replace the recipe that is there.

    Raises:
        InputError: a fault of the source; a recipe is there; there is no such configuration.
        NothingDoneError: there is no sound case.
        ResourceError: no training fits the memory.
    """
    wish, out, data = wish or Wish(), Path(out), read_source(Path(source))
    if out.exists() and not overwrite:
        raise InputError("a recipe is there already", "choose another --out, or say --overwrite", out)
    folder = writable_folder(out.parent)
    fingerprint = measure(data, folder / "fingerprint")
    fingerprint.save(folder / SUMMARY)
    planning = _Planning(fingerprint, data, wish, out)
    return planning.by_nnunet() if wish.rules == "nnunet" else planning.by_own()


def read_source(source: Path) -> DataConfig:
    """The data section that a YAML holds, or that a folder calls for.

    Raises:
        InputError: there is no such thing, or the YAML has other sections, which planning would lose.
    """
    if source.is_dir():
        return of_folder(source)
    content, lines = read_yaml(source)
    others = sorted(set(content) - {"data"})
    if others:
        what = f"planning makes all sections but data; here is also {', '.join(map(str, others))}"
        raise InputError(what, "leave the section data alone in the file", source)
    return check(content, lines, str(source)).data


class _Planning:
    def __init__(self, fingerprint: Fingerprint, data: DataConfig, wish: Wish, out: Path) -> None:
        from densepred.device import pick_device
        from densepred.inference.memory import available

        self.fingerprint, self.data, self.wish, self.out = fingerprint, data, wish, out
        device = pick_device("auto")
        self.kind, self.free = device.type, available(device)
        self.cases = typical_cases(fingerprint)
        self.outputs = sizes_of(fingerprint).labels
        facts = [fingerprint.class_facts(name) for name in fingerprint.names[1:]]
        self.piece = min((one["component_voxels"] for one in facts if "component_voxels" in one), default=0.0)

    def by_nnunet(self) -> Planned:
        memory = self.wish.memory or REFERENCE_BYTES
        found = assemble.nnunet_configurations(self.fingerprint, memory)
        one = self._chosen(found, "3d_fullres" if "3d_fullres" in found else "2d")
        settings = assemble.nnunet_settings(self.fingerprint, self.data, one)
        config = config_of(settings, str(self.out))
        cost = self._tried_lightly(config, one)
        epochs, steps = assemble.NNUNET_LENGTH
        if self.wish.budget is not None:
            epochs = max(1, min(epochs, cost.steps_within(self.wish.budget) // steps))
        return self._written(found, one, settings, config, cost, (epochs, steps))

    def by_own(self) -> Planned:
        """Choose, try, and choose again with what the trial has measured, until memory and time suffice."""
        memory = self.wish.memory or min(self.free / 2, MOST_MEMORY[self.kind])
        limits = Limits.of_device(self.kind, memory)
        best: tuple[Configuration, Limits, Cost] | None = None
        last, peak = None, 0.0
        for _ in range(TRIALS):
            found = own.configurations(sizes_of(self.fingerprint), limits)
            one = self._chosen(found, own.recommended(found, self.piece))
            if one == last:  # nothing would change
                break
            last = one
            config = config_of(self._own_settings(one, limits, LENGTH[self.kind]), str(self.out))
            tried = trial.run(config, self.cases)
            if tried is None:
                limits, last = replace(limits, each=2 * limits.each), None
                continue
            peak, each = tried.peak, max(tried.peak - tried.start, 1) / numbers(one, self.outputs)
            limits = replace(limits, start=float(tried.start), each=each)
            cost = foretold(tried, config, self.fingerprint)
            if peak <= memory * TOLERANCE:
                best = (one, limits, cost)
                limits = self._faster(one, limits, cost)
        if best is None:
            what = f"no training fits {memory / 1e9:.1f} GB; the smallest that was tried took {peak / 1e9:.1f} GB"
            raise ResourceError(what, "give --memory more, or use a machine that has it", self.out)
        one, limits, cost = best
        length = self._length(cost)
        settings = self._own_settings(one, limits, length)
        return self._written(found, one, settings, config_of(settings, str(self.out)), cost, length)

    def _faster(self, one: Configuration, limits: Limits, cost: Cost) -> Limits:
        """As they are, if the budget has room for enough steps; else so much tighter that it should."""
        budget = self.wish.budget
        needed = 1.0 if budget is None else LEAST_STEPS / cost.steps_within(budget)
        work = numbers(one, self.outputs) * limits.base
        while needed > 1 and (tighter := limits.smaller(one.dims)) is not None:
            limits = tighter
            found = own.configurations(sizes_of(self.fingerprint), limits)
            other = self._chosen(found, own.recommended(found, self.piece))
            if work / (numbers(other, self.outputs) * limits.base) >= needed:
                break
        return limits

    def _own_settings(self, one: Configuration, limits: Limits, length: tuple[int, int]) -> list[Setting]:
        return assemble.own_settings(self.fingerprint, self.data, one, limits, length)

    def _chosen(self, found: dict[str, Configuration], usual: str) -> Configuration:
        name = self.wish.configuration or usual
        if name not in found:
            what = f"there is no configuration {name} for this set; there is {', '.join(sorted(found))}"
            raise InputError(what, "choose one of these, or leave --configuration out")
        return found[name]

    def _tried_lightly(self, config: Config, one: Configuration) -> Cost:
        """A trial of steps that a processor does in seconds; on a GPU of the real ones, if they fit."""
        by = max(1.0, numbers(one, self.outputs) / LIGHT) if self.kind == "cpu" else 1.0
        for _ in range(TRIALS):
            light, scaled = lighter(config, by)
            tried = trial.run(light, self.cases)
            if tried is not None:
                return foretold(tried, config, self.fingerprint, scaled)
            by *= 4
        raise ResourceError("not even a small step of this training fits the memory", "use another machine", self.out)

    def _length(self, cost: Cost) -> tuple[int, int]:
        """Epochs, and steps of each."""
        if self.wish.budget is None:
            return LENGTH[self.kind]
        total = max(cost.steps_within(self.wish.budget), 10)
        steps = 250 if total >= 25_000 else 100 if total >= 1000 else max(1, total // 10)
        return max(1, total // steps), steps

    def _written(
        self,
        found: dict[str, Configuration],
        one: Configuration,
        settings: Sequence[Setting],
        config: Config,
        cost: Cost,
        length: tuple[int, int],
    ) -> Planned:
        """The recipe on disk, read back as `densepred train` will."""
        config = with_length(config, cost, *length)
        training, total = config.training, clock(cost.total(config))
        final = [setting for setting in settings if setting.path not in ("training.epochs", "training.steps")]
        final += [
            Setting(
                "training.epochs", training.epochs, f"{training.epochs * training.steps} steps: {total} in all here"
            ),
            Setting("training.steps", training.steps, f"{clock(cost.epoch(config))} an epoch here ({cost.device})"),
            Setting("training.validate_every", training.validate_every, f"one takes about {clock(cost.validation)}"),
        ]
        if self.wish.budget is not None:
            left = max(round(self.wish.budget - cost.prepare), 1)
            why = f"what preparing the cases leaves of {clock(self.wish.budget)}; the schedule ends with it"
            final.append(Setting("training.budget", f"{left}s", why))
        order = list(Config.model_fields)
        final.sort(key=lambda setting: order.index(setting.path.split(".")[0]))
        atomic_write(self.out, text_of(final, self._head(one, config, cost)))
        notes = tuple(self._notes(found, one, config, cost))
        return Planned(self.out, self.fingerprint, found, one, load(self.out), cost, notes)

    def _head(self, one: Configuration, config: Config, cost: Cost) -> list[str]:
        fingerprint, rules = self.fingerprint, self.wish.rules
        left_out = sum(problem.severity == "error" for problem in fingerprint.faults)
        lines = [
            f"Made by densepred {__version__} plan from {len(fingerprint.cases)} cases"
            + (f" ({left_out} faults; see densepred check)" if left_out else "")
            + f", by the rules of {'nnU-Net' if rules == 'nnunet' else 'densepred'}: {one.name}.",
            f"Here ({cost.device}): {cost.memory / 1e9:.2g} GB of memory, {cost.disk / 1e9:.2g} GB of disk, "
            f"{clock(cost.total(config))}.",
            "What is not here has its default; `densepred schema` tells them all.",
        ]
        return lines

    def _notes(self, found: dict[str, Configuration], one: Configuration, config: Config, cost: Cost) -> Iterator[str]:
        low, budget = found.get("3d_lowres"), self.wish.budget
        full = found.get("3d_fullres")
        if one.name == "3d_lowres" and self.wish.configuration is None and full is not None:
            yield (
                f"On the full grid a patch would see {full.covers:.1%} of a typical image; the coarser one was chosen. "
                "--configuration 3d_fullres keeps the details."
            )
        if one.name == "3d_fullres" and low is not None:
            yield (
                f"A patch sees {one.covers:.1%} of a typical image; --configuration 3d_lowres sees {low.covers:.0%}, "
                "on a coarser grid."
            )
        if budget is not None and cost.total(config) > budget * 1.1:
            yield f"The shortest training that is possible takes {clock(cost.total(config))}, more than the budget."
        elif budget is not None and config.training.epochs * config.training.steps < LEAST_STEPS:
            yield f"The budget has room for fewer than {LEAST_STEPS} steps, which learn little: give it more."
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if cost.device == "cpu" and load > 1.5 * cores:
            yield f"Other programs are busy here (load {load:.1f} on {cores} cores): alone, training is faster."
        if cost.memory > self.free:
            yield f"It needs {cost.memory / 1e9:.1f} GB, and {self.free / 1e9:.1f} GB are free here."


__all__ = ["Planned", "Wish", "plan", "read_source"]
