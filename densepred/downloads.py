"""Public data sets, fetched on request only: through MONAI's Decathlon list, checked by hash, unpacked with care."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from densepred.errors import InputError, ResourceError, UnsafeError
from densepred.files import atomic_path, atomic_write, writable_folder
from densepred.registry import lookup

DATASETS = {
    "brain_tumour": "Task01_BrainTumour",
    "heart": "Task02_Heart",
    "liver": "Task03_Liver",
    "hippocampus": "Task04_Hippocampus",
    "prostate": "Task05_Prostate",
    "lung": "Task06_Lung",
    "pancreas": "Task07_Pancreas",
    "hepatic_vessel": "Task08_HepaticVessel",
    "spleen": "Task09_Spleen",
    "colon": "Task10_Colon",
}
"""Our name -> the task of the Medical Segmentation Decathlon (arXiv:1902.09063, CC-BY-SA 4.0)."""

SUBJECT: dict[str, Callable[[str], str]] = {"hippocampus": lambda case: str((int(case.rpartition("_")[2]) + 1) // 2)}
"""Our name -> the subject that a case shows; hippocampus 2k-1 and 2k are very probably the two sides of one."""


def fetch(name: str, out: str | Path) -> Path:
    """Bring a public data set to a folder; only this and `models/weights/fetch.py` use the network.

    An archive that lies beside `out` already, with the right hash, is used instead of the network.

    Args:
        name: a key of `DATASETS`.
        out: a folder that does not exist yet, or is empty.

    Returns:
        The folder, with `dataset.json`, `imagesTr`, `labelsTr`, and `splits.json` where subjects have two cases.

    Raises:
        InputError: an unknown name, or the folder holds files already.
        ResourceError: offline, or the disk is too small.
        UnsafeError: the archive has another hash, or members that have no place in a data set.
    """
    try:
        task = lookup(DATASETS, name, "data set")
    except ValueError as error:
        raise InputError(str(error), "choose one of these") from error
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("holds files already", "use them, remove them, or choose another folder with --out", folder)
    archive = _download(task, writable_folder(folder.absolute().parent))
    unpack(archive, folder)
    if name in SUBJECT:
        _write_splits(folder, SUBJECT[name])
    return folder


def _write_splits(folder: Path, subject: Callable[[str], str]) -> None:
    """Put five folds that keep each subject together beside the list."""
    from densepred.cases.case import collect
    from densepred.cases.folds import folds
    from densepred.config import DataConfig

    data = DataConfig(root=str(folder), dataset="dataset.json")
    cases = [replace(case, group=subject(case.id)) for case in collect(data)]
    splits = [{"train": train, "val": val} for train, val in folds(cases, data)]
    atomic_write(folder / "splits.json", json.dumps(splits, indent=1) + "\n")


def _download(task: str, folder: Path) -> Path:
    """The archive in `folder`, its hash checked; MONAI's downloader brings it where it is missing."""
    from monai.apps.datasets import DecathlonDataset
    from monai.apps.utils import check_hash, download_url

    logging.getLogger("monai.apps").setLevel(logging.CRITICAL)
    url, md5 = DecathlonDataset.resource[task], DecathlonDataset.md5[task]
    archive = folder / url.rpartition("/")[2]

    def verify(path: Path) -> None:
        if not check_hash(path, md5, "md5"):
            raise UnsafeError(f"not the published archive (its MD5 is not {md5})", "remove it and run again", archive)

    if archive.exists():
        verify(archive)
        return archive
    try:
        with atomic_path(archive, verify) as part, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it finds that it has no hash to check: we do
            download_url(url, part, progress=sys.stderr is not None and sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        fix = f"go online, or fetch it elsewhere (MD5 {md5}), put it at {archive} and run the same command again"
        raise ResourceError(f"{url} cannot be downloaded ({reason})", fix) from error
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the one folder in a tar archive as `folder`: all of it or nothing.

    Raises:
        ResourceError: the disk is too small.
        UnsafeError: a member is a link or a device, or would lie outside; nothing is written.
    """
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=folder.absolute().parent) as scratch:
        members = [member for member in tar.getmembers() if not Path(member.name).name.startswith("._")]
        for member in members:
            plain = member.isfile() or member.isdir()
            if not plain or ".." in Path(member.name).parts or member.name.startswith("/"):
                raise UnsafeError(f"the member {member.name!r} has no place in a data set", "do not use it", archive)
        needed, free = sum(member.size for member in members), shutil.disk_usage(scratch).free
        if needed > free:
            what = f"needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB"
            raise ResourceError(what, "free some space", archive)
        tar.extractall(scratch, members, filter="data")
        tops = list(Path(scratch).iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise UnsafeError(f"{len(tops)} entries at the top, not one folder", "do not use it", archive)
        os.replace(tops[0], folder)


__all__ = ["DATASETS", "fetch", "unpack"]
