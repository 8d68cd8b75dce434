"""The schema of the YAML: one model per section, every default, one line of doc per field.

`load` reads a file, applies `key.sub=value` overrides and reports every fault at once, each with its path and line.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from densepred.contradictions import contradictions, nearest
from densepred.errors import InputError
from densepred.yamlfile import read_yaml, set_path, value_of

Axes = Annotated[tuple[int, ...], Field(strict=False, min_length=2, max_length=3)]
"""One positive integer per spatial axis, slowest first."""
Positive = Annotated[int, Field(gt=0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
PerStage = Annotated[tuple[Positive | Annotated[tuple[Positive, ...], Field(strict=False)], ...], Field(strict=False)]
"""One number, or one number per axis, for each stage."""
Range = Annotated[tuple[float, float], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Which files make the cases, what their labels mean, and how they are brought to one form."""

    root: str = "."
    """Folder that the patterns and the list are relative to (itself relative to the current folder)."""
    images: str | dict[str, str] | None = None
    """Pattern of the images: `imagesTr/*.nii.gz`, `{id}/t1.nii.gz`; or a mapping name -> pattern, for channels."""
    labels: str | None = None
    """Pattern of the labels with `{id}`, such as `labelsTr/{id}.nii.gz`."""
    dataset: str | None = None
    """Instead of patterns: a Decathlon or nnU-Net `dataset.json`, or a CSV of id, image (or channels), label, group."""
    axes: Literal["xyz", "xyzc"] | None = None
    """Meaning of the axes of 4D NIfTI files: `xyzc` reads the fourth as channels."""
    classes: Annotated[dict[int, str], Field(strict=False)] = {}
    """Label value in the files -> class name, background first. Gaps are allowed; equal names merge values."""
    ignore: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Label values that mark voxels without a truth: left out of loss and scores."""
    spacing: Annotated[tuple[float, ...], Field(strict=False)] | Literal["median"] | None = None
    """Voxel spacing to resample to, slowest axis first; `median` of the training cases; none keeps the grids."""
    normalize: Literal["zscore", "none"] = "zscore"
    """Intensities per case and channel: zero mean and unit variance over the valid voxels, or as they are."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of cross-validation folds, made by group and seed."""
    seed: int = 0
    """Seed of the folds."""
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """The fold kept for validation; `all` trains on every case and validates on none."""
    splits: str | None = None
    """File with given folds instead (a list of {train: [ids], val: [ids]}), relative to root."""
    group: str | None = None
    """Regular expression on the case id; its one group names the subject, who never spans two folds."""
    cache: str | None = None
    """Folder of the preprocessed cases; by default `cache` in the run directory."""


class ModelConfig(Section):
    """The network: encoder, decoder and head."""

    encoder: str = "plain"
    """Name of the encoder: plain, resnet18, resnet34 or resnet50."""
    decoder: str = "unet"
    """Name of the decoder: unet."""
    dims: Literal[2, 3] = 3
    """Spatial dimensions."""
    channels: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2)] = (32, 64, 128, 256, 320)
    """Feature maps of each stage of a plain encoder, finest first."""
    strides: PerStage | None = None
    """Downsampling at the start of each plain stage, one number or one per axis; by default 1, then 2."""
    kernels: PerStage | None = None
    """Convolution kernel of each plain stage, one number or one per axis; by default 3."""
    convs_per_stage: Positive = 2
    """Convolutions in each stage of a plain encoder and of the decoder."""
    norm: Literal["instance", "batch", "group", "none"] | None = None
    """Normalisation layers; by default instance for plain encoders, batch for the ResNet family."""
    activation: str | None = None
    """Activation; by default leaky_relu for plain encoders, relu for the ResNet family."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Channel dropout after each stage."""
    deep_supervision: Annotated[int, Field(ge=0)] = 0
    """Number of coarser decoder stages that get an output and a loss of their own."""


class PatchConfig(Section):
    """What one training sample is."""

    size: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2, max_length=3)] = (96, 96, 96)
    """Patch size in voxels, slowest axis first."""
    batch: Positive = 2
    """Patches per step."""
    foreground: Share = 0.33
    """Share of a batch's patches centred on a foreground voxel, the class drawn evenly (at least one if above 0)."""


class RandomConfig(Section):
    """How often, and how far."""

    probability: Share
    """Share of the samples it is applied to."""
    range: Range
    """Smallest and largest strength."""


class AugmentConfig(Section):
    """Random changes of training patches, on whole batches on the device."""

    flip: Annotated[tuple[int, ...], Field(strict=False)] = (0, 1, 2)
    """Spatial axes mirrored with probability one half each; leave out axes along which left and right differ."""
    rotation: RandomConfig = RandomConfig(probability=0.2, range=(-30.0, 30.0))
    """Rotation about each axis, in degrees."""
    scaling: RandomConfig = RandomConfig(probability=0.2, range=(0.7, 1.4))
    """Zoom, the same for all axes."""
    noise: RandomConfig = RandomConfig(probability=0.1, range=(0.0, 0.3))
    """Gaussian noise, standard deviation in units of the normalised image."""
    brightness: RandomConfig = RandomConfig(probability=0.15, range=(0.75, 1.25))
    """Factor on the intensities."""
    contrast: RandomConfig = RandomConfig(probability=0.15, range=(0.75, 1.25))
    """Factor on the distance from the mean, kept within the sample's range."""
    gamma: RandomConfig = RandomConfig(probability=0.3, range=(0.7, 1.5))
    """Power on the intensities scaled to 0..1; mean and deviation are kept."""


