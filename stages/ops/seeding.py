"""Seeded global generators for trainers that draw from them, and their former states afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[int]:
    """Seeds Python's, NumPy's and torch's generators inside the block; yields the 32 bits they were seeded with."""
    python, numpy_state = random.getstate(), np.random.get_state()
    seed = seed % 2**32
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield seed
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
