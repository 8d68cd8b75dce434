"""Where the results of a batch go: side by side in one folder, or named as BIDS derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from densepred.bids import BidsFile, Derivatives
from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.files import writable_folder
from densepred.inference.outputs import PROBABILITIES
from densepred.volumes import labels_suffix, split_part

RECORDS = ("manifest.jsonl", "failures.tsv", "labels.json")
"""What a batch writes beside its results: what is done, what failed, and what the label values mean."""


class Layout(Protocol):
    """Names the files of a batch."""

    folder: Path
    """Where the records of the batch lie; the results lie there or below."""

    def prepare(self) -> None:
        """Make the folder, before it is locked."""

    def paths(self, case: Case) -> dict[str, Path]:
        """The results of a case: kind ("labels", "probabilities") -> file."""

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        """Write what goes with the results."""


class Plain:
    """`<id>.nii.gz` (or the suffix that goes with the images'), and the same in a folder `probabilities`.

    Args:
        folder: for the results.
        outputs: the kinds that are written.
    """

    def __init__(self, folder: Path, outputs: Sequence[str]) -> None:
        self.folder, self._outputs = folder, outputs

    def prepare(self) -> None:
        writable_folder(self.folder)

    def paths(self, case: Case) -> dict[str, Path]:
        suffix = labels_suffix(case.images[0])
        wide = ".tif" if suffix == ".png" else suffix  # PNG holds no real numbers
        files = {
            "labels": self.folder / f"{case.id}{suffix}",
            "probabilities": self.folder / PROBABILITIES / f"{case.id}{wide}",
        }
        return {kind: files[kind] for kind in self._outputs}

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        """Nothing goes with these."""


class Bids:
    """BIDS derivatives with side-car files; see `densepred.bids`.

    Args:
        out: the folder to put `derivatives/` in.
        source: an image of the data set.
        model: its name.
        plan: the meaning of the classes.
        outputs: the kinds that are written.

    Raises:
        InputError: the source has no BIDS name.
    """

    def __init__(self, out: Path, source: Path, model: str, plan: Plan, outputs: Sequence[str]) -> None:
        names = dict(zip(plan.values, plan.classes, strict=True))
        dataset = BidsFile.parse(split_part(source)[0]).dataset
        self._derivatives = Derivatives(dataset, model, names, out, ignored=RECORDS)
        self.folder, self._outputs = self._derivatives.folder, outputs

    def prepare(self) -> None:
        self._derivatives.prepare()

    def paths(self, case: Case) -> dict[str, Path]:
        makers = {"labels": self._derivatives.labels_path, "probabilities": self._derivatives.probabilities_path}
        return {kind: makers[kind](case.images[0]) for kind in self._outputs}

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        for path in paths.values():
            self._derivatives.finish(case.images, path)
