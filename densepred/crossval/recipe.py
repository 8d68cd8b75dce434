"""The recipe that all folds of a cross-validation share, with what is fitted to the cases said in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from densepred import config as configuration
from densepred.cases.case import Case, collect
from densepred.cases.folds import Fold, folds, groups_of
from densepred.cases.plan import Plan, make_plan
from densepred.cases.targets import read_table
from densepred.config import Config
from densepred.config.data import ChannelConfig, DataConfig
from densepred.config.normalize import Normalize
from densepred.config.tasks import StandardConfig, TargetConfig
from densepred.errors import InputError
from densepred.files import atomic_write, sha256
from densepred.volumes import companions, split_part

RECIPE, GIVEN = "config.yaml", "given.yaml"
_FREE: dict[str, set[str]] = {
    "data": {"root", "cache", "fold"},
    "training": {"device", "workers", "tensorboard", "trackers"},
    "inference": {"device", "memory"},
}
"""What a cross-validation may be given anew: it changes no result."""


@dataclass(frozen=True)
class Shared:
    """What the folds have in common.

    Args:
        config: the recipe.
        cases: all that are in a fold, by id.
        folds: ids to train on and to validate on.
        groups: case id -> group.
    """

    config: Config
    cases: dict[str, Case]
    folds: list[Fold]
    groups: dict[str, str]

    def told_of(self, cases: Iterable[str]) -> str:
        """SHA-256 of what cases have to tell a training: labels, maps and cells of the table; of images the sizes."""
        lines = [line for name in sorted(cases) for line in self._told[name]]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def _told(self) -> dict[str, list[str]]:
        """Of each case a line for each of its files and cells; folds share them."""
        data = self.config.data
        columns = [*data.covariates, *(one.column for one in data.targets.values() if one.column)]
        table = read_table(data) if columns else None
        told = {}
        for name, case in self.cases.items():
            cells = [f"{name} {column}: {table.cell(name, column)}" for column in columns] if table else []
            told[name] = cells + [
                f"{name} {role} {_size(file) if role.startswith('image') else sha256(file)}"
                for role, path in case.roles.items()
                for file in _files(path)
            ]
        return told


def _files(path: Path) -> list[Path]:
    """What is read of a path, but not the others of its folder, which may be other images."""
    file = split_part(path)[0]
    return [file, *(one for one in companions(file) if one.is_file())]


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def shared(config: Config, out: Path) -> Shared:
    """Resolve a recipe for the folder of a cross-validation, and write it there, as it was given and resolved.

    Spacing, intensities and what makes targets standard are fitted once, to the cases of all folds, as nnU-Net does:
    folds that see their images alike and predict alike can be averaged. The held-out cases lend these few numbers and
    nothing else.

    Raises:
        InputError: a fault of the recipe or of the cases, or another recipe was cross-validated in the folder.
    """
    found = collect(config.data)
    every, groups = folds(found, config.data), groups_of(found, config.data)
    ids = {case for fold in every for side in fold for case in side}
    cases = {case.id: case for case in found if case.id in ids}
    given = _anchored(config, out)
    path = out / RECIPE
    if path.is_file():
        if differences := _differences(read_given(out), given):
            what = f"another recipe was cross-validated here ({'; '.join(differences)})"
            raise InputError(what, "choose another --out folder", path)
        before = configuration.load(path)
        data = before.data.model_copy(update={"root": given.data.root, "cache": given.data.cache})
        kept = {"data": data, "training": given.training, "inference": given.inference}
        return Shared(before.model_copy(update=kept), cases, every, groups)
    fixed = _fitted(given, make_plan(given, list(cases.values())))
    atomic_write(out / GIVEN, configuration.dump(given))
    atomic_write(path, configuration.dump(fixed))
    return Shared(fixed, cases, every, groups)


def read_given(out: Path) -> Config:
    """The recipe that was cross-validated in a folder, as it was given.

    Raises:
        InputError: an earlier version made the folder, which did not keep it.
    """
    if not (out / GIVEN).is_file():
        what = f"has no {GIVEN}: an earlier version made this folder, which did not keep the recipe as it was given"
        raise InputError(what, "copy the recipe there under this name, or choose another folder", out)
    return configuration.load(out / GIVEN)


def of_fold(config: Config, fold: int, device: str | None) -> Config:
    """The recipe of one fold, perhaps on a certain device."""
    data, training = config.data.model_copy(update={"fold": fold}), config.training
    if device is not None:
        training = training.model_copy(update={"device": device})
    return config.model_copy(update={"data": data, "training": training})


def _anchored(config: Config, out: Path) -> Config:
    """With absolute folders, one cache for all folds, and the first fold."""
    data = config.data
    cache = str(Path(data.cache).resolve() if data.cache else (out / "cache").resolve())
    paths = {"root": str(Path(data.root).resolve()), "cache": cache, "fold": 0}
    return config.model_copy(update={"data": data.model_copy(update=paths)})


def _fitted(config: Config, plan: Plan) -> Config:
    """With the numbers of a plan.

    Raises:
        InputError: channels of one file differ in them, for which a recipe has no place.
    """
    data = config.data
    update: dict[str, Any] = {"spacing": plan.spacing, "targets": _with_standards(data, plan)}
    if plan.covariates:
        update["covariates"] = {
            one.name: StandardConfig(mean=one.mean, deviation=one.deviation) for one in plan.covariates
        }
    if isinstance(data.images, dict):
        update["images"] = {
            name: _with_normalize(one, fitted)
            for (name, one), fitted in zip(data.images.items(), plan.normalize, strict=True)
        }
    elif len(set(map(str, plan.normalize))) == 1:
        update["normalize"] = plan.normalize[0]
    else:
        what = "the channels of one file are normalised by numbers that are fitted to each"
        raise InputError(what, "give low, high, mean and std of data.normalize, or name each channel's files")
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _with_standards(data: DataConfig, plan: Plan) -> dict[str, TargetConfig]:
    """The targets with what was found: the names of classes, or mean and deviation."""
    found = {}
    for name, target in data.targets.items():
        one = plan.targets[name]
        if one.classes:
            update: dict[str, Any] = {"classes": one.classes}
        else:
            update = {"mean": one.mean, "deviation": one.deviation} if target.standardize else {}
        found[name] = target.model_copy(update=update)
    return found


def _with_normalize(one: str | ChannelConfig, fitted: Normalize) -> ChannelConfig:
    channel = one if isinstance(one, ChannelConfig) else ChannelConfig(file=one)
    return channel if channel.bits else channel.model_copy(update={"normalize": fitted})


def _differences(before: Config, given: Config) -> list[str]:
    """What is decisive and not the same: "KEY was VALUE, now VALUE"."""
    ours, theirs = (_flat(one.model_dump(mode="json", exclude=_FREE)) for one in (before, given))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    return [f"{key} was {ours.get(key)}, now {theirs.get(key)}" for key in keys]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Each setting by its whole name."""
    if not isinstance(value, dict):
        return {path: value}
    inner = (_flat(one, f"{path}.{key}" if path else key) for key, one in value.items())
    return {key: one for found in inner for key, one in found.items()}


def chosen(every: Sequence[Fold], asked: Sequence[int] | None) -> list[int]:
    """The numbers of the folds to do.

    Raises:
        InputError: there is no such fold.
    """
    beyond = [fold for fold in asked or () if not 0 <= fold < len(every)]
    if beyond:
        raise InputError(f"fold {beyond[0]} of {len(every)}: the folds count from 0", "choose others with --folds")
    return sorted(set(range(len(every)) if asked is None else asked))
