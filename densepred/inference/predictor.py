"""A trained network together with the preprocessing it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.preprocess import NormalizedVolume, check_image, normalized
from densepred.config import Config, ModelConfig
from densepred.config.base import parse_size
from densepred.device import pick_device
from densepred.errors import InputError
from densepred.inference.compute import Reduce, Report, WithinMemory, computing
from densepred.inference.inputs import find_inputs
from densepred.inference.loading import joint_hash, read_runs
from densepred.inference.many import counting, in_batches
from densepred.inference.origin import Origin
from densepred.inference.outputs import (
    Outputs,
    Predicted,
    bytes_of,
    check_kinds,
    contents,
    default_kind,
    gathered,
    reduced,
)
from densepred.inference.ranges import Helper, Range, together
from densepred.inference.sliding_window import Progress, SlidingWindowInferer
from densepred.inference.spool import Arrays, Spool
from densepred.inference.threads import Behind
from densepred.inference.volume_pass import VolumePass
from densepred.models.dense import Model
from densepred.models.heads import HeadSpec, Segmentation
from densepred.models.layers import to_channels_last
from densepred.progress import counted
from densepred.volumes import Provenance, Volume
from densepred.volumes.grid import Box, binned_like, cutout
from densepred.volumes.region import parse_region

_LOG = logging.getLogger(__name__)
Image: TypeAlias = "str | Path | Volume | NDArray[Any]"


def load(
    run: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    weights: str = "last",
    device: str | None = None,
) -> Predictor:
    """Read a run directory for prediction, or several whose mean is predicted; nothing in them can run code.

    Args:
        run: folder with `config.yaml`, `plan.json` and the weights; of several the first one's recipe says how windows
            are laid, and what they see and predict must agree.
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
    members = read_runs([Path(folder) for folder in folders], overrides, weights)
    first, *others = members
    config = first.config
    if device is not None:
        config = config.model_copy(update={"inference": config.inference.model_copy(update={"device": device})})
    return Predictor(
        [member.model for member in members],
        config,
        first.plan,
        joint_hash(members),
        [member.name for member in members],
        overrides,
        [member.config.model for member in others],
    )


