"""What a prediction comes from: which models, with which settings, of which files."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.config import Config, ModelConfig
from densepred.volumes import Provenance

LATER = ("temperature", "keep_largest")
"""Settings that came later: where they do nothing, the hash is that of before, and what was predicted is done."""
LATER_OF_MODEL = ("fine_channels",)
"""The same of the section `model`."""


@dataclass
class Origin:
    """The models and settings of a predictor, for the records.

    Args:
        names: of the models.
        weights_hash: SHA-256 of their weights.
        config: the recipe; of several models the first one's.
        plan: what is fixed in training.
        overrides: the `inference.key=value` texts that are in `config`.
        others: the recipes of the models but the first.
        joint: the hashes of settings of other groups of models, which see images in another way.
        why: a line for each setting that a cross-validation decided on.
    """

    names: Sequence[str]
    weights_hash: str
    config: Config
    plan: Plan
    overrides: Sequence[str] = ()
    others: Sequence[ModelConfig] = field(default_factory=tuple)
    joint: Sequence[str] = ()
    why: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Of all models."""
        return "+".join(self.names)

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of what, besides the weights, decides on the values of a result."""
        aside = {"device", "memory", "outputs", "record_paths"}
        known = type(self.config.inference).model_fields
        aside |= {name for name in LATER if getattr(self.config.inference, name) == known[name].default}
        settings = self.config.inference.model_dump(mode="json", exclude=aside)
        models = [
            one.model_dump(mode="json", exclude={name for name in LATER_OF_MODEL if getattr(one, name) is None})
            for one in (self.config.model, *self.others)
        ]
        parts: list[Any] = [settings, models[0], self.plan.model_dump(mode="json"), *models[1:], *self.joint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def of(self, case: Case, device: str) -> Provenance:
        """How the result of a case comes about on a kind of device."""
        settings = self.config.inference
        said = {role: str(path) if settings.record_paths else path.name for role, path in case.roles.items()}
        names = " ".join(dict.fromkeys(name for role, name in said.items() if role != "label"))
        typed = [name for role, name in said.items() if role.startswith("image")]
        others = [word for name in self.names[1:] for word in ("--with", name)]
        return Provenance(
            model=self.name,
            model_sha=self.weights_hash,
            config_sha=self.config_hash,
            source=names,
            window="x".join(map(str, settings.window or self.config.patch.size)),
            overlap=settings.overlap,
            device=device,
            command=shlex.join(["predict", self.names[0], *typed, *self.overrides, *others]),
        )
