"""Predictions as BIDS derivatives: their paths, side-car files and the description of their data set.

Reference: Brain Imaging Data Structure 1.11, chapters "BIDS derivatives" and "Imaging data types"
(https://bids-specification.readthedocs.io); Gorgolewski et al. 2016, Sci. Data 3, 160044.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densepred import __version__
from densepred.errors import InputError, UnsafeError
from densepred.files import atomic_write, writable_folder
from densepred.volumes import split_part
from densepred.volumes.fits_legend import Legend
from densepred.volumes.record import INVALID

BIDS_VERSION = "1.11.0"
ENTITIES = (
    *("sub", "tpl", "ses", "cohort", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce", "trc", "stain", "rec"),
    *("dir", "run", "mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split", "recording", "chunk"),
    *("atlas", "seg", "scale", "res", "den", "label", "desc"),
)
"""The keys of a file name in the order of the standard."""
DATATYPES = (
    *("anat", "beh", "dwi", "eeg", "emg", "fmap", "func", "ieeg", "meg", "micr", "motion", "mrs", "nirs", "perf"),
    "pet",
)
"""The folders that hold a subject's files."""
_COUNTED = ("run", "echo", "flip", "inv", "split", "chunk")
_COMMON = {"sub", "ses", "acq", "rec", "run", "part", "chunk", "space", "atlas", "seg", "scale", "res", "desc"}
_KEPT = {
    "anat": _COMMON | {"task", "ce", "echo"},
    "func": _COMMON | {"task", "ce", "echo", "dir"},
    "dwi": _COMMON | {"dir"},
}
"""Datatypes that the standard has segmentations for -> the keys that their names may have."""
_LINK = "source"
_RENAME = "name it as BIDS does (sub-01/anat/sub-01_T1w.nii.gz), or predict without BIDS names"


@dataclass(frozen=True)
class BidsFile:
    """A file of a BIDS data set, by its path.

    Args:
        entities: key -> label, in the order of the name: {"sub": "01", "run": "2"}.
        suffix: what it holds: "T1w".
        extension: from the first dot on: ".nii.gz".
        datatype: the folder it lies in: "anat".
        dataset: the folder of the data set, above that of the subject.

    Example:
        >>> file = BidsFile.parse("study/sub-01/ses-a/anat/sub-01_ses-a_acq-mprage_run-1_T1w.nii.gz")
        >>> file.entities["acq"], file.suffix, file.datatype, str(file.dataset)
        ('mprage', 'T1w', 'anat', 'study')
    """

    entities: Mapping[str, str]
    suffix: str
    extension: str
    datatype: str
    dataset: Path

    @classmethod
    def parse(cls, path: str | Path) -> BidsFile:
        """Take a path apart.

        Raises:
            InputError: the name is no BIDS name, or its folders say something else.
        """
        path = Path(path)
        entities, suffix, extension = parse_name(path.name)
        folders = [f"sub-{entities['sub']}"]
        if "ses" in entities:
            folders.append(f"ses-{entities['ses']}")
        above = path.parts[-2 - len(folders) : -1]
        if list(above[:-1]) != folders or above[-1] not in DATATYPES:
            what = (
                f"no BIDS path: the file must lie in {'/'.join(folders)}/<datatype>/, not in {'/'.join(above) or '.'}/"
            )
            raise InputError(what, _RENAME, path)
        return cls(entities, suffix, extension, above[-1], path.parents[len(folders) + 1])


def parse_name(name: str) -> tuple[dict[str, str], str, str]:
    """The entities, suffix and extension of a BIDS file name.

    Raises:
        InputError: it is none.

    Example:
        >>> parse_name("sub-01_task-rest_bold.nii.gz")
        ({'sub': '01', 'task': 'rest'}, 'bold', '.nii.gz')
    """
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
    fault = _fault(pairs, entities, suffix, dot + extension)
    if fault:
        raise InputError(f"no BIDS name: {fault}", _RENAME, name)
    return entities, suffix, dot + extension


