"""Reading run directories: recipe, plan and weights; nothing in them can run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from densepred import config as configuration
from densepred.cases.plan import Plan
from densepred.config import Config
from densepred.errors import InputError, UnsafeError
from densepred.files import is_pickled, sha256
from densepred.inference.heads import heads_of
from densepred.models.build import build
from densepred.models.dense import Model
from densepred.models.weights import Pretraining

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
PRETRAINING = "pretraining.json"
MAY_CHANGE = ("inference.", "data.axes", "data.checksum", "data.validity.least", "data.table")
"""What a prediction may be given anew; anything else belongs to the training."""


@dataclass(frozen=True)
class Member:
    """A trained network with what belongs to it.

    Args:
        name: of its run directory.
        model: the network.
        config: its recipe.
        plan: how files become what it sees.
        weights_hash: SHA-256 of the weights' file.
    """

    name: str
    model: Model
    config: Config
    plan: Plan
    weights_hash: str


def read_runs(folders: Sequence[Path], overrides: Sequence[str] = (), weights: str = "last") -> list[Member]:
    """Read run directories whose mean is predicted; see `densepred.load`, which has these arguments and errors."""
    if not folders:
        raise InputError("no run directory", "give the folder that `densepred train` wrote")
    members: list[Member] = []
    for folder in folders:
        member = read_run(folder, overrides, weights)
        if members:
            check_agreement(members[0].plan, member.plan, members[0].name, folder)
        if member.weights_hash in [other.weights_hash for other in members]:
            raise InputError("its weights are those of a run before it", "give each run once", folder)
        members.append(member)
    return members


def check_agreement(first: Plan, other: Plan, name: str, folder: Path) -> None:
    """Refuse a model that reads files or predicts otherwise than the first, whose `name` is said.

    Raises:
        InputError: it names what differs.
    """
    ours, theirs = _read_and_predicted(first), _read_and_predicted(other)
    for what, value in ours.items():
        if theirs[what] != value:
            fix = "give runs that read the same files and predict the same classes"
            raise InputError(f"{what} {theirs[what]}, but {name} has {value}: no mean of them", fix, folder)


def _read_and_predicted(plan: Plan) -> dict[str, str]:
    labels = {value: plan.classes[index] for value, index in sorted(plan.label_map.items())}
    return {
        "dimensions of images": str(plan.image_dims),
        "classes": str(dict(zip(plan.values, plan.classes, strict=True))),
        "labels": str(labels),
        "ignored values": str(plan.ignore),
        "channels": str(plan.channels),
        "axes": str(plan.reading.axes),
        "flags": str(plan.reading.bits),
        "validity": str(plan.reading.validity),
        "regions": str(plan.regions),
        "targets": ", ".join(f"{name} {one}" for name, one in plan.targets.items()),
        "covariates": ", ".join(map(str, plan.covariates)),
    }


def seen_alike(members: Sequence[Member]) -> list[list[Member]]:
    """The members in groups that see an image in the same way: on one grid, normalised by the same numbers."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        plan = member.plan
        seen = (plan.dims, plan.slices, plan.spacing, plan.resampling, [str(one) for one in plan.normalize])
        groups.setdefault(str(seen), []).append(member)
    return list(groups.values())


def joint_hash(members: Sequence[Member]) -> str:
    """SHA-256 of the weights: of one model those of its file, of several of their hashes in their order."""
    if len(members) == 1:
        return members[0].weights_hash
    return hashlib.sha256("\n".join(member.weights_hash for member in members).encode()).hexdigest()


def read_run(folder: Path, overrides: Sequence[str] = (), weights: str = "last") -> Member:
    """Read a run directory; see `densepred.load`, which has its arguments and errors."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights == "best" and (folder / WEIGHTS["last"]).is_file() and not (folder / WEIGHTS["best"]).is_file():
        raise InputError("no best weights: this training had no validation cases", "use the last ones", folder)
    missing = [name for name in ("config.yaml", "plan.json", WEIGHTS[weights]) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"not a run directory: {', '.join(missing)} missing", "give the folder that `densepred train` wrote", folder
        )
    refused = [text for text in overrides if not text.startswith(MAY_CHANGE)]
    if refused:
        raise InputError(f"prediction cannot change {', '.join(refused)}", f"only {', '.join(MAY_CHANGE)} may be given")
    config = _with_table(configuration.load(folder / "config.yaml", overrides), overrides)
    plan = _read_as(Plan.load(folder / "plan.json"), config, overrides)
    path = folder / WEIGHTS[weights]
    model = build(config.model, len(plan.channels), heads_of(config, plan))
    load_weights(model, read_weights(path), path)
    if (folder / PRETRAINING).is_file():
        model.get_submodule("encoder").pretraining = _pretraining(folder / PRETRAINING)  # type: ignore[assignment]
    return Member(folder.resolve().name, model, config, plan, sha256(path))


def _with_table(config: Config, overrides: Sequence[str]) -> Config:
    """A table that a prediction is given lies where that was asked for, not in the folder of the training's data."""
    if config.data.table is None or not any(text.startswith("data.table=") for text in overrides):
        return config
    data = config.data.model_copy(update={"table": str(Path(config.data.table).absolute())})
    return config.model_copy(update={"data": data})


def _read_as(plan: Plan, config: Config, overrides: Sequence[str]) -> Plan:
    """The plan with what was said anew of the files to read."""
    given = {text.partition("=")[0] for text in overrides}
    reading: dict[str, Any] = {key: getattr(config.data, key) for key in ("axes", "checksum") if f"data.{key}" in given}
    if "data.validity.least" in given:
        reading["validity"] = plan.reading.validity.model_copy(update={"least": config.data.validity.least})
    return plan.model_copy(update={"reading": plan.reading.model_copy(update=reading)}) if reading else plan


def _pretraining(path: Path) -> Pretraining:
    """What the run notes of the weights it started from.

    Raises:
        InputError: the note is damaged.
    """
    try:
        return Pretraining(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"damaged ({error})", "copy the run directory again", path) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UnsafeError: it is something else, such as a pickle, or holds non-finite numbers.
    """
    head = path.read_bytes()[:9] if path.stat().st_size < 9 else path.open("rb").read(9)
    if is_pickled(head):
        what = "holds Python objects (a pickle), which can run code when they are loaded"
        raise UnsafeError(what, "ask the author for the weights as safetensors", path)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UnsafeError(f"not a valid safetensors file ({error})", "copy the run directory again", path) from error
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise UnsafeError(
            f"NaN or infinite weights in {len(broken)} tensors, first {broken[0]}", "use another checkpoint", path
        )
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put the weights in, all of them or none.

    Raises:
        InputError: names or shapes differ; the first five are listed.
    """
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, the recipe wants {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        what = f"the weights do not fit the recipe ({len(faults)} differences): {'; '.join(faults[:5])}"
        raise InputError(what, "use the config.yaml that was written with them", path)
    model.load_state_dict(tensors)
