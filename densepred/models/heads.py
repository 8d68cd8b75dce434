"""Heads: what a network predicts, and the last layers that predict it.

A spec says what comes out and a head computes it: a dense one a value for each voxel of a decoder's map, a global one a
value for the whole image from the encoder's coarsest map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.models.layers import conv, global_pool

LEAST_LOG_VARIANCE = -20.0
"""A predicted log-variance below is taken as this, in the loss and in predictions: residuals stay within float32."""


def _at_least(least: int, value: int, name: str) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


@dataclass(frozen=True)
class Segmentation:
    """A class for each voxel, or several regions that may overlap.

    Attributes:
        classes: K, with the background where the classes are exclusive.
        regions: each class is a region of its own (a sigmoid each) instead of one of many (a softmax).

    Raises:
        ValueError: `classes` is below 1.

    Example:
        >>> Segmentation(classes=3).channels
        3
    """

    classes: int
    regions: bool = False
    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _at_least(1, self.classes, "classes")

    @property
    def channels(self) -> int:
        """Numbers the network gives for each voxel."""
        return self.classes


@dataclass(frozen=True)
class _Numbers:
    """What dense and global regression have in common."""

    outputs: int = 1
    unit: str = ""
    positive: bool = False
    variance: bool = False
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        _at_least(1, self.outputs, "outputs")
        if not self.deviation > 0:
            raise ValueError(f"deviation must be above 0, got {self.deviation!r}")

    @property
    def channels(self) -> int:
        """Numbers the network gives: the means and, with `variance`, as many log-variances after them."""
        return self.outputs * (2 if self.variance else 1)


@dataclass(frozen=True)
class Regression(_Numbers):
    """Numbers for each voxel.

    Attributes:
        outputs: K, how many.
        unit: what they are measured in, for people.
        positive: the mean is above zero, by a softplus.
        variance: predict the noise too: K log-variances, in the logarithm of the unit squared, follow the K means
            (heteroscedastic aleatoric uncertainty; Kendall & Gal 2017, arXiv:1703.04977, section 2.2). Choose a unit in
            which the noise is not tiny: below exp(-20) of its square variances are not told apart.
        mean, deviation: the network gives standard numbers, which `predictions` takes times the deviation, plus the
            mean, to be in the unit.

    Raises:
        ValueError: `outputs` is below 1, or the deviation not above 0.

    Example:
        >>> Regression(outputs=2, unit="mm", variance=True).channels
        4
    """

    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class Classification:
    """A class for the whole image.

    Attributes:
        classes: K.
        covariates: F, tabular numbers (age, redshift, ...) that come with each image.
        hidden: width of the small network that sees them; of no effect without covariates.

    Raises:
        ValueError: `classes` or `hidden` is below 1, or `covariates` below 0.

    Example:
        >>> Classification(classes=2, covariates=3).channels
        2
    """

    classes: int
    covariates: int = 0
    hidden: int = 32
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _at_least(1, self.classes, "classes")
        _at_least(0, self.covariates, "covariates")
        _at_least(1, self.hidden, "hidden")

    @property
    def channels(self) -> int:
        """Numbers the network gives for each image."""
        return self.classes


@dataclass(frozen=True)
class Scalar(_Numbers):
    """Numbers for the whole image.

    Attributes:
        outputs, unit, positive, variance, mean, deviation: as for `Regression`.
        covariates, hidden: as for `Classification`.

    Raises:
        ValueError: `outputs` or `hidden` is below 1, or `covariates` below 0.

    Example:
        >>> Scalar(unit="years", positive=True).channels
        1
    """

    covariates: int = 0
    hidden: int = 32
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, self.covariates, "covariates")
        _at_least(1, self.hidden, "hidden")


HeadSpec: TypeAlias = Segmentation | Regression | Classification | Scalar

HEADS: dict[str, type[HeadSpec]] = {
    "segmentation": Segmentation,
    "regression": Regression,
    "classification": Classification,
    "scalar": Scalar,
}


class DenseHead(nn.Module):
    """A prediction for each voxel, by a convolution of one voxel.

    Args:
        dims: 2 or 3.
        in_channels: channels of the decoder's map; None where the map holds the outputs already (FCN), so that only
            the output's own function remains.
        spec: what to predict.

    Raises:
        ValueError: `spec` is global.

    Example:
        >>> DenseHead(2, 8, Segmentation(3))(torch.zeros(1, 8, 5, 6)).shape
        torch.Size([1, 3, 5, 6])
    """

    def __init__(self, dims: int, in_channels: int | None, spec: HeadSpec) -> None:
        super().__init__()
        if not spec.dense:
            raise ValueError(f"spec must be Segmentation or Regression for a dense head, got {spec!r}")
        self.spec = spec
        self.conv = nn.Identity() if in_channels is None else conv(dims, in_channels, spec.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> logits or means (B, K, *spatial), or (B, 2K, *spatial) with variance."""
        return _finish(self.spec, self.conv(x))


