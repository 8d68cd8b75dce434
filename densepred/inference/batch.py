"""Predicting many cases into one folder: a bad case stops no other, and a rerun does only what is missing."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from densepred.cases.case import Case
from densepred.errors import UnsafeError
from densepred.files import sweep_parts, writable_folder
from densepred.inference.engines import Engine
from densepred.inference.engines.local import Local
from densepred.inference.inputs import find_inputs
from densepred.inference.layouts import Bids, Layout, Plain
from densepred.inference.manifest import Manifest
from densepred.inference.outputs import default_kind
from densepred.inference.predictor import Predictor, load
from densepred.inference.records import FAILURES, write_meaning
from densepred.inference.shards import Shard, held, record_of
from densepred.inference.tabular import write_table
from densepred.inference.work import BatchResult, Job, Work, failing
from densepred.volumes.region import parse_region

__all__ = ["BatchResult", "predict"]
_LOG = logging.getLogger(__name__)


def predict(
    run: str | Path | Sequence[str | Path],
    inputs: Sequence[str | Path],
    out: str | Path,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    bids: bool = False,
    shard: Shard | None = None,
    engine: Engine | None = None,
) -> BatchResult:
    """Segment files into `out/<id>` with the suffix of the images' format (`.nii.gz`, `.fits.fz`, `.tif` ...).

    Maps of numbers go to `out/regression/<id>`, what is predicted of whole images to `out/predictions.csv`.

    Args:
        run: the run directory (its config, plan and weights are used), or several whose mean is predicted.
        inputs: files, folders, glob patterns, lists (a CSV, a `dataset.json` of the Decathlon). Where the model takes
            several channels from several files, folders, in which the recipe's image patterns are looked up, or lists.
        out: folder of the predictions, their manifest, the class names and, if cases failed, `failures.tsv`.
        overrides: `inference.key=value` texts.
        overwrite: replace files that were changed since they were written, or that some other program wrote; without
            it their cases fail.
        bids: name the results as BIDS derivatives, `out/derivatives/densepred-<model>/sub-...`, with side-car files.
        shard: the share of the cases to do; other runs may do the others at the same time, on other machines too.
        engine: what computes; the device that the recipe names by default.

    Raises:
        InputError: with `bids`, images without BIDS names.
        NothingDoneError: no input was found.
        UnsafeError: outputs would replace an input, or files of a folder in which nothing was predicted, or the
            folder's `labels.json` says something else of label maps that stay.
        LockedError: another run holds the folder.
        DiskFullError: the disk is full; what is done stays, and a rerun goes on.
        WorkersError: nothing is left to compute with; likewise.
        StoppedError: a signal; likewise.
    """
    engine = engine or Local()
    predictor = _telling(load(run, overrides, device=engine.device))
    if predictor.config.inference.cutout is not None:
        parse_region(predictor.config.inference.cutout)  # a slip of the pen is found before anything is read
    cases = find_inputs([str(item) for item in inputs], predictor.config, predictor.plan.image_channels)
    mine = cases if shard is None else shard.of(cases)
    result = write_table(predictor, mine, Path(out), overwrite, shard) if predictor.whole else BatchResult()
    if not predictor.maps:
        return result
    layout = _layout(predictor, cases[0], Path(out), bids)
    layout.prepare()
    with held(layout.folder, shard):
        result = BatchResult(failed=result.failed)
        jobs = _jobs(mine, layout, result)
        manifest = Manifest(layout.folder, shard)
        _check_safe(jobs, manifest, overwrite)
        _sweep(layout.folder, jobs, manifest, shard)
        manifest.settle(None if shard is None else {job.key for job in jobs})
        write_meaning(predictor.plan, manifest, [job.key for job in jobs], overwrite)
        manifest.compact()
        with engine.workers(_folders(run), overrides, predictor) as workers:
            return Work(predictor, layout, manifest, result, overwrite, shard).run(jobs, workers)


def _layout(predictor: Predictor, first: Case, out: Path, bids: bool) -> Layout:
    settings = predictor.config.inference
    if bids:
        return Bids(out, first.images[0], predictor.name, predictor.plan, settings)
    return Plain(out, settings.outputs or (default_kind(predictor.head),))


def _jobs(cases: Sequence[Case], layout: Layout, result: BatchResult) -> list[Job]:
    """What there is to do; cases that cannot be done are noted."""
    jobs = []
    for case in cases:
        with failing(case, result):
            case.check()
            results = layout.paths(case)
            files = (*results.values(), *layout.companions(results))
            jobs.append(Job(case, layout.key(case), results, files))
    return jobs


def _telling(predictor: Predictor) -> Predictor:
    for line in predictor.origin.why:
        _LOG.info("%s", line)
    return predictor


def _folders(run: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(one) for one in ([run] if isinstance(run, str | Path) else run)]


def _sweep(folder: Path, jobs: Sequence[Job], manifest: Manifest, shard: Shard | None) -> None:
    """Remove what killed runs left unfinished; beside other shards only what is this one's."""
    names = None
    if shard is not None:
        names = {path.name for job in jobs for path in job.files} | {manifest.path.name, record_of(FAILURES, shard)}
    for parent in {folder} | {path.parent for job in jobs for path in job.files}:
        sweep_parts(writable_folder(parent), names)


def _check_safe(jobs: Sequence[Job], manifest: Manifest, overwrite: bool) -> None:
    """Refuse results that would replace an input, or the files of a folder that is no batch's.

    Raises:
        UnsafeError: as above.
    """
    inputs = {os.path.realpath(path) for job in jobs for path in job.case.inputs}  # of a loop of links, too
    for job in jobs:
        if inputs & {os.path.realpath(path) for path in (*job.files, *manifest.outputs(job.key))}:
            what = "the output would replace the input"
            raise UnsafeError(what, "choose another --out folder", job.case.images[0], job.case.id)
    there = [path for job in jobs for path in job.files if path.exists()]
    if there and not overwrite and not manifest.found:
        what = f"{len(there)} outputs would replace files that were not predicted here"
        raise UnsafeError(what, "choose another --out folder, or say --overwrite", there[0])
