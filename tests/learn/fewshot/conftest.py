from __future__ import annotations

import numpy as np
import pytest

from palimpsest.data.tasks import Examples


@pytest.fixture(scope="session")
def features() -> Examples:
    """Twelve classes of ten rows each, in eight dimensions, well apart."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 10)
    x = (rng.normal(size=(12, 8)) * 2)[y] + rng.normal(size=(120, 8))
    return Examples(x.astype(np.float32), y, tuple(f"class {label}" for label in range(12)))


@pytest.fixture(scope="session")
def images() -> Examples:
    """Eight classes of ten 8x8 pictures: a bright square at a place of each class's own, and noise."""
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(8), 10)
    x = rng.integers(0, 120, size=(80, 1, 8, 8)).astype(np.uint8)
    for row, label in enumerate(y):
        down, right = divmod(int(label), 4)
        x[row, 0, 4 * down : 4 * down + 3, 2 * right : 2 * right + 2] = 255
    return Examples(x, y, tuple(f"class {label}" for label in range(8)))
