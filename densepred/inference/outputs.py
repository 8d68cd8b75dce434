"""What is written of a prediction: label maps, probabilities and other kinds, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densepred.cases.plan import Plan
from densepred.errors import InputError
from densepred.inference import reduce
from densepred.models.heads import LEAST_LOG_VARIANCE, HeadSpec, Regression, Segmentation, in_unit
from densepred.volumes import Provenance, Record, SlabWriter, Volume, label_dtype, open_writer
from densepred.volumes.members import MembersWriter, open_members_writer
from densepred.volumes.record import INVALID


@dataclass(frozen=True)
class Predicted:
    """Finished planes of a prediction.

    Args:
        start, stop: which planes of axis 0.
        logits: (K, n, *rest) float32; of a regression its values.
        invalid: bool (n, *rest), the pixels that do not count; None where all do.
        variance: (1, n, *rest), of the probabilities over models and mirrored views, where it was asked for.
        temperature: by which the logits are divided for probabilities and entropy.
    """

    start: int
    stop: int
    logits: Tensor
    invalid: NDArray[np.bool_] | None
    variance: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Kind:
    """Something that can be asked of a prediction.

    Args:
        reduce: (C, n, *rest) of finished planes, computed where they lie.
        quantity: what one value is.
        wide: C is that of the logits rather than 1.
        unit: of the values.
        heads: what it can be computed of.
    """

    reduce: Callable[[Predicted, Plan, HeadSpec], Tensor]
    quantity: str
    wide: bool = False
    unit: str = ""
    heads: tuple[type[HeadSpec], ...] = (Segmentation,)


def _labels(planes: Predicted, plan: Plan, head: HeadSpec) -> Tensor:
    logits = planes.logits
    if isinstance(head, Segmentation) and head.regions:
        logits = reduce.likeliest_classes(logits, list(plan.regions.values()), len(plan.classes))
    return reduce.labels(logits, torch.from_numpy(np.array(plan.values, label_type(plan))))


def _probabilities(planes: Predicted, plan: Plan, head: HeadSpec) -> Tensor:
    if isinstance(head, Segmentation) and head.regions:
        return (planes.logits / planes.temperature).sigmoid()
    return reduce.probabilities(planes.logits, planes.temperature)


def _entropy(planes: Predicted) -> Tensor:
    return reduce.entropy(planes.logits, planes.temperature)


def _variance(planes: Predicted, plan: Plan, head: HeadSpec) -> Tensor:
    assert planes.variance is not None  # the stream was asked for it
    return planes.variance


def _width(head: HeadSpec) -> int:
    """The means of a regression: log-variances may follow them."""
    return head.outputs if isinstance(head, Regression) else head.channels


def _means(planes: Predicted, plan: Plan, head: HeadSpec) -> Tensor:
    assert isinstance(head, Regression)
    return in_unit(head, planes.logits[: _width(head)])


def _noise(planes: Predicted, plan: Plan, head: HeadSpec) -> Tensor:
    assert isinstance(head, Regression)
    return (planes.logits[_width(head) :].clamp(min=LEAST_LOG_VARIANCE) / 2).exp() * head.deviation


KINDS: dict[str, Kind] = {
    "labels": Kind(_labels, "label"),
    "probabilities": Kind(_probabilities, "probability", wide=True),
    "logits": Kind(lambda planes, plan, head: planes.logits, "logit", wide=True, heads=(Segmentation, Regression)),
    "entropy": Kind(lambda planes, plan, head: _entropy(planes), "entropy", unit="nat"),
    "variance": Kind(_variance, "variance"),
    "regression": Kind(_means, "mean", wide=True, heads=(Regression,)),
    "noise": Kind(_noise, "standard deviation", wide=True, heads=(Regression,)),
}
"""`inference.outputs` -> how it is made."""


def check_kinds(kinds: Iterable[str], head: HeadSpec, predictions: int, blocks: int = 1) -> None:
    """Refuse what such a head does not predict.

    Args:
        kinds: keys of `KINDS`.
        head: what is predicted for each voxel.
        predictions: of each voxel: models times mirrored views.
        blocks: side of the blocks of pixels that are averaged over.

    Raises:
        InputError: an unknown kind; labels of numbers or numbers of classes; the variance of one prediction; noise that
            was not learnt; of blocks regions, or anything but what follows from their mean probabilities.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"there is no output {kind!r}", f"choose of {', '.join(KINDS)}")
        if not isinstance(head, KINDS[kind].heads):
            allowed = ", ".join(name for name, one in KINDS.items() if isinstance(head, one.heads))
            what = f"{kind} cannot be made of a {type(head).__name__.lower()} head"
            raise InputError(what, f"choose of {allowed}" if allowed else "choose a model that predicts voxels")
        if kind == "noise" and isinstance(head, Regression) and not head.variance:
            raise InputError(
                "this model did not learn the noise of its numbers", "train with heads.NAME.variance: true"
            )
        if kind not in OF_REGIONS and isinstance(head, Segmentation) and head.regions:
            what = f"{kind} cannot be made of regions that may overlap, which have no softmax"
            raise InputError(what, f"choose of {', '.join(OF_REGIONS)}")
        if kind == "variance" and predictions < 2:
            fix = "give several models (--with RUN) or mirrored views (inference.mirror)"
            raise InputError("variance needs several predictions of each voxel, and there is one", fix)
        if blocks > 1 and isinstance(head, Segmentation) and head.regions:
            what = f"{kind} of blocks of pixels cannot be made of regions that may overlap, which have no softmax"
            raise InputError(what, "leave inference.bin out")
        if blocks > 1 and kind not in OF_BLOCKS:
            what = f"{kind} of blocks of pixels is not known: probabilities are what is averaged"
            raise InputError(what, f"leave inference.bin out, or choose of {', '.join(OF_BLOCKS)}")


