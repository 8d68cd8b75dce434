"""The loss section: terms by name, each a weight or a weight with settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_serializer

from densepred.config.base import Positive, Section

Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)]
"""A factor for each class, the background included."""
_NotNegative = Annotated[float, Field(ge=0)]
_Above0 = Annotated[float, Field(gt=0)]


class Term(Section):
    """One term of a loss. A number alone is its weight."""

    weight: _NotNegative = 1.0
    """How much the term counts; one of weight 0 is left out."""

    @model_serializer
    def _brief(self) -> float | dict[str, Any]:
        """A number if all else is as by default, so that recipes stay short."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        usual = all(
            fields[name] == field.default for name, field in type(self).model_fields.items() if name != "weight"
        )
        return self.weight if usual else fields

    @property
    def settings(self) -> dict[str, Any]:
        """All but the weight: keyword arguments of the function of the same name in `densepred.losses`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "weight"}


class CrossEntropyTerm(Term):
    """Settings of the cross-entropy."""

    class_weights: Weights | None = None
    """A factor for each class; the mean is weighted by them."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the truth that is spread evenly over all classes (label smoothing)."""
    top: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the known voxels that counts: those with the largest loss."""


class DiceTerm(Term):
    """Settings of the soft Dice."""

    generalised: bool = False
    """One ratio for all classes, background included, each weighted by 1 / (its size squared)."""


class TverskyTerm(Term):
    """Settings of the Tversky index."""

    alpha: _NotNegative = 0.3
    """Weight of what is predicted and not true."""
    beta: _NotNegative = 0.7
    """Weight of what is true and not predicted; alpha = beta = 0.5 is the Dice."""
    gamma: _Above0 = 1.0
    """Exponent of one minus the index: below 1 hard classes count more (focal Tversky)."""


class FocalTerm(Term):
    """Settings of the focal loss."""

    gamma: _NotNegative = 2.0
    """Exponent of one minus the probability of the truth; 0 is the cross-entropy."""
    class_weights: Weights | None = None
    """A factor for each class."""


class HausdorffTerm(Term):
    """Settings of the Hausdorff loss by distance transforms."""

    alpha: _Above0 = 2.0
    """Exponent of the distance."""
    one_sided: bool = False
    """Only the distance to the truth's boundary: half the time."""


class ClDiceTerm(Term):
    """Settings of the centre-line Dice."""

    iterations: Positive = 3
    """Erosions of the soft skeleton: at least the largest radius in voxels."""


class HuberTerm(Term):
    """Settings of the Huber loss."""

    delta: _Above0 = 1.0
    """The error, in the target's unit, where the square turns into a line."""


def _weighted(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"weight": value} if number else value


def _either(term: type[Term]) -> BeforeValidator:
    return BeforeValidator(_weighted, json_schema_input_type=float | term)


class LossConfig(Section):
    """The loss is the weighted sum of its terms, each a weight or a weight with settings; 0 leaves a term out."""

    dice: Annotated[DiceTerm, _either(DiceTerm)] = DiceTerm()
    """The soft Dice over the foreground classes."""
    cross_entropy: Annotated[CrossEntropyTerm, _either(CrossEntropyTerm)] = CrossEntropyTerm()
    """The cross-entropy."""
    tversky: Annotated[TverskyTerm, _either(TverskyTerm)] = TverskyTerm(weight=0)
    """The Tversky index: Dice with separate weights for what is missed and what is invented."""
    focal: Annotated[FocalTerm, _either(FocalTerm)] = FocalTerm(weight=0)
    """The focal loss: cross-entropy that easy voxels hardly enter."""
    lovasz: Annotated[Term, _either(Term)] = Term(weight=0)
    """The Lovász-softmax: the intersection over union itself, as a convex function of the errors."""
    boundary: Annotated[Term, _either(Term)] = Term(weight=0)
    """Probability times the signed distance to the truth's boundary; beside another term."""
    hausdorff: Annotated[HausdorffTerm, _either(HausdorffTerm)] = HausdorffTerm(weight=0)
    """Squared error times the distance to the boundaries; slow, beside another term."""
    cldice: Annotated[ClDiceTerm, _either(ClDiceTerm)] = ClDiceTerm(weight=0)
    """The Dice of centre lines: keeps vessels and filaments connected; beside another term."""
    batch_dice: bool = True
    """Dice, Tversky, Lovász and clDice over the batch as one volume rather than per sample."""

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that count, by name."""
        every = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: term for name, term in every.items() if isinstance(term, Term) and term.weight}


TERMS: dict[str, type[Term]] = {
    "dice": DiceTerm,
    "cross_entropy": CrossEntropyTerm,
    "region_dice": DiceTerm,
    "region_cross_entropy": CrossEntropyTerm,
    "tversky": TverskyTerm,
    "focal": FocalTerm,
    "lovasz": Term,
    "boundary": Term,
    "hausdorff": HausdorffTerm,
    "cldice": ClDiceTerm,
    "mean_squared": Term,
    "mean_absolute": Term,
    "huber": HuberTerm,
    "gaussian_nll": Term,
}
"""The settings of every loss in `densepred.losses.LOSSES`."""
