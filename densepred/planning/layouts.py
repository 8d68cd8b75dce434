"""What a folder of images and labels says by its names: the data section that a recipe would have for it.

Known are nnU-Net's layout and the Decathlon's (with their `dataset.json`), two folders side by side (`images` and
`labels`), and pairs in one folder (`x.nii.gz` and `x_seg.nii.gz`). Nothing is renamed; the patterns do it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from densepred.cases.lists import read_json
from densepred.cases.patterns import COMPRESSED, id_of, is_store
from densepred.config import DataConfig
from densepred.errors import InputError, NothingDoneError
from densepred.volumes import FORMATS

IMAGES = ("images", "image", "imgs", "img", "imagestr", "images_tr", "scans", "volumes", "data", "raw")
"""Names of folders of images, in small letters."""
LABELS = ("labels", "label", "labelstr", "labels_tr", "masks", "mask", "segmentations", "segmentation", "segs", "seg",
          "annotations", "gt", "truth", "groundtruth", "ground_truth")  # fmt: skip
"""Names of folders of labels."""
ENDINGS = ("seg", "label", "labels", "mask", "masks", "segmentation", "gt", "dseg", "annotation", "truth")
"""What follows the name of an image in that of its label: `x_seg`, `x-mask`, `x.label`."""
SPLITS = ("splits_final.json", "splits.json")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_LEAST = 0.5
"""Share of the images that must have a label, for names to count as a layout; those without are named as faults."""


def of_folder(folder: Path) -> DataConfig:
    """The data section of a folder.

    Raises:
        InputError: no images and labels that belong together are found; it says which names would be.
        NothingDoneError: the folder holds no images at all.
    """
    if (folder / "dataset.json").is_file():
        return _of_list(folder)
    inner = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir() and not is_store(path)}
    for images in (inner[name] for name in IMAGES if name in inner):
        for labels in (inner[name] for name in LABELS if name in inner):
            if found := _side_by_side(folder, images, labels):
                return found
    if found := _pairs(folder):
        return found
    seen = sorted(path.name for path in folder.iterdir())[:8]
    what = f"no images with labels are recognised here; it holds {', '.join(seen) or 'nothing'}"
    fix = "give data.images and data.labels in a YAML, or folders images/ and labels/, or x_seg.nii.gz beside x.nii.gz"
    raise (InputError if any(_image_files(folder)) or inner else NothingDoneError)(what, fix, folder)


def _of_list(folder: Path) -> DataConfig:
    """nnU-Net's or the Decathlon's; channels of the Decathlon lie in the fourth axis of one file."""
    content = read_json(folder / "dataset.json")
    settings: dict[str, Any] = {"root": str(folder), "dataset": "dataset.json"}
    channels = content.get("modality") or content.get("channel_names") or {}
    if "training" in content and isinstance(channels, Mapping) and len(channels) > 1:
        settings["axes"] = "xyzc"
    return DataConfig(**settings, **_splits(folder))


def _splits(folder: Path) -> dict[str, Any]:
    """Folds that lie beside the data."""
    there = [name for name in SPLITS if (folder / name).is_file()]
    return {"splits": there[0]} if there else {}


def _side_by_side(folder: Path, images: Path, labels: Path) -> DataConfig | None:
    """`images/x.nii.gz` or, for channels, `images/x_0000.nii.gz`, with `labels/x.nii.gz` or `labels/x_seg.nii.gz`."""
    truth = _by_stem(labels)
    found = _by_stem(images)
    channels: dict[str, dict[str, str]] = {}
    for stem, ending in found.items():
        if match := _CHANNEL.fullmatch(stem):
            channels.setdefault(match[2], {})[match[1]] = ending
    ways: list[dict[str, dict[str, str]]] = [dict(sorted(channels.items()))] if channels else []
    tails = ("", *(mark + one for one in ENDINGS for mark in "_-."))
    for named, tail in product([*ways, {"": found}], tails):  # four digits may also number images: x_0001, x_0002
        ids = set().union(*named.values())
        chosen = {case: truth[case + tail] for case in ids if case + tail in truth}
        if ids and len(chosen) >= _LEAST * len(ids):
            where = {name: _one_ending(endings.values(), images) for name, endings in named.items()}
            patterns = {
                f"channel_{name}": f"{images.name}/{{id}}_{name}{ending}" for name, ending in where.items() if name
            }
            pattern = f"{images.name}/{{id}}{where.get('', '')}"
            only = next(iter(patterns.values()), pattern)
            return DataConfig(
                root=str(folder),
                images=dict(patterns) if len(patterns) > 1 else only,
                labels=f"{labels.name}/{{id}}{tail}{_one_ending(chosen.values(), labels)}",
                **_splits(folder),
            )
    return None


def _pairs(folder: Path) -> DataConfig | None:
    """`x.nii.gz` and `x_seg.nii.gz` in one folder."""
    found = _by_stem(folder)
    for tail in (mark + one for one in ENDINGS for mark in "_-."):
        truth = {stem.removesuffix(tail): ending for stem, ending in found.items() if stem.endswith(tail)}
        rest = {stem: ending for stem, ending in found.items() if not stem.endswith(tail)}
        both = truth.keys() & rest.keys()
        if both and len(both) >= _LEAST * len(rest):
            return DataConfig(
                root=str(folder),
                images=f"{{id}}{_one_ending((rest[case] for case in both), folder)}",
                labels=f"{{id}}{tail}{_one_ending((truth[case] for case in both), folder)}",
                **_splits(folder),
            )
    return None


def _image_files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.glob("[!.]*")) if _ending(path) and (path.is_file() or is_store(path)))


def _by_stem(folder: Path) -> dict[str, str]:
    """Name without suffix -> suffix, of the images in a folder."""
    return {id_of(path): path.name[len(id_of(path)) :] for path in _image_files(folder)}


def _ending(path: Path) -> bool:
    name = path.name.lower()
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return name.endswith(tuple(FORMATS)) or path.name.lower().endswith(tuple(FORMATS))


def _one_ending(endings: Iterable[str], folder: Path) -> str:
    """The suffix that all share.

    Raises:
        InputError: they differ.
    """
    several = sorted(set(endings))
    if len(several) > 1:
        what = f"images of several suffixes lie here: {', '.join(several)}"
        raise InputError(
            what, "put one kind into a folder of its own, or list the cases in a CSV (data.dataset)", folder
        )
    return several[0]