def default_kind(head: HeadSpec) -> str:
    """What one wants first of a head."""
    return "regression" if isinstance(head, Regression) else "labels"


OF_REGIONS = ("labels", "probabilities", "logits")
"""What can be made of regions that may overlap: of labels the likeliest class, of probabilities the regions' own."""
OF_BLOCKS = ("labels", "probabilities", "entropy")
"""What follows from the mean probabilities of a block."""


def reduced(kind: str, planes: Predicted, plan: Plan, head: HeadSpec) -> NDArray[Any]:
    """Finished planes as they are written, (C, n, *rest); where a pixel is invalid `plan.invalid` in labels, else NaN.

    Args:
        kind: a key of `KINDS`.
        planes: with `variance`, if that is the kind.
        plan: the meaning of the classes.
        head: what was predicted.
    """
    values: NDArray[Any] = KINDS[kind].reduce(planes, plan, head).cpu().numpy()
    if planes.invalid is None:
        return values
    fill = plan.invalid if kind == "labels" else np.nan
    return np.where(planes.invalid, values.dtype.type(fill), values)  # a copy: they may be the stream's own


def names_of(plan: Plan) -> dict[int, str]:
    """Label value -> class name, "invalid" for pixels that do not count where these have a value of their own."""
    names = dict(zip(plan.values, plan.classes, strict=True))
    return names if plan.invalid in names else {**names, plan.invalid: INVALID}


def label_type(plan: Plan) -> np.dtype:
    """The smallest type for label maps."""
    values = (*plan.values, plan.invalid)
    return label_dtype(max(values), min(values))


@dataclass(frozen=True)
class Contents:
    """What the values of a kind are.

    Args:
        dtype: of the values.
        channels: how many.
        names: of labels, value -> class; of a channel for each class, channel -> class.
        unit: of the values.
    """

    dtype: np.dtype
    channels: int
    names: Mapping[int, str]
    unit: str


def contents(kind: str, plan: Plan, head: HeadSpec) -> Contents:
    """What a kind holds, from the plan and what is predicted."""
    if kind == "labels":
        return Contents(label_type(plan), 1, names_of(plan), "")
    channels = (head.channels if kind == "logits" else _width(head)) if KINDS[kind].wide else 1
    classes = KINDS[kind].wide and isinstance(head, Segmentation)
    regions = isinstance(head, Segmentation) and head.regions
    names = dict(enumerate(plan.regions if regions else plan.classes)) if classes else {}
    unit = head.unit if isinstance(head, Regression) and kind != "logits" else KINDS[kind].unit
    return Contents(np.dtype(np.float32), channels, names, unit)


def gathered(
    grid: Volume, held: Mapping[str, Contents], slabs: Iterable[tuple[int, int, Mapping[str, NDArray[Any]]]]
) -> dict[str, Volume]:
    """Finished planes as whole volumes in memory.

    Args:
        grid: of the result.
        held: what each kind holds.
        slabs: (z0, z1, kind -> (C, z1 - z0, *rest)), in order for each kind.
    """
    arrays = {kind: np.empty((one.channels, *grid.shape[1:]), one.dtype) for kind, one in held.items()}
    for start, stop, found in slabs:
        for kind, values in found.items():
            arrays[kind][:, start:stop] = values
    volumes = {kind: grid.like(values, labels=kind == "labels") for kind, values in arrays.items()}
    for kind, result in volumes.items():
        result.classes, result.unit = dict(held[kind].names), held[kind].unit
    return volumes


def bytes_of(kinds: Iterable[str], plan: Plan, head: HeadSpec) -> int:
    """The bytes of a voxel of several kinds."""
    return sum(one.channels * one.dtype.itemsize for one in (contents(kind, plan, head) for kind in kinds))


class Outputs:
    """The files of one case, filled together; each is whole or not there.

    Args:
        paths: kind, one of `KINDS` -> file.
        count: images that the case holds, which go into one file.
        plan: the meaning of the classes.
        made: how the result came about.
        head: what is predicted; by default the plan's classes.
    """

    def __init__(
        self, paths: Mapping[str, Path], count: int, plan: Plan, made: Provenance, head: HeadSpec | None = None
    ) -> None:
        self.paths, self.count, self.plan, self.made = dict(paths), count, plan, made
        self.head = head or Segmentation(len(plan.classes))
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
        held = contents(kind, self.plan, self.head)
        return open_writer(path, like, held.dtype, held.channels, kind == "labels", self._record(kind, held))

    def _open_members(self, kind: str, path: Path) -> AbstractContextManager[MembersWriter]:
        held = contents(kind, self.plan, self.head)
        told = self._record(kind, held)
        return open_members_writer(path, self.count, held.dtype, held.channels, kind == "labels", told)

    def _record(self, kind: str, held: Contents) -> Record:
        probability, quantity = kind == "probabilities", KINDS[kind].quantity
        return Record(
            names=held.names, probability=probability, unit=held.unit, quantity=quantity, provenance=self.made
        )

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Append finished planes, kind -> (C, n, *rest), of the image that was begun last to the files of these."""
        for kind, values in arrays.items():
            try:
                self._writers[kind].write(values)
            except OSError as error:
                error.filename = error.filename or str(self.paths[kind])
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