class Predictor:
    """Predicts label maps, probabilities and the like on the grid of the input.

    Args:
        model: maps (B, C, *spatial) to logits (B, K, *spatial); several are averaged.
        config: the recipe; its `inference` section is used.
        plan: normalisation, spacing, classes and channels fixed in training.
        weights_hash: SHA-256 of the weights' file, for the records.
        name: of the model, or of each, for the records.
        overrides: the `inference.key=value` texts that are in `config`, for the records.
        others: the recipes of the models but the first, for the records.
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        config: Config,
        plan: Plan,
        weights_hash: str,
        name: str | Sequence[str] = "",
        overrides: Sequence[str] = (),
        others: Sequence[ModelConfig] = (),
    ) -> None:
        names = (name,) if isinstance(name, str) else tuple(name)
        self.origin = Origin(names, weights_hash, config, plan, tuple(overrides), tuple(others))
        self.config, self.plan = config, plan
        settings = config.inference
        self.device = pick_device(settings.device)
        models = [model] if isinstance(model, nn.Module) else list(model)
        self.models = tuple(to_channels_last(one.eval().to(self.device)) for one in models)
        self._compute = computing(self.models, config, self.device)
        self.sharing = 1  # predictors that share the memory of the device

    @property
    def inferer(self) -> SlidingWindowInferer:
        """Windows, batch and device."""
        return self._compute.inferer

    @property
    def model(self) -> Model:
        """The network; of several the first."""
        return self.models[0]

    @property
    def head(self) -> HeadSpec:
        """What is predicted for each voxel: of several the first; by a model that does not tell, the plan's classes.

        Raises:
            InputError: all heads are for whole images.
        """
        if not hasattr(self.model, "specs"):  # a module of another make
            return Segmentation(len(self.plan.classes))
        dense = [spec for spec in self.model.specs.values() if spec.dense]
        if not dense:
            raise InputError("the model predicts nothing for each voxel", "give one with a dense head")
        return dense[0]

    def _check(self, kinds: Sequence[str]) -> None:
        count = len(self.models) << len(set(self.config.inference.mirror))
        if self.config.inference.skip and not (isinstance(self.head, Segmentation) and not self.head.regions):
            what = "inference.skip above 0 is held to by comparing class probabilities, of which the model has none"
            raise InputError(what, "set it to 0, which skips windows of one value and changes nothing")
        check_kinds(kinds, self.head, count, self.config.inference.bin)

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
            outputs: a kind, "labels", "probabilities", "logits", "entropy", "variance" or "regression", or several; by
                default labels, or of a model of numbers these.
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

    def _volume(self, source: Volume | NDArray[Any], spacing: Sequence[float] | None) -> Volume:
        if isinstance(source, Volume):
            return source
        planes = self.config.inference.slices is not None and source.ndim > 2
        return Volume.from_array(source, tuple(spacing) if spacing else (1.0,) * (3 if planes else self.plan.dims))

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
        return gathered(self.grid(volume), {kind: contents(kind, self.plan, self.head) for kind in kinds}, slabs)

    def _tell_invalid(self, volume: Volume, count: int) -> None:
        if count:
            blocks = self.config.inference.bin > 1
            what = "left out of the means of their blocks" if blocks else f"labelled {self.plan.invalid}"
            _LOG.warning(
                "%s: %d pixels do not count (NaN, infinite or masked): %s", volume.path or "image", count, what
            )

    def reduce(self, planes: Predicted, kind: str) -> NDArray[Any]:
        """Finished planes of `stream` as a kind of output, (C, n, *rest), as of `predict`.

        Raises:
            InputError: the model does not predict that kind.
        """
        self._check([kind])
        return reduced(kind, planes, self.plan, self.head)

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
                        for _, _, arrays in slabs:
                            write(arrays)
                    self._tell_invalid(volume, within.report.invalid)
            if before_placing is not None:
                before_placing()

    def prepare(self, image: VolumePass, variance: bool) -> None:
        """Get ready for the windows of an image: where workers share the memory, before any of them fills it."""
        if self.sharing > 1:
            compute = self._compute if not variance else self._compute.giving_variance()
            compute.ready_for(image)

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

    @property
    def _planes_required(self) -> bool:
        return self.config.inference.planes == "required"

    def grid(self, volume: Volume) -> Volume:
        """What has the grid of a result: the image, or its cut-out, or the blocks of that."""
        settings = self.config.inference
        box = self._box(volume)
        like = volume if box is None else cutout(volume, box)
        if settings.bin == 1:
            return like
        left = [size % settings.bin for size in like.shape[-2:]]
        if any(left):
            what = f"blocks of {settings.bin} leave out the last {left[0]} rows and {left[1]} columns"
            _LOG.warning("%s: %s", volume.path or "image", what)
        return binned_like(like, settings.bin)

    def _box(self, volume: Volume) -> Box | None:
        region = self.config.inference.cutout
        return None if region is None else parse_region(region).resolve(volume)

    def made(self, case: Case) -> Provenance:
        """How the result of a case comes about."""
        return self.origin.of(case, self.device.type)

    def stream(self, volume: Volume, progress: Progress | None = None, variance: bool = False) -> Iterator[Predicted]:
        """Yield finished planes, of what `grid` says, as soon as no later window can change them.

        The volume is read forward: for what normalisation needs (and its checksum), then for the windows. Who wants no
        more planes closes the generator, or lets go of it.

        Args:
            volume: the image.
            progress: called with windows done and all windows.
            variance: the planes have that too.

        Raises:
            InputError: dimensions or channels other than the model's, too few valid pixels, or a damaged file.
        """

        def whole(planes: Predicted) -> Arrays:
            arrays = {"logits": planes.logits.cpu().numpy()}
            arrays |= {} if planes.variance is None else {"variance": planes.variance.cpu().numpy()}
            invalid = np.zeros(planes.logits.shape[1:], bool) if planes.invalid is None else planes.invalid
            return arrays | {"invalid": invalid[np.newaxis]}

        within = self._within(volume, ("logits", "variance") if variance else ("logits",))
        for start, stop, arrays in within.slabs(whole, progress):
            logits, (invalid,) = torch.from_numpy(arrays["logits"]), arrays["invalid"]
            spread = torch.from_numpy(arrays["variance"]) if variance else None
            yield Predicted(start, stop, logits, invalid if invalid.any() else None, spread)
        self._tell_invalid(volume, within.report.invalid)

    def _seen(self, volume: Volume) -> NormalizedVolume:
        """What the network sees of an image, which is read for that once."""
        check_image(volume, self.plan, sliced=self.config.inference.slices is not None)
        return normalized(volume, self.plan)

    def _within(
        self,
        volume: Volume,
        kinds: Collection[str],
        scratch: Path | None = None,
        seen: NormalizedVolume | None = None,
    ) -> WithinMemory:
        """An image on its way, within the memory that is allowed."""
        image, settings = self._image(volume, seen), self.config.inference
        budget = None if settings.memory is None else parse_size(settings.memory)
        compute = self._compute.giving_variance() if "variance" in kinds else self._compute
        voxel = bytes_of(kinds, self.plan, self.head)
        return WithinMemory(image, compute, budget, scratch, self.sharing, voxel)

    def _image(self, volume: Volume, seen: NormalizedVolume | None = None) -> VolumePass:
        """An image, normalised, and how it is gone through."""
        settings, box, name = self.config.inference, self._box(volume), str(volume.path or "image")
        seen = seen or self._seen(volume)
        source = seen if box is None else seen.cutout(box)
        slices = settings.slices if volume.dims > self.plan.dims else None
        return VolumePass(source, volume.spacing, self.plan.spacing, settings.bin, slices, name)

    def _reduced(self, kinds: Iterable[str]) -> Reduce:
        return lambda planes: {kind: reduced(kind, planes, self.plan, self.head) for kind in kinds}


__all__ = ["Predictor", "load"]