def _fault(pairs: list[str], entities: dict[str, str], suffix: str, extension: str) -> str:
    for pair in pairs:
        key, dash, label = pair.partition("-")
        if not dash or key not in ENTITIES:
            return f"'{pair}' is no <key>-<label> with a key that BIDS knows"
        if not re.fullmatch("[0-9]+" if key in _COUNTED else "[0-9a-zA-Z+]+", label, re.ASCII):
            return f"'{pair}' needs {'a number' if key in _COUNTED else 'letters and digits alone'} behind the dash"
    places = [ENTITIES.index(pair.partition("-")[0]) for pair in pairs]
    if places != sorted(set(places)):
        right = "_".join(f"{key}-..." for key in sorted(entities, key=ENTITIES.index))
        return f"its keys are out of order or double; in order: {right}"
    if "sub" not in entities:
        return "it names no subject (sub-...)"
    if not re.fullmatch("[0-9a-zA-Z]+", suffix, re.ASCII):
        return f"'{suffix}' is no suffix (T1w, bold, ...)"
    return "" if extension else "it has no extension"


def label_of(text: str) -> str:
    """`text` as a BIDS label, which has ASCII letters and digits alone.

    Accents are taken off, everything else ends a word, and each word but the first gets a capital.

    Raises:
        InputError: nothing is left.

    Example:
        >>> label_of("hippocampus_unet3d v2"), label_of("Läsion")
        ('hippocampusUnet3dV2', 'Lasion')
    """
    plain = "".join(_ascii(sign) for sign in unicodedata.normalize("NFKC", text))
    first, *others = re.findall("[0-9a-zA-Z]+", plain) or [""]
    if not first:
        raise InputError(f"'{text}' has no letter or digit to make a BIDS label of", "choose another name")
    return first + "".join(word[0].upper() + word[1:] for word in others)


def _ascii(sign: str) -> str:
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or " "


