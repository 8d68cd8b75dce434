"""`evaluate` for tables: classes and numbers of whole images against a table of the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densepred.cases.targets import Table, Target, open_table
from densepred.errors import DONE, InputError, NothingDoneError
from densepred.evaluation.summaries import delimited, without_nan
from densepred.figures import INK, color_of, new_figure, save_png
from densepred.files import atomic_write, writable_folder
from densepred.metrics import MapErrors, Ranking

if TYPE_CHECKING:
    from rich.table import Table as Shown

MEANING = "predictions.json"


@dataclass(frozen=True)
class ClassScores:
    """How well the classes of whole images are told apart.

    Args:
        classes: their names.
        confusion: (K, K) int64, truth in rows.
        rankings: of each class its probabilities, one against the rest.
        log_loss: mean negative logarithm of the truth's probability.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    rankings: tuple[Ranking, ...]
    log_loss: float

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy, its mean over the classes, mean AUC, log loss, and the AUC of each class."""
        right, all_of = np.diag(self.confusion), self.confusion.sum(1)
        there = all_of > 0
        areas = {f"auc_{name}": one.auc for name, one in zip(self.classes, self.rankings, strict=True)}
        finite = [area for area in areas.values() if math.isfinite(area)]
        return {
            "n": float(all_of.sum()),
            "accuracy": float(right.sum() / all_of.sum()),
            "balanced_accuracy": float((right[there] / all_of[there]).mean()),
            "auc": float(np.mean(finite)) if finite else math.nan,
            "log_loss": self.log_loss,
            **areas,
        }


@dataclass(frozen=True)
class TableScores:
    """What an evaluation of tables found.

    Args:
        found: target -> its scores by name.
        classes: target -> more of those that are classes.
        unpredicted: ids of the truth without a prediction.
        unlabelled: ids of predictions without a truth.
    """

    found: Mapping[str, Mapping[str, float]]
    classes: Mapping[str, ClassScores] = field(default_factory=dict)
    unpredicted: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    exit_code: int = DONE

    def table(self) -> Shown:
        """To be printed."""
        from rich.table import Table as Shown

        shown = Shown("target", "score", "value")
        for name, scores in self.found.items():
            for score, value in scores.items():
                shown.add_row(name, score, f"{value:.6g}")
        notes = {"predictions have no truth": self.unlabelled, "truths have no prediction": self.unpredicted}
        shown.caption = "; ".join(f"{len(ids)} {what}" for what, ids in notes.items() if ids) or None
        return shown

    def save(self, out: str | Path) -> list[Path]:
        """Write scores.csv, scores.json, and roc_TARGET.png of those that are classes; their paths."""
        folder = writable_folder(out)
        rows = [
            {"target": name, "score": score, "value": f"{value:.9g}"}
            for name, one in self.found.items()
            for score, value in one.items()
        ]
        atomic_write(folder / "scores.csv", delimited(["target", "score", "value"], rows, ","))
        content: dict[str, Any] = {name: {"scores": dict(scores)} for name, scores in self.found.items()}
        for name, one in self.classes.items():
            content[name] |= {"classes": list(one.classes), "confusion": one.confusion.tolist()}
        missing = {"unpredicted": list(self.unpredicted), "unlabelled": list(self.unlabelled)}
        text = json.dumps(without_nan({"targets": content} | missing), indent=1, allow_nan=False)
        atomic_write(folder / "scores.json", text + "\n")
        paths = [folder / "scores.csv", folder / "scores.json"]
        for name, one in self.classes.items():
            paths.append(folder / f"roc_{name}.png")
            draw_roc(one, paths[-1])
        return paths


def evaluate_table(predictions: str | Path, truth: str | Path, out: str | Path | None = None) -> TableScores:
    """Score predictions of whole images.

    Args:
        predictions: the table that `densepred predict` wrote; `predictions.json` beside it says what its columns are.
        truth: a CSV with a column id and those that training learnt; empty cells are not known.
        out: where to write the scores and ROC curves.

    Raises:
        InputError: a table cannot be read, or lacks a column.
        NothingDoneError: no prediction has a truth.

    Example:
        >>> evaluate_table("out/predictions.csv", "test.csv").found["digit"]["accuracy"]  # doctest: +SKIP
        0.99
    """
    predicted, known = open_table(Path(predictions)), open_table(Path(truth))
    targets = _targets(Path(predictions).parent / MEANING)
    both = [case for case in predicted.rows if case in known.rows]
    if not both:
        raise NothingDoneError("no prediction has a row in the table of the truth", "compare the ids", Path(truth))
    found: dict[str, dict[str, float]] = {}
    classes: dict[str, ClassScores] = {}
    for name, target in targets.items():
        if target.kind == "classification":
            classes[name] = _of_classes(name, target, predicted, known, both)
            found[name] = classes[name].scores
        else:
            found[name] = _of_numbers(name, target, predicted, known, both)
    unlabelled = tuple(case for case in predicted.rows if case not in known.rows)
    unpredicted = tuple(case for case in known.rows if case not in predicted.rows)
    scores = TableScores(found, classes, unpredicted, unlabelled)
    if out is not None:
        scores.save(out)
    return scores


def _targets(path: Path) -> dict[str, Target]:
    try:
        told = json.loads(path.read_text("utf-8"))["targets"]
        return {name: Target.model_validate_json(json.dumps(target)) for name, target in told.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"does not say what the predictions mean ({error})"
        raise InputError(what, "leave it beside the predictions.csv that densepred predict wrote", path) from error


def _of_classes(name: str, target: Target, predicted: Table, known: Table, cases: list[str]) -> ClassScores:
    count = len(target.classes)
    confusion, told = np.zeros((count, count), np.int64), []
    truths = []
    for case in cases:
        text = known.cell(case, target.column)
        if not text:
            continue
        if text not in target.classes:
            what = f"{target.column} is {text!r}, which the model does not know"
            raise InputError(what, f"its classes are {', '.join(target.classes[:10])}", known.path, case)
        truths.append(target.classes.index(text))
        told.append([predicted.number(case, f"{name}:{one}") for one in target.classes])
        got = predicted.cell(case, name)
        if got not in target.classes:
            what = f"{name} is {got!r}, which is none of the classes in {MEANING}"
            raise InputError(what, "give the table as densepred predict wrote it", predicted.path, case)
        confusion[truths[-1], target.classes.index(got)] += 1
    if not truths:
        raise NothingDoneError(f"no truth of {name} is known", "fill the column", known.path)
    shares, truth = np.array(told), np.array(truths)
    rankings = tuple(Ranking.of(shares[:, k], (truth == k).astype(np.int8)) for k in range(count))
    log_loss = -np.log(np.maximum(shares[np.arange(len(truth)), truth], 1e-12)).mean()
    return ClassScores(target.classes, confusion, rankings, float(log_loss))


def _of_numbers(name: str, target: Target, predicted: Table, known: Table, cases: list[str]) -> dict[str, float]:
    pairs = np.array([(predicted.number(case, name), known.number(case, target.column)) for case in cases])
    errors = MapErrors.of(truth=pairs[:, 1], prediction=pairs[:, 0])
    scores = {"mse": errors.mse, "mae": errors.mae, "bias": errors.bias, "r": errors.pearson}
    return {"n": float(errors.count)} | {score: float(value) for score, value in scores.items()}


def draw_roc(of: ClassScores, path: str | Path) -> None:
    """Draw a ROC curve for each class, one against the rest; small false-positive rates are drawn large."""
    figure = new_figure(5.6, 5.2)
    axes = figure.subplots()
    for index, (name, one) in enumerate(zip(of.classes, of.rankings, strict=True)):
        false, true, _ = one.roc
        style = "-" if index < 7 else "--"
        axes.plot(false, true, style, color=color_of(index), lw=1.4, label=f"{name}: {one.auc:.5g}")
    chance = np.linspace(0, 1, 1000)
    axes.plot(chance, chance, ":", color=INK, lw=0.8)
    axes.set_xscale("symlog", linthresh=1e-2)
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xlim=(-2e-4, 1), ylim=(0, 1.01))
    axes.set_title(f"accuracy {of.scores['accuracy']:.4f}, mean area {of.scores['auc']:.5g}", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=9, title="area")
    save_png(figure, path)
