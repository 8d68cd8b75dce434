"""What one case holds: its grid, intensities, classes and their pieces. The image is read once, slab by slab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy import ndimage

from densepred.cases.case import Case
from densepred.cases.labels import LabelCounts, map_labels, unknown_labels
from densepred.cases.plan import Plan, index_classes
from densepred.cases.preprocess import grid_fault, slab_thickness
from densepred.cases.reading import Reading
from densepred.config import Section
from densepred.config.normalize import NoNormalization
from densepred.errors import DensepredError, InputError
from densepred.planning.sketch import Gathering, Sketch, merged
from densepred.volumes import Volume


class ClassFacts(Section):
    """One class in one case."""

    voxels: int
    """How many it has."""
    pieces: int = 0
    """Connected components; neighbours by faces, edges and corners are connected."""
    largest: int = 0
    """Voxels of the largest of them."""
    typical: float = 0.0
    """Median of their voxels."""


class CaseFacts(Section):
    """One case."""

    id: str
    """Its id."""
    channels: int
    """Of the image."""
    shape: tuple[int, ...] = Field(strict=False)
    """Voxels along each axis, slowest first."""
    cropped: tuple[int, ...] = Field(strict=False)
    """The same of the box outside which all channels are 0 (or invalid) everywhere."""
    spacing: tuple[float, ...] = Field(strict=False)
    """Of the voxels."""
    valid: tuple[Sketch, ...] = Field(strict=False)
    """For each channel the intensities of its finite voxels."""
    foreground: tuple[Sketch, ...] = Field(strict=False)
    """For each channel those in voxels of a class other than the background."""
    classes: dict[str, ClassFacts]
    """By name, or by label value where nobody names them; the background is the first."""

    @property
    def relative_size(self) -> float:
        """Share of the voxels that is left after cropping."""
        return float(np.prod(self.cropped, dtype=float) / np.prod(self.shape, dtype=float))


@dataclass(frozen=True)
class Measuring:
    """How cases are measured.

    Args:
        reading: how their files become images.
        names: label value -> class; empty where nobody names them, so that each value is a class and 0 the background.
        ignore: label values without a truth.
        instances: whether labels number objects, all of the one class.
    """

    reading: Reading
    names: Mapping[int, str]
    ignore: tuple[int, ...] = ()
    instances: bool = False

    def case(self, case: Case) -> CaseFacts:
        """Read a case to its end.

        Raises:
            DensepredError: what is wrong with it; it names the case.
        """
        try:
            with self.reading.open_case(case) as image:
                label, names = self._label(case, image)
                return self._measured(case, image, label, names)
        except DensepredError as error:
            raise error.of_case(case.id) from error

    def _label(self, case: Case, image: Volume) -> tuple[np.ndarray, tuple[str, ...]]:
        """Class indices `(*spatial)`, -1 where there is no truth; and the names of the classes."""
        if case.label is None:
            raise InputError("no label", "add the label or leave the case out", case.images[0])
        with self.reading.open_plane(case.label) as volume:
            fault = grid_fault(image, volume)
            if fault is not None:
                raise InputError(*fault, case.label)
            values = volume.numpy()[0]
        names = self.names or _values(values, case)
        classes, first, label_map = index_classes(names)
        plan = Plan(
            dims=2 if image.dims == 2 else 3,
            channels=("image",),
            classes=classes,
            values=first,
            label_map=label_map,
            ignore=self.ignore,
            instances=self.instances,
            normalize=(NoNormalization(),),
        )
        return map_labels(values, plan, case), classes

    def _measured(self, case: Case, image: Volume, label: np.ndarray, names: tuple[str, ...]) -> CaseFacts:
        channels, spatial = image.shape[0], image.shape[1:]
        gathered = [[Gathering(label.size) for _ in range(channels)] for _ in range(2)]  # outside, and in a class
        seen = [np.zeros(length, bool) for length in spatial]
        for start, stop, slab in image.slabs(slab_thickness(image.shape)):
            inside, finite = label[start:stop] > 0, np.isfinite(slab)
            for channel in range(channels):
                for which, where in zip(gathered, (~inside, inside), strict=True):
                    which[channel].add(slab[channel][where & finite[channel]])
            shown = ((slab != 0) & finite).any(0)
            seen[0][start:stop] = shown.any(tuple(range(1, shown.ndim)))
            for axis in range(1, shown.ndim):
                seen[axis] |= shown.any(tuple(other for other in range(shown.ndim) if other != axis))
        outside, foreground = ([one.sketch() for one in which] for which in gathered)
        extent = [np.flatnonzero(along) for along in seen]
        whole = all(len(along) for along in extent)
        return CaseFacts(
            id=case.id,
            channels=channels,
            shape=spatial,
            cropped=tuple(int(along[-1] - along[0]) + 1 for along in extent) if whole else spatial,
            spacing=image.spacing,
            valid=tuple(merged(pair) for pair in zip(outside, foreground, strict=True)),
            foreground=tuple(foreground),
            classes=_classes(label, names),
        )


def _values(label: np.ndarray, case: Case) -> dict[int, str]:
    """The values in a label as classes of their own, 0 first; at least two of them.

    Raises:
        InputError: numbers that are no integers.
    """
    counts = LabelCounts()
    counts.add(label)
    if counts.odd:
        raise unknown_labels(counts, (), {}, case)
    found = {0, *counts.values}
    return {
        value: str(value)
        for value in sorted(found if len(found) > 1 else {0, 1}, key=lambda value: (value != 0, value))
    }


def _classes(label: np.ndarray, names: tuple[str, ...]) -> dict[str, ClassFacts]:
    boxes = ndimage.find_objects(np.maximum(label, 0), len(names) - 1)
    counts = np.bincount(label[label >= 0].astype(np.int64), minlength=len(names))
    found = {names[0]: ClassFacts(voxels=int(counts[0]))}
    for index, box in enumerate(boxes, 1):
        facts = ClassFacts(voxels=int(counts[index]))
        if box is not None:
            pieces, number = ndimage.label(label[box] == index, np.ones((3,) * label.ndim))
            sizes = np.bincount(pieces.reshape(-1))[1:]
            facts = ClassFacts(
                voxels=facts.voxels, pieces=number, largest=int(sizes.max()), typical=float(np.median(sizes))
            )
        found[names[index]] = facts
    return found
