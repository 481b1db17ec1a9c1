"""A row of the table that `make bench` prints: what is measured, what it ought to be, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    work: str
    goal: float
    sense: Literal[">=", "<="]
    measure: Callable[[], tuple[float, str]]
    """The figure, and what it comes from."""

    def holds(self, figure: float) -> bool:
        return figure >= self.goal if self.sense == ">=" else figure <= self.goal