class LossConfig(Section):
    """The loss is the weighted sum of its terms; a term of weight 0 is left out."""

    dice: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft Dice loss over the foreground classes."""
    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""
    batch_dice: bool = True
    """Dice over the batch as one volume rather than per sample."""


class OptimizerConfig(Section):
    """The optimiser, its schedule and the moving average of the weights."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Initial learning rate; by default 0.01 for sgd, 0.001 for adamw."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    """Weight decay (decoupled in adamw)."""
    schedule: Literal["polynomial", "cosine", "constant"] | None = None
    """Course of the learning rate over all steps; by default polynomial (power 0.9) for sgd, cosine for adamw."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    clip: Annotated[float, Field(ge=0)] = 12.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights, which is what is validated and kept; 0 switches it off."""


class TrainingConfig(Section):
    """Length, seed, device and what is written."""

    epochs: Positive = 100
    """Number of epochs."""
    steps: Positive = 250
    """Steps of an epoch."""
    seed: int = 0
    """Seed of weights, sampling and augmentation; every random number is a function of (seed, epoch, sample)."""
    validate_every: Positive = 1
    """Epochs between validations on whole volumes; the last epoch is always validated."""
    checkpoint_every: Positive = 250
    """Steps between checkpoints; a killed run loses at most so many."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware computes in it."""
    compile: bool = False
    """Compile the network with torch.compile (needs a C++ compiler)."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that prepare batches ahead; the result does not depend on their number."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""


class InferenceConfig(Section):
    """Sliding-window prediction."""

    window: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """Window in voxels; by default the patch size."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the window shared by neighbours."""
    blend: Literal["gaussian", "gaussian_monai", "constant"] = "gaussian"
    """Weights of overlapping windows: nnU-Net's Gaussian, MONAI's (clamped), or equal."""
    batch: Positive = 1
    """Windows per forward pass."""
    mirror: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Axes mirrored for test-time augmentation; every subset is one more forward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware computes in it; sums are float32 always."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""


class Config(Section):
    """A whole recipe."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    patch: PatchConfig = PatchConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` texts, the value in YAML's syntax; they win over the file.

    Raises:
        InputError: every fault of the file and the overrides, one line each with its place.
        UnsafeError: the file holds tags, duplicate keys, too many aliases, or is too large or too deep.
    """
    data, lines = read_yaml(Path(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"override {text!r} is not of the form key.sub=value", "write, say, training.epochs=40")
        path_in = tuple(key.split("."))
        set_path(data, [int(part) if part.isdecimal() else part for part in path_in], value_of(value, text))
        lines[path_in] = 0
    _complete(data)
    return check(data, lines, str(path))


def _complete(data: dict[str, Any]) -> None:
    """Fill in what an augmentation leaves out, say its range, from its default."""
    given = data.get("augment")
    if not isinstance(given, dict):
        return
    for name, field in AugmentConfig.model_fields.items():
        if isinstance(given.get(name), dict) and isinstance(field.default, RandomConfig):
            given[name] = field.default.model_dump(mode="json") | given[name]


def check(data: dict[str, Any], lines: dict[tuple[str, ...], int], name: str) -> Config:
    """Validate `data`; every fault is reported with the line that `lines` gives for its path."""
    faults: list[tuple[tuple[str, ...], str]] = []
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults = _field_faults(error)
        config = _without(data, [path for path, _ in faults])
    wrong = {path for path, _ in faults}
    faults += [(path, text) for path, text in contradictions(config) if path not in wrong]
    if not faults:
        return config
    rows = sorted({(_line(path, lines), ".".join(path), text) for path, text in faults})
    places = [f"  {f'{name}:{line}' if line else 'command line'}: {path}: {text}" for line, path, text in rows]
    count = f"{len(rows)} mistake{'s' if len(rows) > 1 else ''} in the configuration"
    raise InputError("\n".join([count, *places]), "correct these; `densepred schema` lists every key", name)


def dump(config: Config) -> str:
    """The configuration as YAML, every default written out; `load` reads the same configuration back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    """Writes equal values out each time rather than as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _line(path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int:
    """The line of the nearest enclosing key; 0 stands for the command line."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _field_faults(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    faults: dict[tuple[str, ...], str] = {}
    for item in error.errors(include_url=False):
        section, path = _walk(item["loc"])
        if item["type"] == "extra_forbidden":
            known = list(section.model_fields)
            text = f"unknown key{nearest(path[-1], known)}; known: {', '.join(known)}"
        else:
            text = f"{item['msg'][0].lower()}{item['msg'][1:]}, got {reprlib.repr(item['input'])}"
        faults[path] = f"{faults[path]}; or {text}" if path in faults else text
    return list(faults.items())


def _walk(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], tuple[str, ...]]:
    """The section that holds the fault, and its path cut at the last key that stands in the YAML."""
    section: type[BaseModel] = Config
    path: list[str] = []
    for part in loc:
        path.append(str(part))
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return section, tuple(path)


def _without(data: dict[str, Any], paths: list[tuple[str, ...]]) -> Config:
    """What is left of a faulty configuration, for finding contradictions among the sound keys."""
    kept = {name: dict(section) if isinstance(section, dict) else section for name, section in data.items()}
    for path in paths:
        if len(path) > 1 and isinstance(kept.get(path[0]), dict):
            kept[path[0]].pop(path[1], None)
        else:
            kept.pop(path[0], None)
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return Config(data=DataConfig(images="*", labels="{id}"))


__all__ = ["Config", "check", "contradictions", "dump", "load", "nearest"]
