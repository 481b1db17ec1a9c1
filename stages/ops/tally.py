"""Sums over the tokens and steps of an update, of which `PPOMetrics` are the means."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from schemas.metrics import PPOMetrics


class Tally:
    """Each metric is divided by the tokens it was summed over. Sums stay tensors until the end, so that no step waits."""

    def __init__(self) -> None:
        self._sums: list[tuple[tuple[str, ...], Tensor, int]] = []  # names, (names,) float64, tokens: a micro-batch each
        self._log_ratios: list[Tensor] = []  # (2,) least and greatest of a micro-batch
        self._norms: dict[str, list[float]] = defaultdict(list)
        self._ends: list[int] = [0]  # micro-batches after each step

    def add(self, **columns: Tensor | None) -> None:
        """Of one micro-batch: (m,) each; None is not counted."""
        there = {name: column for name, column in columns.items() if column is not None}
        if there:
            stacked = torch.stack([column.detach().float() for column in there.values()])
            self._sums.append((tuple(there), stacked.sum(1, dtype=torch.float64), stacked.shape[1]))

    def ratio(self, log_ratio: Tensor) -> None:
        """Extremes of a micro-batch's log-ratios: (m,)."""
        self._log_ratios.append(torch.stack(log_ratio.aminmax()))

    def end_step(self, norms: dict[str, float]) -> None:
        """A step is over, with these gradient norms."""
        for network, norm in norms.items():
            self._norms[f"grad_norm_{network}"].append(norm)
        self._ends.append(len(self._sums))

    def approx_kl(self) -> float:
        """Of the last step's minibatch, before the step, nats a token; 0 where the policy was not run."""
        return self._means(self._sums[self._ends[-2] :]).get("approx_kl", 0.0)

    def metrics(self, learning_rate_factor: float, importance: dict[str, float]) -> PPOMetrics:
        """`importance`: what was measured of the importance weights before the first step."""
        means = self._means(self._sums)
        norms = {name: float(np.mean(values)) for name, values in self._norms.items()}
        last = {"approx_kl_final": self.approx_kl()} if "approx_kl" in means else {}
        extremes = {}
        if self._log_ratios:
            low, high = torch.stack(self._log_ratios).T
            extremes = {"ratio_min": float(low.min().exp()), "ratio_max": float(high.max().exp())}
        return PPOMetrics(**means, **norms, **last, **extremes, **importance, steps=len(self._ends) - 1,
                          learning_rate_factor=learning_rate_factor)

    @staticmethod
    def _means(sums: list[tuple[tuple[str, ...], Tensor, int]]) -> dict[str, float]:
        """Mean over tokens, by name; what was summed over none is left out."""
        groups: dict[tuple[str, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        for names, totals, tokens in sums:
            groups[names].append((totals, tokens))
        means: dict[str, float] = {}
        for names, parts in groups.items():
            tokens = sum(count for _, count in parts)
            if tokens:
                totals = torch.stack([total for total, _ in parts]).sum(0) / tokens
                means |= dict(zip(names, totals.tolist(), strict=True))
        return means
