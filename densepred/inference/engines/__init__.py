"""What computes the cases of a batch: the devices of this machine, or workers on several.

The batch decides what is to be done and writes the records; an engine gives it workers, and each computes one case at a
time in a thread of the batch, or helps another with a range of the planes of its case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from densepred.errors import InputError

if TYPE_CHECKING:
    from densepred.cases.case import Case
    from densepred.inference.predictor import Predictor


class Worker(Protocol):
    """Computes; a `Predictor` is one."""

    def predict_file(
        self,
        case: Case,
        paths: Mapping[str, Path],
        progress: Callable[[int, int], None],
        before_placing: Callable[[], None],
        others: Sequence[Any],
    ) -> None:
        """As `Predictor.predict_file`; it calls `progress` now and then, which may raise to end the case.

        The others are workers of the same engine, which may be given ranges of the case.
        """


class Engine(Protocol):
    """Gives a batch its workers."""

    device: str | None
    """Where the batch's own copy of the network is; None for where the recipe says."""

    def workers(
        self, runs: Sequence[Path], overrides: Sequence[str], predictor: Predictor
    ) -> AbstractContextManager[Sequence[Worker]]:
        """The workers, for as long as the context lasts.

        Args:
            runs: the run directories, which each worker reads for itself.
            overrides: as for `load`.
            predictor: the batch's own copy.
        """


def devices_of(text: str) -> tuple[str, ...]:
    """Devices as they are written on the command line: `0,1`, `cuda:0,cuda:1`, `cpu,cpu`, `cpu*8`.

    Raises:
        InputError: one of them is none.

    Example:
        >>> devices_of("0,1"), devices_of("cpu*3")
        (('cuda:0', 'cuda:1'), ('cpu', 'cpu', 'cpu'))
    """
    found: list[str] = []
    for word in text.split(","):
        parts = re.fullmatch(r"\s*(?:([0-9]{1,4})|(cpu|cuda(?::[0-9]{1,4})?))(?:\*([0-9]{1,4}))?\s*", word)
        if parts is None or parts[3] == "0":
            raise InputError(f"--devices {text!r}: {word!r} is no device", "write 0,1 or cuda:0,cuda:1 or cpu,cpu")
        found += [f"cuda:{parts[1]}" if parts[1] else parts[2]] * int(parts[3] or 1)
    return tuple(found)


def engine_of(name: str, devices: str | None, address: str | None) -> Engine:
    """The engine that the command line asks for.

    Args:
        name: "local" or "ray".
        devices: as for `devices_of`.
        address: of a Ray cluster.

    Raises:
        InputError: they do not go together.
    """
    asked = () if devices is None else devices_of(devices)
    if name == "ray":
        from densepred.inference.engines.cluster import RayCluster

        return RayCluster(asked, address)
    if address is not None:
        raise InputError("--address is that of a Ray cluster", "add --engine ray, or leave it out")
    from densepred.inference.engines.local import Local

    return Local(asked)
