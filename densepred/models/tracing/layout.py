"""Where the axes of the image are among the dimensions of a tensor, also while they are split, merged and permuted.

Each dimension is a product of atoms, outer first. An atom is a piece of it that goes along an axis of the image, or
along none (channels, a window's voxels). Windows of 2 of an axis of 8 are the atoms (axis, 4) and (none, 2). An axis
is in one atom only, or in none: then the tensor does not extend along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from densepred.models.tracing.steps import Step, grow, shrink

NONE = -1


class Atom(NamedTuple):
    """A piece of a dimension: the axis of the image it goes along, or NONE, and its size."""

    axis: int
    size: int


Dim = tuple[Atom, ...]
Layout = tuple[Dim, ...]
Steps = dict[int, Step]


def blank(size: int) -> Dim:
    """A dimension along no axis."""
    return (Atom(NONE, size),)


def of_image(shape: Sequence[int]) -> Layout:
    """The layout of an image (B, C, *spatial)."""
    return (blank(shape[0]), blank(shape[1]), *((Atom(axis, n),) for axis, n in enumerate(shape[2:])))


def axes(dim: Dim) -> set[int]:
    """The axes of the image that a dimension goes along."""
    return {atom.axis for atom in dim} - {NONE}


def size(dim: Dim) -> int:
    """Elements of a dimension."""
    total = 1
    for atom in dim:
        total *= atom.size
    return total


def axis_of(dim: Dim) -> int:
    """The axis that a dimension is all of; NONE if it goes along none, or is a product."""
    return dim[0].axis if len(dim) == 1 else NONE


def settle(layout: Layout) -> tuple[Layout, Steps]:
    """Make one atom of each dimension that is an axis with its voxels repeated, and say what that does along the axes.

    Example:
        >>> settle(((Atom(0, 4), Atom(NONE, 2)),))[0]
        ((Atom(axis=0, size=8),),)
    """
    dims: list[Dim] = []
    steps: Steps = {}
    for dim in layout:
        rest = [atom for atom in dim if atom.size > 1] or sorted(dim)[-1:]
        if len(rest) > 1 and rest[0].axis != NONE and not axes(tuple(rest[1:])):
            steps[rest[0].axis] = grow(size(tuple(rest[1:])))
            rest = [Atom(rest[0].axis, size(dim))]
        dims.append(tuple(rest) if axes(tuple(rest)) else blank(size(dim)))
    return tuple(dims), steps


def reshape(layout: Layout, shape: Sequence[int]) -> tuple[Layout, Steps]:
    """What a view of another shape does: atoms are dealt out to the new dimensions, and split where one ends within.

    If they cannot be, the new layout has no axes.

    Example:
        >>> reshape(((Atom(0, 8),),), (4, 2))[0]
        ((Atom(axis=0, size=4),), (Atom(axis=-1, size=2),))
    """
    atoms = [atom for dim in layout for atom in dim]
    dims: list[Dim] = []
    steps: Steps = {}
    for n in shape:
        dim = [atoms.pop(0)] if n == 1 and atoms and atoms[0].size == 1 else []
        while n > 1 and atoms:
            atom = atoms.pop(0)
            if atom.size > n:
                inner, rest = divmod(atom.size, n)
                if rest:
                    break
                if atom.axis != NONE:
                    steps[atom.axis] = shrink(inner)
                atoms.insert(0, Atom(NONE, inner))
                atom = Atom(atom.axis, n)
            elif n % atom.size:
                break
            dim.append(atom)
            n //= atom.size
        if n > 1:
            return tuple(blank(m) for m in shape), {}
        dims.append(tuple(dim) or blank(1))
    if dims:
        dims[-1] += tuple(atoms)  # of one voxel
    return tuple(dims), steps
