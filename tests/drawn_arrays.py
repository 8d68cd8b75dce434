"""Arrays for the tests of image formats, and how hypothesis draws them."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck
from hypothesis import strategies as st

RNG = np.random.default_rng(0)
COMMON = {"max_examples": 40, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
SHAPES = st.lists(st.integers(1, 20), min_size=2, max_size=3).map(tuple)


def scan(shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    return RNG.integers(0, 100, shape).astype(dtype)


def last(values: np.ndarray) -> np.ndarray:
    """Channels behind, as image libraries have them; none where there is one."""
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
