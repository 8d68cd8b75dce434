"""From a configuration to the YAML of a recipe, with a comment behind each number that says why it is what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from densepred.cases.names import class_names
from densepred.config import Config, DataConfig, check
from densepred.config.data import ChannelConfig
from densepred.errors import InputError
from densepred.planning.fingerprint import Fingerprint
from densepred.planning.nnunet import Configuration, Sizes
from densepred.planning.sketch import Sketch
from densepred.yamlfile import set_path

_WIDTH = 120
_BRIGHT = 4.0
"""The deviation over that of a normal distribution with the same 99 %: above it a few voxels carry it."""
_CENTRAL = 5.152
"""Standard deviations between the 0.5th and the 99.5th percentile of a normal distribution."""


class Setting(NamedTuple):
    """One key of a recipe."""

    path: str
    value: Any
    why: str = ""


def sizes_of(fingerprint: Fingerprint) -> Sizes:
    """What the rules look at."""
    return Sizes(
        tuple(case.cropped for case in fingerprint.cases),
        tuple(case.spacing for case in fingerprint.cases),
        fingerprint.cases[0].channels,
        len(fingerprint.names) + bool(fingerprint.ignored),
    )


def of_data(fingerprint: Fingerprint, data: DataConfig, one: Configuration, alike: bool, rules: str) -> list[Setting]:
    """The data section: what was given, and what follows from the fingerprint but the normalisation.

    Args:
        fingerprint: of the set.
        data: as given.
        one: the configuration.
        alike: all cases lie on the grid of its spacing already.
        rules: nnunet or densepred.
    """
    given = data.model_dump(exclude_unset=True)
    found = [Setting(f"data.{key}", value) for key, value in given.items()]
    if not class_names(data):
        why = "the values in the labels, background first; give them names"
        found.append(Setting("data.classes", dict(fingerprint.classes), why))
    cases = len(fingerprint.cases)
    if "folds" not in given and "splits" not in given and cases < data.folds:
        few = Setting("data.folds", cases, f"there are no more than {cases} cases")
        found += [few] if cases > 1 else [Setting("data.fold", "all", "one case: nothing is left to validate on")]
    if rules == "nnunet" and "resampling" not in given and not alike:
        found.append(Setting("data.resampling", "nnunet", "cubic, without antialiasing, as nnU-Net resamples"))
    if "spacing" not in given and not alike:
        spacing = tuple(n for axis, n in enumerate(one.spacing) if one.dims == 3 or axis != one.axis)
        found.append(
            Setting("data.spacing", tuple(float(f"{n:.6g}") for n in spacing), _spacing_why(fingerprint, one, rules))
        )
    return found


def _spacing_why(fingerprint: Fingerprint, one: Configuration, rules: str) -> str:
    fine = "" if rules == "nnunet" else "; finer images are averaged, so that nothing aliases"
    if one.name == "3d_lowres":
        return f"coarser than the images, so that a patch holds {one.covers:.0%} of one{fine}"
    median = fingerprint.median("spacing")
    finer = [axis for axis, (a, b) in enumerate(zip(one.spacing, median, strict=True)) if a < b * 0.999]
    tenth = f", the 10th percentile along axis {finer[0]}, of few and thick slices" if finer else ""
    return f"median of the cases{tenth}{fine}"


def of_model(one: Configuration, network: str, deep: int) -> list[Setting]:
    """The network: its name (`nnunet`, or `plain` for an encoder of ours), and coarser outputs with a loss."""
    named = Setting("model.network", network) if network == "nnunet" else Setting("model.encoder", network)
    edges = [n // by for n, by in zip(one.net.patch, one.net.divisor, strict=True)]
    return [
        Setting("model.dims", one.dims, f"configuration {one.name}"),
        named,
        Setting("model.channels", one.channels, f"{one.net.stages} stages; the coarsest maps are {_times(edges)}"),
        Setting(
            "model.strides",
            _plain(one.net.strides),
            "an axis is halved while 8 voxels are left and it is among the finest",
        ),
        Setting(
            "model.kernels", _plain(one.net.kernels), "1 along axes whose voxels are twice as long as the shortest"
        ),
        Setting("model.deep_supervision", deep, "coarser outputs with a loss of their own"),
    ]


def of_patch(one: Configuration, why_size: str, why_batch: str, foreground: float) -> list[Setting]:
    """The patch section, and how a 2D network predicts volumes."""
    found = [
        Setting("patch.size", one.net.patch, why_size),
        Setting("patch.batch", one.batch, why_batch),
        Setting("patch.foreground", foreground, "share of the patches that is centred on a voxel of some class"),
    ]
    if one.axis is not None:
        found.append(Setting("patch.axis", one.axis, "planes across the coarsest axis of the volumes"))
        found.append(Setting("inference.slices", one.axis))
    return found


def normalizations(fingerprint: Fingerprint, rules: str) -> list[tuple[Any, str]]:
    """For each channel its normalisation, and why."""
    return [
        _nnunet_normalize(name) if rules == "nnunet" else _own_normalize(name, sketch)
        for name, sketch in zip(fingerprint.channels, fingerprint.intensities("valid"), strict=True)
    ]


def _nnunet_normalize(name: str) -> tuple[Any, str]:
    known: dict[str, tuple[Any, str]] = {
        "ct": ("ct_window", "CT: window, mean and deviation of the foreground of all training cases"),
        "nonorm": ("none", "as the channel's name demands"),
        "rescale_to_0_1": ({"name": "percentile", "low": 0, "high": 100}, "from the least to the greatest value"),
        "rgb_to_0_1": ({"name": "ct_window", "low": 0, "high": 255, "mean": 0, "std": 255}, "bytes to 0..1"),
    }
    return known.get(name.casefold(), ("zscore", "each case by its own mean and deviation"))


def _own_normalize(name: str, sketch: Sketch) -> tuple[Any, str]:
    if name.casefold() == "ct":
        return "ct_window", "CT: the values mean something; window, mean and deviation of the foreground"
    wide = (sketch.quantile(0.995) - sketch.quantile(0.005)) / _CENTRAL
    if wide > 0 and sketch.std > _BRIGHT * wide:
        ratio = sketch.std / wide
        return "asinh", f"a few bright voxels carry the deviation ({ratio:.0f} times that of the central 99 %)"
    return "zscore", "each case by its own mean and deviation: intensities have no common unit"


def of_normalize(fingerprint: Fingerprint, data: DataConfig, rules: str) -> list[Setting]:
    """The normalisation, one for all channels or one for each.

    Raises:
        InputError: channels need several, and they are given by a list, which has one for all.
    """
    if "normalize" in data.model_fields_set:
        return []
    chosen = normalizations(fingerprint, rules)
    if all(value == chosen[0][0] for value, _ in chosen):
        return [Setting("data.normalize", *chosen[0])]
    if not isinstance(data.images, dict):
        which = ", ".join(f"{n}: {v}" for n, (v, _) in zip(fingerprint.channels, chosen, strict=True))
        what = f"the channels want different normalisations ({which}), and a list of cases has one for all"
        raise InputError(what, "name the channels' patterns in data.images, or give data.normalize", data.root)
    images = {}
    for (name, one), (value, _) in zip(data.images.items(), chosen, strict=True):
        channel = one if isinstance(one, ChannelConfig) else ChannelConfig(file=one)
        keep = channel.normalize is not None or channel.bits
        images[name] = channel.model_dump(exclude_unset=True) | ({} if keep else {"normalize": value})
    return [Setting("data.images", images, "; ".join(f"{n}: {w}" for n, (_, w) in zip(images, chosen, strict=True)))]


def one_sided(names: Iterable[str]) -> bool:
    """Whether classes tell left from right, so that mirroring would teach the wrong thing."""
    return any(re.search(r"(?:^|[^a-z])(left|right)(?:$|[^a-z])", name.lower()) for name in names)


def config_of(settings: Sequence[Setting], name: str) -> Config:
    """The recipe that the settings make; a later one of a path wins.

    Raises:
        InputError: it is not valid.
    """
    data: dict[str, Any] = {}
    for path, value, _ in settings:
        set_path(data, path.split("."), _listed(value))
    return check(data, {}, name)


def text_of(settings: Sequence[Setting], head: Sequence[str]) -> str:
    """The YAML: sections in the order they come, keys with comments."""
    lines = [f"# {line}".rstrip() for line in head]
    last = {setting.path: setting for setting in settings}
    sections = dict.fromkeys(path.split(".")[0] for path in last)
    for section in sections:
        lines += ["", f"{section}:"]
        for path, value, why in last.values():
            if path.split(".")[0] == section:
                lines += _line(path.split(".", 1)[1], value, why)
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, why: str) -> list[str]:
    first, _, rest = key.partition(".")
    content = {first: {rest: value} if rest else value}
    flow = yaml.safe_dump(_listed(content[first]), default_flow_style=True, width=10**6, allow_unicode=True)
    text = f"  {first}: {flow.removesuffix('...' + chr(10)).strip()}"
    if not why:
        return [text]
    if len(text) + len(why) + 4 <= _WIDTH:
        return [f"{text}  # {why}"]
    return [f"  # {why}", text]


def _listed(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, Mapping):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, tuple | list) else value


def _plain(stages: Sequence[tuple[int, ...]]) -> tuple[int | tuple[int, ...], ...]:
    """One number where all axes have it."""
    return tuple(axes[0] if len(set(axes)) == 1 else axes for axes in stages)


def _times(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
