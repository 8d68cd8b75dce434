"""The schema of a recipe: one class per section, every default, one line of doc per field."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from densepred.config.base import Device, Memory, Positive, Range, Section, Share
from densepred.config.data import DataConfig
from densepred.config.model import ModelConfig


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
    form: Literal["auto", "plain", "fast", "lean"] = "auto"
    """fast: channels-last and compiled (needs a C++ compiler). lean: less memory by gradient checkpointing. plain."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Threads that prepare batches ahead; the result does not depend on their number."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the CSV."""


Output: TypeAlias = Literal["labels", "probabilities", "logits", "entropy", "variance", "regression"]


class InferenceConfig(Section):
    """Sliding-window prediction."""

    window: Annotated[tuple[Positive, ...], Field(strict=False, min_length=2, max_length=3)] | None = None
    """Window in voxels; by default the patch size."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the window shared by neighbours."""
    blend: Literal["gaussian", "gaussian_monai", "constant", "none"] = "gaussian"
    """Weights of overlapping windows: nnU-Net's Gaussian, MONAI's (clamped), equal, or none: one window per voxel."""
    batch: Positive = 1
    """Windows per forward pass; fewer where memory runs out."""
    memory: Memory | None = None
    """The most to take of the machine and of each GPU, by all workers there: `2GB`. By default most of what is free."""
    skip: Annotated[float, Field(ge=0)] | None = 0.0
    """Windows whose normalised values span at most so much are predicted once for all; 0 skips windows of one value."""
    mirror: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Axes mirrored for test-time augmentation; every subset is one more forward pass."""
    slices: Literal[0, 1, 2, "all"] | None = None
    """Volumes by a 2D model: the axis that its images lie across, or all three, of whose logits the mean is taken."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 where the hardware computes in it; sums are float32 always."""
    backend: Literal["auto", "torch", "compiled", "openvino"] = "torch"
    """What runs the network: auto takes another than torch where a short trial shows it to be faster and as exact."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    outputs: Annotated[tuple[Output, ...], Field(strict=False, min_length=1)] = ("labels",)
    """Kinds of result; all but labels in a folder of their name. Variance is that over models and mirrored views."""
    cutout: str | None = None
    """The part to predict: `y0:y1,x0:x1` (pixels from 0), or `ra,dec,size` on the sky; normalised as in the whole."""
    bin: Positive = 1
    """Side of the blocks of pixels in a plane over which probabilities are averaged before they are written."""
    record_paths: bool = False
    """Write whole paths of the input files into results rather than their names (FITS: DPINPUT and HISTORY)."""
    planes: Literal["required", "optional"] = "required"
    """Data-quality and weight planes, if the model was trained with them; without them every finite pixel counts."""


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
