"""Fewer of many, where all would be too much to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def thinned(values: Sequence[T], most: int) -> Sequence[T]:
    """Every so many, the first and the last among them; all where they are no more than `most`."""
    if len(values) <= most:
        return values
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]
