"""What prediction should do with the folds, each decided by what it gains on held-out cases.

A step is taken where it makes the mean score better by more than noise: the 95 % interval of the paired difference,
over the same cases, lies above 0. The score is the Dice of label maps, and of others what `judged` says. As every
decision is made on the cases that it is measured on, its gain is a little optimistic; what is left of it where each
fold is decided on by the others is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densepred.crossval.calibration import Sample, fit_temperature, loss, reliability
from densepred.crossval.held_out import TRIALS, HeldOut, Setup, scored
from densepred.crossval.judged import Metric
from densepred.files import atomic_write, writable_folder
from densepred.inference.components import ALL, KeepLargest
from densepred.inference.folds import SETTINGS
from densepred.inference.records import LABELS
from densepred.metrics.bootstrap import Interval, gain, informative, means
from densepred.volumes import Record, open_writer

MIRROR, KEEP, TEMPERATURE = SETTINGS
FEWEST = 5
"""Groups of cases below which a difference proves nothing."""
Floats = NDArray[np.float64]
Rule = Callable[[Floats, Floats, Sequence[str]], tuple[bool, Interval]]


@dataclass
class Decision:
    """One thing that was tried.

    Args:
        what: its name.
        used: whether prediction does it.
        why: a sentence with the numbers.
        numbers: what was measured.
    """

    what: str
    used: bool
    why: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Paired:
    """Scores `(n, K)` of the same cases before and after a step, turned so that more is better."""

    metric: Metric
    cases: list[str]
    before: Floats
    after: Floats

    @classmethod
    def of(cls, before: HeldOut, after: HeldOut) -> Paired:
        """The cases that have both."""
        ours, theirs = before.judged, after.judged
        places = [{case: row for row, case in enumerate(one.cases)} for one in (ours, theirs)]
        cases = [case for case in ours.cases if case in places[1]]
        first, second = (
            one.better[[at[case] for case in cases]] for one, at in zip((ours, theirs), places, strict=True)
        )
        return cls(ours.metric, cases, first, second)


def decide(what: str, pair: Paired, setup: Setup, rule: Rule) -> Decision:
    """Apply a rule to all folds, and to each fold what it says of the others."""
    groups, folds = setup.groups(pair.cases), np.array([setup.fold_of[case] for case in pair.cases])
    used, found = rule(pair.before, pair.after, groups)
    nested = pair.before.copy()
    for fold in np.unique(folds):
        apart = folds != fold
        kept = [group for group, other in zip(groups, apart, strict=True) if other]
        if apart.any() and rule(pair.before[apart], pair.after[apart], kept)[0]:
            nested[~apart] = pair.after[~apart]
    every = np.ones((1, len(nested)))
    left = float((means(nested, every) - means(pair.before, every))[0])
    change = pair.metric.change(found)
    others = f"{pair.metric.sign * left + 0.0:+{pair.metric.form}}"
    verdict = "used" if used else "not used"
    telling = informative(pair.before + pair.after, groups)
    few = f", too few of them ({telling} groups) to tell" if telling < FEWEST else ""
    why = f"{what}: {verdict}, mean {pair.metric.name} {change}{few}; decided fold by fold by the others {others}"
    return Decision(what, used, why, {"gain": found.to_dict(), "gain_by_other_folds": left})


def more_than_noise(before: Floats, after: Floats, groups: Sequence[str]) -> tuple[bool, Interval]:
    """Is the 95 % interval of the gain above 0, over enough groups?"""
    found = gain(before, after, groups)
    return found.low > 0 and informative(before + after, groups) >= FEWEST, found


def _and_no_class_loses(before: Floats, after: Floats, groups: Sequence[str]) -> tuple[bool, Interval]:
    used, found = more_than_noise(before, after, groups)
    every = np.ones((1, len(before)))
    falls = [
        (means(b[:, None], every) > means(a[:, None], every)).any() for b, a in zip(before.T, after.T, strict=True)
    ]
    return used and not any(falls), found


def decide_mirror(setup: Setup, axes: Sequence[int], plain: HeldOut, mirrored: HeldOut | None) -> Decision:
    """Test-time augmentation by mirrored views, which costs 2^axes times the time."""
    what = f"mirrored views of axes {list(axes)}"
    if not setup.kind:
        return Decision("mirrored views", False, "mirrored views: none, whole images are predicted as they are")
    if mirrored is None:
        return Decision("mirrored views", False, "mirrored views: none, the recipe names no axis (inference.mirror)")
    decision = decide(what, Paired.of(plain, mirrored), setup, more_than_noise)
    decision.numbers |= {"axes": list(axes), "views": 1 << len(axes)}
    return decision


def decide_components(setup: Setup, base: HeldOut) -> tuple[HeldOut, list[Decision], list[str]]:
    """The largest component of all classes together, then of each class.

    Returns:
        the predictions with the steps that are taken, all decisions, and what `inference.keep_largest` becomes; of
        others than label maps there is nothing to decide.

    Reference: Isensee et al. 2021, Nature Methods 18, 203 (nnU-Net), "Post-processing": it takes a step that improves
    the mean and, of all classes together, makes no class worse; here it must also be more than noise.
    """
    if setup.kind != "labels":
        return base, [], []
    classes = setup.plan.classes[1:]
    steps = [ALL, *(classes if len(classes) > 1 else ())]
    decisions: list[Decision] = []
    kept: list[str] = []
    for step in steps:
        after = only_largest(setup, base, kept, step)
        what = "largest component of " + ("all classes together" if step == ALL else step)
        if after is base:
            decisions.append(Decision(what, False, f"{what}: not used, no case has another component"))
            continue
        decision = decide(what, Paired.of(base, after), setup, _and_no_class_loses)
        decision.numbers["changed_cases"] = sum(base.files[case] != path for case, path in after.files.items())
        decisions.append(decision)
        if decision.used:
            base, kept = after, [*kept, step]
    return base, decisions, kept


def only_largest(setup: Setup, base: HeldOut, before: Sequence[str], step: str) -> HeldOut:
    """Label maps of which only the largest components stay; the files of those that change lie in `trials`."""
    names = [*before, step]
    folder = setup.out / TRIALS / ("largest-" + "-".join(_number(setup, name) for name in names) + setup.suffix)
    keep, files = KeepLargest.of(setup.plan, [step]), dict[str, Path]()
    for case, path in base.files.items():
        with setup.plan.reading.open_plane(path) as volume:
            labels = volume.numpy()[0].copy()
            files[case] = path
            if keep.apply(labels):
                files[case] = writable_folder(folder) / path.name
                record = Record(names=dict(zip(setup.plan.values, setup.plan.classes, strict=True)), quantity="label")
                with open_writer(files[case], volume, labels.dtype, labels=True, record=record) as writer:
                    writer.write(labels[np.newaxis])
    if files == base.files:
        return base
    atomic_write(folder / LABELS, (base.folder / LABELS).read_bytes())
    return HeldOut(base.folder, files, base.rows, *scored(setup, files, base.rows), base.failed)


def _number(setup: Setup, name: str) -> str:
    """Of a class, whose name need not be that of a folder."""
    return "all" if name == ALL else str(setup.plan.classes.index(name))


def decide_temperature(setup: Setup, samples: Sequence[Sample]) -> tuple[Decision, float]:
    """One number for all logits, where it makes the truth likelier: each fold by the temperature of the others.

    Returns:
        the decision, and the temperature that was fitted to all.
    """
    if len({setup.fold_of[one.case] for one in samples}) < 2:
        return Decision("temperature", False, "temperature: not used, it takes two folds to fit and to judge one"), 1.0
    cases = [one.case for one in samples]
    folds = [setup.fold_of[case] for case in cases]
    of_others = {
        fold: fit_temperature([one for one, of in zip(samples, folds, strict=True) if of != fold])
        for fold in sorted(set(folds))
    }
    before = np.array([[loss(one, 1.0)] for one in samples])
    after = np.array([[loss(one, of_others[fold])] for one, fold in zip(samples, folds, strict=True)])
    groups = setup.groups(cases)
    used, found = more_than_noise(-before, -after, groups)
    temperature = round(fit_temperature(samples), 4)
    scaled = [replace(one, logits=one.logits / of_others[fold]) for one, fold in zip(samples, folds, strict=True)]
    errors = {
        name: {
            "before": reliability(samples, 1.0, contested).error,
            "after": reliability(scaled, 1.0, contested).error,
        }
        for name, contested in (("all_voxels", False), ("foreground_possible", True))
    }
    fore = errors["foreground_possible"]
    why = (
        f"temperature {temperature:g}: {'used' if used else 'not used'}, log-likelihood of the truth by the "
        f"temperature of the other folds {found.signed()} nats a voxel; calibration error where foreground is "
        f"possible {fore['before']:.4f}, with theirs {fore['after']:.4f}"
    )
    numbers = {"temperature": temperature, "gain": found.to_dict(), "calibration_error": errors}
    numbers["of_other_folds"] = of_others
    return Decision("temperature", used, why, numbers), temperature
