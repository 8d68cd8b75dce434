"""Voxels of held-out cases with their logits, drawn as the predictions stream by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from densepred.cases.case import Case
from densepred.cases.labels import map_labels
from densepred.crossval.calibration import DOUBT, Sample
from densepred.crossval.held_out import TRIALS, Setup
from densepred.errors import StoppedError
from densepred.files import atomic_path, writable_folder
from densepred.inference.predictor import Predictor, load
from densepred.inference.reduce import probabilities
from densepred.progress import progress
from densepred.signals import StopSignals

PER_CASE, PER_FOLD = 2000, 20
"""Voxels of each kind of a case, and cases of a fold."""


class Drawn:
    """The voxels with the smallest keys, which are a random sample; memory does not depend on how many there are.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self._keys, self._parts = [np.empty(0)], list[tuple[NDArray[np.float32], NDArray[np.int64]]]()

    def add(self, keys: NDArray[np.float64], logits: NDArray[np.float32], truth: NDArray[np.int64]) -> None:
        """Voxels `(n,)`, with logits `(K, n)`."""
        self.seen += len(keys)
        self._keys.append(keys)
        self._parts.append((logits.T, truth))
        self._reduce()

    def _reduce(self) -> None:
        keys = np.concatenate(self._keys)
        best = np.argsort(keys, kind="stable")[: self.size]
        best.sort()
        logits, truth = (np.concatenate(parts)[best] for parts in zip(*self._parts, strict=True))
        self._keys, self._parts = [keys[best]], [(logits, truth)]

    @property
    def voxels(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits `(n, K)` and truth `(n,)`, in the order of the image."""
        return self._parts[0] if self._parts else (np.empty((0, 0), np.float32), np.empty(0, np.int64))


def sample_case(predictor: Predictor, case: Case, seed: int = 0) -> Sample | None:
    """Up to `PER_CASE` voxels in which foreground is possible to the model, and as many of the others.

    Which ones follows from the seed, the case and the plane, not from how the image is cut into slabs. The image is
    predicted once; only its label is held.

    Returns:
        None if no voxel has a truth.
    """
    assert case.label is not None
    plan, drawn = predictor.plan, (Drawn(PER_CASE), Drawn(PER_CASE))
    name = int(hashlib.sha256(case.id.encode()).hexdigest()[:15], 16)
    with plan.reading.open_plane(case.label) as volume:
        label = map_labels(volume.numpy()[0], plan, case)
    with plan.reading.open_case(case) as volume, closing(predictor.stream(volume)) as stream:  # type: ignore[type-var]
        for part in stream:
            logits, truth = part.logits.cpu().numpy(), label[part.start : part.stop].astype(np.int64)
            known = truth >= 0 if part.invalid is None else (truth >= 0) & ~part.invalid
            contested = probabilities(part.logits)[0].cpu().numpy() < 1 - DOUBT
            draws = [
                np.random.default_rng([seed, name, z]).random(truth.shape[1:]) for z in range(part.start, part.stop)
            ]
            keys = np.stack(draws)
            for chosen, into in zip((known & contested, known & ~contested), drawn, strict=True):
                if chosen.any():
                    into.add(keys[chosen], logits[:, chosen], truth[chosen])
    seen = sum(one.seen for one in drawn)
    if not seen:
        return None
    parts = [(one, *one.voxels) for one in drawn if one.seen]
    weights = [np.full(len(truth), one.seen / seen / len(truth)) for one, _, truth in parts]
    doubted = [np.full(len(truth), one is drawn[0]) for one, _, truth in parts]
    joined = (np.concatenate([logits for _, logits, _ in parts]), np.concatenate([truth for *_, truth in parts]))
    return Sample(case.id, *joined, np.concatenate(weights), np.concatenate(doubted))


def sample_held_out(setup: Setup, settings: Sequence[str]) -> list[Sample]:
    """Samples of up to `PER_FOLD` cases of each fold, by the model that did not see them; kept in `trials/samples`.

    Args:
        setup: models and cases.
        settings: `inference.key=value` texts, as for the predictions that are to be made with the temperature.

    Raises:
        StoppedError: a signal; the samples that are there stay.
    """
    folder = writable_folder(setup.out / TRIALS / "samples")
    chosen = {one.fold: _spread(sorted(one.cases)) for one in setup.done}
    samples: list[Sample] = []
    with StopSignals() as stop, progress(sum(map(len, chosen.values())), "sampling logits") as advance:
        for one in setup.done:
            overrides = [*setup.plain, *settings]
            predictor = load(setup.runs(one), overrides, device=setup.engine.device)
            made = f"{predictor.weights_hash}:{predictor.config_hash}"
            for case in chosen[one.fold]:
                if stop.signal is not None:
                    raise StoppedError(
                        "stopped by a signal while logits were sampled", stop.exit_code, "run the same command again"
                    )
                path = folder / f"{case}.safetensors"
                sample = _read(path, case, made)
                if sample is None and (sample := sample_case(predictor, setup.cases[case])) is not None:
                    _write(path, sample, made)
                samples += [] if sample is None else [sample]
                advance(1)
    return samples


def _spread(cases: Sequence[str]) -> list[str]:
    """At most `PER_FOLD`, in their order; as good as drawn, for every second id may be of the left side."""
    kept = set(sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())[:PER_FOLD])
    return [case for case in cases if case in kept]


def _write(path: Path, sample: Sample, made: str) -> None:
    arrays = {"logits": sample.logits, "truth": sample.truth, "weight": sample.weight, "contested": sample.contested}
    with atomic_path(path) as part:
        safetensors.numpy.save_file(
            {key: np.ascontiguousarray(value) for key, value in arrays.items()}, part, {"made": made}
        )


def _read(path: Path, case: str, made: str) -> Sample | None:
    """A sample that these models gave with these settings; None if there is none."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("made") != made:
                return None
            return Sample(case, *(file.get_tensor(key) for key in ("logits", "truth", "weight", "contested")))
    except (OSError, SafetensorError):
        return None
