"""Files of weights: where they are kept, how they are brought and how they are read. The one module of `models` that
knows of files, and it fetches only what was asked for by name."""

from __future__ import annotations

import os
import re
import sys
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from densepred.errors import DensepredError, InputError, ResourceError, UnsafeError
from densepred.files import atomic_path, is_pickled, sha256, writable_folder
from densepred.models.adapters.source import Source

_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "weights")
"""Keys under which training scripts put the weights beside other things."""


def cache_folder() -> Path:
    """Where fetched weights are kept: $DENSEPRED_WEIGHTS, by default ~/.cache/densepred/weights.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    named = os.environ.get("DENSEPRED_WEIGHTS")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "densepred" / "weights"


def obtain(source: Source) -> Path:
    """The file of a published source: the one in the cache folder, torch.hub's copy of it, or downloaded now.

    Raises:
        InputError: what is there, or was sent, is not a file of weights.
        ResourceError: offline; the message says what to fetch and where to put it.
        UnsafeError: a file with another hash.
    """
    path = cache_folder() / source.file
    if path.exists():
        _verify(path, source, path)
        return path
    hub = Path(torch.hub.get_dir()) / "checkpoints" / source.file
    if source.sha256 and hub.is_file() and sha256(hub).startswith(source.sha256):
        return hub
    writable_folder(path.parent)
    try:
        with atomic_path(path, lambda part: _verify(part, source, path)) as part:
            shows = sys.stderr is not None and sys.stderr.isatty()
            torch.hub.download_url_to_file(source.url, str(part), progress=shows)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        digest = f" (SHA-256 {source.sha256}...)" if source.sha256 else ""
        fix = f"go online, or fetch it elsewhere{digest}, put it at {path} and run the same command again"
        raise ResourceError(f"{source.url} cannot be downloaded ({reason})", fix) from error
    return path


def _verify(path: Path, source: Source, name: Path) -> None:
    """Refuse what is no file of weights, or another one than published; `name` is the file to speak of."""
    again = f"remove it, fetch {source.url} with a browser, and put it at {name}"
    if _kind(path, name, again) == "safetensors":
        try:
            safe_open(path, "pt")  # compares what the header promises with the size of the file
        except SafetensorError as error:
            raise InputError(f"not a whole file of weights ({error})", again, name) from error
    if source.sha256 and not (digest := sha256(path)).startswith(source.sha256):
        what = f"not the published weights: its SHA-256 starts {digest[: len(source.sha256)]}, not {source.sha256}"
        raise UnsafeError(what, again, name)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU; what the file holds decides how it is read, not its name.

    Args:
        path: a safetensors file, or one that torch.save wrote, with the weights alone or under "state_dict", "model"
            or such.

    Raises:
        InputError: there is no such file, or it does not hold weights, or they are damaged.
        UnsafeError: a pickle that needs more than tensors and plain containers, which could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file of weights", "check the path", path)
    try:
        kind = _kind(path, path, "choose a file of weights (.safetensors, .pth)")
        content = load_file(path) if kind == "safetensors" else torch.load(path, "cpu", weights_only=True)
    except DensepredError:
        raise
    except Exception as error:  # whatever the readers trip over in a damaged file
        if "TorchScript" in str(error):
            fix = "save the weights alone (torch.save(torch.jit.load(...).state_dict()))"
            raise UnsafeError("a TorchScript program, which holds code; it is not opened", fix, path) from error
        if type(error).__name__ == "UnpicklingError":  # its module is not imported here
            fix = "use its safetensors form, or let its author save the weights alone (torch.save(model.state_dict()))"
            found = re.search(r"GLOBAL (\S+)", str(error))
            needs = found[1] if found else "more than tensors"
            what = f"a pickle that needs {needs} and could run code; it is not opened"
            raise UnsafeError(what, fix, path) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"not a whole file of weights ({reason})", "fetch or write it again", path) from error
    return _tensors(content, path)


def _kind(path: Path, name: Path, fix: str) -> str:
    """ "safetensors" or "torch", by the first bytes; `name` is the file to speak of."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise InputError("a web page, not weights", fix, name)
    if text.startswith(b"version https://git-lfs"):
        raise InputError("a pointer of Git LFS, not the weights themselves", fix, name)
    if is_pickled(head):
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    raise InputError(f"neither safetensors nor written by torch.save: it starts with {head[:8]!r}", fix, name)


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The named tensors in what was read, out of the dict they may be wrapped in."""
    if isinstance(content, dict):
        for key in _WRAPPERS:
            if isinstance(content.get(key), dict) and content[key] is not content:
                return _tensors(content[key], path)
        found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if found:
            return found
    keys = f"the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content).__name__
    fix = f"save the weights as a dict of tensors, or under {', '.join(_WRAPPERS[:2])}"
    raise InputError(f"holds no named tensors but {keys}", fix, path)
