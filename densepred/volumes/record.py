"""What a result is and how it came about: each format keeps of it what it has room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

INVALID = "invalid"
"""Name of the label of pixels that were not predicted."""


@dataclass(frozen=True)
class Provenance:
    """How a result came about. Names, no paths: neither user nor machine can be told from it.

    Args:
        model: name of the run.
        model_sha: SHA-256 of its weights.
        config_sha: SHA-256 of its settings.
        source: names of the input files.
        window: of the prediction, "96x96x96".
        overlap: of the windows, a share.
        device: "cpu", "cuda".
        command: as it could be typed again.
    """

    model: str = ""
    model_sha: str = ""
    config_sha: str = ""
    source: str = ""
    window: str = ""
    overlap: float = 0.0
    device: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the values of a result are.

    Args:
        names: of labels, value -> class; of probabilities, channel -> class; else channel -> name, or none.
        probability: the values are probabilities of classes.
        unit: of the values.
        quantity: what they are in a word: "label", "entropy".
        provenance: how they came about.

    Example:
        >>> Record(names={0: "sky", 1: "source"}).names[1]
        'source'
    """

    names: Mapping[int, str]
    probability: bool = False
    unit: str = ""
    quantity: str = ""
    provenance: Provenance = field(default_factory=Provenance)