class GlobalHead(nn.Module):
    """A prediction for each image: a linear layer on the mean of a feature map.

    Covariates join wide and deep (Cheng et al. 2016, arXiv:1606.07792): a small network turns them into features beside
    the map's (the deep path), and a linear layer adds their own contribution to the result (the wide path). They are
    best given standardised.

    Args:
        in_channels: C of the map.
        spec: what to predict.

    Raises:
        ValueError: `spec` is dense.

    Example:
        >>> head = GlobalHead(8, Classification(classes=3, covariates=2))
        >>> head(torch.zeros(4, 8, 5, 6, 7), torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, in_channels: int, spec: HeadSpec) -> None:
        super().__init__()
        if isinstance(spec, Segmentation | Regression):
            raise ValueError(f"spec must be Classification or Scalar for a global head, got {spec!r}")
        self.spec, width = spec, in_channels
        if spec.covariates:
            layers = (
                nn.Linear(spec.covariates, spec.hidden),
                nn.ReLU(),
                nn.Linear(spec.hidden, spec.hidden),
                nn.ReLU(),
            )
            self.deep = nn.Sequential(*layers)
            self.wide = nn.Linear(spec.covariates, spec.channels, bias=False)  # the linear layer has the one bias
            width += spec.hidden
        self.linear = nn.Linear(width, spec.channels)

    def forward(self, features: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Features (B, C, *spatial), covariates (B, F) -> logits or means (B, K), or (B, 2K) with variance.

        Raises:
            ValueError: covariates are missing, not expected, or of another shape.
        """
        pooled = global_pool(features)
        if covariates is None:
            if self.spec.covariates:
                raise ValueError(f"model expects {self._expected()}, got none")
            return _finish(self.spec, self.linear(pooled))
        self._check(covariates)
        covariates = covariates.to(self.wide.weight.dtype)
        out = self.linear(torch.cat([pooled, self.deep(covariates)], 1)) + self.wide(covariates)
        return _finish(self.spec, out)

    def _expected(self) -> str:
        count = self.spec.covariates
        return f"{count or 'no'} covariate{'' if count == 1 else 's'}"

    def _check(self, covariates: Tensor) -> None:
        if covariates.ndim != 2:
            raise ValueError(f"covariates must be (batch, {self.spec.covariates}), got {tuple(covariates.shape)}")
        if covariates.shape[1] != self.spec.covariates or not self.spec.covariates:
            raise ValueError(f"model expects {self._expected()}, got {covariates.shape[1]}")


def build_head(dims: int, in_channels: int | None, spec: HeadSpec) -> DenseHead | GlobalHead:
    """The head for a spec.

    Args:
        dims: 2 or 3.
        in_channels: channels of the map it looks at; None where a dense head's map holds its outputs already.
        spec: what to predict.

    Raises:
        ValueError: a global head without `in_channels`.

    Example:
        >>> build_head(3, 16, Regression(outputs=2))(torch.zeros(1, 16, 3, 4, 5)).shape
        torch.Size([1, 2, 3, 4, 5])
    """
    if spec.dense:
        return DenseHead(dims, in_channels, spec)
    if in_channels is None:
        raise ValueError(f"in_channels must be an int for the global {spec!r}, got None")
    return GlobalHead(in_channels, spec)


def predictions(spec: HeadSpec, outputs: Tensor) -> dict[str, Tensor]:
    """What users want to know, from what a head gives.

    Args:
        spec: the head's.
        outputs: (B, C, *spatial) of a dense head or (B, C) of a global one, C being `spec.channels`.

    Returns:
        For classes float `probabilities` (B, K, ...) and int64 `labels` (B, ...); for overlapping regions `labels` is
        bool (B, K, ...), true where the probability is above one half. For numbers `mean` (B, K, ...) in their unit
        and, if predicted, `variance` (B, K, ...) in the unit squared. At least float32.

    Raises:
        ValueError: another number of channels than the spec's.

    Example:
        >>> predictions(Segmentation(2), torch.tensor([[[[0.0]], [[2.0]]]]))["labels"]
        tensor([[[1]]])
    """
    if outputs.ndim < 2 or outputs.shape[1] != spec.channels:
        raise ValueError(f"outputs must have {spec.channels} channels for {spec!r}, got {tuple(outputs.shape)}")
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if isinstance(spec, _Numbers):
        mean, log_variance = outputs[:, : spec.outputs], outputs[:, spec.outputs :].clamp(min=LEAST_LOG_VARIANCE)
        variance = {"variance": log_variance.exp() * spec.deviation**2} if spec.variance else {}
        return {"mean": in_unit(spec, mean)} | variance
    if isinstance(spec, Segmentation) and spec.regions:
        return {"probabilities": outputs.sigmoid(), "labels": outputs > 0}
    return {"probabilities": outputs.softmax(1), "labels": outputs.argmax(1)}


def in_unit(spec: Regression | Scalar | _Numbers, standard: Tensor) -> Tensor:
    """The numbers of a head in their unit, of any shape; as they are where the network gives these.

    Example:
        >>> in_unit(Regression(mean=1.0, deviation=2.0), torch.tensor([0.5]))
        tensor([2.])
    """
    return standard if (spec.mean, spec.deviation) == (0.0, 1.0) else standard * spec.deviation + spec.mean


def _finish(spec: HeadSpec, x: Tensor) -> Tensor:
    """The output's own function: (B, C, ...) -> the same shape."""
    if not isinstance(spec, _Numbers) or not spec.positive:
        return x
    mean = F.softplus(x[:, : spec.outputs])
    return torch.cat([mean, x[:, spec.outputs :]], 1) if spec.variance else mean
