"""Prediction of images: normalised, gone through within the memory, on their own grid."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from densepred.cases.plan import Plan
from densepred.cases.preprocess import NormalizedVolume, check_image, normalized
from densepred.config import Config, ModelConfig
from densepred.config.base import parse_size
from densepred.device import pick_device, reproducible
from densepred.errors import InputError
from densepred.inference.components import KeepLargest
from densepred.inference.compute import Reduce, WithinMemory, computing
from densepred.inference.heads import chosen
from densepred.inference.origin import Origin
from densepred.inference.outputs import (
    Predicted,
    bytes_of,
    check_kinds,
    reduced,
)
from densepred.inference.sliding_window import Progress, SlidingWindowInferer
from densepred.inference.spool import Arrays
from densepred.inference.volume_pass import VolumePass
from densepred.models.dense import DensePredictor, Model
from densepred.models.heads import HeadSpec, Segmentation
from densepred.volumes import Volume
from densepred.volumes.grid import Box, binned_like, cutout
from densepred.volumes.region import parse_region

_LOG = logging.getLogger(__name__)


class ImagePredictor:
    """Predicts images that are open, slab by slab.

    Args:
        model: maps (B, C, *spatial) to logits (B, K, *spatial); several are averaged.
        config: the recipe; its `inference` section is used.
        plan: normalisation, spacing, classes and channels fixed in training.
        weights_hash: SHA-256 of the weights' file, for the records.
        name: of the model, or of each, for the records.
        overrides: the `inference.key=value` texts that are in `config`, for the records.
        others: the recipes of the models but the first, for the records.

    Attributes:
        models: with their heads for voxels; `whole` with those for whole images, if there are such.
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
        reproducible(self.device)
        models = [model] if isinstance(model, nn.Module) else list(model)
        self.whole = tuple(_part(one, dense=False).eval().to(self.device) for one in models if _has(one, dense=False))
        models = [_part(one, dense=True) if _has(one, True) and _has(one, False) else one for one in models]
        self.models = tuple(one.eval().to(self.device) for one in models)
        self._compute = computing(self.models, config, self.device)
        self.largest = KeepLargest.of(plan, settings.keep_largest)
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
        name = chosen(self.model.specs, self.config.inference.head)
        if name is None:
            raise InputError("the model predicts nothing for each voxel", "give one with a dense head")
        return self.model.specs[name]

    def prepare(self, image: VolumePass, variance: bool) -> None:
        """Get ready for the windows of an image: where workers share the memory, before any of them fills it."""
        if self.sharing > 1:
            compute = self._compute if not variance else self._compute.giving_variance()
            compute.ready_for(image)

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
            heat = 1.0 if self.config.inference.bin > 1 else self.config.inference.temperature  # blocks are cooled
            yield Predicted(start, stop, logits, invalid if invalid.any() else None, spread, heat)
        self._tell_invalid(volume, within.report.invalid)

    def reduce(self, planes: Predicted, kind: str) -> NDArray[Any]:
        """Finished planes of `stream` as a kind of output, (C, n, *rest), as of `predict`.

        Raises:
            InputError: the model does not predict that kind.
        """
        self._check([kind])
        return reduced(kind, planes, self.plan, self.head)

    def _check(self, kinds: Sequence[str]) -> None:
        count = len(self.models) << len(set(self.config.inference.mirror))
        if self.config.inference.skip and not (isinstance(self.head, Segmentation) and not self.head.regions):
            what = "inference.skip above 0 is held to by comparing class probabilities, of which the model has none"
            raise InputError(what, "set it to 0, which skips windows of one value and changes nothing")
        check_kinds(kinds, self.head, count, self.config.inference.bin)
        regions = isinstance(self.head, Segmentation) and self.head.regions
        if regions and not self.plan.regions and set(kinds) != {"logits"}:
            what = f"the plan does not tell which classes make up the regions that may overlap: no {', '.join(kinds)}"
            raise InputError(what, "take the logits, whose sigmoids are the probabilities of the regions")

    def _box(self, volume: Volume) -> Box | None:
        region = self.config.inference.cutout
        return None if region is None else parse_region(region).resolve(volume)

    def _seen(self, volume: Volume) -> NormalizedVolume:
        """What the network sees of an image, which is read for that once."""
        check_image(volume, self.plan, sliced=self.config.inference.slices is not None)
        return normalized(volume, self.plan)

    def _image(self, volume: Volume, seen: NormalizedVolume | None = None) -> VolumePass:
        """An image, normalised, and how it is gone through."""
        settings, box, name = self.config.inference, self._box(volume), str(volume.path or "image")
        seen = seen or self._seen(volume)
        source = seen if box is None else seen.cutout(box)
        slices = settings.slices if volume.dims > self.plan.dims else None
        spacings, ways = (volume.spacing, self.plan.spacing), (self.plan.resampling, settings.temperature)
        return VolumePass(source, *spacings, settings.bin, slices, name, *ways)

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
        held = self.largest.bytes_of(image.result_shape) if "labels" in kinds else 0
        return WithinMemory(image, compute, budget, scratch, self.sharing, voxel, held)

    def _reduced(self, kinds: Iterable[str]) -> Reduce:
        return lambda planes: {kind: reduced(kind, planes, self.plan, self.head) for kind in kinds}

    @property
    def maps(self) -> bool:
        """Whether something is predicted for each voxel."""
        return _has(self.model, dense=True)

    def _tell_invalid(self, volume: Volume, count: int) -> None:
        if count:
            blocks = self.config.inference.bin > 1
            what = "left out of the means of their blocks" if blocks else f"labelled {self.plan.invalid}"
            _LOG.warning(
                "%s: %d pixels do not count (NaN, infinite or masked): %s", volume.path or "image", count, what
            )


def _part(model: nn.Module, dense: bool) -> DensePredictor:
    """A model's outputs for voxels alone, or for whole images alone."""
    assert isinstance(model, DensePredictor)  # no other has both kinds
    return model.part(dense)


def _has(model: nn.Module, dense: bool) -> bool:
    """Whether a model has heads for voxels, or for whole images; one that does not tell has the former alone."""
    specs = getattr(model, "specs", None)
    return dense if specs is None else any(spec.dense == dense for spec in specs.values())
