"""From logits to what is written: label maps and probabilities, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from densepred.cases.plan import Plan
from densepred.volumes import Provenance, Record, SlabWriter, Volume, label_dtype, open_writer
from densepred.volumes.members import MembersWriter, open_members_writer
from densepred.volumes.record import INVALID

PROBABILITIES = "probabilities"
"""Folder of the probabilities, beside the label maps."""


@dataclass(frozen=True)
class Predicted:
    """Finished planes of a prediction.

    Args:
        start, stop: which planes of axis 0.
        logits: (K, n, *rest) float32.
        invalid: bool (n, *rest), the pixels that do not count; None where all do.
    """

    start: int
    stop: int
    logits: Tensor
    invalid: NDArray[np.bool_] | None


def labels_of(planes: Predicted, plan: Plan) -> NDArray[Any]:
    """The label value of the likeliest class, (1, n, *rest); `plan.invalid` where a pixel is invalid."""
    table = np.array(plan.values, label_type(plan))
    labels = table[planes.logits.max(0).indices.cpu().numpy()]
    if planes.invalid is not None:
        labels[planes.invalid] = plan.invalid
    return labels[np.newaxis]


def probabilities_of(planes: Predicted, plan: Plan) -> NDArray[np.float32]:
    """The probabilities of the classes, (K, n, *rest) float32; NaN where a pixel is invalid."""
    values: NDArray[np.float32] = planes.logits.softmax(0).cpu().numpy()
    if planes.invalid is not None:
        values[:, planes.invalid] = np.nan
    return values


def names_of(plan: Plan) -> dict[int, str]:
    """Label value -> class name, "invalid" for pixels that do not count where these have a value of their own."""
    names = dict(zip(plan.values, plan.classes, strict=True))
    return names if plan.invalid in names else {**names, plan.invalid: INVALID}


def label_type(plan: Plan) -> np.dtype:
    """The smallest type for label maps."""
    values = (*plan.values, plan.invalid)
    return label_dtype(max(values), min(values))


@dataclass(frozen=True)
class _Kind:
    reduce: Callable[[Predicted, Plan], NDArray[Any]]
    labels: bool


KINDS = {"labels": _Kind(labels_of, True), "probabilities": _Kind(probabilities_of, False)}


class Outputs:
    """The files of one case, filled together; each is whole or not there.

    Args:
        paths: kind ("labels", "probabilities") -> file.
        count: images that the case holds, which go into one file.
        plan: the meaning of the classes.
        made: how the result came about.
    """

    def __init__(self, paths: Mapping[str, Path], count: int, plan: Plan, made: Provenance) -> None:
        self.paths, self.count, self.plan, self.made = dict(paths), count, plan, made
        self._stack = ExitStack()
        self._members: dict[str, MembersWriter] = {}
        self._writers: dict[str, SlabWriter] = {}

    def __enter__(self) -> Outputs:
        return self

    def begin(self, like: Volume) -> None:
        """Begin the next image, on the grid of `like`."""
        for kind, path in self.paths.items():
            if self.count == 1:
                self._writers[kind] = self._stack.enter_context(self._open(kind, path, like))
                continue
            if kind not in self._members:
                self._members[kind] = self._stack.enter_context(self._open_members(kind, path))
            self._writers[kind] = self._members[kind].member(like)

    def _open(self, kind: str, path: Path, like: Volume) -> AbstractContextManager[SlabWriter]:
        labels, record, dtype, channels = self._contents(kind)
        return open_writer(path, like, dtype, channels, labels, record)

    def _open_members(self, kind: str, path: Path) -> AbstractContextManager[MembersWriter]:
        labels, record, dtype, channels = self._contents(kind)
        return open_members_writer(path, self.count, dtype, channels, labels, record)

    def _contents(self, kind: str) -> tuple[bool, Record, np.dtype, int]:
        plan, labels = self.plan, KINDS[kind].labels
        names = names_of(plan) if labels else dict(enumerate(plan.classes))
        dtype = label_type(plan) if labels else np.dtype(np.float32)
        return (
            labels,
            Record(names=names, probability=not labels, provenance=self.made),
            dtype,
            1 if labels else len(plan.classes),
        )

    def write(self, planes: Predicted) -> None:
        """Append finished planes of the image that was begun last to every file."""
        for kind, writer in self._writers.items():
            writer.write(KINDS[kind].reduce(planes, self.plan))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
