"""Predictions of whole images, as a table: a row for each case."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densepred.cases.case import Case
from densepred.cases.preprocess import preprocess
from densepred.cases.targets import Table, covariates_of, read_table
from densepred.errors import StoppedError, UnsafeError
from densepred.files import append, atomic_write, writable_folder
from densepred.inference.heads import of_whole
from densepred.inference.image_predictor import ImagePredictor
from densepred.inference.origin import Origin
from densepred.inference.records import write_failures
from densepred.inference.shards import Shard, held, record_of, records_of
from densepred.inference.work import BatchResult, failing, made_from
from densepred.models.heads import predictions
from densepred.progress import progress
from densepred.signals import StopSignals

TABLE, MEANING, JOURNAL = "predictions.csv", "predictions.json", "predictions.jsonl"


def predict_whole(predictor: ImagePredictor, case: Case, table: Table | None) -> dict[str, dict[str, np.ndarray]]:
    """What is predicted of a whole image; of several models the mean.

    Args:
        predictor: of a model with heads for whole images.
        case: its files.
        table: has the covariates, if the model takes any.

    Returns:
        Name -> `probabilities` (K,) of classes; or `mean` (1,) in the target's unit, and `variance` (1,) if predicted.

    Raises:
        DensepredError: files that cannot be read, or another image than the model was made for.
    """
    image, _ = preprocess(replace(case, label=None, maps=()), predictor.plan)
    covariates = covariates_of(predictor.plan, table, case.id)
    found: list[dict[str, dict[str, np.ndarray]]] = []
    for model in predictor.whole:
        outputs = of_whole(model, image, covariates, predictor.config, predictor.device)
        told = {name: predictions(spec, outputs[name]) for name, spec in model.specs.items()}
        found.append({n: {k: v[0].numpy() for k, v in one.items() if k != "labels"} for n, one in told.items()})
    return {n: {k: np.mean([one[n][k] for one in found], 0) for k in found[0][n]} for n in found[0]}


class _Rows:
    """The journal of a table, a line of JSON for each case: its cells, and what they were made from.

    Of several lines for one case the last holds, and one that cannot be read is dropped. Lines of others, of shards
    that ran since, are taken in.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()) -> None:
        self.path = path
        texts = [one.read_text(errors="replace") for one in (path, *others) if one.is_file()]
        lines = [line for text in texts for line in text.splitlines()]
        self._known = {entry["id"]: entry for entry in map(_parsed, lines) if entry is not None}

    def holds(self, entry: Mapping[str, Any]) -> bool:
        """Are there cells of this case that were made from the same?"""
        known = self._known.get(entry["id"], {})
        return all(known.get(key) == value for key, value in entry.items())

    def add(self, entry: Mapping[str, Any], cells: Mapping[str, str]) -> None:
        """Take a case in, and write its line."""
        self._known[entry["id"]] = {**entry, "cells": dict(cells)}
        append(self.path, json.dumps(self._known[entry["id"]]) + "\n", forced=False)

    def drop(self, cases: Iterable[str]) -> None:
        """Forget cases, which failed."""
        for case in cases:
            self._known.pop(case, None)

    def of(self, origin: Origin) -> list[dict[str, str]]:
        """The rows of this model with these settings, by id."""
        made = (origin.weights_hash, origin.config_hash)
        ours = {case: one for case, one in self._known.items() if (one["model"], one["config"]) == made}
        return [{"id": case, **ours[case]["cells"]} for case in sorted(ours)]

    def compact(self) -> None:
        """Write a line for each case, and leave out what is torn."""
        atomic_write(self.path, "".join(json.dumps(self._known[case]) + "\n" for case in sorted(self._known)))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        whole = isinstance(entry["id"], str) and {"model", "config"} <= set(entry)
        return entry if whole and all(isinstance(cell, str) for cell in entry["cells"].values()) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def write_table(
    predictor: ImagePredictor, cases: Sequence[Case], out: Path, overwrite: bool = False, shard: Shard | None = None
) -> BatchResult:
    """Write `predictions.csv`, and beside it what its columns mean; bad cases are listed and stop no other.

    What this model predicted before of the same files stays, and so do its rows of other cases.

    Args:
        predictor: of a model with heads for whole images.
        cases: in their order.
        out: the folder.
        overwrite: replace a table that was not written here.
        shard: the share of the cases that this is, which gets a table of its own.

    Raises:
        UnsafeError: there is such a table.
        StoppedError: a signal; a rerun goes on.
    """
    path, result = writable_folder(out) / record_of(TABLE, shard), BatchResult()
    table = read_table(predictor.config.data) if predictor.plan.covariates else None
    with held(out, shard):
        journal, meaning = out / record_of(JOURNAL, shard), json.dumps(_meaning(predictor), indent=1) + "\n"
        if not (out / MEANING).exists():  # which is there before anything else
            there = [file for file in (path, journal) if file.exists() and not overwrite]
            if there:
                what = "was not predicted here: left as it is"
                raise UnsafeError(what, "choose another --out, or say --overwrite", there[0])
            atomic_write(out / MEANING, meaning)
        journals, tables = ([] if shard else records_of(name, out) for name in (JOURNAL, TABLE))
        rows = _Rows(journal, [one for one in journals if one != journal])
        rows.compact()
        _remove(journals, journal)
        with StopSignals() as stop, progress(len(cases), "predicting") as advance:
            for case in cases:
                if stop.signal is not None:
                    what = f"stopped by a signal: {result}, {len(cases)} in all"
                    raise StoppedError(what, stop.exit_code, "run the same command again to go on")
                with failing(case, result):
                    _do(predictor, case, table, rows, result)
                advance(1, case=case.id)
        rows.drop(result.failed)
        text = io.StringIO()
        writer = csv.DictWriter(text, ["id", *_columns(predictor)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.of(predictor.origin))
        atomic_write(out / MEANING, meaning)
        atomic_write(path, text.getvalue())
        rows.compact()
        _remove(tables, path)
        write_failures(out, shard, [*result.done, *result.skipped], result.failed)
    return result


def _remove(parts: Iterable[Path], whole: Path) -> None:
    """Remove the records of shards: what they say stands in the whole one."""
    for part in parts:
        if part != whole:
            part.unlink(missing_ok=True)


def _do(predictor: ImagePredictor, case: Case, table: Table | None, rows: _Rows, result: BatchResult) -> None:
    """Predict a case, unless that was done of the same files, covariates and model."""
    case.check()
    covariates = covariates_of(predictor.plan, table, case.id)
    made = {"id": case.id, **made_from(case, predictor.origin), "covariates": covariates.tolist()}
    if rows.holds(made):
        result.skipped.append(case.id)
        return
    rows.add(made, _cells(predictor, predict_whole(predictor, case, table)))
    result.done.append(case.id)


def _columns(predictor: ImagePredictor) -> Iterator[str]:
    """A target's name is the column of its class or number; then come probabilities, or the variance."""
    for name, spec in predictor.whole[0].specs.items():
        yield name
        yield from (f"{name}:{one}" for one in predictor.plan.targets[name].classes)
        if getattr(spec, "variance", False):
            yield f"{name}:variance"


def _cells(predictor: ImagePredictor, found: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    cells: dict[str, str] = {}
    for name, one in found.items():
        classes = predictor.plan.targets[name].classes
        if classes:
            cells[name] = classes[int(one["probabilities"].argmax())]
            cells |= {f"{name}:{c}": f"{p:.9g}" for c, p in zip(classes, one["probabilities"], strict=True)}
            continue
        cells[name] = f"{one['mean'][0]:.7g}"
        if "variance" in one:
            cells[f"{name}:variance"] = f"{one['variance'][0]:.7g}"
    return cells


def _meaning(predictor: ImagePredictor) -> dict[str, Any]:
    """What the columns are, and what they come from."""
    targets = {
        name: {key: value for key, value in target.model_dump(mode="json").items() if value}
        for name, target in predictor.plan.targets.items()
        if target.kind != "regression"
    }
    origin = predictor.origin
    made = {"model": origin.name, "weights_sha256": origin.weights_hash, "config_sha256": origin.config_hash}
    return made | {"torch": torch.__version__, "targets": targets}
