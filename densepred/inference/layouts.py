"""Where the results of a batch go: side by side in one folder, or named as BIDS derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from densepred.bids import BidsFile, Derivatives
from densepred.cases.case import Case
from densepred.cases.plan import Plan
from densepred.config.inference import InferenceConfig
from densepred.errors import InputError
from densepred.files import writable_folder
from densepred.inference.outputs import names_of
from densepred.inference.records import RECORDS
from densepred.volumes import labels_suffix, split_part


class Layout(Protocol):
    """Names the files of a batch."""

    folder: Path
    """Where the records of the batch lie; the results lie there or below."""

    def prepare(self) -> None:
        """Make the folder, before it is locked."""

    def key(self, case: Case) -> str:
        """What results of a case have in common that take each other's places."""

    def paths(self, case: Case) -> dict[str, Path]:
        """The results of a case: kind ("labels", "probabilities" ...) -> file."""

    def companions(self, paths: Mapping[str, Path]) -> list[Path]:
        """The files that go with results, all of which `finish` writes."""

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        """Write what goes with the results."""


class Plain:
    """`<id>.nii.gz` (or the suffix that goes with the images'); other kinds than labels in folders of their names.

    Args:
        folder: for the results.
        outputs: the kinds that are written.
    """

    def __init__(self, folder: Path, outputs: Sequence[str]) -> None:
        self.folder, self._outputs = folder, outputs

    def prepare(self) -> None:
        writable_folder(self.folder)

    def key(self, case: Case) -> str:
        return case.id

    def paths(self, case: Case) -> dict[str, Path]:
        suffix = labels_suffix(case.images[0])
        wide = ".tif" if suffix == ".png" else suffix  # PNG holds no real numbers
        return {
            kind: self.folder / (f"{case.id}{suffix}" if kind == "labels" else f"{kind}/{case.id}{wide}")
            for kind in self._outputs
        }

    def companions(self, paths: Mapping[str, Path]) -> list[Path]:
        return []

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        """Nothing goes with these."""


class Bids:
    """BIDS derivatives with side-car files; see `densepred.bids`.

    Args:
        out: the folder to put `derivatives/` in.
        source: an image of the data set.
        model: its name.
        plan: the meaning of the classes.
        settings: what is written, and whether of a cut-out or in blocks.

    Raises:
        InputError: the source has no BIDS name, or BIDS has no name for what is to be written.
    """

    def __init__(self, out: Path, source: Path, model: str, plan: Plan, settings: InferenceConfig) -> None:
        outputs = settings.outputs or ("labels",)
        nameless = [kind for kind in outputs if kind not in ("labels", "probabilities")]
        if nameless:
            what = f"BIDS has names for segmentations (dseg) and probabilities (probseg), not for {', '.join(nameless)}"
            raise InputError(what, "leave it out of inference.outputs, or predict without BIDS names")
        names = names_of(plan)
        dataset = BidsFile.parse(split_part(source)[0]).dataset
        cut, blocks = settings.cutout is not None, settings.bin
        self._derivatives = Derivatives(dataset, model, names, out, ignored=RECORDS, cut=cut, blocks=blocks)
        self.folder, self._outputs = self._derivatives.folder, outputs
        self._apart = ("_cutout" if cut else "") + (f"_bin{blocks}" if blocks > 1 else "")

    def prepare(self) -> None:
        self._derivatives.prepare()

    def key(self, case: Case) -> str:
        """Cut-outs and blocks have names of their own, and lie beside the whole."""
        return case.id + self._apart

    def paths(self, case: Case) -> dict[str, Path]:
        makers = {"labels": self._derivatives.labels_path, "probabilities": self._derivatives.probabilities_path}
        return {kind: makers[kind](case.images[0]) for kind in self._outputs}

    def companions(self, paths: Mapping[str, Path]) -> list[Path]:
        return [path for output in paths.values() for path in self._derivatives.companions(output)]

    def finish(self, case: Case, paths: Mapping[str, Path]) -> None:
        for path in paths.values():
            self._derivatives.finish(case.images, path)
