"""Sums over the tokens and steps of an update, of which `PPOMetrics` are the means."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from schemas.metrics import PPOMetrics


class Tally:
    """Each metric is divided by the tokens it was summed over; texts mixed in have their own."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.norms: dict[str, list[float]] = defaultdict(list)
        self.of_steps: list[float] = []  # approximate KL of each step
        self._ended: tuple[float, int] = (0.0, 0)  # its sum and tokens when the last step was over
        self.extremes: dict[str, float] = {}

    def add(self, **columns: Tensor | None) -> None:
        """Of one micro-batch: (n,) each; None is not counted."""
        for name, column in columns.items():
            if column is not None:
                self.sums[name] += float(column.sum(dtype=torch.float64))
                self.tokens[name] += len(column)

    def ratio(self, ratio: Tensor) -> None:
        """Extremes of a micro-batch's ratios: (n,)."""
        low, high = float(ratio.min()), float(ratio.max())
        self.extremes = {"ratio_min": min(self.extremes.get("ratio_min", np.inf), low),
                         "ratio_max": max(self.extremes.get("ratio_max", -np.inf), high)}

    def end_step(self, norms: dict[str, float]) -> float:
        """A step is over, with these gradient norms; its approximate KL, nats a token, 0 where the policy was not run."""
        for network, norm in norms.items():
            self.norms[f"grad_norm_{network}"].append(norm)
        before, self._ended = self._ended, (self.sums["approx_kl"], self.tokens["approx_kl"])
        tokens = self._ended[1] - before[1]
        self.of_steps.append((self._ended[0] - before[0]) / tokens if tokens else 0.0)
        return self.of_steps[-1]

    def metrics(self, learning_rate_factor: float, importance: dict[str, float]) -> PPOMetrics:
        """`importance`: what was measured of the importance weights before the first step."""
        means = {name: total / self.tokens[name] for name, total in self.sums.items() if self.tokens[name]}
        norms = {name: float(np.mean(values)) for name, values in self.norms.items()}
        last = {"approx_kl_final": self.of_steps[-1]} if "approx_kl" in means else {}
        return PPOMetrics(**means, **norms, **last, **self.extremes, **importance, steps=len(self.of_steps),
                          learning_rate_factor=learning_rate_factor)
