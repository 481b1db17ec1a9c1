"""What an update measures of its tokens and steps, and the `PPOMetrics` that come of it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from schemas.metrics import PPOMetrics
from stages.ops import ranks
from stages.ops.kl import kl_estimate


class Tally:
    """Keeps the columns of all micro-batches and averages them at the end, so that no step waits for its metrics."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = defaultdict(list)  # (m,) of each micro-batch
        self._norms: dict[str, list[float]] = defaultdict(list)  # of each step
        self._ends: list[int] = [0]  # micro-batches of the policy after each step

    def add(self, **columns: Tensor | None) -> None:
        """Of one micro-batch: (m,) each; None is not counted. `log_ratio` is what KL and extreme ratios come of."""
        for name, column in columns.items():
            if column is not None:
                self._columns[name].append(column.detach())

    def end_step(self, norms: dict[str, float]) -> None:
        """A step is over, with these gradient norms."""
        for network, norm in norms.items():
            self._norms[f"grad_norm_{network}"].append(norm)
        self._ends.append(len(self._columns["log_ratio"]))

    def approx_kl(self) -> float:
        """Of the last step's minibatch, before the step, nats a token; 0 where the policy was not run."""
        last = ranks.joined_columns({"log_ratio": self._columns["log_ratio"][self._ends[-2] :]})
        return _mean(kl_estimate(last["log_ratio"], "k3")) if last else 0.0

    def metrics(self, learning_rate_factor: float, importance: dict[str, float]) -> PPOMetrics:
        """`importance`: what was measured of the importance weights before the first step."""
        columns, policy = ranks.joined_columns(self._columns), {}
        if "log_ratio" in columns:
            policy = _of_ratio(columns.pop("log_ratio")) | {"approx_kl_final": self.approx_kl()}
        return PPOMetrics(
            **{name: _mean(column) for name, column in columns.items()}, **policy, **importance,
            **{name: float(np.mean(values)) for name, values in self._norms.items()}, steps=len(self._ends) - 1,
            learning_rate_factor=learning_rate_factor)


def _of_ratio(log_ratio: Tensor) -> dict[str, float]:
    low, high = log_ratio.aminmax()
    return {"approx_kl": _mean(kl_estimate(log_ratio, "k3")), "approx_kl_k1": _mean(kl_estimate(log_ratio, "k1")),
            "ratio_min": float(low.exp()), "ratio_max": float(high.exp())}


def _mean(column: Tensor) -> float:
    return float(column.mean(dtype=torch.float64))
