"""What is done once folds are trained: held-out predictions, decisions, scores, and their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densepred.crossval import tables
from densepred.crossval.calibration import fit_temperature
from densepred.crossval.decisions import (
    KEEP,
    MIRROR,
    TEMPERATURE,
    Decision,
    decide_components,
    decide_mirror,
    decide_temperature,
)
from densepred.crossval.held_out import HeldOut, Setup, predict_held_out
from densepred.crossval.misplaced import Misplaced, draw_misplaced, misplaced
from densepred.crossval.pictures import reliability_figure, scores_figure
from densepred.crossval.sampling import sample_held_out
from densepred.errors import InputError, NothingDoneError, UnsafeError
from densepred.figures import save_png
from densepred.files import atomic_folder, atomic_write, remove, sha256, writable_folder
from densepred.inference.folds import DECISIONS, write_record
from densepred.inference.layouts import Plain
from densepred.inference.outputs import Outputs
from densepred.inference.predictor import load
from densepred.inference.records import LABELS
from densepred.inference.tabular import MEANING, TABLE
from densepred.models.heads import Segmentation
from densepred.volumes import FORMATS

PREDICTIONS, PICTURE, RELIABILITY = "predictions", "scores.png", "reliability.png"
WRITTEN = "written.json"
"""In the predictions: the hashes of what was written there."""


@dataclass
class Verdict:
    """What a cross-validation found.

    Args:
        settings: key -> value, what prediction does.
        decisions: why.
        held_out: the predictions, as they would now be made, and their scores.
        summary: of the scores.
        misplaced: labels that seem to be moved.
        failed: case id -> why there is no prediction or score.
    """

    settings: dict[str, Any]
    decisions: list[Decision]
    held_out: HeldOut
    summary: dict[str, Any]
    misplaced: list[Misplaced]
    failed: dict[str, str] = field(default_factory=dict)


def judge(setup: Setup, first: Sequence[Decision] = (), runs: Sequence[str] = ()) -> Verdict:
    """Predict the held-out cases, decide, and write predictions, scores, pictures and `decisions.json`.

    Args:
        setup: models and cases.
        first: what was decided before.
        runs: the run directories that prediction uses; by default those of all finished folds.

    Raises:
        NothingDoneError: no case could be predicted and scored.
        UnsafeError: a file of the predictions was changed by somebody else.
    """
    axes = setup.shared.config.inference.mirror if setup.kind else ()
    base = predict_held_out(setup, "plain", [f"{MIRROR}=[]"])
    mirrored = predict_held_out(setup, "mirrored", [f"{MIRROR}={list(axes)}"]) if axes else None
    decisions = [*first, decide_mirror(setup, axes, base, mirrored)]
    if not base.judged.cases:
        what = next((error.what for error in base.failed.values()), "none was scored")
        raise NothingDoneError(f"no held-out case could be scored: {what}", "look at the cases with densepred check")
    settings: dict[str, Any] = {MIRROR: list(axes) if decisions[-1].used else []}
    base = mirrored if mirrored is not None and decisions[-1].used else base
    final, of_components, settings[KEEP] = decide_components(setup, base)
    decisions += of_components
    settings[TEMPERATURE] = _temperature(setup, settings, decisions) if setup.kind == "labels" else 1.0
    _write_predictions(setup, final, settings)
    moved = misplaced(setup, final) if setup.kind == "labels" else []
    draw_misplaced(moved, setup, final)
    summary = tables.summarized(final, setup) | {"misplaced": [one.to_dict() for one in moved]}
    tables.save(final, setup, summary, setup.out)
    save_png(scores_figure(final, setup, summary), setup.out / PICTURE)
    write_decisions(setup.out, settings, decisions, runs)
    return Verdict(settings, decisions, final, summary, moved, dict(summary["failed"]))


def write_decisions(out: Path, settings: dict[str, Any], decisions: Sequence[Decision], runs: Sequence[str]) -> None:
    """Write `decisions.json`, by which `densepred predict` goes."""
    which = {"runs": list(runs)} if runs else {}
    rows = [vars(one) for one in decisions]
    write_record(out / DECISIONS, {**which, "settings": settings, "decisions": rows})


def _temperature(setup: Setup, settings: dict[str, Any], decisions: list[Decision]) -> float:
    """Decide on it, and draw how far probabilities are to be trusted."""
    head = load(setup.runs(setup.done[0]), device="cpu").head
    if not isinstance(head, Segmentation) or head.regions:
        decisions.append(Decision("temperature", False, "temperature: not used, the classes have no softmax"))
        return 1.0
    samples = sample_held_out(setup, [f"{MIRROR}={settings[MIRROR]}"])
    decision, temperature = decide_temperature(setup, samples)
    decisions.append(decision)
    if samples:
        shown = temperature if "temperature" in decision.numbers else fit_temperature(samples)
        save_png(reliability_figure(samples, round(shown, 4), decision.used), setup.out / RELIABILITY)
    return temperature if decision.used else 1.0


def _write_predictions(setup: Setup, final: HeldOut, settings: dict[str, Any]) -> None:
    """The files as prediction would now make them, each of the model that did not see the case.

    What was filtered is written with the record of how it came about; the others are copied.

    Raises:
        UnsafeError: a file was changed since it was written here, or was not.
    """
    folder = _Written(writable_folder(setup.out / PREDICTIONS))
    layout = Plain(folder.path, [setup.kind])
    maps = {case: layout.paths(setup.cases[case])[setup.kind] for case in final.files} if setup.kind else {}
    copied = [LABELS] if setup.plan.classes else []
    copied += [TABLE] if final.rows else []
    folder.begin([*maps.values(), *(folder.path / name for name in copied)])
    _write_maps(setup, final, settings, maps, folder)
    for name in copied:
        folder.copy(final.folder / name, folder.path / name)
    if final.rows:
        targets = json.loads((final.folder / MEANING).read_text("utf-8"))["targets"]
        weights = {str(one.fold): one.weights for one in setup.done}
        meaning = {"model": setup.out.resolve().name, "weights_sha256_of_folds": weights, "targets": targets}
        atomic_write(folder.path / MEANING, json.dumps(meaning, indent=1) + "\n")
    folder.end()


class _Written:
    """A folder of files and the record of their hashes, so that what people changed or added there stays.

    Args:
        path: the folder; one without a record, of earlier versions, is taken for all ours.

    Raises:
        InputError: the record is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._record = path, path / WRITTEN
        self._kept: dict[str, str | None] = {}
        try:
            if self._record.exists():
                self._known: dict[str, str | None] = dict(json.loads(self._record.read_text("utf-8")))
            else:
                self._known = {self._name(one): None for one in path.rglob("*")}
        except (ValueError, TypeError) as error:
            fix = "remove it: what lies beside it is then taken for written here"
            raise InputError(f"damaged ({error})", fix, self._record) from error

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def is_ours(self, path: Path) -> bool:
        """Whether it is as it was written here; what was being written when a run was killed is."""
        name = self._name(path)
        return name in self._known and self._known[name] in (None, sha256(path))

    def begin(self, targets: Sequence[Path]) -> None:
        """Refuse to replace what is not ours."""
        for target in targets:
            if target.exists() and not self.is_ours(target):
                what = "was changed since it was written: left as it is"
                raise UnsafeError(what, "move it away, and run the same command again", target)

    @contextmanager
    def writing(self, target: Path) -> Iterator[None]:
        """Note that a file is about to be written, and then its hash."""
        self._known[self._name(target)] = None
        self._save(self._known)
        yield
        self._keep(target)
        self._save(self._known)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file, or a store in a folder, unless the same is there."""
        writable_folder(target.parent)
        if target.exists() and sha256(target) == sha256(source):
            self._keep(target)
            return
        with self.writing(target):
            if source.is_dir():
                with atomic_folder(target) as part:
                    shutil.copytree(source, part, dirs_exist_ok=True)
            else:
                atomic_write(target, source.read_bytes())

    def _keep(self, target: Path) -> None:
        name = self._name(target)
        self._kept[name] = self._known[name] = sha256(target)

    def end(self) -> None:
        """Remove the images beside those that were written now, if they are ours; the record is of these alone."""
        for parent in {(self.path / name).parent for name in self._kept}:
            for path in parent.iterdir():
                image = path.name.lower().endswith(tuple(FORMATS)) and path.name[0] != "."
                if image and self._name(path) not in self._kept and self.is_ours(path):
                    remove(path)
        self._save(self._kept)

    def _save(self, names: dict[str, str | None]) -> None:
        atomic_write(self._record, json.dumps(dict(sorted(names.items())), indent=1) + "\n")


def _write_maps(
    setup: Setup, final: HeldOut, settings: dict[str, Any], targets: Mapping[str, Path], folder: _Written
) -> None:
    """The label maps, or maps of numbers."""
    for one in setup.done:
        overrides = [f"{MIRROR}={settings[MIRROR]}", f"{KEEP}={settings[KEEP]}"]
        predictor = load(setup.runs(one), overrides, device=setup.engine.device)
        for case in one.cases:
            if case not in targets:
                continue
            source, target = final.files[case], targets[case]
            if not settings[KEEP]:
                folder.copy(source, target)
                continue
            with folder.writing(target), setup.plan.reading.open_plane(source) as volume:
                made = predictor.made(setup.cases[case])
                with Outputs({setup.kind: target}, 1, setup.plan, made, predictor.head) as outputs:
                    outputs.begin(volume)
                    outputs.write({setup.kind: volume.numpy()})
