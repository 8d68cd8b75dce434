"""Where the voxels of an augmented patch come from: rotation, scaling, shear, shift, crop and bending as one map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from densepred.augment.axes import along_axes
from densepred.augment.draws import Numbers
from densepred.config.transforms import (
    Crop,
    Dummy2d,
    Elastic,
    Flip,
    QuarterTurns,
    Rotation,
    Scaling,
    Shear,
    Shift,
    Transform,
)


@dataclass
class Move:
    """The geometry of one sample: turns by 90 degrees, then mirroring, then a smooth map."""

    dims: int
    quarters: int = 0
    flips: tuple[int, ...] = ()
    matrix: Tensor = field(default_factory=lambda: torch.empty(0))
    """(dims, dims), world units about the patch's centre, output to input."""
    shift: Tensor = field(default_factory=lambda: torch.empty(0))
    """(dims,), voxels."""
    nodes: Tensor | None = None
    """Moves of B-spline nodes (dims, *nodes) in voxels, made before the map."""
    apart: tuple[float, ...] = ()
    """Voxels between nodes along each axis."""
    warped: bool = False
    """Whether anything but flips and quarter turns happens."""

    def __post_init__(self) -> None:
        self.matrix = torch.eye(self.dims, dtype=torch.float64)
        self.shift = torch.zeros(self.dims, dtype=torch.float64)

    def voxels(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Matrix (dims, dims) and offset (dims,) from output to input positions in voxels, mirroring included."""
        step = torch.tensor(spacing, dtype=torch.float64)
        size = torch.tensor(shape, dtype=torch.float64)
        sign = torch.tensor([-1.0 if a in self.flips else 1.0 for a in range(self.dims)], dtype=torch.float64)
        matrix = self.matrix * step.unsqueeze(0) / step.unsqueeze(1)
        centre = (size - 1) / 2
        offset = centre - matrix @ centre + self.shift
        return sign.unsqueeze(1) * matrix, torch.where(sign < 0, size - 1 - offset, offset)

    def bend(self, matrix: Tensor, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """What bending adds to the positions, (dims, *shape): the nodes' moves through `matrix`, that of `voxels`."""
        if self.nodes is None:
            return None
        bases = [bspline(size, apart, device) for size, apart in zip(shape, self.apart, strict=True)]
        moves = torch.tensordot(matrix, self.nodes, dims=1)
        return along_axes(moves.float().to(device, non_blocking=True), bases)


def draw_move(transforms: Iterable[tuple[Transform, Numbers]], shape: Sequence[int], spacing: Sequence[float]) -> Move:
    """The geometry of one sample.

    Args:
        transforms: those of geometry with their numbers; others are passed over.
        shape: of the patch.
        spacing: of its voxels.
    """
    dims = len(shape)
    chosen = list(transforms)
    thin = dims == 3 and any(in_planes(t, shape) for t, _ in chosen)
    free = [axis for axis in range(dims) if axis or not thin]
    move = Move(dims)
    for settings, numbers in chosen:
        if isinstance(settings, Flip):
            fired = [numbers.fires(settings.probability) for _ in range(dims)]
            move.flips = tuple(a for a in range(dims) if a in settings.axes and fired[a])
        elif isinstance(settings, QuarterTurns):
            move.quarters = _quarters(settings, numbers, shape, spacing)
        elif isinstance(settings, Elastic):
            _bend(move, settings, numbers, free, shape, spacing)
        elif isinstance(settings, Rotation | Scaling | Shear | Shift | Crop):
            _affine(move, settings, numbers, free, shape, spacing)
    return move


def in_planes(settings: Transform, shape: Sequence[int]) -> bool:
    """Whether a patch is so thin that `dummy_2d` keeps to its planes."""
    return isinstance(settings, Dummy2d) and len(shape) == 3 and max(shape) / shape[0] > settings.ratio


def _quarters(settings: QuarterTurns, numbers: Numbers, shape: Sequence[int], spacing: Sequence[float]) -> int:
    fires, turns = numbers.fires(settings.probability), 1 + int(numbers.uniform() * 3)
    alike = shape[-1] == shape[-2] and math.isclose(spacing[-1], spacing[-2], rel_tol=1e-3)
    return (turns if alike else 2) if fires else 0


def _affine(
    move: Move,
    settings: Rotation | Scaling | Shear | Shift | Crop,
    numbers: Numbers,
    free: Sequence[int],
    shape: Sequence[int],
    spacing: Sequence[float],
) -> None:
    """Let one transform into the map; it acts on the image after those before it."""
    dims = move.dims
    fires = numbers.fires(settings.probability)
    inverse = torch.eye(dims, dtype=torch.float64)
    shift = torch.zeros(dims, dtype=torch.float64)
    if isinstance(settings, Rotation):
        limits = _auto(shape, free) if settings.range == "auto" else settings.range
        angles = [math.radians(numbers.between(limits)) for _ in range(3)]
        about = [0] if len(free) < dims else settings.axes
        inverse = rotation([a if dims == 2 or k in about else 0.0 for k, a in enumerate(angles)], dims)
    elif isinstance(settings, Scaling):
        one, own = numbers.around_one(settings.range), [numbers.around_one(settings.range) for _ in range(dims)]
        inverse = torch.diag(_at(free, [1 / (own[a] if settings.per_axis else one) for a in range(dims)], 1.0))
    elif isinstance(settings, Shear):
        for a in range(dims):
            for b in range(a + 1, dims):
                angle = numbers.between(settings.range)
                inverse[a, b] = math.tan(math.radians(angle)) if a in free else 0.0
    elif isinstance(settings, Shift):
        shift = torch.tensor([-numbers.between(settings.range) * size for size in shape], dtype=torch.float64)
    else:
        part = numbers.between(settings.range)
        inverse *= part
        places = [numbers.uniform() - 0.5 for _ in range(dims)]
        shift = torch.tensor([p * (1 - part) * s for p, s in zip(places, shape, strict=True)], dtype=torch.float64)
    if fires:
        step = torch.tensor(spacing, dtype=torch.float64)
        move.shift = move.shift + (move.matrix * step / step.unsqueeze(1)) @ shift  # shifts are in voxels
        move.matrix = move.matrix @ inverse
        move.warped = True


def _at(free: Sequence[int], values: Sequence[float], otherwise: float) -> Tensor:
    return torch.tensor([v if a in free else otherwise for a, v in enumerate(values)], dtype=torch.float64)


def _auto(shape: Sequence[int], free: Sequence[int]) -> tuple[float, float]:
    """nnU-Net's range of angles."""
    long = len(shape) == 2 and max(shape) / min(shape) > 1.5
    angle = 15.0 if long else 180.0 if len(free) < 3 else 30.0
    return -angle, angle


def rotation(angles: Sequence[float], dims: int) -> Tensor:
    """The rotation matrix (dims, dims) for angles in radians: in 2D the first, in 3D about the axes 0, 1, 2 in turn."""
    matrix = torch.eye(dims, dtype=torch.float64)
    planes = [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)]
    for (a, b), angle in zip(planes, angles, strict=False):
        turn = torch.eye(dims, dtype=torch.float64)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _bend(
    move: Move,
    settings: Elastic,
    numbers: Numbers,
    free: Sequence[int],
    shape: Sequence[int],
    spacing: Sequence[float],
) -> None:
    fires, strength, seed = numbers.fires(settings.probability), numbers.between(settings.range), numbers.seed()
    if not fires:
        return
    finest = min(spacing)
    apart = [max(2.0, settings.nodes * finest / step) for step in spacing]
    counts = [_nodes(size, gap) for size, gap in zip(shape, apart, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    moves = torch.rand((move.dims, *counts), generator=generator, dtype=torch.float64) * 2 - 1
    far = _at(free, [strength * gap for gap in apart], 0.0)
    move.nodes, move.apart, move.warped = moves * far.view(-1, *[1] * move.dims), tuple(apart), True


def _nodes(size: int, apart: float) -> int:
    return math.floor((size - 1) / apart) + 4


def bspline(size: int, apart: float, device: torch.device | None = None) -> Tensor:
    """The matrix (size, nodes) from values at nodes, `apart` voxels from each other, to a cubic B-spline at voxels.

    Node 1 lies at voxel 0. With moves up to 0.4 of `apart` the map never folds (Choi and Lee 2000,
    doi:10.1006/gmod.1999.0521; Rueckert et al. 2006, doi:10.1007/11866763_86).
    """
    at = torch.arange(size, device=device, dtype=torch.float64) / apart
    away = (at.unsqueeze(1) + 1 - torch.arange(_nodes(size, apart), device=device)).abs()
    near = 2 / 3 - away**2 + away**3 / 2
    far = (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, near, far).float()