class Derivatives:
    """A data set of predictions, `<out>/derivatives/densepred-<model>/`, in the form of BIDS derivatives.

    An image keeps the entities of its source that BIDS allows in the name of a segmentation, and gets `seg-<model>`:
    `sub-01_ses-a_run-1_T1w.nii.gz` gives `sub-01/ses-a/anat/sub-01_ses-a_run-1_seg-<model>_dseg.nii.gz`. Where
    source and prediction lie on one grid, `space` and `res` are the source's; a cut-out is told by `desc-cutout`,
    blocks of n x n voxels by `res-bin<n>`, both behind what the source has there.

    Args:
        dataset: the folder of the sources' data set, as `BidsFile.dataset`.
        model: the model's name; `label_of` makes the label of it.
        classes: value -> name, in the order of the channels of probabilities; one named "invalid" has no channel.
        out: the folder to put `derivatives/` in; by default that of the sources.
        colours: value -> "#rrggbb"; those left out are chosen.
        atlas: the name of the atlas that the classes are of, if there is one.
        desc: a label that tells this prediction from others of the same model.
        ignored: names of further files in the folder, for `.bidsignore`.
        cut: the predictions are cut-outs of their sources.
        blocks: side of the blocks of the sources' voxels, in a plane, that one of the predictions is the mean of.

    Raises:
        InputError: the model's name or `desc` has no letter or digit.

    Example:
        >>> derivatives = Derivatives(Path("study"), "unet v2", {0: "background", 1: "lesion"})
        >>> str(derivatives.labels_path("study/sub-01/anat/sub-01_T1w.nii.gz"))
        'study/derivatives/densepred-unetV2/sub-01/anat/sub-01_seg-unetV2_dseg.nii.gz'
    """

    def __init__(
        self,
        dataset: Path,
        model: str,
        classes: Mapping[int, str],
        out: Path | None = None,
        colours: Mapping[int, str] | None = None,
        atlas: str | None = None,
        desc: str | None = None,
        ignored: Sequence[str] = (),
        cut: bool = False,
        blocks: int = 1,
    ) -> None:
        self._cut, self._blocks = cut, blocks
        self.dataset, self.model = Path(dataset), model
        self._label = label_of(model)
        self.folder = Path(out or dataset) / "derivatives" / f"densepred-{self._label}"
        self._legend = Legend(classes, colours or {})
        self._atlas, self._ignored = atlas, tuple(ignored)
        self._desc = None if desc is None else label_of(desc)
        self._sources: dict[Path, str] = {}

    def prepare(self) -> None:
        """Make the folder and its `dataset_description.json`, which stays if it is there and is this one's.

        Raises:
            InputError: the folder cannot be written to.
            UnsafeError: the folder is another program's, or of another model or data set.
        """
        self.folder = writable_folder(self.folder)
        path, ours = self.folder / "dataset_description.json", self._description()
        if not path.exists():
            self._check_empty()
        if path.exists():  # by now: another shard may have been faster
            _check_description(_json(path), ours, path)
        else:
            atomic_write(path, _text(ours))
        if self._ignored:
            atomic_write(self.folder / ".bidsignore", "".join(f"{name}\n" for name in self._ignored))

    def _check_empty(self) -> None:
        """Hidden files do not count: locks, and what a killed run left unfinished."""
        names = sorted(item.name for item in self.folder.iterdir() if item.name[0] != ".")
        foreign = [name for name in names if name not in self._ignored]
        if foreign and "dataset_description.json" not in names:
            what = f"the folder holds files of another program ({', '.join(foreign[:3])})"
            raise UnsafeError(f"{what} and no dataset_description.json", "choose another folder", self.folder)

    def _description(self) -> dict[str, Any]:
        link = Path(os.path.relpath(self.dataset.resolve(), self.folder.resolve())).as_posix()
        theirs = _json(self.dataset / "dataset_description.json")
        source = {"URL": link} | ({"DOI": theirs["DatasetDOI"]} if "DatasetDOI" in theirs else {})
        return {
            "Name": f"densepred {self.model}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "densepred", "Version": __version__, "Description": f"model {self.model}"}],
            "SourceDatasets": [source],
            "DatasetLinks": {_LINK: link},
        }

    def labels_path(self, source: str | Path) -> Path:
        """Where the label map of a source goes.

        Args:
            source: the image, of several that make a case the first.

        Raises:
            InputError: the source is not of the data set, BIDS has no segmentations for its datatype, or the name is
                another source's already.
        """
        return self._path(source, "dseg")

    def probabilities_path(self, source: str | Path) -> Path:
        """Where the probabilities go, one file with a class per channel along its fourth axis; as `labels_path`."""
        return self._path(source, "probseg")

    def _path(self, source: str | Path, suffix: str) -> Path:
        source = split_part(source)[0]
        file = self._parse(source)
        kept = {key: label for key, label in file.entities.items() if key in _KEPT[file.datatype]}
        kept |= {"seg": self._label} | ({"desc": self._desc} if self._desc else {})
        if self._cut:
            kept["desc"] = kept["desc"] + "Cutout" if "desc" in kept else "cutout"
        if self._blocks > 1:
            kept["res"] = f"{kept['res']}Bin{self._blocks}" if "res" in kept else f"bin{self._blocks}"
        pairs = [f"{key}-{kept[key]}" for key in sorted(kept, key=ENTITIES.index)]
        folders = [f"{key}-{kept[key]}" for key in ("sub", "ses") if key in kept]
        path = self.folder.joinpath(*folders, file.datatype, "_".join([*pairs, f"{suffix}.nii.gz"]))
        uri = self._uri(source)
        known = self._sources.setdefault(path, (_json(_sidecar(path)).get("Sources") or [uri])[0])
        if known != uri:
            what = f"its prediction would have the name of that of {known.rpartition(':')[2]}: {path.name}"
            raise InputError(what, "predict one of them, or give one of the predictions a `desc`", source)
        return path

    def _parse(self, source: Path) -> BidsFile:
        file = BidsFile.parse(source)
        if file.dataset.resolve() != self.dataset.resolve():
            what = f"not of the data set {self.dataset}, but of {file.dataset}"
            raise InputError(what, "predict one data set at a time", source)
        if file.datatype not in _KEPT:
            what = f"BIDS names segmentations of {', '.join(_KEPT)}, not of {file.datatype}"
            raise InputError(what, "predict without BIDS names", source)
        if file.datatype == "func" and "task" not in file.entities:
            raise InputError("no BIDS name: a file of func must name its task (task-...)", _RENAME, source)
        return file

    def _uri(self, source: Path) -> str:
        """By its name: what a link there points to may lie anywhere."""
        return f"bids:{_LINK}:{source.relative_to(BidsFile.parse(source).dataset).as_posix()}"

    def companions(self, output: Path) -> list[Path]:
        """What `finish` writes."""
        sidecar = _sidecar(output)
        return [sidecar] if _has_probabilities(output) else [sidecar, sidecar.with_suffix(".tsv")]

    def finish(self, sources: str | Path | Sequence[str | Path], output: Path) -> None:
        """Write what goes with an output: the side-car `.json`, and beside a label map the table of its values.

        Args:
            sources: the images it was made from, the one that gave the path first.
            output: a path of `labels_path` or `probabilities_path`.
        """
        several = [sources] if isinstance(sources, str | Path) else list(sources)
        uris = [self._uri(split_part(source)[0]) for source in several]
        probabilities = _has_probabilities(output)
        kind = "Probabilities of the classes" if probabilities else "Segmentation"
        about: dict[str, Any] = {
            "Description": f"{kind} by the densepred model {self.model}",
            "Sources": list(dict.fromkeys(uris)),
            "Manual": False,
        }
        own_grid = self._cut or self._blocks > 1
        if not own_grid or "_space-" in output.name:  # where a space is named, BIDS demands what it is that of
            about["SpatialReference"] = uris[0]
        if self._atlas:
            about["Atlas"] = self._atlas
        if "_res-" in output.name:
            blocks = f"blocks of {self._blocks} x {self._blocks} voxels in each plane of the source"
            about["Resolution"] = "that of the source" if self._blocks == 1 else blocks
        if probabilities:
            about["LabelMap"] = [name for name in self._legend.names.values() if name != INVALID]
        else:
            atomic_write(_sidecar(output).with_suffix(".tsv"), self._table())
        atomic_write(_sidecar(output), _text(about))

    def _table(self) -> str:
        names = {value: " ".join(name.split()) for value, name in sorted(self._legend.names.items())}
        rows = [f"{value}\t{name or 'n/a'}\t{self._legend.colour(value)}\n" for value, name in names.items()]
        return "index\tname\tcolor\n" + "".join(rows)


def sources_of(output: str | Path) -> list[str]:
    """The URIs of the images an output was made from, as its side-car file tells; none where there is no such file.

    Example:
        >>> sources_of("study/derivatives/x/sub-01/anat/sub-01_dseg.nii.gz")
        []
    """
    listed = _json(_sidecar(Path(output))).get("Sources")
    return [str(uri) for uri in listed] if isinstance(listed, list) else []


def _has_probabilities(path: Path) -> bool:
    return path.name.endswith("_probseg.nii.gz")


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_description(found: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    """Refuse a description that does not say what ours would say.

    Raises:
        UnsafeError: it is another program's, or of another model or data set.
    """
    listed = found.get("GeneratedBy")
    makers = [item.get("Name") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if makers != ["densepred"]:
        what = f"the folder is another program's ({', '.join(map(str, makers)) or 'it says no name'})"
        raise UnsafeError(what, "choose another folder", path)
    for key in ("Name", "DatasetLinks"):
        if found.get(key) != ours[key]:
            what = f"the folder holds other predictions: {key} is {found.get(key)} there, and {ours[key]} here"
            raise UnsafeError(what, "choose another folder", path)
