"""What `densepred plan` shows: the data, the choice, the cost; rows of a name and a text."""

from __future__ import annotations

from collections.abc import Sequence

from densepred.config import Config
from densepred.planning.cost import Cost
from densepred.planning.fingerprint import Fingerprint
from densepred.planning.nnunet import Configuration
from densepred.progress import clock


def of_fingerprint(fingerprint: Fingerprint) -> list[list[str]]:
    """The set in a few lines."""
    faults = sum(problem.severity == "error" for problem in fingerprint.faults)
    cropped = "" if fingerprint.relative_size > 0.99 else f"; {fingerprint.relative_size:.0%} left after cropping"
    rows = [
        ["cases", f"{len(fingerprint.cases)}" + (f", and {faults} faults (below)" if faults else "")],
        ["median shape", f"{_times(fingerprint.median('shape'))}{cropped}"],
        ["median spacing", _times(fingerprint.median("spacing"))],
    ]
    for name, valid, inside in zip(
        fingerprint.channels, fingerprint.intensities("valid"), fingerprint.intensities("foreground"), strict=True
    ):
        text = (
            f"{valid.mean:.4g} ± {valid.std:.3g}, 0.5 to 99.5 %: {_range(valid.quantile(0.005), valid.quantile(0.995))}"
        )
        if inside.count:
            text += f"; in classes {inside.mean:.4g} ± {inside.std:.3g}"
        rows.append([f"channel {name}" if not name.startswith("channel") else name, text])
    for name in fingerprint.names[1:]:
        facts = fingerprint.class_facts(name)
        text = f"in {facts['cases']} cases, {facts['share']:.2%} of all voxels"
        if "components" in facts:
            pieces = facts["components"]
            text += f", {pieces:g} piece{'' if pieces == 1 else 's'} a case, of {facts['component_voxels']:g} voxels"
        rows.append([f"class {name}", text])
    return rows


def of_choice(one: Configuration, config: Config) -> list[list[str]]:
    """The configuration."""
    spacing = "as the files" if config.data.spacing is None else _times(one.spacing)
    return [
        ["configuration", one.name],
        ["spacing", spacing],
        ["patch", f"{_times(one.net.patch)}, {one.batch} a step; a patch holds {min(one.covers, 1):.0%} of an image"],
        ["network", f"{one.net.stages} stages of {', '.join(map(str, one.channels))} feature maps"],
        ["training", f"{config.training.epochs} epochs of {config.training.steps} steps"],
    ]


def of_cost(cost: Cost, config: Config) -> list[list[str]]:
    """What it takes here."""
    how = "measured" if cost.scaled == 1 else f"{cost.scaled:.1f} times that of a smaller step that was measured"
    apart = config.training.validate_every
    every = "epoch" if apart == 1 else f"{apart} epochs"
    return [
        ["memory", f"{cost.memory / 1e9:.1f} GB ({cost.device})"],
        ["disk", f"{cost.disk / 1e9:.2f} GB of prepared cases, made in {clock(cost.prepare)}"],
        ["a step", f"{cost.step:.3g} s, {how}"],
        ["an epoch", clock(cost.epoch(config))],
        ["a validation", f"{clock(cost.validation)}, after each {every}"],
        ["all", clock(cost.total(config))],
    ]


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _range(low: float, high: float) -> str:
    return f"{low:.4g} to {high:.4g}"
