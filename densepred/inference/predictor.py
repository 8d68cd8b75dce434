"""A trained network together with the preprocessing it was trained with."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densepred import config as configuration
from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.cases.preprocess import NormalizedVolume, check_image, normalized
from densepred.cases.resample import resampled_shape
from densepred.config import Config
from densepred.device import pick_device, pick_precision
from densepred.errors import InputError, UnsafeError
from densepred.files import is_pickled, sha256
from densepred.inference.blocks import in_blocks
from densepred.inference.inputs import find_inputs
from densepred.inference.outputs import Outputs, Predicted, label_type, labels_of, names_of
from densepred.inference.resample import Resampled, resample_slabs
from densepred.inference.sliding_window import Progress, SlidingWindowInferer
from densepred.models.build import build
from densepred.models.dense import Model
from densepred.models.layers import to_channels_last
from densepred.models.weights import Pretraining
from densepred.volumes import Provenance, Volume
from densepred.volumes.grid import Box, binned_like, cutout
from densepred.volumes.region import parse_region

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
PRETRAINING = "pretraining.json"
MAY_CHANGE = ("inference.", "data.axes", "data.checksum", "data.validity.least")
"""What a prediction may be given anew; anything else belongs to the training."""
_LOG = logging.getLogger(__name__)


def load(run: str | Path, overrides: Sequence[str] = (), weights: str = "last", device: str | None = None) -> Predictor:
    """Read a run directory for prediction; nothing in it can run code.

    Args:
        run: folder with `config.yaml`, `plan.json` and the weights.
        overrides: `inference.key=value` texts; of the data section, what `MAY_CHANGE` names.
        weights: "last", or "best" for the epoch that scored best on the validation cases (optimistic on those).
        device: where to compute, whatever the recipe says; in no record, as the result is the same.

    Raises:
        InputError: files are missing, or the weights do not fit the recipe.
        UnsafeError: the weights are no safetensors file, or hold NaN or infinite numbers.

    Example:
        >>> labels = load("runs/hippo").predict("ct.nii.gz")  # doctest: +SKIP
    """
    folder = Path(run)
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
    config = configuration.load(folder / "config.yaml", overrides)
    if device is not None:
        config = config.model_copy(update={"inference": config.inference.model_copy(update={"device": device})})
    plan = _read_as(Plan.load(folder / "plan.json"), config, overrides)
    path = folder / WEIGHTS[weights]
    model = build(config.model, len(plan.channels), len(plan.classes))
    load_weights(model, read_weights(path), path)
    if (folder / PRETRAINING).is_file():
        model.get_submodule("encoder").pretraining = _pretraining(folder / PRETRAINING)  # type: ignore[assignment]
    return Predictor(model, config, plan, sha256(path), folder.resolve().name, overrides)


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


class Predictor:
    """Predicts label maps on the grid of the input.

    Args:
        model: maps (B, C, *spatial) to logits (B, K, *spatial).
        config: the recipe; its `inference` section is used.
        plan: normalisation, spacing, classes and channels fixed in training.
        weights_hash: SHA-256 of the weights' file, for the records.
        name: of the model, for the records.
        overrides: the `inference.key=value` texts that are in `config`, for the records.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        plan: Plan,
        weights_hash: str,
        name: str = "",
        overrides: Sequence[str] = (),
    ) -> None:
        self._overrides = tuple(overrides)
        self.config, self.plan, self.weights_hash, self.name = config, plan, weights_hash, name
        settings = config.inference
        self.device = pick_device(settings.device)
        precision = pick_precision(settings.precision, self.device)
        self.model = to_channels_last(model.eval().to(self.device))
        self.inferer = SlidingWindowInferer(
            window=settings.window or config.patch.size,
            overlap=settings.overlap,
            blend=settings.blend,
            batch=settings.batch,
            device=self.device,
            precision=str(precision).removeprefix("torch."),
            mirror_axes=settings.mirror,
            multiple=model.stride if settings.blend == "none" else 1,
        )

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of what, besides the weights, decides on the values of a result."""
        settings = self.config.inference.model_dump(mode="json", exclude={"device", "outputs", "record_paths"})
        parts = [settings, self.config.model.model_dump(mode="json"), self.plan.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def predict(self, source: str | Path | Volume | NDArray[Any], spacing: Sequence[float] | None = None) -> Volume:
        """Segment one image.

        Args:
            source: a file, which brings the other files of its case as on the command line; a Volume, or an array
                (C, *spatial) or *spatial, whose invalid pixels are NaN.
            spacing: voxel spacing of an array, slowest axis first; 1 by default.

        Returns:
            A Volume (1, *spatial) of label values (as in the training labels), on the input's grid.
        """
        if isinstance(source, str | Path):
            (case,) = find_inputs([str(source)], self.config, len(self.plan.image_channels))
            with self.plan.reading.open_case(case, self._planes_required) as volume:
                return self._labelled(volume)
        if isinstance(source, np.ndarray):
            source = Volume.from_array(source, tuple(spacing) if spacing else (1.0,) * self.plan.dims)
        if not isinstance(source, Volume):
            raise TypeError(f"source must be a path, a Volume or an array, got {type(source).__name__}")
        return self._labelled(source)

    def _labelled(self, volume: Volume) -> Volume:
        grid = self.grid(volume)
        values = np.empty((1, *grid.shape[1:]), label_type(self.plan))
        for planes in self.stream(volume):
            values[:, planes.start : planes.stop] = labels_of(planes, self.plan)
        labels = grid.like(values, labels=True)
        labels.classes = names_of(self.plan)
        return labels

    def predict_file(
        self,
        case: Case,
        paths: Mapping[str, Path],
        progress: Progress | None = None,
        before_placing: Callable[[], None] | None = None,
    ) -> None:
        """Predict one case from its files to files, slab by slab; each appears whole or not at all.

        Args:
            case: its images and planes.
            paths: "labels", "probabilities" -> the file for them.
            progress: called with windows done and all windows.
            before_placing: called when all is predicted, before the first file is put in its place.
        """
        count, images = self.plan.reading.count(case), self.plan.reading.open_cases(case, self._planes_required)
        with closing(images), Outputs(paths, count, self.plan, self.made(case)) as outputs:
            for volume in images:
                with volume:
                    outputs.begin(self.grid(volume))
                    for planes in self.stream(volume, progress):
                        outputs.write(planes)
            if before_placing is not None:
                before_placing()

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
        settings = self.config.inference
        said = {role: str(path) if settings.record_paths else path.name for role, path in case.roles.items()}
        names = " ".join(dict.fromkeys(name for role, name in said.items() if role != "label"))
        typed = [name for role, name in said.items() if role.startswith("image")]
        return Provenance(
            model=self.name,
            model_sha=self.weights_hash,
            config_sha=self.config_hash,
            source=names,
            window="x".join(map(str, settings.window or self.config.patch.size)),
            overlap=settings.overlap,
            device=self.device.type,
            command=shlex.join(["predict", self.name, *typed, *self._overrides]),
        )

    def stream(self, volume: Volume, progress: Progress | None = None) -> Iterator[Predicted]:
        """Yield finished planes, of what `grid` says, as soon as no later window can change them.

        The volume is read forward: for what normalisation needs (and its checksum), then for the windows.

        Raises:
            InputError: dimensions or channels other than the model's, too few valid pixels, or a damaged file.
        """
        check_image(volume, self.plan)
        settings, whole = self.config.inference, normalized(volume, self.plan)
        box = self._box(volume)
        source = _Screened(whole if box is None else whole.cutout(box))
        shape = tuple(source.shape[1:])
        target = resampled_shape(shape, volume.spacing, self.plan.spacing) if self.plan.spacing else shape
        if target == shape:
            slabs = self.inferer.stream(self.model, source, progress)
        else:
            moved = Resampled(source, target, self.device)
            slabs = resample_slabs(self.inferer.stream(self.model, moved, progress), target, shape)
        planes = (Predicted(start, stop, logits, source.invalid(start, stop)) for start, stop, logits in slabs)
        yield from planes if settings.bin == 1 else in_blocks(planes, settings.bin)
        if source.count:
            name, value = volume.path or "image", self.plan.invalid
            what = f"labelled {value}" if settings.bin == 1 else "left out of the means of their blocks"
            _LOG.warning("%s: %d pixels do not count (NaN, infinite or masked): %s", name, source.count, what)


class _Screened:
    """A normalised volume that remembers the invalid pixels of the planes it has read until they are asked for."""

    def __init__(self, source: NormalizedVolume) -> None:
        self.source, self.shape, self.count = source, source.shape, 0
        self._planes: dict[int, NDArray[np.bool_]] = {}

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Planes `[:, z0:z1]`, read forward."""
        values, valid = self.source.read(key)
        if valid is not None:
            start = key[1].start or 0
            self._planes |= {start + z: ~plane for z, plane in enumerate(valid) if not plane.all()}
        return values

    def invalid(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Bool (n, *rest) of planes that were read; None where all pixels are valid."""
        found = {z: self._planes.pop(z) for z in range(start, stop) if z in self._planes}
        if not found:
            return None
        out = np.zeros((stop - start, *self.shape[2:]), bool)
        for z, plane in found.items():
            out[z - start] = plane
        self.count += int(out.sum())
        return out


__all__ = ["Predictor", "load", "load_weights", "read_weights"]
