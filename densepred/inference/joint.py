"""Models that see an image each in its own way (spacing, normalisation, planes or volumes), as one: their mean.

Each group of models that see it alike goes through the image by itself, and brings its logits back to the image's grid.
Those of all groups but the last wait on disk, so that memory is that of one group; then planes are averaged as the last
one finishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densepred.cases.case import Case
from densepred.cases.preprocess import NormalizedVolume
from densepred.errors import InputError
from densepred.inference.compute import Reduce, WithinMemory
from densepred.inference.outputs import Predicted
from densepred.inference.predictor import Predictor
from densepred.inference.ranges import Helper
from densepred.inference.slices import averaged
from densepred.inference.sliding_window import Progress, Slab
from densepred.inference.spool import Arrays, Spool
from densepred.volumes import Volume


class JointPredictor(Predictor):
    """The mean of the logits of several predictors, each of which counts by the number of its models.

    Args:
        parts: what they predict must agree; the first one's plan and settings are those of results.

    Raises:
        InputError: they predict something for whole images.
    """

    def __init__(self, parts: Sequence[Predictor]) -> None:
        first, *others = parts
        self.parts = tuple(parts)
        self.config, self.plan, self.device = first.config, first.plan, first.device
        self.models = tuple(model for part in parts for model in part.models)
        self.whole = tuple(model for part in parts for model in part.whole)
        if self.whole:
            what = "models that see an image in different ways have no joint prediction of whole images"
            raise InputError(what, "predict with those of one recipe at a time")
        self.origin = replace(first.origin, joint=[part.config_hash for part in others])
        self._compute, self.largest, self.sharing = first._compute, first.largest, 1

    def predict_many(
        self, images: Iterable[Volume | NDArray[Any]], outputs: Sequence[str] = ("labels",)
    ) -> Iterator[dict[str, Volume]]:
        """As of `Predictor`, one by one."""
        for image in images:
            yield self.predict(image, outputs=list(outputs))

    def predict_file(
        self,
        case: Case,
        paths: Mapping[str, Path],
        progress: Progress | None = None,
        before_placing: Callable[[], None] | None = None,
        others: Sequence[Helper] = (),
    ) -> None:
        """As of `Predictor`; other workers have cases of their own."""
        super().predict_file(case, paths, progress, before_placing)

    def _check(self, kinds: Sequence[str]) -> None:
        super()._check(kinds)
        if "variance" in kinds or self.config.inference.bin > 1:
            what = "models that see an image in different ways give no variance, and no blocks of pixels"
            raise InputError(what, "predict with those of one recipe, or leave it out")

    def _within(
        self,
        volume: Volume,
        kinds: Collection[str],
        scratch: Path | None = None,
        seen: NormalizedVolume | None = None,
    ) -> WithinMemory:
        passes = []
        for number, part in enumerate(self.parts):
            part.sharing = self.sharing
            wanted = ("logits", *(kind for kind in kinds if kind == "labels"))
            passes.append(part._within(volume, wanted, scratch, seen if number == 0 else None))
        heat = self.config.inference.temperature
        return _JointPass(passes, [len(part.models) for part in self.parts], heat)


class _JointPass(WithinMemory):
    """One image through each of several predictors.

    Args:
        passes: through each.
        counts: how many models each stands for.
        temperature: by which logits are divided for probabilities.
    """

    def __init__(self, passes: Sequence[WithinMemory], counts: Sequence[int], temperature: float) -> None:
        first = passes[0]
        super().__init__(first.image, first.compute, first.budget, first.scratch, first.sharing, first.voxel)
        self._passes, self._counts, self._temperature = passes, counts, temperature

    def slabs(
        self, reduce: Reduce, progress: Progress | None = None, planes: tuple[int, int] | None = None
    ) -> Generator[tuple[int, int, Arrays], None, None]:
        """As of `WithinMemory`, of whole images."""
        every, last = (0, self.image.result_shape[0]), len(self._passes) - 1
        with ExitStack() as stack:
            streams: list[Generator[Slab, None, None]] = []
            for number, (one, count) in enumerate(zip(self._passes, self._counts, strict=True)):
                share = count * len(self._counts) / sum(self._counts)
                found = one.slabs(_whole, _part_of(progress, number, last + 1), planes)
                if number < last:
                    spool = stack.enter_context(Spool(self.scratch, every, self.image.result_shape[1:]))
                    with closing(found):
                        for start, _, arrays in found:
                            spool.write(start, (0, spool.rest[0]), arrays)
                    streams.append(_weighted(spool.slabs(), share))
                else:
                    streams.append(_weighted(stack.enter_context(closing(found)), share))
            with closing(averaged(streams)) as mean:
                for start, stop, slab in mean:
                    invalid = slab[-1].numpy() > 0
                    missing = invalid if invalid.any() else None
                    yield start, stop, reduce(Predicted(start, stop, slab[:-1], missing, None, self._temperature))
        self.report.invalid = max(one.report.invalid for one in self._passes)


def _whole(planes: Predicted) -> Arrays:
    invalid = np.zeros(planes.logits.shape[1:], bool) if planes.invalid is None else planes.invalid
    return {"logits": planes.logits.cpu().numpy(), "invalid": invalid[np.newaxis]}


def _weighted(slabs: Iterable[tuple[int, int, Arrays]], share: float) -> Generator[Slab, None, None]:
    """Logits times a share and, as the last channel, which pixels do not count."""
    for start, stop, arrays in slabs:
        logits: Tensor = torch.from_numpy(arrays["logits"]) * share
        yield start, stop, torch.cat([logits, torch.from_numpy(arrays["invalid"]).to(logits.dtype)])


def _part_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The hook of one pass of several, as if all had as many windows as it has."""
    return None if progress is None else lambda done, total: progress(number * total + done, count * total)
