"""How good a prediction is, in numbers.

All counts are integers and all sums are of float64; whatever a metric needs of a case adds up (`+`) over slabs, cases
and sets, where this is possible at all. Voxels that are not known (a label of -1, NaN, or `known` false) count nowhere.
A metric that has no value, such as a distance to an object that is not there, is nan, and nan is left out of means.

Arrays only: nothing here knows files, and nothing torch.
"""

from __future__ import annotations

from densepred.metrics.calibration import Calibration
from densepred.metrics.curves import Ranking
from densepred.metrics.instances import Panoptic, components, panoptic
from densepred.metrics.maps import MapErrors
from densepred.metrics.overlap import METRICS, confusion, dice, iou, precision, recall
from densepred.metrics.spectra import Spectra
from densepred.metrics.surface import SurfaceDistances, surface_distances

__all__ = [
    "METRICS",
    "Calibration",
    "MapErrors",
    "Panoptic",
    "Ranking",
    "Spectra",
    "SurfaceDistances",
    "components",
    "confusion",
    "dice",
    "iou",
    "panoptic",
    "precision",
    "recall",
    "surface_distances",
]
