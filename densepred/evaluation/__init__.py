"""How good predictions are: scores per case and per set, tables, and pictures of the worst and the median case.

Example:
    >>> from densepred.evaluation import draw_cases, evaluate
    >>> scores = evaluate("predictions/", "labelsTr/", out="scores/")  # doctest: +SKIP
    >>> draw_cases(scores, "scores/", images="imagesTr/")  # doctest: +SKIP
"""

from __future__ import annotations

from densepred.evaluation.compare import evaluate
from densepred.evaluation.measures import MEASURES
from densepred.evaluation.pictures import draw_cases
from densepred.evaluation.scores import CaseResult, Scores
from densepred.evaluation.summaries import Failure
from densepred.evaluation.value_pictures import draw_curves, draw_spectra
from densepred.evaluation.values import ValueScores, evaluate_values, is_of_values
from densepred.evaluation.whole_images import TableScores, evaluate_table

__all__ = [
    "MEASURES",
    "CaseResult",
    "Failure",
    "Scores",
    "TableScores",
    "ValueScores",
    "draw_cases",
    "draw_curves",
    "draw_spectra",
    "evaluate",
    "evaluate_table",
    "evaluate_values",
    "is_of_values",
]
