"""A trained network together with the preprocessing it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from densepred.cases.case import Case
from densepred.cases.preprocess import NormalizedVolume
from densepred.inference.compute import Report
from densepred.inference.folds import decided, read_ensemble
from densepred.inference.image_predictor import ImagePredictor
from densepred.inference.inputs import find_inputs
from densepred.inference.loading import joint_hash, read_runs, seen_alike
from densepred.inference.many import counting, in_batches
from densepred.inference.outputs import (
    Outputs,
    contents,
    default_kind,
    gathered,
)
from densepred.inference.ranges import Helper, Range, together
from densepred.inference.sliding_window import Progress
from densepred.inference.spool import Arrays, Spool
from densepred.inference.threads import Behind
from densepred.progress import counted
from densepred.volumes import Provenance, Volume

Image: TypeAlias = "str | Path | Volume | NDArray[Any]"


def load(
    run: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    weights: str = "last",
    device: str | None = None,
) -> Predictor:
    """Read a run directory for prediction, or several whose mean is predicted; nothing in them can run code.

    Args:
        run: folder with `config.yaml`, `plan.json` and the weights, or that of a cross-validation, which stands for its
            folds and settings. Several must predict the same; of those that see images alike the first one's recipe
            says how windows are laid, the others go through an image by themselves.
        overrides: `inference.key=value` texts; of the data section, what `MAY_CHANGE` names.
        weights: "last", or "best" for the epoch that scored best on the validation cases (optimistic on those).
        device: where to compute, whatever the recipe says; in no record, as the result is the same.

    Raises:
        InputError: files are missing, the weights do not fit the recipe, or runs do not agree.
        UnsafeError: the weights are no safetensors file, or hold NaN or infinite numbers.

    Example:
        >>> labels = load("runs/hippo").predict("ct.nii.gz")  # doctest: +SKIP
        >>> labels = load(["runs/fold0", "runs/fold1"]).predict("ct.nii.gz")  # doctest: +SKIP
    """
    folders = [run] if isinstance(run, str | Path) else list(run)
    found = [read_ensemble(Path(folder)) for folder in folders]
    settings, why = decided(found)
    overrides = [*settings, *overrides]
    members = read_runs([run for one in found for run in one.runs], overrides, weights)
    names, hashed = [one.name for one in found], joint_hash(members)
    parts: list[Predictor] = []
    for first, *others in seen_alike(members):
        config, same = first.config, [first, *others]
        if device is not None:
            config = config.model_copy(update={"inference": config.inference.model_copy(update={"device": device})})
        models, recipes = [one.model for one in same], [one.config.model for one in others]
        parts.append(Predictor(models, config, first.plan, hashed, names, overrides, recipes))
        parts[-1].origin.why = why
    if len(parts) == 1:
        return parts[0]
    from densepred.inference.joint import JointPredictor

    return JointPredictor(parts)


class Predictor(ImagePredictor):
    """Predicts label maps, probabilities and the like on the grid of the input; files to files too.

    Args: as of `ImagePredictor`.
    """

    @property
    def name(self) -> str:
        """Of the model, or of all."""
        return self.origin.name

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return self.origin.weights_hash

    @property
    def config_hash(self) -> str:
        """SHA-256 of what, besides the weights, decides on the values of a result."""
        return self.origin.config_hash

    @overload
    def predict(
        self,
        source: Image,
        spacing: Sequence[float] | None = None,
        outputs: str | None = None,
        progress: Progress | bool = False,
    ) -> Volume: ...

    @overload
    def predict(
        self,
        source: Image,
        spacing: Sequence[float] | None = None,
        *,
        outputs: list[str] | tuple[str, ...],
        progress: Progress | bool = False,
    ) -> dict[str, Volume]: ...

    def predict(
        self,
        source: Image,
        spacing: Sequence[float] | None = None,
        outputs: str | list[str] | tuple[str, ...] | None = None,
        progress: Progress | bool = False,
    ) -> Volume | dict[str, Volume]:
        """Predict one image. Threads may share a predictor, each with an image of its own.

        Args:
            source: a file, which brings the other files of its case as on the command line; a Volume, or an array
                (C, *spatial) or *spatial, whose invalid pixels are NaN.
            spacing: voxel spacing of an array, slowest axis first; by default 1 along each axis of the model, or where
                `inference.slices` says so of a volume.
            outputs: a kind, "labels", "probabilities", "logits", "entropy", "variance", "regression" or "noise", or
                several; by default labels, or of a model of numbers these.
            progress: called with windows done and all windows, or true for a bar. What it raises ends the prediction,
                whatever it is, and arrives at the caller; the predictor is as before.

        Returns:
            A Volume on the input's grid, or kind -> Volume if several were asked for. Labels are (1, *spatial) values
            as in the training labels; the others float32, NaN where a pixel is invalid: (K, *spatial) probabilities,
            logits or numbers, (1, *spatial) entropy in nats or variance.

        Raises:
            InputError: a kind that the model does not predict, or an image that it was not made for.
        """
        kinds = [outputs or default_kind(self.head)] if outputs is None or isinstance(outputs, str) else list(outputs)
        with ExitStack() as stack:
            if isinstance(source, str | Path):
                (case,) = find_inputs([str(source)], self.config, self.plan.image_channels)
                volume = stack.enter_context(self.plan.reading.open_case(case, self._planes_required))
            elif isinstance(source, np.ndarray | Volume):
                volume = self._volume(source, spacing)
            else:
                raise TypeError(f"source must be a path, a Volume or an array, got {type(source).__name__}")
            hook = stack.enter_context(counted("predicting")) if progress is True else progress or None
            found = self._predicted(volume, kinds, hook)
        return found if isinstance(outputs, list | tuple) else found[kinds[0]]

    def predict_many(
        self, images: Iterable[Volume | NDArray[Any]], outputs: Sequence[str] = ("labels",)
    ) -> Iterator[dict[str, Volume]]:
        """Predict images in their order, those that fit in a window `inference.batch` at a time.

        Args:
            images: as for `predict`, in memory or opened.
            outputs: kinds, as for `predict`.

        Yields:
            Kind -> Volume for each image, as `predict`, whose numbers may differ in their last digits.

        Raises:
            InputError: as `predict`.
        """
        self._check(outputs)
        compute = self._compute.giving_variance() if "variance" in outputs else self._compute
        each = ((volume, self._image(volume)) for volume in (self._volume(image, None) for image in images))
        for volume, planes in in_batches(each, compute, partial(self.stream, variance="variance" in outputs)):
            counted: list[int] = []
            slabs = ((part.start, part.stop, self._reduced(outputs)(part)) for part in counting(planes, counted))
            yield self._gathered(volume, outputs, slabs)
            self._tell_invalid(volume, sum(counted))

    def predict_file(
        self,
        case: Case,
        paths: Mapping[str, Path],
        progress: Progress | None = None,
        before_placing: Callable[[], None] | None = None,
        others: Sequence[Helper] = (),
    ) -> None:
        """Predict one case from its files to files, slab by slab; each appears whole or not at all.

        Args:
            case: its images and planes.
            paths: "labels", "probabilities" ... -> the file for them.
            progress: called with windows done and all windows; what it raises ends the case, and no file is left.
            before_placing: called when all is predicted, before the first file is put in its place.
            others: have nothing else to do, and predict ranges of its planes where that pays; the bytes are the same.

        Raises:
            InputError: as `predict`.
        """
        self._check(list(paths))
        count, images = self.plan.reading.count(case), self.plan.reading.open_cases(case, self._planes_required)
        with closing(images), Outputs(paths, count, self.plan, self.made(case), self.head) as outputs:
            for volume in images:
                with volume:
                    outputs.begin(self.grid(volume))
                    seen, scratch = self._seen(volume), next(iter(paths.values()))
                    within = self._within(volume, paths, scratch.parent, seen)
                    asked = Range(case, tuple(paths), seen.fitted, scratch)
                    slabs = together(within, self._reduced(paths), asked, others if count == 1 else (), progress)
                    with closing(slabs), Behind(outputs.write) as write:
                        for _, _, arrays in self.largest.held(slabs, within.image.result_shape):
                            write(arrays)
                    self._tell_invalid(volume, within.report.invalid)
            if before_placing is not None:
                before_placing()

    def predict_range(self, asked: Range, progress: Progress, spool: Spool) -> Report:
        """Predict a range of the planes of a case into a spool, from files of its own."""
        with self.plan.reading.open_case(asked.case, self._planes_required) as volume:
            seen = NormalizedVolume(volume, asked.fitted, self.plan.reading.validity)
            within = self._within(volume, asked.kinds, asked.scratch.parent, seen)
            every = (0, spool.rest[0])
            with closing(within.slabs(self._reduced(asked.kinds), progress, spool.planes)) as slabs:
                for start, _, arrays in slabs:
                    spool.write(start, every, arrays)
            return within.report

    def made(self, case: Case) -> Provenance:
        """How the result of a case comes about."""
        return self.origin.of(case, self.device.type)

    def _volume(self, source: Volume | NDArray[Any], spacing: Sequence[float] | None) -> Volume:
        if isinstance(source, Volume):
            return source
        planes = self.config.inference.slices is not None and source.ndim > 2
        return Volume.from_array(source, tuple(spacing) if spacing else (1.0,) * (3 if planes else self.plan.dims))

    def _predicted(self, volume: Volume, kinds: Sequence[str], progress: Progress | None) -> dict[str, Volume]:
        self._check(kinds)
        within = self._within(volume, kinds)
        with closing(within.slabs(self._reduced(kinds), progress)) as slabs:
            found = self._gathered(volume, kinds, slabs)
        self._tell_invalid(volume, within.report.invalid)
        return found

    def _gathered(
        self, volume: Volume, kinds: Sequence[str], slabs: Iterator[tuple[int, int, Arrays]]
    ) -> dict[str, Volume]:
        grid, held = self.grid(volume), {kind: contents(kind, self.plan, self.head) for kind in kinds}
        return gathered(grid, held, self.largest.held(slabs, grid.shape[1:]))

    @property
    def _planes_required(self) -> bool:
        return self.config.inference.planes == "required"


__all__ = ["Predictor", "load"]
